// The selective scan, backward.  With a_t = exp(dt_t A), g_t = a_t h_{t-1}, gy the gradient of y and G the gradient of h:
//
//     h_t = g_t + dt_t u_t B_t       G_t = C_t gy_t + r_{t+1}       r_t = a_t G_t
//     gC_t = sum_d gy_t h_t          gB_t = sum_d G_t dt_t u_t      g(dt_t u_t) = sum_n G_t B_t      g(dt_t A) = G_t g_t
//
// A block owns CPB channels of one row and walks its steps from the last to the first in chunks of K, whose first states the forward
// saved.  A chunk is swept once to leave a state every TS steps; then, from the last TS steps to the first, a and h of TS steps are
// recomputed into registers and the adjoint runs over them.  Sums over the states of a channel (LN lanes) and over the channels
// of a warp go through shared memory that only the warp touches; sums over the warps of the block are written as partial results,
// which `sum_partials` adds up in a fixed order.  Nothing is added atomically.
#include "common.cuh"

struct BackwardParams {
    const void *u, *dt, *B, *C, *z, *gout;
    const float *A, *D, *bias;
    const float *saved, *h0;  // (b, l / K, d, n): states before steps c K; the first is h0 (b, d, n), or zero
    const float* glast;       // (b, d, n): r behind each row
    const float *local, *decay;  // (cut pieces, d, n) and (cut pieces, d, 2): what a piece adds to r, and its sum of dt
    const uint8 *reset, *valid;
    void *gu, *gdt, *gz;
    float* gbc;    // (tiles_per_group, 2, b, l, g, n): gB and gC, summed over a block's channels
    float* gA;     // (pieces, d, n), times dt
    float* gskip;  // (pieces, 2, d): gD and gbias
    float* ginit;  // (b, d, n)
    void* out;     // OUTPUTS: (b, l, d) in one piece, the gated outputs, which come with the gradient of the gate
    int64 u_b, u_l, dt_b, dt_l, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, gout_b, gout_l, gu_b, gu_l, gdt_b, gdt_l, gz_b, gz_l;
    Walk walk;
    LengthCut cut;
    int l, batch, d, n, groups, tiles_per_group, softplus;
};

template <int ELEMENT, int NS, int LN, int CH, int NW, int K, int TS>
struct BackwardShape {
    static constexpr int N = NS * LN, NG = 32 / LN, CPB = NW * NG * CH, THREADS = NW * 32, SUBS = K / TS, PT = 4;
    // where a warp's share of a row of (dt, dt u) has room for its sums of gB and gC, they go there once the row is done with
    static constexpr bool REUSE = NG * CH >= N;
    static constexpr int BUFFERS = ELEMENT == 2 ? 2 : 1;
    // B and C are read as they came where that is float32, or where many 16-bit states would make the adjoint wait for shared memory
    static constexpr int lanes = 16 / ELEMENT, bc_row = (N < lanes ? 16 : N * ELEMENT);  // bytes of a step's B
    static constexpr bool CONVERT = N < lanes || (ELEMENT == 2 && N <= 16);
    static constexpr int bc = CONVERT ? K * N : 0;  // floats that hold the B of a chunk
    static constexpr int pairs = 0, gy = pairs + K * CPB * 2, Bs = gy + K * CPB, Cs = Bs + bc, keep = Cs + bc, valid = keep + K,
                         skip = valid + K, bias = skip + CPB, states = bias + CPB, npart = states + (SUBS - 1) * NS * CH * THREADS,
                         cpart = npart + NW * 3 * PT * CH * 32, end = cpart + NW * PT * 2 * 32 * NS;
    // what a chunk brings in: u, dt, z and gout, then B and C, then the states before its first step
    static constexpr int wide_bytes = K * CPB * ELEMENT, bc_at = 4 * wide_bytes, start_at = bc_at + 2 * K * bc_row, raw_bytes = start_at + CPB * N * 4;
    static constexpr int bytes = end * 4 + BUFFERS * raw_bytes;
};

template <class T, int NS, int LN, int CH, int NW, int K, int TS, int FLAGS>
struct Backward {
    using S = BackwardShape<sizeof(T), NS, LN, CH, NW, K, TS>;
    using P = Packed<T>;
    using L = Lanes<LN>;
    static constexpr int EACH = CH, STEPS = K, N = S::N, NG = S::NG, CPB = S::CPB, THREADS = S::THREADS, SUBS = S::SUBS, PT = S::PT;
    static constexpr int V = P::lanes, ROW = CPB / V, IT = (K * ROW + THREADS - 1) / THREADS, STRIDE = THREADS / ROW;
    static_assert(STRIDE * ROW == THREADS, "a thread moves the same channels of every STRIDE-th step");
    static constexpr int BV = N < V ? N : V, BROW = N / BV, BIT = (2 * K * BROW + THREADS - 1) / THREADS;

