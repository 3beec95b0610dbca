// Gradients of SSD:  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t,  out = y silu(z).
//
// Four launches.  `ssd_steps` forms step sizes and the running sums c of dt A within chunks of Q tokens.  `ssd_backward_states` walks each
// head's chunks from the last to the first with the gradient of the state in registers, and leaves, per chunk, the gradient R of the state
// behind it.  `ssd_backward_chunks` has all that a chunk needs then: H, the state before it, which the forward saved, and R.  With
// L_ts = exp(c_t - c_s), s <= t, and S = C B^T, W = gy X^T, G = S L W:
//
//   gX = dt (S L)^T gy + dt e^(c_last - c) (B R^T) + D gy        gC = (sum over heads of W L dt) B   + sum over heads of e^c (gy H)
//                                                                gB = (sum over heads of W L dt)^T C + sum over heads of dt e^(c_last - c) (X R)
//   gdt = A gc + (column sums of G) + e^(c_last - c) B . (X R), where gc of a token is what flows past it: from s < t to t' >= t (dt G),
//   from H to tokens from t on (e^c C . (gy H)), from tokens before t to R, and from H to R.
//
// A block goes through the heads of a group (or its share of them) and keeps S and the sums for B and C in registers all the while, so that
// nothing per head and token but gX and gdt is written.  `ssd_backward_sums` adds up what blocks left, in a fixed order.
//
// Documents: a chunk in which some start is done once for each of them, with zeros in place of the others' tokens, which are not written: no
// zero meets a NaN of another document.  c starts anew with a document.  More than P channels per head come P at a time.
#include "ssd_backward.cuh"

// What a block of `ssd_backward_chunks` has in shared memory: warps WM x WN, each with Q / WM rows and a WN-th of the columns of every product,
// and sums of up to HEADS heads that wait: what becomes of them is a chain of shuffles, for as many warps at once as there are heads
template <class T, int P, int N, int WM, int WN, int STAGES, int HEADS, int FLAGS>
struct ChunkMemory {
    static constexpr int Q = Chunk<T>::q, PAD = 16 / sizeof(T), PS = P + PAD, NS = N + PAD, QS = Q + PAD, THREADS = 32 * WM * WN;
    static constexpr int GATE = FLAGS & GATED ? 1 : 0;
    // elements: B, C, a matrix (Q, Q), with a gate in two parts, and gy, in two parts, too; then stages of x, gout, z, H, R and the steps' floats; then sums
    static constexpr int C_at = Q * NS, M_at = 2 * Q * NS, gy_at = M_at + (1 + GATE) * Q * QS, stages_at = gy_at + 2 * GATE * Q * PS;
    static constexpr int gout_at = Q * PS, z_at = 2 * Q * PS, H_at = (2 + GATE) * Q * PS, R_at = H_at + P * NS, steps_at = R_at + P * NS;
    // steps, and what undoes the scales of H and R
    static constexpr int stage = steps_at + (4 * Q + 4) * 4 / sizeof(T);
    // sums of a head: over G's rows and e^c C . (gy H), over its columns, its diagonal, x . gy, e^(c_last - c) B . (X R), R . H
    using Sum = typename SumType<T>::type;
    static constexpr int row_at = 0, col_at = WN * Q, diag_at = col_at + WM * Q, skip_at = diag_at + Q, moved_at = skip_at + Q,
                         kept_at = moved_at + WN * Q, count = kept_at + WM * WN;
    static constexpr int scratches = sizeof(T) == 2 ? 4 * WM * WN : 0;  // floats
    static constexpr int bytes = (stages_at + STAGES * stage) * (int)sizeof(T) + HEADS * count * (int)sizeof(Sum) + scratches * 4;
};

template <class T, int P, int N, int WM, int WN, int STAGES, int HEADS, int FLAGS>
struct BackwardChunks : ChunkMemory<T, P, N, WM, WN, STAGES, HEADS, FLAGS> {
    using M = ChunkMemory<T, P, N, WM, WN, STAGES, HEADS, FLAGS>;
    using M::Q, M::PS, M::NS, M::QS, M::THREADS, M::GATE;
    static constexpr int MT = Q / WM / 16, NN = N / WN / 8, NQ = Q / WN / 8, NP = P / WN / 8, EACH = Q / 32;
    static constexpr bool ALIGNED = !(FLAGS & UNALIGNED);
    using State = typename StateType<T>::type;
    using Sum = typename M::Sum;

