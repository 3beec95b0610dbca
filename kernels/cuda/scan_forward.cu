// The selective scan, forward: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = C_t h_t + D u_t,  out_t = y_t silu(z_t).
//
// A block owns CPB channels of one row and walks over time in tiles of TT steps.  Its first NC threads ("scanners") hold the state:
// LN lanes share a channel, each has NS of its states in registers, for CH channels.  The other NH threads ("helpers") bring in the
// next tile (conversion, bias, softplus) and finish the last one (sum over the lanes, skip, gate, store) while the scanners work on
// the current one; shared memory holds two of each, and one barrier per tile keeps them in step.
#include "common.cuh"

struct ForwardParams {
    const void *u, *dt, *B, *C, *z;  // (b, l, d) and (b, l, g, n), contiguous in d and in n
    const float *A, *D, *bias;       // (d, n), (d), (d)
    const float* h0;                 // (b, d, n), or (b, chunks, d, n) where the length is split
    const uint8 *reset, *valid;      // (b, l)
    void* out;                       // (b, l, d)
    float* last;                     // (b, d, n)
    float* saved;                    // (b, l / K, d, n): the state before step c K
    float *local, *decay;            // STATE: (b, chunks, d, n) and (b, chunks, d, 2): what a chunk adds, and its sum of dt
    const float* before;             // WALK: (b, l, d), what earlier walks add up to, or null
    float* sum;                      // WALK: the same with this walk, in place of out; null for the last one
    int64 u_b, u_l, dt_b, dt_l, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, out_b, out_l;
    Walk walk;
    int l, chunk_len, batch, d, n, groups, tiles_per_group, chunks, softplus;
};

enum Mode { FULL = 0, STATE = 1, ADJOINT = 2 };  // ADJOINT: r_t = a_t (r_{t+1} + C_t dout_t silu(z_t)), backwards in time

// Where slot `slot` of row `row` (16 bytes each) stands, so that scanners and helpers, who go through a row differently, both find their
// slots in different banks.  swizzle(row, s + k) is swizzle(row, s) ^ swizzle(0, k) for k below the largest power of two dividing s.
DEVICE constexpr int swizzle(int row, int slot) { return slot ^ ((slot >> 3) & 3) ^ ((row & 1) << 2); }

// Shared memory: two stages of what scanners read, two of what they leave, and, in flight or waiting for their use, the raw tiles.
template <int ELEMENT, int NC, int NS, int LN, int CH, int TT, int MODE>
struct ForwardShape {
    static constexpr int N = NS * LN, CPB = NC / LN * CH;
    // a scanner of one channel reads 16-bit B and C as they came: fewer bytes of shared memory, which is what it waits for
    static constexpr bool PACKED = ELEMENT == 2 && CH == 1 && N >= 8 && LN > 2;
    static constexpr int pair_floats = TT * CPB * 2, bc_floats = PACKED ? 0 : TT * N;
    static constexpr int stage_floats = pair_floats + bc_floats * (MODE == FULL ? 2 : 1) + TT;
    static constexpr int part_floats = MODE == FULL ? TT * CPB * LN : 0;
    static constexpr int floats = 2 * (stage_floats + part_floats);
    static constexpr int lanes = 16 / ELEMENT, bc_lanes = N < lanes ? N : lanes;
    static constexpr int wide_bytes = TT * CPB * ELEMENT, bc_bytes = TT * N / bc_lanes * 16 * (MODE == FULL ? 2 : 1);
    // u lives from two tiles before its use to one tile after it, dt until it is staged, z while its tile is finished
    static constexpr int U_SLOTS = MODE == FULL ? 4 : 2, BC_SLOTS = PACKED ? 3 : 2;
    static constexpr int dt_at = U_SLOTS * wide_bytes, z_at = dt_at + 2 * wide_bytes, bc_at = z_at + 2 * wide_bytes;
    static constexpr int bytes = floats * 4 + bc_at + BC_SLOTS * bc_bytes;
};

template <class T, int NC, int NS, int LN, int CH, int TT, int NH, int K, int MODE, int FLAGS>
struct Forward {
    using S = ForwardShape<sizeof(T), NC, NS, LN, CH, TT, MODE>;
    using P = Packed<T>;
    static constexpr int N = S::N, CPB = S::CPB, V = P::lanes, ROW = CPB / V, IT = (TT * ROW + NH - 1) / NH;
    static constexpr int BV = S::bc_lanes, BROW = N / BV, BIT = (TT * BROW + NH - 1) / NH;
    static constexpr int PSLOTS = CPB * LN / 4;  // float4 slots in a row of partial outputs