    static constexpr bool ALIGNED = !(FLAGS & UNALIGNED), NARROW_ALIGNED = !(FLAGS & NARROW);

    const BackwardParams& p;
    float* smem;
    int ch0, ch_end, group, tile_in_group, chunk;
    int64 b;
    int tid, warp, lane, q, cg;  // cg: the thread's group of CH channels inside the block, q: its share of their states
    int finished;  // where the element lies that the lane finishes, of the first steps of a chunk, if it finishes one at a time

    // Where an element of a chunk of u, dt, z or gout lies.  The sums' four steps read the same few channels each: 16-byte slots change
    // places with the step, or all four would be in the same banks.
    static constexpr int SWAP = NG * CH < V ? 1 : NG * CH / V;
    DEVICE static int wide_at(int t, int col) { return t * CPB + (((col / V) ^ (t % 4 * SWAP % ROW)) * V | col % V); }
    // k times STEP steps behind t
    template <int STEP>
    DEVICE static int wide_at(int t, int k, int col) {
        if constexpr (STEP % 4 == 0) return wide_at(t, col) + k * STEP * CPB;
        return wide_at(t + k * STEP, col);
    }

    DEVICE char* raw(int c) const { return reinterpret_cast<char*>(smem + S::end) + (S::BUFFERS == 2 ? c & 1 : 0) * S::raw_bytes; }
    DEVICE T* raw(int c, int which) const { return reinterpret_cast<T*>(raw(c) + which * S::wide_bytes); }
    DEVICE float* start(int c) const { return reinterpret_cast<float*>(raw(c) + S::start_at); }

    DEVICE int token(int t) const {
        if constexpr (FLAGS & WALK) t = p.walk.token(t);
        return t;
    }

    DEVICE void fetch(int c, int which, const void* x, int64 sb, int64 sl) const {
        const int col = tid % ROW * V, first = tid / ROW, count = ch_end - ch0 - col;
        const Tokens<T> rows(x, b * sb + ch0 + (count > 0 ? col : 0), sl);
        T* to = raw(c, which);
#pragma unroll
        for (int it = 0; it < IT; ++it) {
            const int t = c * K + first + it * STRIDE;
            if (tid + it * THREADS >= K * ROW) continue;
            const bool there = t < p.l && count > 0;
            P::template fetch<ALIGNED>(to + wide_at<STRIDE>(first, it, col), there ? rows.at(token(t)) : rows.base, there ? count : 0);
        }
    }

    DEVICE void fetch_bc(int c) const {
#pragma unroll
        for (int it = 0; it < BIT; ++it) {
            const int v = tid + it * THREADS, kind = v / (K * BROW), n = v % BROW * BV, t = c * K + v / BROW % K;
            const int count = kind < 2 && t < p.l ? p.n - n : 0;
            const Tokens<T> rows = kind ? Tokens<T>(p.C, b * p.C_b + group * p.C_g, p.C_l) : Tokens<T>(p.B, b * p.B_b + group * p.B_g, p.B_l);
            if (v < 2 * K * BROW)
                P::template fetch<NARROW_ALIGNED && BV == V>(raw(c) + S::bc_at + v * 16, count > 0 ? rows.at(token(t)) + n : rows.base, count);
        }
    }

    // where the i-th state of the block (channel by channel) lies, so that threads find theirs side by side
    DEVICE static int state_at(int i) {
        const int ch = i / N, n = i % N, group = ch / CH;
        return (ch % CH * THREADS + group / NG * 32 + L::lane(group % NG, n / NS)) * NS + n % NS;
    }

    // the states before the chunk: what the forward saved, or where the row starts, which need not lie on a 16-byte border
    DEVICE void fetch_start(int c) const {
        const float* from = (c == 0 ? p.h0 + b * p.d * p.n : p.saved + (b * ((p.l + K - 1) / K) + c) * p.d * p.n) + (int64)ch0 * p.n;
        const int there = (ch_end - ch0) * p.n;
        if (N % 4 == 0 && p.n == N && c > 0) {
#pragma unroll
            for (int it = 0; it < (CPB * N / 4 + THREADS - 1) / THREADS; ++it) {
                const int i = (tid + it * THREADS) * 4;
                if (CPB * N / 4 % THREADS == 0 || i < CPB * N) copy_async16(start(c) + state_at(i), i < there ? from + i : p.saved, i < there);
            }
        } else {
            for (int i = tid; i < CPB * N; i += THREADS) {
                const int at = i / N * p.n + i % N;
                start(c)[state_at(i)] = (c > 0 || p.h0 != nullptr) && i % N < p.n && at < there ? from[at] : 0.f;
            }
        }
    }