    const SsdBackwardParams& p;
    T* memory;
    int64 b, row;  // row: of the partial sums
    int chunk, group, split, first_head, heads, tiles, warp, lane, m0, wn;
    // of the document at work: its tokens, whether the state before the chunk comes into it and whether the one behind is its own
    int lo, hi;
    bool entered, left, again;

    DEVICE T* stage(int i) const { return memory + M::stages_at + i % STAGES * M::stage; }
    DEVICE static const float* steps(const T* in) { return reinterpret_cast<const float*>(in + M::steps_at); }
    DEVICE Sum* sums(int waiting) const { return reinterpret_cast<Sum*>(memory + M::stages_at + STAGES * M::stage) + waiting * M::count; }
    DEVICE float* scratch(int which) const { return reinterpret_cast<float*>(sums(HEADS)) + which * (WM * WN); }
    // what undoes the scale of H (0) or R (1), in fp16
    DEVICE static float back(const T* in, int which) { return is_fp16<T> ? steps(in)[4 * Q + which] : 1.f; }
    DEVICE T* gy(T* in) const { return GATE ? memory + M::gy_at : in + M::gout_at; }
    // log2 of the decay from behind token s to token t
    DEVICE static float between(const float* s, int from, int to) { return (s[Q + to] - s[Q + from]) + (s[2 * Q + to] - s[2 * Q + from]); }
    DEVICE static float onward(const float* s, int from) { return exp2_of<T>(between(s, from, Q - 1)); }
    DEVICE static float into(const float* s, int to) { return exp2_of<T>(s[Q + to] + s[2 * Q + to]); }