    static constexpr bool ALIGNED = !(FLAGS & UNALIGNED);
    // barriers, each for even and odd tiles
    static constexpr int STAGED = 1, SCANNED = 3;

    const ForwardParams& p;
    float* smem;
    int ch0, ch_end, group, t0, len, chunk;
    int64 b;

    DEVICE float* stage(int tile) const { return smem + (tile & 1) * S::stage_floats; }
    DEVICE float* part(int tile) const { return smem + 2 * S::stage_floats + (tile & 1) * S::part_floats; }
    DEVICE char* raw() const { return reinterpret_cast<char*>(smem + S::floats); }
    DEVICE char* raw_u(int tile) const { return raw() + tile % S::U_SLOTS * S::wide_bytes; }
    DEVICE char* raw_dt(int tile) const { return raw() + S::dt_at + tile % 2 * S::wide_bytes; }
    DEVICE char* raw_z(int tile) const { return raw() + S::z_at + tile % 2 * S::wide_bytes; }
    DEVICE char* raw_bc(int tile) const { return raw() + S::bc_at + tile % S::BC_SLOTS * S::bc_bytes; }
    DEVICE int token(int s) const {
        int t = MODE == ADJOINT ? t0 + len - 1 - s : t0 + s;
        if constexpr (FLAGS & WALK) t = p.walk.token(t);
        return t;
    }

    // ---- scanners
    struct Carry {
        float h[CH][NS], a2[CH][NS], sum[CH], keep;
    };

    // what one step needs from shared memory
    struct Input {
        float pair[2 * CH], B[NS], C[NS], keep;
    };

    DEVICE void step(Carry& s, const Input& in, float (&y)[CH]) const {
#pragma unroll
        for (int c = 0; c < CH; ++c) {
            const float dt = in.pair[2 * c], x = in.pair[2 * c + 1];
            y[c] = 0.f;
#pragma unroll
            for (int j = 0; j < NS; ++j) {
                float a = decay_of<T>(dt, s.a2[c][j]);
                if constexpr (FLAGS & RESET) a = in.keep == 0.f ? 0.f : a;
                if constexpr (MODE == ADJOINT)
                    s.h[c][j] = a * fmaf(in.B[j], x, s.h[c][j]);
                else
                    s.h[c][j] = fmaf(a, s.h[c][j], x * in.B[j]);
                if constexpr (MODE == FULL) y[c] = fmaf(s.h[c][j], in.C[j], y[c]);
            }
            if constexpr (MODE != FULL) s.sum[c] += dt;
        }
        if constexpr (MODE != FULL && (FLAGS & RESET)) s.keep *= in.keep;
    }

    DEVICE void store_states(float* at, const Carry& s, int cg, int q) const {
#pragma unroll
        for (int c = 0; c < CH; ++c) {
            int ch = ch0 + cg * CH + c;
            if (ch >= ch_end) continue;
            float* to = at + (int64)ch * p.n + q * NS;
            if (p.n == N) {
                store_shared<NS>(to, s.h[c]);
            } else {
#pragma unroll
                for (int j = 0; j < NS; ++j)
                    if (q * NS + j < p.n) to[j] = s.h[c][j];
            }
        }
    }

    DEVICE void save_if_boundary(const Carry& s, int t, int cg, int q) const {
        if constexpr (MODE != ADJOINT) {
            if (p.saved != nullptr && t % K == 0 && t < p.l)
                store_states(p.saved + (b * ((p.l + K - 1) / K) + t / K) * p.d * p.n, s, cg, q);
        }
    }

    // where a scanner finds and leaves things in a tile, for even and odd rows
    struct View {
        const float *pairs, *Bs, *Cs, *keep;
        const T *packed_B, *packed_C;
        float* ys;
        int in_slot[2], out_slot[2][CH];
    };