    DEVICE void fetch_chunk(int c) const {
        fetch(c, 0, p.u, p.u_b, p.u_l);
        fetch(c, 1, p.dt, p.dt_b, p.dt_l);
        if (p.z != nullptr) fetch(c, 2, p.z, p.z_b, p.z_l);
        fetch(c, 3, p.gout, p.gout_b, p.gout_l);
        fetch_bc(c);
        fetch_start(c);
        copy_async_commit();
    }

    DEVICE void store_chunk(int c, int which, void* x, int64 sb, int64 sl) const {
        const int col = tid % ROW * V, first = tid / ROW, count = ch_end - ch0 - col;
        const Tokens<T> rows(x, b * sb + ch0 + col, sl);
        const T* from = raw(c, which);
#pragma unroll
        for (int it = 0; it < IT; ++it) {
            const int t = c * K + first + it * STRIDE;
            if (tid + it * THREADS < K * ROW && t < p.l && count > 0) P::from(from + wide_at<STRIDE>(first, it, col)).template store<ALIGNED>(rows.at(token(t)), count);
        }
    }

    DEVICE void stage_bc(int c) const {
#pragma unroll
        for (int it = 0; it < BIT; ++it) {
            const int v = tid + it * THREADS;
            if (v >= 2 * K * BROW) continue;
            float x[V], y[BV];
            P::from(raw(c) + S::bc_at + v * 16).unpack(x);
#pragma unroll
            for (int j = 0; j < BV; ++j) y[j] = x[j];
            // Cs follows Bs
            store_shared<BV>(smem + S::Bs + v * BV, y);
        }
    }

    DEVICE void read_bc(int c, int kind, int t, float (&x)[NS]) const {
        if constexpr (S::CONVERT)
            load_shared<NS>(smem + (kind ? S::Cs : S::Bs) + t * N + q * NS, x);
        else if constexpr (sizeof(T) == 4)
            load_shared<NS>(reinterpret_cast<float*>(raw(c) + S::bc_at) + (kind * K + t) * N + q * NS, x);
        else
            read_packed<T, NS>(reinterpret_cast<T*>(raw(c) + S::bc_at) + (kind * K + t) * N + q * NS, x);
    }

    DEVICE bool is_there(int s) const { return s < p.l && (p.valid == nullptr || p.valid[b * p.l + token(s)]); }

    // (dt, dt u) and gy of a chunk, from the raw tensors
    DEVICE void stage(int c) const {
        if (p.valid != nullptr || (FLAGS & RESET)) {
            for (int t = tid; t < K; t += THREADS) {
                const int s = c * K + t;
                smem[S::valid + t] = is_there(s) ? 1.f : 0.f;
                if constexpr (FLAGS & RESET) smem[S::keep + t] = s < p.l && p.reset[b * p.l + token(s)] ? 0.f : 1.f;
            }
        }
        // a thread has the same channels of every LN-th step
        constexpr int ITEMS = K / LN, TOGETHER = ITEMS < 4 ? ITEMS : 4;
        const int first = tid / (NW * NG), col = tid % (NW * NG) * CH;
        float bias[CH];
        load_shared<CH>(smem + S::bias + col, bias);
#pragma unroll 1
        for (int it = 0; it < ITEMS; it += TOGETHER) {
            float u[TOGETHER][CH], dt[TOGETHER][CH], z[TOGETHER][CH], g[TOGETHER][CH];
#pragma unroll
            for (int m = 0; m < TOGETHER; ++m) {
                const int i = wide_at<LN>(first, it + m, col);
                read_channels<T, CH>(raw(c, 0) + i, u[m]);
                read_channels<T, CH>(raw(c, 1) + i, dt[m]);
                read_channels<T, CH>(raw(c, 2) + i, z[m]);
                read_channels<T, CH>(raw(c, 3) + i, g[m]);
            }
#pragma unroll
            for (int m = 0; m < TOGETHER; ++m) {
                const int i = (first + (it + m) * LN) * CPB + col;
                float s[CH], pair[2 * CH];
                sigmoids<CH>(z[m], s);
#pragma unroll
                for (int k = 0; k < CH; ++k) {
                    // without a gate, z is whatever lies there
                    g[m][k] *= p.z != nullptr ? z[m][k] * s[k] : 1.f;
                    const float x = dt[m][k] + bias[k], soft = softplus<sizeof(T) == 2>(x);
                    pair[2 * k] = p.softplus ? soft : x;
                    pair[2 * k + 1] = pair[2 * k] * u[m][k];
                }
                store_shared<CH>(smem + S::gy + i, g[m]);
                store_shared<2 * CH>(smem + S::pairs + i * 2, pair);
            }
        }
        if (p.valid == nullptr && (c + 1) * K <= p.l) return;
#pragma unroll 1
        for (int t = first; t < K; t += LN) {
            const float none[2 * CH] = {};
            if (!is_there(c * K + t)) store_shared<2 * CH>(smem + S::pairs + (t * CPB + col) * 2, none);
        }
    }