    template <int COLS, class F>
    DEVICE void each(F f) const {
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i)
#pragma unroll
            for (int j = 0; j < COLS; ++j) f(m0 + lane / 4 + 8 * i, (wn * COLS + j) * 8 + lane % 4 * 2, i / 2, j, i % 2 * 2);
    }
    template <int COLS>
    DEVICE static void clear(float (&acc)[MT][COLS][4]) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int j = 0; j < COLS; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.f;
    }
    // acc += a b over states, `AT_ONCE` of them unrolled, for which there are registers
    template <int COLS>
    DEVICE static void over_states(float (&acc)[MT][COLS][4], const T* a, const T* b) {
        constexpr int AT_ONCE = 32;
#pragma unroll 1
        for (int k = 0; k < N; k += AT_ONCE) product<T, MT, COLS, false, false>(acc, a + k, NS, b + k, NS, AT_ONCE);
    }
    // the pairs of a product of channels with a state, some columns at a time
    template <bool TWICE, class F>
    DEVICE void in_parts(const T* a, const T* state, F f) const {
        constexpr int SOME = NN > 4 ? NN / 2 : NN;
#pragma unroll
        for (int j0 = 0; j0 < NN; j0 += SOME) {
            float part[MT][SOME][4];
            clear<SOME>(part);
            constexpr int AT_ONCE = N > 128 && sizeof(T) == 2 ? 16 : P;
#pragma unroll 1
            for (int k = 0; k < P; k += AT_ONCE) {
                const T* b = state + k * NS + (wn * NN + j0) * 8;
                product<T, MT, SOME, false, true>(part, a + m0 * PS + k, PS, b, NS, AT_ONCE);
                if (TWICE) product<T, MT, SOME, false, true>(part, a + (Q + m0) * PS + k, PS, b, NS, AT_ONCE);
            }
#pragma unroll
            for (int i = 0; i < 2 * MT; ++i)
#pragma unroll
                for (int j = 0; j < SOME; ++j) {
                    const float* x = part[i / 2][j] + i % 2 * 2;
                    f(m0 + lane / 4 + 8 * i, (wn * NN + j0 + j) * 8 + lane % 4 * 2, i / 2, j0 + j, i % 2 * 2, x[0], x[1]);
                }
        }
    }
    // of the tiles of a head, sums are those of all
    DEVICE static void put(Sum* to, Sum x, bool first) { *to = first ? x : *to + x; }
    // every row's sum over the warp's columns
    DEVICE void put_rows(Sum (&sum)[2 * MT], Sum* to, bool first) const {
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            sum[i] += shuffle(sum[i], 1);
            sum[i] += shuffle(sum[i], 2);
            if (lane % 4 == 0) put(to + wn * Q + m0 + lane / 4 + 8 * i, sum[i], first);
        }
    }

    DEVICE void fetch(int i) const {
        T* to = stage(i);
        const int head = first_head + i / tiles, p0 = i % tiles * P;
        const int64 t = (int64)chunk * Q;
        fetch_tile<T, Q, P, PS, THREADS, ALIGNED>(to, (const T*)p.x + b * p.x_b + t * p.x_l + head * p.x_h + p0, p.x_l, lo, hi, p.p - p0);
        fetch_tile<T, Q, P, PS, THREADS, ALIGNED>(to + M::gout_at, (const T*)p.gout + b * p.gout_b + t * p.gout_l + head * p.gout_h + p0, p.gout_l, lo, hi, p.p - p0);
        if constexpr (GATE != 0)
            fetch_tile<T, Q, P, PS, THREADS, ALIGNED>(to + M::z_at, (const T*)p.z + b * p.z_b + t * p.z_l + head * p.z_h + p0, p.z_l, lo, hi, p.p - p0);
        const int64 state = (((b * p.chunks + chunk) * p.h + head) * p.p + p0) * p.n;
        float* undo = reinterpret_cast<float*>(to + M::steps_at) + 4 * Q;
        if (entered) fetch_state<T, P, N, NS, THREADS, ALIGNED>(to + M::H_at, (const State*)p.saved + state, p.p - p0, p.n, undo, scratch(0));
        if (left) fetch_state<T, P, N, NS, THREADS, ALIGNED>(to + M::R_at, (const State*)p.gstates + state, p.p - p0, p.n, undo + 1, scratch(1));
        const int64 plane = (int64)p.batch * p.h * p.chunks * Q;
        const float* from = p.steps + ((b * p.h + head) * p.chunks + chunk) * Q;
        if (threadIdx.x < Q) copy_async16(to + M::steps_at + threadIdx.x * M::PAD, from + threadIdx.x / (Q / 4) * plane + threadIdx.x % (Q / 4) * 4, true);
        copy_async_commit();
    }

    // gout silu(z)
    DEVICE float2 gated(const T* in, int at) const {
        const float2 g = read_pair(in + M::gout_at + at), z = read_pair(in + M::z_at + at);
        return {g.x * z.x * sigmoid(z.x), g.y * z.y * sigmoid(z.y)};
    }
    // gy as a sum of two, and what x gy adds up to; returns what undoes the scale that it has in fp16
    DEVICE float gate(const T* in, T* to, Sum* f, bool first) const {
        float by = 1.f, undo = 1.f;
        if constexpr (is_fp16<T>) {
            float largest = 0.f;
            for (int i = threadIdx.x; i < Q * P / 2; i += THREADS) {
                const float2 g = gated(in, i / (P / 2) * PS + i % (P / 2) * 2);
                largest = fmaxf(largest, fmaxf(fabsf(g.x), fabsf(g.y)));
            }
            normal_range(block_max(largest, scratch(3)), 8, by, undo);
        }
        Sum skip = 0.f;
        for (int i = threadIdx.x; i < Q * P / 2; i += THREADS) {
            const int at = i / (P / 2) * PS + i % (P / 2) * 2;
            const float2 g = gated(in, at), x = read_pair(in + at);
            write_shared_pair(to + at, g.x * by, g.y * by);
            const float2 big = read_pair(to + at);
            write_shared_pair(to + Q * PS + at, g.x * by - big.x, g.y * by - big.y);
            skip += fmaf(x.x, g.x, x.y * g.y);
        }
        skip = warp_sum(skip);
        if (lane == 0) put(f + M::skip_at + warp, skip, first);
        return undo;
    }
    // S L dt into shared memory, W L dt to the sum over heads, and the sums of G; returns what undoes the scale of the former
    DEVICE float weigh(const T* in, const T* gy, const float (&scores)[MT][NQ][4], float (&gscores)[MT][NQ][4], float undo_gy, Sum* f, bool first) const {
        const float* s = steps(in);
        float W[MT][NQ][4];
        Sum rows[2 * MT], cols[2 * NQ];
        clear<NQ>(W);
        // else all columns are behind all rows
        const bool some = wn * (8 * NQ) < m0 + 16 * MT;
        if (some) {
            product<T, MT, NQ, false, false>(W, gy + m0 * PS, PS, in + wn * (8 * NQ) * PS, PS, P);
            if (GATE != 0) product<T, MT, NQ, false, false>(W, gy + (Q + m0) * PS, PS, in + wn * (8 * NQ) * PS, PS, P);
        }
        float dt[2 * NQ], from_hi[2 * NQ], from_lo[2 * NQ], to_hi[2 * MT], to_lo[2 * MT];
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            const int t = m0 + lane / 4 + 8 * i;
            rows[i] = 0.f, to_hi[i] = s[Q + t], to_lo[i] = s[2 * Q + t];
        }