    template <int W>
    DEVICE void read(const View& v, int t, Input (&in)[W]) const {
        if constexpr (CH == 1) {
#pragma unroll
            for (int r = 0; r < W; r += 2) {
                float both[4];
                load_shared<4>(v.pairs + (t + r) / 2 * CPB * 4 + v.in_slot[((t + r) / 2) & 1], both);
                in[r].pair[0] = both[0], in[r].pair[1] = both[1], in[r + 1].pair[0] = both[2], in[r + 1].pair[1] = both[3];
            }
        }
#pragma unroll
        for (int r = 0; r < W; ++r) {
            if constexpr (CH > 1) {
#pragma unroll
                for (int k = 0; k < CH / 2; ++k) {
                    float both[4];
                    load_shared<4>(v.pairs + (t + r) * (CPB * 2) + (v.in_slot[r & 1] ^ swizzle(0, k) * 4), both);
#pragma unroll
                    for (int m = 0; m < 4; ++m) in[r].pair[4 * k + m] = both[m];
                }
            }
            if constexpr (S::PACKED) {
                read_packed<T, NS>(v.packed_B + (t + r) * N, in[r].B);
                if constexpr (MODE == FULL) read_packed<T, NS>(v.packed_C + (t + r) * N, in[r].C);
            } else {
                load_shared<NS>(v.Bs + (t + r) * N, in[r].B);
                if constexpr (MODE == FULL) load_shared<NS>(v.Cs + (t + r) * N, in[r].C);
            }
            if constexpr (FLAGS & RESET) in[r].keep = v.keep[t + r];
        }
    }