    struct Step {
        float dt[CH], x[CH], B[NS];
    };
    struct Back : Step {
        float C[NS], gy[CH];
    };
    DEVICE Back read_back(int c, int t) const {
        Back s;
        static_cast<Step&>(s) = read_step(c, t);
        read_bc(c, 1, t, s.C);
        load_shared<CH>(smem + S::gy + t * CPB + cg * CH, s.gy);
        return s;
    }
    DEVICE Step read_step(int c, int t) const {
        Step s;
        float pair[2 * CH];
        load_shared<2 * CH>(smem + S::pairs + (t * CPB + cg * CH) * 2, pair);
        read_bc(c, 0, t, s.B);
#pragma unroll
        for (int k = 0; k < CH; ++k) s.dt[k] = pair[2 * k], s.x[k] = pair[2 * k + 1];
        return s;
    }
    // what passes a step, in either direction: where a document starts (keep = 0), nothing, not even NaN
    DEVICE float keep_at(int t) const {
        if constexpr (FLAGS & RESET) return smem[S::keep + t];
        return 1.f;
    }
    DEVICE static float passing(float keep, float x) {
        if constexpr (FLAGS & RESET) return keep == 0.f ? 0.f : x;
        return x;
    }

    DEVICE float* kept_state(int sub, int k) const { return smem + S::states + (((sub - 1) * CH + k) * THREADS + tid) * NS; }
    DEVICE float* first_state(int c, int k) const { return start(c) + (k * THREADS + tid) * NS; }

    // the thread's states before the TS steps of `sub`
    DEVICE void read_state(int c, int sub, float (&h)[CH][NS]) const {
#pragma unroll
        for (int k = 0; k < CH; ++k)
            load_shared<NS>(sub > 0 ? kept_state(sub, k) : first_state(c, k), h[k]);
    }

    DEVICE void sweep(int c, const float (&a2)[CH][NS]) const {
        float h[CH][NS];
        read_state(c, 0, h);
#pragma unroll 1
        for (int sub = 1; sub < SUBS; ++sub) {
#pragma unroll
            for (int i = 0; i < TS; ++i) {
                int t = (sub - 1) * TS + i;
                Step s = read_step(c, t);
                const float keep = keep_at(t);
#pragma unroll
                for (int k = 0; k < CH; ++k)
#pragma unroll
                    for (int j = 0; j < NS; ++j) h[k][j] = fmaf(decay_of<T>(s.dt[k], a2[k][j]), passing(keep, h[k][j]), s.x[k] * s.B[j]);
            }
#pragma unroll
            for (int k = 0; k < CH; ++k) store_shared<NS>(kept_state(sub, k), h[k]);
        }
    }

    // gu, gdt and gz of one step and CH channels
    struct Finished {
        float gu[CH], gdt[CH], gz[CH];
    };
    static constexpr int FINISH = (PT * NG + 31) / 32;

    DEVICE int finish_at(int first, int item) const { return first * CPB + (FINISH == 1 ? finished : wide_at(item / NG, (warp * NG + item % NG) * CH)); }