#pragma unroll
        for (int j = 0; j < 2 * NQ; ++j) {
            const int t = (wn * NQ + j / 2) * 8 + lane % 4 * 2 + j % 2;
            cols[j] = 0.f, dt[j] = s[t], from_hi[j] = s[Q + t], from_lo[j] = s[2 * Q + t];
        }
        float largest = 0.f, by = 1.f, undo = 1.f;
        if (some) each<NQ>([&](int to, int from, int i, int j, int e) {
            const int r = 2 * i + e / 2;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                W[i][j][e + k] *= undo_gy;
                const int c = 2 * j + k;
                const bool seen = from + k <= to && from + k >= lo && to < hi, past = seen && from + k < to;
                const float L = exp2_of<T>(zero_or(seen, (to_hi[r] - from_hi[c]) + (to_lo[r] - from_lo[c])));
                const float G = zero_or(seen, W[i][j][e + k] * scores[i][j][e + k] * L);
                const float weight = zero_or(seen, scores[i][j][e + k] * L * dt[c]);
                gscores[i][j][e + k] += zero_or(seen, W[i][j][e + k] * L * dt[c]);
                rows[r] += past ? (Sum)G * dt[c] : 0;
                cols[c] += zero_or(past, G);
                if (from + k == to) {
                    put(f + M::diag_at + to, G, first);
                    if (GATE == 0) put(f + M::skip_at + to, zero_or(seen, W[i][j][e + k]), first);
                }
                W[i][j][e + k] = weight;
                if constexpr (is_fp16<T>) largest = fmaxf(largest, fabsf(weight));
            }
        });
        if constexpr (is_fp16<T>) normal_range(block_max(largest, scratch(2)), 8, by, undo);
        each<NQ>([&](int to, int from, int i, int j, int e) {
            T* at = memory + M::M_at + to * QS + from;
            const float x = W[i][j][e] * by, y = W[i][j][e + 1] * by;
            write_shared_pair(at, x, y);
            if (GATE != 0) {
                const float2 big = read_pair(at);
                write_shared_pair(at + Q * QS, x - big.x, y - big.y);
            }
        });
        put_rows(rows, f + M::row_at, first);