    DEVICE void scan_tile(Carry& s, int tile, int cg, int q) const {
        View v;
        v.pairs = stage(tile), v.Bs = v.pairs + S::pair_floats + q * NS, v.Cs = v.Bs + S::bc_floats;
        v.keep = v.pairs + S::stage_floats - TT, v.ys = part(tile);
        v.packed_B = reinterpret_cast<const T*>(raw_bc(tile)) + q * NS;
        v.packed_C = v.packed_B + TT * N;
        const int flat = cg * CH * LN + q, t_first = t0 + tile * TT;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            v.in_slot[r] = swizzle(r, CH == 1 ? cg : cg * (CH / 2)) * 4;
#pragma unroll
            for (int c = 0; c < CH; ++c) v.out_slot[r][c] = swizzle(r, (flat + c * LN) >> 2) * 4 + ((flat + c * LN) & 3);
        }
        // Stores of partial outputs and loads of inputs may not change places (for all the compiler knows they overlap), so the inputs of
        // the next W steps are loaded before the outputs of these are stored.
        constexpr int W = 2, U = TT < 8 ? TT : 8;
        Input in[W], next[W];
        read(v, 0, in);
        if constexpr (K >= TT) save_if_boundary(s, t_first, cg, q);
#pragma unroll 1
        for (int t1 = 0; t1 < TT; t1 += U) {
#pragma unroll
            for (int t2 = 0; t2 < U; t2 += W) {
                if constexpr (K < TT)
                    if (t2 == 0) save_if_boundary(s, t_first + t1, cg, q);
                // at the end of the tile, steps that nobody uses
                read(v, t2 + W < U ? t1 + t2 + W : t1 + U < TT ? t1 + U : 0, next);
                float y[W][CH];
#pragma unroll
                for (int r = 0; r < W; ++r) step(s, in[r], y[r]);
                if constexpr (MODE == FULL) {
#pragma unroll
                    for (int r = 0; r < W; ++r)
#pragma unroll
                        for (int c = 0; c < CH; ++c) v.ys[(t1 + t2 + r) * PSLOTS * 4 + v.out_slot[r & 1][c]] = y[r][c];
                }
#pragma unroll
                for (int r = 0; r < W; ++r) in[r] = next[r];
            }
        }
    }

    DEVICE void scanner(int tid, int tiles) const {
        const int q = tid % LN, cg = tid / LN;
        Carry s;
        s.keep = 1.f;
        const float* h0 = MODE != FULL || p.h0 == nullptr ? nullptr : p.h0 + (b * p.chunks + chunk) * p.d * p.n;
#pragma unroll
        for (int c = 0; c < CH; ++c) {
            s.sum[c] = 0.f;
            int ch = ch0 + cg * CH + c;
#pragma unroll
            for (int j = 0; j < NS; ++j) {
                bool ok = ch < ch_end && q * NS + j < p.n;
                int64 at = (int64)ch * p.n + q * NS + j;
                s.a2[c][j] = ok ? p.A[at] * LOG2E : 0.f;
                s.h[c][j] = ok && h0 != nullptr ? h0[at] : 0.f;
            }
        }
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
            barrier_wait(STAGED + (tile & 1), NC + NH);
            scan_tile(s, tile, cg, q);
            barrier_arrive(SCANNED + (tile & 1), NC + NH);
        }
        if constexpr (MODE == FULL) {
            if (p.last != nullptr && chunk == p.chunks - 1) store_states(p.last + b * p.d * p.n, s, cg, q);
        } else if (p.local != nullptr) {
            store_states(p.local + (b * p.chunks + chunk) * p.d * p.n, s, cg, q);
#pragma unroll
            for (int c = 0; c < CH; ++c) {
                int ch = ch0 + cg * CH + c;
                if (q == 0 && ch < ch_end) {
                    float* to = p.decay + ((b * p.chunks + chunk) * p.d + ch) * 2;
                    to[0] = s.sum[c], to[1] = s.keep;
                }
            }
        }
    }

    // ---- helpers
    struct Place {
        int t, col, count;  // step inside the tile, channel inside the block, channels there
        DEVICE Place(int hid, int it, int channels) {
            int v = hid + it * NH;
            t = v / ROW, col = v % ROW * V;
            count = TT * ROW % NH == 0 || v < TT * ROW ? channels - col : 0;
            count = count < 0 ? 0 : count > V ? V : count;
        }
    };

    // Where a helper's vectors of a tensor lie: its first one of a tile, how far it is from one to the next, and from tile to tile.  Tiles
    // are visited in order, and `at` goes along.
    struct Source {
        const char* at;
        int64 next, tile;  // bytes, or, on a walk, the stride of a token
    };
    DEVICE static int direction() { return MODE == ADJOINT ? -1 : 1; }
    DEVICE Source source(const void* x, int64 offset, int64 stride, int t, int64 col, int rows) const {
        const int64 down = stride * direction(), first = MODE == ADJOINT ? t0 + len - 1 : t0;
        constexpr int64 size = sizeof(T);
        if constexpr (FLAGS & WALK) return {(const char*)x + (offset + col) * size, stride * size, 0};
        return {(const char*)x + (offset + first * stride + t * down + col) * size, rows * down * size, TT * down * size};
    }
    struct Sources {
        Source wide[3], bc[2];  // u or gout, dt, z; B, C
    };

    DEVICE Sources sources(int hid) const {
        const int t = hid / ROW, col = hid % ROW * V, rows = NH / ROW, tb = hid / BROW, n = hid % BROW * BV, rows_b = NH / BROW;
        return {{source(p.u, b * p.u_b + ch0, p.u_l, t, col, rows), source(p.dt, b * p.dt_b + ch0, p.dt_l, t, col, rows),
                 source(p.z, b * p.z_b + ch0, p.z_l, t, col, rows)},
                {source(p.B, b * p.B_b + group * p.B_g, p.B_l, tb, n, rows_b), source(p.C, b * p.C_b + group * p.C_g, p.C_l, tb, n, rows_b)}};
    }

    DEVICE const T* vector(const Source& x, int tile, int it, int t) const {
        if constexpr (FLAGS & WALK) return (const T*)(x.at + (int64)token(tile * TT + t) * x.next);
        return (const T*)(x.at + it * x.next);
    }

    // WHOLE: every step and every channel of the tile is there, as in all tiles but a few
    template <bool WHOLE>
    DEVICE void fetch_wide(char* to, Source& x, int tile, int hid, int channels) const {
#pragma unroll
        for (int it = 0; it < IT; ++it) {
            const Place at(hid, it, channels);
            if (TT * ROW % NH != 0 && at.t >= TT) continue;
            const int count = WHOLE ? V : tile * TT + at.t < len ? at.count : 0;
            P::template fetch<ALIGNED>(to + (hid + it * NH) * 16, count > 0 ? vector(x, tile, it, at.t) : (const T*)p.u, count);
        }
        x.at += x.tile;
    }

    template <bool WHOLE>
    DEVICE void fetch_bc(char* to, Source& x, int tile, int hid) const {
#pragma unroll
        for (int it = 0; it < BIT; ++it) {
            const int v = hid + it * NH, t = v / BROW, count = WHOLE ? BV : tile * TT + t < len ? p.n - v % BROW * BV : 0;
            if (TT * BROW % NH != 0 && v >= TT * BROW) continue;
            P::template fetch<ALIGNED && BV == V>(to + v * 16, count > 0 ? vector(x, tile, it, t) : (const T*)p.u, count);
        }
        x.at += x.tile;
    }

    template <bool WHOLE>
    DEVICE void fetch_tile(int tile, Sources& x, int hid, int channels) const {
        fetch_wide<WHOLE>(raw_u(tile), x.wide[0], tile, hid, channels);
        fetch_wide<WHOLE>(raw_dt(tile), x.wide[1], tile, hid, channels);
        fetch_bc<WHOLE>(raw_bc(tile), x.bc[MODE == ADJOINT], tile, hid);
        if (MODE == FULL) fetch_bc<WHOLE>(raw_bc(tile) + S::bc_bytes / 2, x.bc[1], tile, hid);
    }

    DEVICE void fetch(int tile, Sources& x, int hid, int channels) const {
        const bool wide = ALIGNED && channels >= CPB;
        if ((tile + 1) * TT <= len && wide && p.n == N)
            fetch_tile<true>(tile, x, hid, channels);
        else if (tile * TT < len)
            fetch_tile<false>(tile, x, hid, channels);
        // the adjoint takes z when it stages a tile, the forward when it finishes one
        const int gate = MODE == ADJOINT ? tile : tile - 2;
        if (MODE != STATE && p.z != nullptr && gate >= 0) {
            if ((gate + 1) * TT <= len && wide)
                fetch_wide<true>(raw_z(gate), x.wide[2], gate, hid, channels);
            else if (gate * TT < len)
                fetch_wide<false>(raw_z(gate), x.wide[2], gate, hid, channels);
        }
        copy_async_commit();
    }

    DEVICE void stage_bc(float* to, const char* from, int hid) const {
#pragma unroll
        for (int it = 0; it < BIT; ++it) {
            int v = hid + it * NH;
            if (v >= TT * BROW) continue;
            float x[V], y[BV];
            P::from(from + v * 16).unpack(x);
#pragma unroll
            for (int j = 0; j < BV; ++j) y[j] = x[j];
            store_shared<BV>(to + v * BV, y);
        }
    }

    // (dt, dt u), or (dt, dout silu(z)) for the adjoint, as the scanners read them
    DEVICE void stage_pairs(int tile, const Place& at, int v, const float (&bias)[V]) const {
        if (TT * ROW % NH != 0 && at.t >= TT) return;
        float* pairs = stage(tile);
        float dt[V], x[V];
        P::from(raw_dt(tile) + v * 16).unpack(dt);
        P::from(raw_u(tile) + v * 16).unpack(x);
        const int s = tile * TT + at.t;
        if constexpr (FLAGS & RESET) {
            if (at.col == 0) stage(tile)[S::stage_floats - TT + at.t] = s < len && p.reset[b * p.l + token(s)] ? 0.f : 1.f;
        }
        if constexpr (MODE == ADJOINT) {
            if (p.z != nullptr) {
                float z[V];
                P::from(raw_z(tile) + v * 16).unpack(z);
#pragma unroll
                for (int j = 0; j < V; ++j) x[j] *= z[j] * sigmoid(z[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            // chosen afterwards: a branch would keep one channel from going on while another waits
            const float biased = dt[j] + bias[j], soft = softplus<sizeof(T) == 2>(biased);
            dt[j] = p.softplus ? soft : biased;
        }
        if (p.valid != nullptr || (tile + 1) * TT > len) {
            const bool there = s < len && (p.valid == nullptr || p.valid[b * p.l + token(s)] != 0);
#pragma unroll
            for (int j = 0; j < V; ++j) dt[j] = there ? dt[j] : 0.f;
        }
        if constexpr (MODE != ADJOINT) {
#pragma unroll
            for (int j = 0; j < V; ++j) x[j] *= dt[j];
        }
        if constexpr (CH == 1) {
            float* row = pairs + at.t / 2 * CPB * 4 + (at.t & 1) * 2;
            const int slot = swizzle(at.t >> 1, at.col) * 4;
#pragma unroll
            for (int j = 0; j < V; ++j)
                *reinterpret_cast<float2*>(row + (slot ^ swizzle(0, j) * 4)) = make_float2(dt[j], x[j]);
        } else {
            float* row = pairs + at.t * (CPB * 2);
            const int slot = swizzle(at.t, at.col / 2) * 4;
#pragma unroll
            for (int j = 0; j < V; j += 2)
                *reinterpret_cast<float4*>(row + (slot ^ swizzle(0, j / 2) * 4)) =
                    make_float4(dt[j], x[j], dt[j + 1], x[j + 1]);
        }
    }

    DEVICE int64 place(int s, const Place& at) const { return (b * p.l + token(s)) * p.d + ch0 + at.col; }

    DEVICE void read_before(int tile, const Place& at, float (&x)[V]) const {
        const int s = tile * TT + at.t, count = p.before != nullptr && s >= 0 && s < len ? at.count : 0;
        const float* from = count > 0 ? p.before + place(s, at) : nullptr;
#pragma unroll
        for (int j = 0; j < V; j += 4) {
            float four[4];
            Packed<float>::load<ALIGNED>(from + j, count - j).unpack(four);
#pragma unroll
            for (int k = 0; k < 4; ++k) x[j + k] = four[k];
        }
    }

    DEVICE void finish(int tile, const Source& out, const Place& at, int it, int v, const float (&skip)[V], const float (&before)[V]) const {
        const int s = tile * TT + at.t;
        if (s >= len || at.count == 0) return;
        const float4* row = reinterpret_cast<const float4*>(part(tile)) + at.t * PSLOTS;
        float y[V], u[V];
        P::from(raw_u(tile) + v * 16).unpack(u);
        const int slot = swizzle(at.t, at.col * LN / 4);
#pragma unroll
        for (int j = 0; j < V; ++j) y[j] = 0.f;
#pragma unroll
        for (int k = 0; k < V * LN / 4; ++k) {
            float4 w = row[slot ^ swizzle(0, k)];
            if constexpr (LN >= 4) {
                y[k * 4 / LN] += (w.x + w.y) + (w.z + w.w);
            } else if constexpr (LN == 2) {
                y[2 * k] = w.x + w.y, y[2 * k + 1] = w.z + w.w;
            } else {
                y[4 * k] = w.x, y[4 * k + 1] = w.y, y[4 * k + 2] = w.z, y[4 * k + 3] = w.w;
            }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) y[j] = fmaf(skip[j], u[j], y[j]);
        if constexpr (FLAGS & WALK) {
#pragma unroll
            for (int j = 0; j < V; ++j) y[j] += before[j];
            if (p.sum != nullptr) {
                float* to = p.sum + place(s, at);
#pragma unroll
                for (int j = 0; j < V; j += 4) {
                    const float four[4] = {y[j], y[j + 1], y[j + 2], y[j + 3]};
                    Packed<float>::pack(four).template store<ALIGNED>(to + j, at.count - j);
                }
                return;
            }
        }
        if (p.z != nullptr) {
            float z[V];
            P::from(raw_z(tile) + v * 16).unpack(z);
#pragma unroll
            for (int j = 0; j < V; j += 2) {
                float g0, g1;
                sigmoid2(z[j], z[j + 1], g0, g1);
                y[j] *= z[j] * g0, y[j + 1] *= z[j + 1] * g1;
            }
        }
        P::pack(y).template store<ALIGNED>(const_cast<T*>(vector(out, tile, it, at.t)), at.count);
    }

    DEVICE void helper(int hid, int tiles) const {
        const int channels = ch_end - ch0;
        static_assert(NH % ROW == 0, "a helper keeps to its channels");
        float skip[V], bias[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const int ch = ch0 + hid % ROW * V + j;
            skip[j] = ch < ch_end && p.D != nullptr ? p.D[ch] : 0.f;
            bias[j] = ch < ch_end && p.bias != nullptr ? p.bias[ch] : 0.f;
        }
        static_assert(NH % BROW == 0, "");
        Sources rows = sources(hid);
        Source out = source(p.out, b * p.out_b + ch0, p.out_l, hid / ROW, hid % ROW * V, NH / ROW);
        fetch(0, rows, hid, channels);
#pragma unroll 1
        for (int tile = -1; tile <= tiles; ++tile) {
            // while scanners are on `tile`: fetch tile + 2, finish tile - 1, bring in tile + 1
            float before[IT][V];
            if constexpr (MODE == FULL && (FLAGS & WALK)) {
#pragma unroll
                for (int it = 0; it < IT; ++it) read_before(tile - 1, Place(hid, it, channels), before[it]);
            }
            if (tile > 0) barrier_wait(SCANNED + (tile - 1 & 1), NC + NH);
            fetch(tile + 2, rows, hid, channels);
            copy_async_wait<1>();
            if (MODE == FULL && tile > 0) {
#pragma unroll
                for (int it = 0; it < IT; ++it) finish(tile - 1, out, Place(hid, it, channels), it, hid + it * NH, skip, before[it]);
                out.at += out.tile;
            }
            if (tile + 1 < tiles) {
#pragma unroll
                for (int it = 0; it < IT; ++it) stage_pairs(tile + 1, Place(hid, it, channels), hid + it * NH, bias);
                if constexpr (!S::PACKED) {
                    float* to = stage(tile + 1) + S::pair_floats;
                    stage_bc(to, raw_bc(tile + 1), hid);
                    if constexpr (MODE == FULL) stage_bc(to + S::bc_floats, raw_bc(tile + 1) + S::bc_bytes / 2, hid);
                }
                barrier_arrive(STAGED + (tile + 1 & 1), NC + NH);
            }
        }
    }
};

template <class T, int NC, int NS, int LN, int CH, int TT, int NH, int K, int MODE, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(NC + NH, MIN_BLOCKS) scan_forward(const ForwardParams p) {
    SHARED_MEMORY(memory);
    using F = Forward<T, NC, NS, LN, CH, TT, NH, K, MODE, FLAGS>;
    const int tiles_d = p.tiles_per_group * p.groups, tile_d = blockIdx.x % tiles_d;
    const int rest = blockIdx.x / tiles_d, group = tile_d / p.tiles_per_group, per_group = p.d / p.groups;
    // on the way back there is nothing before the first chunk that asks for its sums
    const int chunk = rest / p.batch + (MODE == ADJOINT);
    const int t0 = chunk * p.chunk_len;
    F f{p, reinterpret_cast<float*>(memory), group * per_group + tile_d % p.tiles_per_group * F::CPB, (group + 1) * per_group, group,
        t0, p.l - t0 < p.chunk_len ? p.l - t0 : p.chunk_len, chunk, rest % p.batch};
    const int tiles = (f.len + TT - 1) / TT;
    if (threadIdx.x < NC)
        f.scanner(threadIdx.x, tiles);
    else
        f.helper(threadIdx.x - NC, tiles);
}

// Between chunks: H_{c+1} = exp(A sum dt) H_c + local_c, from the left, or from the right for the adjoint.  `local` becomes H.
struct CarryParams {
    const float *A, *decay, *first;  // (d, n), (b, chunks, d, 2), (b, d, n) or null
    float* local;                    // (b, chunks, d, n)
    int64 total;                     // b d n
    int d, n, chunks, reverse;
};

__global__ void __launch_bounds__(256) scan_carry(const CarryParams p) {
    const int64 i = blockIdx.x * (int64)256 + threadIdx.x;
    if (i >= p.total) return;
    const int64 dn = (int64)p.d * p.n, b = i / dn, at = i - b * dn;
    const float a2 = p.A[at] * LOG2E;
    float h = p.first == nullptr ? 0.f : p.first[i];
    // four chunks are read before any of them is written, or each would wait for the one before
    constexpr int TOGETHER = 4;
    for (int k = 0; k < p.chunks; k += TOGETHER) {
        float* to[TOGETHER];
        float local[TOGETHER], sum[TOGETHER], keep[TOGETHER];
#pragma unroll
        for (int m = 0; m < TOGETHER; ++m) {
            const bool there = k + m < p.chunks;
            const int64 c = b * p.chunks + (!there ? 0 : p.reverse ? p.chunks - 1 - k - m : k + m);
            const float* s = p.decay + (c * p.d + at / p.n) * 2;
            to[m] = there ? p.local + c * dn + at : nullptr;
            local[m] = there ? *to[m] : 0.f, sum[m] = s[0], keep[m] = s[1];
        }
#pragma unroll
        for (int m = 0; m < TOGETHER; ++m) {
            if (to[m] == nullptr) continue;
            *to[m] = h;
            h = (keep[m] == 0.f ? 0.f : decay_of<float>(sum[m], a2) * h) + local[m];
        }
    }
}