    DEVICE Finished finish(int c, int first, int item, float (&gD)[CH], float (&gbias)[CH]) const {
        const float* part = smem + S::npart + warp * 3 * PT * CH * 32;
        const int i = item / NG, g = item % NG, at = finish_at(first, item), col = (warp * NG + g) * CH, flat = (first + i) * CPB + col;
        float sums[3][CH], u[CH], dt[CH], z[CH], gout[CH], gy[CH], D[CH], bias[CH], pair[2 * CH];
        Finished f;
#pragma unroll
        for (int k = 0; k < 3; ++k)
#pragma unroll
            for (int ch = 0; ch < CH; ++ch) {
                float x[LN];
                load_shared<LN>(part + ((k * PT + i) * CH + ch) * 32 + g * LN, x);
                sums[k][ch] = x[0];
#pragma unroll
                for (int j = 1; j < LN; ++j) sums[k][ch] += x[j];
            }
        read_channels<T, CH>(raw(c, 0) + at, u);
        read_channels<T, CH>(raw(c, 1) + at, dt);
        load_shared<2 * CH>(smem + S::pairs + flat * 2, pair);
        load_shared<CH>(smem + S::gy + flat, gy);
        load_shared<CH>(smem + S::skip + col, D);
        load_shared<CH>(smem + S::bias + col, bias);
        read_channels<T, CH>(raw(c, 2) + at, z);
        read_channels<T, CH>(raw(c, 3) + at, gout);
        const bool valid = c * K + first + i < p.l && (p.valid == nullptr || smem[S::valid + first + i] != 0.f);
        // without a gate, z is whatever lies there, and nobody reads its gradient; but two sigmoids share a reciprocal, and one is dt's
        float x[2 * CH], s[2 * CH];
#pragma unroll
        for (int ch = 0; ch < CH; ++ch) x[ch] = CH % 2 == 0 || p.z != nullptr ? z[ch] : 0.f, x[CH + ch] = dt[ch] + bias[ch];
        sigmoids<2 * CH>(x, s);
#pragma unroll
        for (int ch = 0; ch < CH; ++ch) {
            const float g = fmaf(u[ch], sums[1][ch], sums[2][ch] * LN2), y = fmaf(D[ch], u[ch], sums[0][ch]);
            f.gu[ch] = fmaf(pair[2 * ch], sums[1][ch], D[ch] * gy[ch]);
            f.gdt[ch] = valid ? g * (p.softplus ? s[CH + ch] : 1.f) : 0.f;
            f.gz[ch] = gout[ch] * y * s[ch] * fmaf(z[ch], 1.f - s[ch], 1.f);
            gout[ch] = y * (z[ch] * s[ch]);
            gD[ch] = fmaf(gy[ch], u[ch], gD[ch]);
            gbias[ch] += f.gdt[ch];
        }
        // in place of gout, which nobody reads again
        if constexpr (FLAGS & OUTPUTS) write_channels<T, CH>(raw(c, 3) + at, gout);
        return f;
    }

    // in place of u, dt, z
    DEVICE void put(int c, int at, const Finished& f) const {
        write_channels<T, CH>(raw(c, 0) + at, f.gu);
        write_channels<T, CH>(raw(c, 1) + at, f.gdt);
        if (p.z != nullptr) write_channels<T, CH>(raw(c, 2) + at, f.gz);
    }

    // gB and gC of a step, four states at a time, over the channels of the warp, or of the block where the warp has no room for them
    static constexpr int W = NS < 4 ? NS : 4, ITEMS = PT * 2 * (N / W), SUMMERS = S::REUSE ? 32 : THREADS, SUM = (ITEMS + SUMMERS - 1) / SUMMERS;

    DEVICE void sum_channels(int item, float (&total)[W]) const {
        const int n = item % (N / W) * W, row = item / (N / W);
        const float* from = smem + S::cpart + ((S::REUSE ? warp : 0) * PT * 2 + row) * 32 * NS + L::lane(0, n / NS) * NS + n % NS;
        // lanes who would read the same bank start with different groups
        constexpr int GAP = L::near * NS, ORDERS = NG < 4 ? NG : 4;
        const int order = item / (GAP / W) % ORDERS;
#pragma unroll
        for (int w = 0; w < (S::REUSE ? 1 : NW); ++w)
#pragma unroll
            for (int g = 0; g < NG; ++g) {
                float x[W];
                load_shared<W>(from + w * PT * 2 * 32 * NS + (g ^ order) * GAP, x);
#pragma unroll
                for (int j = 0; j < W; ++j) total[j] = w + g == 0 ? x[j] : total[j] + x[j];
            }
    }