#pragma unroll
        for (int j = 0; j < 2 * NQ; ++j) {
#pragma unroll
            for (int m = 4; m < 32; m *= 2) cols[j] += shuffle(cols[j], m);
            if (lane < 4) put(f + M::col_at + warp / WN * Q + (wn * NQ + j / 2) * 8 + lane * 2 + j % 2, cols[j], first);
        }
        return undo;
    }
    // e^c (gy H) for C
    DEVICE void read(const T* in, const T* gy, float (&gC)[MT][NN][4], float undo_gy, Sum* f) const {
        float decay[2 * MT];
        Sum rows[2 * MT];
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) rows[i] = 0.f, decay[i] = into(steps(in), m0 + lane / 4 + 8 * i) * (back(in, 0) * undo_gy);
        in_parts<GATE != 0>(gy, in + M::H_at, [&](int t, int col, int i, int j, int e, float x0, float x1) {
            const float by = decay[2 * i + e / 2], g0 = by * x0, g1 = by * x1;
            const float2 C = read_pair(memory + M::C_at + t * NS + col);
            gC[i][j][e] += g0, gC[i][j][e + 1] += g1;
            rows[2 * i + e / 2] += fmaf(C.x, g0, C.y * g1);
        });
        put_rows(rows, f + M::row_at, false);
    }
    // dt e^(c_last - c) (X R) for B
    DEVICE void write(const T* in, float (&gB)[MT][NN][4], Sum* f, bool first) const {
        const float* s = steps(in);
        float decay[2 * MT], dt[2 * MT];
        Sum rows[2 * MT];
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            const int t = m0 + lane / 4 + 8 * i;
            rows[i] = 0.f, decay[i] = onward(s, t) * back(in, 1), dt[i] = s[t];
        }
        in_parts<false>(in, in + M::R_at, [&](int t, int col, int i, int j, int e, float x0, float x1) {
            const float by = decay[2 * i + e / 2], g0 = by * x0, g1 = by * x1;
            const float2 B = read_pair(memory + t * NS + col);
            gB[i][j][e] = fmaf(dt[2 * i + e / 2], g0, gB[i][j][e]), gB[i][j][e + 1] = fmaf(dt[2 * i + e / 2], g1, gB[i][j][e + 1]);
            rows[2 * i + e / 2] += fmaf(B.x, g0, B.y * g1);
        });
        put_rows(rows, f + M::moved_at, first);
    }
    // what goes from the state before the chunk to the one behind it
    DEVICE void keep(const T* in, Sum* f, bool first) const {
        Sum sum = 0.f;
        for (int i = threadIdx.x; i < P * N / M::PAD; i += THREADS) {
            const int at = i / (N / M::PAD) * NS + i % (N / M::PAD) * M::PAD;
            float H[M::PAD], R[M::PAD];
            Packed<T>::from(in + M::H_at + at).unpack(H);
            Packed<T>::from(in + M::R_at + at).unpack(R);
#pragma unroll
            for (int k = 0; k < M::PAD; ++k) sum += (Sum)H[k] * R[k];
        }
        sum = warp_sum(sum);
        if (lane == 0) put(f + M::kept_at + warp, sum * (into(steps(in), Q - 1) * back(in, 0) * back(in, 1)), first);
    }
    DEVICE void inputs(T* in, T* gy, int head, int p0, float undo, float (&gx)[MT][NP][4]) const {
        product<T, MT, NP, true, true>(gx, memory + M::M_at + m0, QS, gy + wn * (8 * NP), PS, Q);
        if (GATE != 0) {
            product<T, MT, NP, true, true>(gx, memory + M::M_at + m0, QS, gy + Q * PS + wn * (8 * NP), PS, Q);
            product<T, MT, NP, true, true>(gx, memory + M::M_at + Q * QS + m0, QS, gy + wn * (8 * NP), PS, Q);
        }
        const float* D = reinterpret_cast<const float*>(p.D);
        each<NP>([&](int t, int col, int i, int j, int e) {
            const int count = t >= lo && t < hi ? p.p - p0 - col : 0;
            gx[i][j][e] *= undo, gx[i][j][e + 1] *= undo;
            if (D != nullptr && count > 0) {
                const float2 g = GATE ? gated(in, t * PS + col) : read_pair(gy + t * PS + col);
                const float* at = D + (int64)head * p.D_head + (p0 + col) * p.D_channel;
                gx[i][j][e] = fmaf(at[0], g.x, gx[i][j][e]);
                if (count > 1) gx[i][j][e + 1] = fmaf(at[p.D_channel], g.y, gx[i][j][e + 1]);
            }
            write_pair<T, ALIGNED>((T*)p.gx + place(t, head, p0 + col, p.gx_row), gx[i][j][e], gx[i][j][e + 1], count);
        });
    }
    DEVICE int64 token(int t) const { return b * p.l + (int64)chunk * Q + t; }
    DEVICE int64 place(int t, int head, int channel, int64 row) const { return token(t) * row + (int64)head * p.p + channel; }
    // the gradient of the gate, which needs y
    DEVICE void gates(const T* in, int head, int p0, float undo) const {
        const float* s = steps(in);
        float y[MT][NP][4];
        clear<NP>(y);
        if (entered) {
            over_states(y, memory + M::C_at + m0 * NS, in + M::H_at + wn * (8 * NP) * NS);
            const float by = back(in, 0) / undo;
            each<NP>([&](int t, int, int i, int j, int e) { y[i][j][e] *= into(s, t) * by, y[i][j][e + 1] *= into(s, t) * by; });
        }
#pragma unroll
        for (int part = 0; part < 2; ++part)
            product<T, MT, NP, false, true>(y, memory + M::M_at + (part * Q + m0) * QS, QS, in + wn * (8 * NP), PS, Q);
        const float* D = reinterpret_cast<const float*>(p.D);
        each<NP>([&](int t, int col, int i, int j, int e) {
            const int count = t >= lo && t < hi ? p.p - p0 - col : 0;
            if (count <= 0) return;
            y[i][j][e] *= undo, y[i][j][e + 1] *= undo;
            const float2 x = read_pair(in + t * PS + col), g = read_pair(in + M::gout_at + t * PS + col), z = read_pair(in + M::z_at + t * PS + col);
            const float* at = D + (int64)head * p.D_head + (p0 + col) * p.D_channel;
            if (D != nullptr) {
                y[i][j][e] = fmaf(at[0], x.x, y[i][j][e]);
                if (count > 1) y[i][j][e + 1] = fmaf(at[p.D_channel], x.y, y[i][j][e + 1]);
            }
            const float s0 = sigmoid(z.x), s1 = sigmoid(z.y);
            const float g0 = g.x * y[i][j][e] * s0 * fmaf(z.x, 1.f - s0, 1.f), g1 = g.y * y[i][j][e + 1] * s1 * fmaf(z.y, 1.f - s1, 1.f);
            write_pair<T, ALIGNED>((T*)p.gz + place(t, head, p0 + col, p.gz_row), g0, g1, count);
        });
    }
    DEVICE void add_to(float* at, Sum x) const { *at = (float)(again ? *at + x : x); }

    // what a warp makes of a head's sums, EACH tokens per lane
    struct HeadSums {
        Sum row[EACH], col[EACH], diag[EACH], moved[EACH], kept, skip;
    };
    DEVICE void gather(const Sum* f, HeadSums& a) const {
        a.kept = a.skip = 0.f;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int t = lane * EACH + i;
            a.row[i] = a.col[i] = a.diag[i] = a.moved[i] = 0.f;
            if (t < lo || t >= hi) continue;
#pragma unroll
            for (int w = 0; w < WN; ++w) {
                a.row[i] += f[M::row_at + w * Q + t];
                if (left) a.moved[i] += f[M::moved_at + w * Q + t];
            }
#pragma unroll
            for (int w = 0; w < WM; ++w) a.col[i] += f[M::col_at + w * Q + t];
            a.diag[i] = f[M::diag_at + t];
            if (GATE == 0) a.skip += f[M::skip_at + t];
        }
        for (int w = 0; w < WM * WN; ++w) {
            if (entered && left) a.kept += f[M::kept_at + w];
            if (GATE && lane == 0) a.skip += f[M::skip_at + w];
        }
    }
    DEVICE void finish(const Sum* f, int head) const {
        HeadSums a;
        gather(f, a);
        // dt, and its derivative behind
        const float* s = p.steps + ((b * p.h + head) * p.chunks + chunk) * Q;
        const int64 slopes = 3 * (int64)p.batch * p.h * p.chunks * Q;
        // what flows to a token less what flows from it, and what goes from it to the state behind the chunk
        const float A = finite_rate(reinterpret_cast<const float*>(p.A)[head]), rate = rate_of(A);
        double ahead[EACH], behind[EACH], from_start = 0., to_end = 0.;
        bool ends[EACH], cut = false;
        float dt[EACH];
#pragma unroll
        for (int i = EACH - 1; i >= 0; --i) {
            const int t = lane * EACH + i;
            // nothing flows past a step that forgets all: digits of what is behind it must not come into sums before it
            ends[i] = t + 1 < Q && forgets(s[t + 1], rate);
            // of another document, it may not be finite
            dt[i] = t >= lo && t < hi ? s[t] : 0.f;
            ahead[i] = a.row[i] - (double)dt[i] * a.col[i];
            to_end = ends[i] ? ahead[i] : to_end + ahead[i];
            cut |= ends[i];
        }
        double rest = sum_before(to_end, cut, 31 - lane);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            behind[i] = from_start;
            from_start += (double)dt[i] * a.moved[i];
        }
        const double before = sum_before(from_start, false, lane);
        Sum gA = 0.f, gbias = 0.f;
#pragma unroll
        for (int i = EACH - 1; i >= 0; --i) {
            const int t = lane * EACH + i;
            rest = ends[i] ? ahead[i] : rest + ahead[i];
            const Sum gc = forgets(dt[i], rate) ? (Sum)0 : (Sum)(rest + before + behind[i] + a.kept);
            const Sum graw = (A * gc + (a.col[i] + a.diag[i] + a.moved[i])) * s[slopes + t];
            if (t >= lo && t < hi) {
                gA += gc * dt[i], gbias += graw;
                const int64 at = token(t) * p.gdt_row + head;
                if (p.wide_dt)
                    reinterpret_cast<float*>(p.gdt)[at] = (float)graw;
                else
                    write_one((T*)p.gdt + at, (float)graw);
            }
        }
        gA = warp_sum(gA), gbias = warp_sum(gbias);
        const Sum skip = warp_sum(a.skip);
        float* to = p.gheads + row * (2 * p.h + p.h * (p.D_channel ? p.p : 1));
        if (lane == 0) {
            add_to(to + head, gA), add_to(to + p.h + head, gbias);
            if (!p.D_channel) add_to(to + 2 * p.h + head, skip);
        }
    }
    // D of every channel
    DEVICE void skips(const T* in, int head, int p0) const {
        float* to = p.gheads + row * (2 * p.h + (int64)p.h * p.p) + 2 * p.h + (int64)head * p.p;
        for (int col = threadIdx.x; col < P && p0 + col < p.p; col += THREADS) {
            Sum sum = 0.f;
            for (int t = lo; t < hi; ++t) {
                const int at = t * PS + col;
                const float g = read_one(in + M::gout_at + at), z = GATE ? read_one(in + M::z_at + at) : 0.f;
                sum += (GATE ? g * z * sigmoid(z) : g) * read_one(in + at);
            }
            add_to(to + p0 + col, sum);
        }
    }

    // all heads, for the tokens of one document
    DEVICE void run() const {
        float gB[MT][NN][4], gC[MT][NN][4], scores[MT][NQ][4], gscores[MT][NQ][4];
        clear<NN>(gB), clear<NN>(gC), clear<NQ>(scores), clear<NQ>(gscores);
        const int64 t0 = (int64)chunk * Q;
        __syncthreads();
        fetch_tile<T, Q, N, NS, THREADS, ALIGNED>(memory, (const T*)p.B + b * p.B_b + t0 * p.B_l + group * p.B_g, p.B_l, lo, hi, p.n);
        fetch_tile<T, Q, N, NS, THREADS, ALIGNED>(memory + M::C_at, (const T*)p.C + b * p.C_b + t0 * p.C_l + group * p.C_g, p.C_l, lo, hi, p.n);
        fetch(0);
        const int count = heads * tiles;
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            T* in = stage(i);
            const int tile = i % tiles, nth = i / tiles, head = first_head + nth, waiting = nth % HEADS;
            Sum* f = sums(waiting);
            copy_async_wait<0>();
            __syncthreads();
            if (STAGES > 1 && i + 1 < count) fetch(i + 1);
            if (i == 0) over_states(scores, memory + M::C_at + m0 * NS, memory + wn * (8 * NQ) * NS);
            float undo_gy = 1.f;
            if constexpr (GATE != 0) {
                undo_gy = gate(in, gy(in), f, tile == 0);
                __syncthreads();
            }
            const float undo = weigh(in, gy(in), scores, gscores, undo_gy, f, tile == 0);
            float gx[MT][NP][4];
            clear<NP>(gx);
            if (entered) read(in, gy(in), gC, undo_gy, f);
            if (left) {
                write(in, gB, f, tile == 0);
                over_states(gx, memory + m0 * NS, in + M::R_at + wn * (8 * NP) * NS);
                const float* s = steps(in);
                each<NP>([&](int t, int, int i, int j, int e) {
                    const float by = onward(s, t) * s[t] * (back(in, 1) / (undo * undo_gy));
                    gx[i][j][e] *= by, gx[i][j][e + 1] *= by;
                });
                if (entered) keep(in, f, tile == 0);
            }
            __syncthreads();
            inputs(in, gy(in), head, tile * P, undo * undo_gy, gx);
            if constexpr (GATE != 0) gates(in, head, tile * P, undo);
            if (p.D_channel) skips(in, head, tile * P);
            if (tile == tiles - 1 && (waiting == HEADS - 1 || i == count - 1))
                for (int w = warp; w <= waiting; w += WM * WN) finish(sums(w), head - waiting + w);
            if (STAGES == 1 && i + 1 < count) {
                __syncthreads();
                fetch(i + 1);
            }
        }
        // the matrix is done with when all have come here
        __syncthreads();
        float by = 1.f, undo = 1.f;
        if constexpr (is_fp16<T>) {
            float largest = 0.f;
            each<NQ>([&](int, int, int i, int j, int e) { largest = fmaxf(largest, fmaxf(fabsf(gscores[i][j][e]), fabsf(gscores[i][j][e + 1]))); });
            normal_range(block_max(largest, scratch(3)), 8, by, undo);
            each<NN>([&](int, int, int i, int j, int e) {
                gB[i][j][e] *= by, gB[i][j][e + 1] *= by, gC[i][j][e] *= by, gC[i][j][e + 1] *= by;
            });
        }
        each<NQ>([&](int to, int from, int i, int j, int e) {
            write_shared_pair(memory + M::M_at + to * QS + from, gscores[i][j][e] * by, gscores[i][j][e + 1] * by);
        });
        __syncthreads();
        product<T, MT, NN, false, true>(gC, memory + M::M_at + m0 * QS, QS, memory + wn * (8 * NN), NS, Q);
        product<T, MT, NN, true, true>(gB, memory + M::M_at + m0, QS, memory + M::C_at + wn * (8 * NN), NS, Q);
        const int64 plane = (int64)p.batch * p.l * p.groups * p.n;
        float* to = p.gBC + 2 * split * plane;
        each<NN>([&](int t, int col, int i, int j, int e) {
            const int there = t >= lo && t < hi ? p.n - col : 0;
            float* at = to + ((b * p.l + t0 + t) * p.groups + group) * p.n + col;
            write_pair<float, ALIGNED>(at, gB[i][j][e] * undo, gB[i][j][e + 1] * undo, there);
            write_pair<float, ALIGNED>(at + plane, gC[i][j][e] * undo, gC[i][j][e + 1] * undo, there);
        });
    }
    // one document after the other
    DEVICE void documents() {
        const int end = p.l - chunk * Q < Q ? p.l - chunk * Q : Q;
        lo = 0, hi = end, again = false, entered = left = true;
        if constexpr (FLAGS & RESET) {
            const uint8* reset = p.reset + b * p.l + (int64)chunk * Q;
            hi = 0;
            while (hi < end) {
                lo = hi++;
                entered = lo == 0 && !reset[0];
                while (hi < end && !reset[hi]) ++hi;
                left = hi == end;
                run();
                again = true;
            }
        } else {
            run();
        }
    }
};