    // of the PT steps from `first`: what the partial results in shared memory add up to
    DEVICE void settle(int c, int first, float (&gD)[CH], float (&gbias)[CH]) const {
        Finished f[FINISH];
        float total[SUM][W];
        if constexpr (S::REUSE)
            __syncwarp();
        else
            __syncthreads();
        const int me = S::REUSE ? lane : tid;
#pragma unroll
        for (int k = 0; k < SUM; ++k)
            if (ITEMS % SUMMERS == 0 || me + k * SUMMERS < ITEMS) sum_channels(me + k * SUMMERS, total[k]);
#pragma unroll
        for (int k = 0; k < FINISH; ++k)
            if (PT * NG % 32 == 0 || lane + k * 32 < PT * NG) f[k] = finish(c, first, lane + k * 32, gD, gbias);
        if constexpr (S::REUSE)
            __syncwarp();
        else
            __syncthreads();
#pragma unroll
        for (int k = 0; k < FINISH; ++k)
            if (PT * NG % 32 == 0 || lane + k * 32 < PT * NG) put(c, finish_at(first, lane + k * 32), f[k]);
#pragma unroll
        for (int k = 0; k < SUM; ++k) {
            const int item = me + k * SUMMERS, n = item % (N / W) * W, kind = item / (N / W) % 2, i = item / (N / W) / 2;
            if (ITEMS % SUMMERS != 0 && item >= ITEMS) continue;
            if constexpr (S::REUSE)
                store_shared<W>(warp_sums(warp, first + i) + kind * N + n, total[k]);
            else
                write_gbc(c, first + i, kind, n, total[k]);
        }
    }

    DEVICE float* warp_sums(int w, int t) const { return smem + S::pairs + (t * CPB + w * NG * CH) * 2; }

    template <int M>
    DEVICE void write_gbc(int c, int t, int kind, int n, const float (&x)[M]) const {
        const int s = c * K + t;
        if (s >= p.l) return;
        float* to = p.gbc + ((((int64)tile_in_group * 2 + kind) * p.batch + b) * p.l + token(s)) * p.groups * p.n + group * p.n + n;
        if (p.n == N) {
            store_shared<M>(to, x);
        } else {
#pragma unroll
            for (int j = 0; j < M; ++j)
                if (n + j < p.n) to[j] = x[j];
        }
    }

    DEVICE void sum_warps(int c) const {
        constexpr int M = N < 4 ? N : 4;
        for (int item = tid; item < K * 2 * N / M; item += THREADS) {
            const int n = item % (N / M) * M, kind = item / (N / M) % 2, t = item / (N / M) / 2;
            float total[M];
#pragma unroll
            for (int j = 0; j < M; ++j) total[j] = 0.f;
#pragma unroll
            for (int w = 0; w < NW; ++w) {
                float x[M];
                load_shared<M>(warp_sums(w, t) + kind * N + n, x);
#pragma unroll
                for (int j = 0; j < M; ++j) total[j] += x[j];
            }
            write_gbc(c, t, kind, n, total);
        }
    }

    struct Sums {
        float r[CH][NS], gA[CH][NS], gD[CH], gbias[CH];
    };

    DEVICE void adjoint(int c, int sub, const float (&a2)[CH][NS], Sums& s) const {
        float a[TS][CH][NS], h[TS][CH][NS], before[CH][NS];
        read_state(c, sub, before);
#pragma unroll
        for (int i = 0; i < TS; ++i) {
            Step in = read_step(c, sub * TS + i);
            const float keep = keep_at(sub * TS + i);
#pragma unroll
            for (int ch = 0; ch < CH; ++ch)
#pragma unroll
                for (int j = 0; j < NS; ++j) {
                    a[i][ch][j] = decay_of<T>(in.dt[ch], a2[ch][j]);
                    const float from = passing(keep, i > 0 ? h[i > 0 ? i - 1 : 0][ch][j] : before[ch][j]);
                    h[i][ch][j] = fmaf(in.x[ch], in.B[j], a[i][ch][j] * from);
                }
        }
        float* npart = smem + S::npart + warp * 3 * PT * CH * 32 + L::group(lane) * LN + q;
        float* cpart = smem + S::cpart + (warp * PT * 2 * 32 + lane) * NS;
        // the next step's inputs are read before this step's results are stored: the compiler may not exchange the two
        Back in = read_back(c, sub * TS + TS - 1);
#pragma unroll
        for (int half = TS / PT - 1; half >= 0; --half) {
#pragma unroll
            for (int k = PT - 1; k >= 0; --k) {
                const int i = half * PT + k, t = sub * TS + i;
                Back next;
                if (i > 0) next = read_back(c, t - 1);
                // read again: there is no room for it among the registers
                if (i == 0) read_state(c, sub, before);
                const float keep = keep_at(t);
                float gB[NS], gC[NS];
#pragma unroll
                for (int j = 0; j < NS; ++j) gB[j] = gC[j] = 0.f;
#pragma unroll
                for (int ch = 0; ch < CH; ++ch) {
                    float y = 0.f, s1 = 0.f, s2 = 0.f;
#pragma unroll
                    for (int j = 0; j < NS; ++j) {
                        const float G = fmaf(in.C[j], in.gy[ch], s.r[ch][j]);
                        s.r[ch][j] = passing(keep, a[i][ch][j] * G);
                        const float w = s.r[ch][j] * passing(keep, i > 0 ? h[i > 0 ? i - 1 : 0][ch][j] : before[ch][j]);
                        gC[j] = fmaf(h[i][ch][j], in.gy[ch], gC[j]);
                        gB[j] = fmaf(G, in.x[ch], gB[j]);
                        y = fmaf(h[i][ch][j], in.C[j], y);
                        s1 = fmaf(G, in.B[j], s1);
                        s2 = fmaf(w, a2[ch][j], s2);
                        s.gA[ch][j] = fmaf(w, in.dt[ch], s.gA[ch][j]);
                    }
                    npart[((0 * PT + k) * CH + ch) * 32] = y;
                    npart[((1 * PT + k) * CH + ch) * 32] = s1;
                    npart[((2 * PT + k) * CH + ch) * 32] = s2;
                }
                store_shared<NS>(cpart + (k * 2 + 0) * 32 * NS, gB);
                store_shared<NS>(cpart + (k * 2 + 1) * 32 * NS, gC);
                if (i > 0) in = next;
            }
            settle(c, sub * TS + half * PT, s.gD, s.gbias);
        }
    }