template <class T, int P, int N, int WM, int WN, int STAGES, int HEADS, int FLAGS>
__global__ void __launch_bounds__(32 * WM * WN, 1) ssd_backward_chunks(const SsdBackwardParams p) {
    SHARED_MEMORY(memory);
    using F = BackwardChunks<T, P, N, WM, WN, STAGES, HEADS, FLAGS>;
    const int warp = threadIdx.x / 32, per_group = p.h / p.groups, per_split = (per_group + p.splits - 1) / p.splits;
    int at = blockIdx.x;
    const int split = at % p.splits;
    at /= p.splits;
    const int group = at % p.groups;
    at /= p.groups;
    const int chunk = at % p.chunks, first = split * per_split, last = first + per_split < per_group ? first + per_split : per_group;
    // every other row of warps from right to left: those above the diagonal, who have less to do, share a scheduler with others
    F f{{}, p, reinterpret_cast<T*>(memory), at / p.chunks, at, chunk, group, split, group * per_group + first, last - first, (p.p + P - 1) / P,
        warp, (int)threadIdx.x % 32, warp / WN * (F::Q / WM), warp / WN % 2 ? WN - 1 - warp % WN : warp % WN};
    f.documents();
}

// Sums of B's and C's gradients over the shares of a group, then those of what heads have one of over batch and chunks
template <class T>
__global__ void __launch_bounds__(256) ssd_backward_sums(const SsdBackwardParams p) {
    SHARED_ARRAY(double, shared, 256);
    const int64 plane = (int64)p.batch * p.l * p.groups * p.n, blocks = (2 * plane + 255) / 256;
    if (blockIdx.x < blocks) {
        const int64 i = (int64)blockIdx.x * 256 + threadIdx.x;
        if (i >= 2 * plane) return;
        float sum = 0.f;
        for (int s = 0; s < p.splits; ++s) sum += p.gBC[2 * s * plane + i];
        const int64 at = i < plane ? i : i - plane, wide = p.groups * p.n;
        // a division of 64 bits takes as long as the sum
        const int64 token = plane < 1ll << 31 ? (uint32)at / (uint32)wide : at / wide;
        write_one((T*)(i < plane ? p.gB : p.gC) + token * p.gBC_row + (at - token * wide), sum);
        return;
    }
    // 32 columns per block, eight threads each, whose sums are added in their order
    const int lane = threadIdx.x % 32, m = threadIdx.x / 32, rows = p.batch * p.chunks;
    const int64 size = 2 * p.h + (int64)p.h * (p.D_channel ? p.p : 1), at = (blockIdx.x - blocks) * 32 + lane;
    double part[4] = {0., 0., 0., 0.};
    if (at < size)
        for (int row = m; row < rows; row += 32)
#pragma unroll
            for (int i = 0; i < 4; ++i) part[i] += row + 8 * i < rows ? p.gheads[(row + 8 * i) * size + at] : 0.f;
    shared[threadIdx.x] = (part[0] + part[1]) + (part[2] + part[3]);
    __syncthreads();
    if (m > 0 || at >= size) return;
    double sum = 0.;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += shared[i * 32 + lane];
    if (at < p.h)
        p.gA[at] = (float)sum;
    else if (at < 2 * p.h)
        p.gbias[at - p.h] = (float)sum;
    else
        p.gD[at - 2 * p.h] = (float)sum;
}