    DEVICE void run(int first, int last) {
        float a2[CH][NS];
        Sums s;
        const float* glast = p.glast == nullptr ? nullptr : p.glast + b * p.d * p.n;
#pragma unroll
        for (int k = 0; k < CH; ++k) {
            int ch = ch0 + cg * CH + k;
            s.gD[k] = s.gbias[k] = 0.f;
#pragma unroll
            for (int j = 0; j < NS; ++j) {
                bool ok = ch < ch_end && q * NS + j < p.n;
                int64 at = (int64)ch * p.n + q * NS + j;
                a2[k][j] = ok ? rate_of(p.A[at]) : 0.f;
                s.r[k][j] = ok && glast != nullptr ? glast[at] : 0.f;
                s.gA[k][j] = 0.f;
            }
            if ((FLAGS & CUT) && b >= p.cut.whole) {
                const int64 last = p.cut.cut_piece(b, p.cut.chunks - 1) * p.d + ch, next = -p.d;
                pass_pieces<NS>(s.r[k], a2[k], ch < ch_end ? p.n - q * NS : 0, p.cut.chunks - 1 - chunk, p.local + last * p.n + q * NS, next * p.n,
                                p.decay + last * 2, next * 2);
            }
        }
        for (int k = tid; k < CPB; k += THREADS) {
            bool ok = ch0 + k < ch_end;
            smem[S::skip + k] = ok && p.D != nullptr ? p.D[ch0 + k] : 0.f;
            smem[S::bias + k] = ok && p.bias != nullptr ? p.bias[ch0 + k] : 0.f;
        }
        if (S::BUFFERS == 2) fetch_chunk(last);
#pragma unroll 1
        for (int c = last; c >= first; --c) {
            if (S::BUFFERS == 1) {
                __syncthreads();
                fetch_chunk(c);
            }
            copy_async_wait<0>();
            __syncthreads();
            if (S::BUFFERS == 2 && c > first) fetch_chunk(c - 1);
            if constexpr (S::CONVERT) stage_bc(c);
            stage(c);
            __syncthreads();
            sweep(c, a2);
#pragma unroll 1
            for (int sub = SUBS - 1; sub >= 0; --sub) adjoint(c, sub, a2, s);
            __syncthreads();
            if constexpr (S::REUSE) sum_warps(c);
            store_chunk(c, 0, p.gu, p.gu_b, p.gu_l);
            store_chunk(c, 1, p.gdt, p.gdt_b, p.gdt_l);
            if (p.z != nullptr) store_chunk(c, 2, p.gz, p.gz_b, p.gz_l);
            if constexpr (FLAGS & OUTPUTS) store_chunk(c, 3, p.out, (int64)p.l * p.d, p.d);
        }
        write_totals(s);
    }

    DEVICE void write_totals(const Sums& s) const {
        const int64 row = p.cut.piece(b, chunk);
#pragma unroll
        for (int k = 0; k < CH; ++k) {
            int ch = ch0 + cg * CH + k;
#pragma unroll
            for (int j = 0; j < NS; ++j) {
                if (ch >= ch_end || q * NS + j >= p.n) continue;
                int64 at = (int64)ch * p.n + q * NS + j;
                p.gA[row * p.d * p.n + at] = s.gA[k][j];
                if (chunk == 0 && p.ginit != nullptr) p.ginit[b * p.d * p.n + at] = s.r[k][j];
            }
            // lanes with the same lane % NG finished the same channels
            float gD = s.gD[k], gbias = s.gbias[k];
#pragma unroll
            for (int o = NG; o < 32; o *= 2) {
                gD += __shfl_xor_sync(0xffffffffu, gD, o);
                gbias += __shfl_xor_sync(0xffffffffu, gbias, o);
            }
            int mine = ch0 + (warp * NG + lane) * CH + k;
            if (lane < NG && mine < ch_end) {
                p.gskip[row * 2 * p.d + mine] = gD;
                p.gskip[(row * 2 + 1) * p.d + mine] = gbias;
            }
        }
    }
};

template <class F>
DEVICE void run_block(const BackwardParams& p, char* memory, int block) {
    const int tiles_d = p.tiles_per_group * p.groups, tile_d = block % tiles_d;
    const int rest = block / tiles_d;
    const int group = tile_d / p.tiles_per_group, per_group = p.d / p.groups, in_group = tile_d % p.tiles_per_group;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    int chunk;
    int64 b;
    p.cut.place(rest, p.batch, b, chunk);
    F f{p, reinterpret_cast<float*>(memory), group * per_group + in_group * F::CPB, (group + 1) * per_group, group, in_group, chunk,
        b, tid, warp, lane, F::L::share(lane), warp * F::NG + F::L::group(lane), keep_in_register(F::wide_at(lane / F::NG, (warp * F::NG + lane % F::NG) * F::EACH))};
    f.run(p.cut.begin(chunk) / F::STEPS, (p.cut.end(b, chunk, p.l) - 1) / F::STEPS);
}

template <class T, int NS, int LN, int CH, int NW, int K, int TS, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(NW * 32, MIN_BLOCKS) scan_backward(const BackwardParams p) {
    SHARED_MEMORY(memory);
    run_block<Backward<T, NS, LN, CH, NW, K, TS, FLAGS>>(p, memory, blockIdx.x);
}

template <class T, int NS, int LN, int CH, int NW, int K, int TS, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(NW * 32, MIN_BLOCKS) scan_backward_walks(const __grid_constant__ Walks<BackwardParams> walks) {
    SHARED_MEMORY(memory);
    run_block<Backward<T, NS, LN, CH, NW, K, TS, FLAGS>>(walks.each[blockIdx.x / walks.blocks], memory, blockIdx.x % walks.blocks);
}

// out[i] = sum_k in[k * stride + i], for several arrays in one launch, each in a fixed order
struct SumParams {
    static constexpr int PARTS = 5;
    const float* in[PARTS];
    void* out[PARTS];
    struct Part {
        int64 size, stride;
        int count, wide, block0;  // wide: the result is float32, else T; block0: the first block of this part
    } part[PARTS];
};

template <class T>
DEVICE void sum_block(const SumParams& p, int block) {
    int k = 0;
    while (k + 1 < SumParams::PARTS && block >= p.part[k + 1].block0) ++k;
    const SumParams::Part& a = p.part[k];
    const int64 i = (int64)(block - a.block0) * 256 + threadIdx.x;
    if (i >= a.size) return;
    const float* in = p.in[k] + i;
    float total[4] = {0.f, 0.f, 0.f, 0.f};
    int j = 0;
    for (; j + 4 <= a.count; j += 4)
#pragma unroll
        for (int m = 0; m < 4; ++m) total[m] += in[(j + m) * a.stride];
    for (; j < a.count; ++j) total[0] += in[j * a.stride];
    const float sum[1] = {(total[0] + total[1]) + (total[2] + total[3])};
    if (a.wide)
        reinterpret_cast<float*>(p.out[k])[i] = sum[0];
    else
        write_channels<T, 1>(reinterpret_cast<T*>(p.out[k]) + i, sum);
}

template <class T>
__global__ void __launch_bounds__(256) sum_partials(const SumParams p) {
    sum_block<T>(p, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(256) sum_partials_walks(const __grid_constant__ Walks<SumParams> walks) {
    sum_block<T>(walks.each[blockIdx.x / walks.blocks], blockIdx.x % walks.blocks);
}
