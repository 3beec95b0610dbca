// The selective scan, forward: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = C_t h_t + D u_t,  out_t = y_t silu(z_t).
//
// A block owns CPB channels of one row and walks over time in tiles of TT steps.  Its first NC threads ("scanners") hold the state:
// LN lanes share a channel, each has NS of its states in registers, for CH channels.  The other NH threads ("helpers") bring in the
// next tile (conversion, bias, softplus) and finish the last one (sum over the lanes, skip, gate, store) while the scanners work on
// the current one; shared memory holds two of each, and one barrier per tile keeps them in step.
#include "low_rank.cuh"

struct ForwardParams {
    const void *u, *dt, *B, *C, *z;  // (b, l, d) and (b, l, g, n), contiguous in d and in n
    const float *A, *D, *bias;       // (d, n), (d), (d)
    const float* h0;                 // (b, d, n)
    const uint8 *reset, *valid;      // (b, l)
    void* out;                       // (b, l, d)
    float* last;                     // (b, d, n)
    float* saved;                    // (b, l / K, d, n): the state before step c K
    float *local, *decay;            // (cut pieces, d, n) and (cut pieces, d, 2): what a piece adds, and its sum of dt; STATE, ADJOINT write it
    const float* before;             // WALK: (b, l, d), what earlier walks add up to, or null
    float* sum;                      // WALK: the same with this walk, in place of out; null for the last one
    const void* weight;              // LOW_RANK: (d, rank), of which dt, here (b, l, rank), is formed
    int64 u_b, u_l, dt_b, dt_l, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, out_b, out_l;
    Walk walk;
    LengthCut cut;
    int l, batch, d, n, groups, tiles_per_group, softplus, rank, first_tiles;
};

enum Mode { FULL = 0, STATE = 1, ADJOINT = 2 };  // ADJOINT: r_t = a_t (r_{t+1} + C_t dout_t silu(z_t)), backwards in time

// Where slot `i` (16 bytes) of a row stands: with a gap behind every eighth, scanners, who take neighbouring slots, and helpers, who take
// every eighth, both find theirs in different banks.
DEVICE constexpr int padded(int i) { return i + i / 8; }

// Shared memory: two stages of what scanners read, two of what they leave, and, in flight or waiting for their use, the raw tiles.
template <int ELEMENT, int NC, int NS, int LN, int CH, int TT, int MODE, bool LOW>
struct ForwardShape {
    static constexpr int N = NS * LN, CPB = NC / LN * CH;
    // slots of a row: (dt, x) of two steps for every channel, and a step's partial outputs
    static constexpr int PAIR_ROW = padded(CPB), PART_ROW = padded(CPB * LN / 4);
    static constexpr int pair_floats = TT / 2 * PAIR_ROW * 4, bc_floats = TT * N;
    static constexpr int stage_floats = pair_floats + bc_floats * (MODE == FULL ? 2 : 1) + TT;
    static constexpr int part_floats = MODE == FULL ? TT * PART_ROW * 4 : 0;
    static constexpr int floats = 2 * (stage_floats + part_floats);
    static constexpr int lanes = 16 / ELEMENT, bc_lanes = N < lanes ? N : lanes;
    static constexpr int wide_bytes = TT * CPB * ELEMENT, bc_bytes = TT * N / bc_lanes * 16 * (MODE == FULL ? 2 : 1);
    // u lives from two tiles before its use to one tile after it, dt until it is staged, z while its tile is finished
    static constexpr int U_SLOTS = MODE == FULL ? 4 : 2;
    // one tile of dt, formed out of its low-rank form, which is brought in two tiles before, takes the place of two that are brought in;
    // rows of that form start in different banks
    static constexpr int low_row = MAX_RANK + 8, low_bytes = TT * low_row * 2, dt_at = U_SLOTS * wide_bytes, low_at = dt_at + wide_bytes;
    static constexpr int z_at = low_at + (LOW ? 3 * low_bytes : wide_bytes), bc_at = z_at + 2 * wide_bytes;
    static constexpr int bytes = floats * 4 + bc_at + 2 * bc_bytes;
};

template <class T, int NC, int NS, int LN, int CH, int TT, int NH, int K, int MODE, int FLAGS>
struct Forward {
    static constexpr bool LOW = FLAGS & LOW_RANK;
    using S = ForwardShape<sizeof(T), NC, NS, LN, CH, TT, MODE, LOW>;
    using P = Packed<T>;
    static constexpr int N = S::N, CPB = S::CPB, V = P::lanes, ROW = CPB / V, IT = (TT * ROW + NH - 1) / NH;
    static constexpr int BV = S::bc_lanes, BROW = N / BV, BIT = (TT * BROW + NH - 1) / NH;

    static constexpr int SCANNERS = NC, STEPS = TT;
    static constexpr bool ALIGNED = !(FLAGS & UNALIGNED), NARROW_ALIGNED = !(FLAGS & NARROW);
    // barriers, those between scanners and helpers for even and for odd tiles
    static constexpr int STAGED = 1, SCANNED = 3, HELPERS = 5;

    const ForwardParams& p;
    float* smem;
    int ch0, ch_end, group, t0, len, chunk;
    int64 b;

    DEVICE float* stage(int tile) const { return smem + (tile & 1) * S::stage_floats; }
    DEVICE float* part(int tile) const { return smem + 2 * S::stage_floats + (tile & 1) * S::part_floats; }
    DEVICE char* raw() const { return reinterpret_cast<char*>(smem + S::floats); }
    DEVICE char* raw_u(int tile) const { return raw() + tile % S::U_SLOTS * S::wide_bytes; }
    DEVICE char* raw_dt(int tile) const { return raw() + S::dt_at + (LOW ? 0 : tile % 2 * S::wide_bytes); }
    DEVICE T* raw_low(int tile, int t, int k) const {
        return reinterpret_cast<T*>(raw() + S::low_at + tile % 3 * S::low_bytes) + t * S::low_row + k;
    }
    DEVICE char* raw_z(int tile) const { return raw() + S::z_at + tile % 2 * S::wide_bytes; }
    DEVICE char* raw_bc(int tile) const { return raw() + S::bc_at + tile % 2 * S::bc_bytes; }
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
                const float a = decay_of<T>(dt, s.a2[c][j]);
                float& h = s.h[c][j];
                // where a document starts, what is carried is replaced, not multiplied by zero: it may be NaN
                if constexpr (MODE == ADJOINT) {
                    h = a * fmaf(in.B[j], x, h);
                    if constexpr (FLAGS & RESET) h = in.keep == 0.f ? 0.f : h;
                } else {
                    if constexpr (FLAGS & RESET) h = in.keep == 0.f ? 0.f : h;
                    h = fmaf(a, h, x * in.B[j]);
                }
                if constexpr (MODE == FULL) y[c] = fmaf(s.h[c][j], in.C[j], y[c]);
            }
            if constexpr (MODE != FULL) s.sum[c] += dt;
        }
        if constexpr (MODE != FULL && (FLAGS & RESET)) s.keep *= in.keep;
    }

    // A warp has CH times NG neighbouring channels, a thread one of each NG.
    using L = Lanes<LN>;
    static constexpr int NG = L::groups, WARP_PART = padded(8) * 4;  // a warp's partial outputs for one channel of each thread
    static_assert(CH == 1 || NG % 8 == 0, "a thread's channels are a whole number of gaps apart");
    DEVICE static int channel(int tid, int c) { return (tid / 32 * CH + c) * NG + L::group(tid % 32); }

    DEVICE void store_states(float* at, const Carry& s, int tid) const {
        const int q = L::share(tid % 32);
#pragma unroll
        for (int c = 0; c < CH; ++c) {
            int ch = ch0 + channel(tid, c);
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

    DEVICE void save_if_boundary(const Carry& s, int t, int tid) const {
        if constexpr (MODE != ADJOINT) {
            if (p.saved != nullptr && t % K == 0 && t < p.l)
                store_states(p.saved + (b * ((p.l + K - 1) / K) + t / K) * p.d * p.n, s, tid);
        }
    }

    // where a scanner finds and leaves things in a tile
    struct View {
        const float *pairs, *Bs, *Cs, *keep;
        float* ys;
    };

    // Where state n of B or C lies in a step's row: the first four states of every lane, then the next four, so that neighbouring lanes find
    // theirs in different banks.
    static constexpr int FOUR = NS < 4 ? NS : 4;
    DEVICE static int state_slot(int n) { return (n % NS / FOUR * LN + n / NS) * FOUR + n % FOUR; }

    DEVICE static void read_states(const float* mine, float (&x)[NS]) {
#pragma unroll
        for (int k = 0; k < NS / FOUR; ++k) {
            float four[FOUR];
            load_shared<FOUR>(mine + k * LN * FOUR, four);
#pragma unroll
            for (int j = 0; j < FOUR; ++j) x[k * FOUR + j] = four[j];
        }
    }

    template <int W>
    DEVICE void read(const View& v, int t, Input (&in)[W]) const {
#pragma unroll
        for (int r = 0; r < W; r += 2)
#pragma unroll
            for (int c = 0; c < CH; ++c) {
                float both[4];
                load_shared<4>(v.pairs + ((t + r) / 2 * S::PAIR_ROW + padded(c * NG)) * 4, both);
#pragma unroll
                for (int m = 0; m < 2; ++m) in[r + m].pair[2 * c] = both[2 * m], in[r + m].pair[2 * c + 1] = both[2 * m + 1];
            }
#pragma unroll
        for (int r = 0; r < W; ++r) {
            read_states(v.Bs + (t + r) * N, in[r].B);
            if constexpr (MODE == FULL) read_states(v.Cs + (t + r) * N, in[r].C);
            if constexpr (FLAGS & RESET) in[r].keep = v.keep[t + r];
        }
    }

    DEVICE void scan_tile(Carry& s, int tile, int tid) const {
        const int q = L::share(tid % 32), t_first = t0 + tile * TT;
        View v;
        v.pairs = stage(tile) + padded(channel(tid, 0)) * 4, v.Bs = stage(tile) + S::pair_floats + q * FOUR, v.Cs = v.Bs + S::bc_floats;
        v.keep = stage(tile) + S::stage_floats - TT, v.ys = part(tile) + tid / 32 * CH * WARP_PART + L::group(tid % 32) * LN + q;
        // Stores of partial outputs and loads of inputs may not change places (for all the compiler knows they overlap), so the inputs of
        // the next W steps are loaded before the outputs of these are stored.
        constexpr int W = 2, U = TT < 8 ? TT : 8;
        Input in[W], next[W];
        read(v, 0, in);
        if constexpr (K >= TT) save_if_boundary(s, t_first, tid);
#pragma unroll 1
        for (int t1 = 0; t1 < TT; t1 += U) {
#pragma unroll
            for (int t2 = 0; t2 < U; t2 += W) {
                if constexpr (K < TT)
                    if (t2 == 0) save_if_boundary(s, t_first + t1, tid);
                // at the end of the tile, steps that nobody uses
                read(v, t2 + W < U ? t1 + t2 + W : t1 + U < TT ? t1 + U : 0, next);
                float y[W][CH];
#pragma unroll
                for (int r = 0; r < W; ++r) step(s, in[r], y[r]);
                if constexpr (MODE == FULL) {
#pragma unroll
                    for (int r = 0; r < W; ++r)
#pragma unroll
                        for (int c = 0; c < CH; ++c) v.ys[(t1 + t2 + r) * S::PART_ROW * 4 + c * WARP_PART] = y[r][c];
                }
#pragma unroll
                for (int r = 0; r < W; ++r) in[r] = next[r];
            }
        }
    }

    DEVICE void scanner(int tid, int tiles) const {
        const int q = L::share(tid % 32);
        Carry s;
        s.keep = 1.f;
        const float* h0 = MODE != FULL || p.h0 == nullptr ? nullptr : p.h0 + b * p.d * p.n;
#pragma unroll
        for (int c = 0; c < CH; ++c) {
            s.sum[c] = 0.f;
            int ch = ch0 + channel(tid, c);
#pragma unroll
            for (int j = 0; j < NS; ++j) {
                bool ok = ch < ch_end && q * NS + j < p.n;
                int64 at = (int64)ch * p.n + q * NS + j;
                s.a2[c][j] = ok ? rate_of(p.A[at]) : 0.f;
                s.h[c][j] = ok && h0 != nullptr ? h0[at] : 0.f;
            }
            if constexpr (MODE == FULL && (FLAGS & CUT)) {
                const int64 first = p.cut.cut_piece(b, 0) * p.d + ch, next = p.d;
                pass_pieces<NS>(s.h[c], s.a2[c], ch < ch_end ? p.n - q * NS : 0, chunk, p.local + first * p.n + q * NS, next * p.n,
                                p.decay + first * 2, next * 2);
            }
        }
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
            barrier_wait(STAGED + (tile & 1), NC + NH);
            scan_tile(s, tile, tid);
            barrier_arrive(SCANNED + (tile & 1), NC + NH);
        }
        if constexpr (MODE == FULL) {
            if (p.last != nullptr && t0 + len == p.l) store_states(p.last + b * p.d * p.n, s, tid);
        } else {
            store_states(p.local + p.cut.cut_piece(b, chunk) * p.d * p.n, s, tid);
#pragma unroll
            for (int c = 0; c < CH; ++c) {
                int ch = ch0 + channel(tid, c);
                if (q == 0 && ch < ch_end) {
                    float* to = p.decay + (p.cut.cut_piece(b, chunk) * p.d + ch) * 2;
                    to[0] = s.sum[c], to[1] = s.keep;
                }
            }
        }
    }

    // ---- helpers
    // A helper keeps to its channels, and takes two steps in a row where it has an even number of them, to store them together.
    static constexpr bool TWO = IT % 2 == 0;
    static constexpr int ROWS = NH / ROW;
    static_assert(NH % ROW == 0 && NH % BROW == 0, "a helper keeps to its channels and states");
    DEVICE static int first_step(int hid) { return hid / ROW * (TWO ? 2 : 1); }
    DEVICE static constexpr int steps_on(int it) { return TWO ? it / 2 * 2 * ROWS + it % 2 : it * ROWS; }

    // where a helper keeps its vectors
    DEVICE static int raw_slot(int hid, int it) {
        return TT * ROW % NH == 0 ? hid + it * NH : (first_step(hid) + steps_on(it)) * ROW + hid % ROW;
    }

    // the same, of step t and a slot of the row
    DEVICE static int raw_slot_at(int t, int slot) {
        if constexpr (TT * ROW % NH != 0 || !TWO) return t * ROW + slot;
        return t % (2 * ROWS) / 2 * ROW + slot + (t / (2 * ROWS) * 2 + t % 2) * NH;
    }

    // where in a tile of dt that is formed: lanes who store neighbouring steps do so in different banks
    DEVICE static int formed(int slot, int t) { return slot ^ t % (ROW % 8 == 0 ? 8 : ROW % 4 == 0 ? 4 : 1); }

    struct Place {
        int t, col, count;  // step inside the tile, channel inside the block, channels there
        DEVICE Place(int hid, int it, int channels) {
            t = first_step(hid) + steps_on(it), col = hid % ROW * V;
            count = TT * ROW % NH == 0 || t < TT ? channels - col : 0;
            count = count < 0 ? 0 : count > V ? V : count;
        }
    };

    // Where a helper's vectors of a tensor lie: its first one of a tile, and how far it is from step to step.  Tiles are visited in order,
    // and `at` goes along.
    struct Source {
        const char* at;
        int64 step;  // bytes; on a walk, to the next token
        DEVICE void next_tile() {
            if constexpr (!(FLAGS & WALK)) at += TT * step;
        }
    };
    DEVICE static int direction() { return MODE == ADJOINT ? -1 : 1; }
    DEVICE Source source(const void* x, int64 offset, int64 stride, int t, int64 col) const {
        const int64 down = stride * direction(), first = MODE == ADJOINT ? t0 + len - 1 : t0;
        constexpr int64 size = sizeof(T);
        if constexpr (FLAGS & WALK) return {(const char*)x + (offset + col) * size, stride * size};
        return {(const char*)x + (offset + first * stride + t * down + col) * size, down * size};
    }
    struct Sources {
        Source wide[3], bc[2];  // u or gout, dt, z; B, C
    };

    DEVICE Sources sources(int hid) const {
        const int t = first_step(hid), col = hid % ROW * V, tb = hid / BROW, n = hid % BROW * BV;
        return {{source(p.u, b * p.u_b + ch0, p.u_l, t, col), source(p.dt, b * p.dt_b + ch0, p.dt_l, t, col),
                 source(p.z, b * p.z_b + ch0, p.z_l, t, col)},
                {source(p.B, b * p.B_b + group * p.B_g, p.B_l, tb, n), source(p.C, b * p.C_b + group * p.C_g, p.C_l, tb, n)}};
    }

    // of step t of the tile, `on` steps behind the helper's first one
    DEVICE const T* vector(const Source& x, int tile, int t, int on) const {
        if constexpr (FLAGS & WALK) return (const T*)(x.at + (int64)token(tile * TT + t) * x.step);
        return (const T*)(x.at + on * x.step);
    }

    // WHOLE: every step and every channel of the tile is there, as in all tiles but a few
    template <bool WHOLE>
    DEVICE void fetch_wide(char* to, Source& x, int tile, int hid, int channels) const {
#pragma unroll
        for (int it = 0; it < IT; ++it) {
            const Place at(hid, it, channels);
            if (TT * ROW % NH != 0 && at.t >= TT) continue;
            const int count = WHOLE ? V : tile * TT + at.t < len ? at.count : 0;
            P::template fetch<ALIGNED>(to + raw_slot(hid, it) * 16, count > 0 ? vector(x, tile, at.t, steps_on(it)) : (const T*)p.u, count);
        }
        x.next_tile();
    }

    template <bool WHOLE>
    DEVICE void fetch_bc(char* to, Source& x, int tile, int hid) const {
#pragma unroll
        for (int it = 0; it < BIT; ++it) {
            const int v = hid + it * NH, t = v / BROW, count = WHOLE ? BV : tile * TT + t < len ? p.n - v % BROW * BV : 0;
            if (TT * BROW % NH != 0 && v >= TT * BROW) continue;
            P::template fetch<NARROW_ALIGNED && BV == V>(to + v * 16, count > 0 ? vector(x, tile, t, it * (NH / BROW)) : (const T*)p.B, count);
        }
        x.next_tile();
    }

    template <bool WHOLE>
    DEVICE void fetch_tile(int tile, Sources& x, int hid, int channels) const {
        fetch_wide<WHOLE>(raw_u(tile), x.wide[0], tile, hid, channels);
        if constexpr (LOW)
            fetch_low(tile + 1, hid);
        else
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

    // the low-rank form of a tile's dt
    DEVICE void fetch_low(int tile, int hid) const {
        constexpr int VECTORS = MAX_RANK / V;
        const T* low = (const T*)p.dt + b * p.dt_b;
#pragma unroll
        for (int v = hid; v < TT * VECTORS; v += NH) {
            const int t = v / VECTORS, k = v % VECTORS * V, s = tile * TT + t, count = s < len ? p.rank - k : 0;
            P::template fetch<true>(raw_low(tile, t, k), count > 0 ? low + token(s) * p.dt_l + k : low, count);
        }
    }

    // dt of a tile, where it would have been brought in; a barrier of helpers stands behind the last use of what lies there
    using Low = LowRank<T, LOW ? TT : 16, CPB, NH>;
    DEVICE void form_tile(int tile, int hid, const Low& low) const {
        low.form(
            hid,
            [&](int t, int k) {
                // what follows the last numbers may have come with them
                const uint32 two = *reinterpret_cast<const uint32*>(raw_low(tile, t, k));
                return k + 1 < p.rank ? two : k < p.rank ? two & 0xffffu : 0;
            },
            [&](int t, int col, uint32 two) { *reinterpret_cast<uint32*>(raw_dt(tile) + formed(raw_slot_at(t, col / V), t) * 16 + col % V * 2) = two; });
    }

    DEVICE void stage_bc(float* to, const char* from, int hid) const {
#pragma unroll
        for (int it = 0; it < BIT; ++it) {
            int v = hid + it * NH;
            if (v >= TT * BROW) continue;
            float x[V];
            P::from(from + v * 16).unpack(x);
#pragma unroll
            for (int k = 0; k < BV; k += FOUR) {
                float four[FOUR];
#pragma unroll
                for (int j = 0; j < FOUR; ++j) four[j] = x[k + j];
                store_shared<FOUR>(to + v / BROW * N + state_slot(v % BROW * BV + k), four);
            }
        }
    }

    // (dt, dt u), or (dt, dout silu(z)) for the adjoint
    DEVICE void pairs_of(int tile, const Place& at, int v, const float (&bias)[V], float (&dt)[V], float (&x)[V]) const {
        P::from(raw_dt(tile) + (LOW ? formed(v, at.t) : v) * 16).unpack(dt);
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
    }

    // as the scanners read them: of two steps together
    DEVICE void stage_pairs(int tile, int hid, int channels, const float (&bias)[V]) const {
        constexpr int M = TWO ? 2 : 1;
#pragma unroll
        for (int it = 0; it < IT; it += M) {
            const Place at(hid, it, channels);
            if (TT * ROW % NH != 0 && at.t >= TT) continue;
            float dt[M][V], x[M][V];
#pragma unroll
            for (int m = 0; m < M; ++m) pairs_of(tile, Place(hid, it + m, channels), raw_slot(hid, it + m), bias, dt[m], x[m]);
            float* row = stage(tile) + (at.t / 2 * S::PAIR_ROW + padded(at.col)) * 4 + (at.t & 1) * 2;
#pragma unroll
            for (int j = 0; j < V; ++j) {
                float pairs[2 * M];
#pragma unroll
                for (int m = 0; m < M; ++m) pairs[2 * m] = dt[m][j], pairs[2 * m + 1] = x[m][j];
                store_shared<2 * M>(row + j * 4, pairs);
            }
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
        const float4* row = reinterpret_cast<const float4*>(part(tile)) + at.t * S::PART_ROW + padded(at.col * LN / 4);
        float y[V], u[V];
        P::from(raw_u(tile) + v * 16).unpack(u);
#pragma unroll
        for (int j = 0; j < V; ++j) y[j] = 0.f;
#pragma unroll
        for (int k = 0; k < V * LN / 4; ++k) {
            float4 w = row[padded(k)];
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
        P::pack(y).template store<ALIGNED>(const_cast<T*>(vector(out, tile, at.t, steps_on(it))), at.count);
    }

    DEVICE void helper(int hid, int tiles) const {
        const int channels = ch_end - ch0;
        float skip[V], bias[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const int ch = ch0 + hid % ROW * V + j;
            skip[j] = ch < ch_end && p.D != nullptr ? p.D[ch] : 0.f;
            bias[j] = ch < ch_end && p.bias != nullptr ? p.bias[ch] : 0.f;
        }
        Sources rows = sources(hid);
        Source out = source(p.out, b * p.out_b + ch0, p.out_l, first_step(hid), hid % ROW * V);
        if constexpr (LOW) fetch_low(0, hid);
        fetch(0, rows, hid, channels);
        Low low;
        if constexpr (LOW) low.load((const T*)p.weight + (int64)ch0 * p.rank, p.rank, channels, hid);
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
            if constexpr (LOW) {
                // later, scanners and helpers have met since the low-rank form came and dt was used
                if (tile <= 0) barrier_wait(HELPERS, NH);
                if (tile + 1 < tiles) form_tile(tile + 1, hid, low);
            }
            if (MODE == FULL && tile > 0) {
#pragma unroll
                for (int it = 0; it < IT; ++it) finish(tile - 1, out, Place(hid, it, channels), it, raw_slot(hid, it), skip, before[it]);
                out.next_tile();
            }
            if (tile + 1 < tiles) {
                if constexpr (LOW) barrier_wait(HELPERS, NH);
                stage_pairs(tile + 1, hid, channels, bias);
                float* to = stage(tile + 1) + S::pair_floats;
                stage_bc(to, raw_bc(tile + 1), hid);
                if constexpr (MODE == FULL) stage_bc(to + S::bc_floats, raw_bc(tile + 1) + S::bc_bytes / 2, hid);
                barrier_arrive(STAGED + (tile + 1 & 1), NC + NH);
            }
        }
    }
};

// Block `block` of those of one kind, which take `tiles` of a group's tiles of channels, behind its first `skipped` channels.
template <class F>
DEVICE void run_block(const ForwardParams& p, char* memory, int mode, int block, int tiles, int skipped) {
    const int tiles_d = tiles * p.groups, tile_d = block % tiles_d, rest = block / tiles_d;
    const int group = tile_d / tiles, per_group = p.d / p.groups;
    int chunk;
    int64 b;
    if (mode == FULL) {
        p.cut.place(rest, p.batch, b, chunk);
    } else {
        // nobody asks for the sums of the last piece, or, on the way back, of the first
        const int cut_rows = p.batch - p.cut.whole;
        chunk = rest / cut_rows + (mode == ADJOINT), b = p.cut.whole + rest % cut_rows;
    }
    const int t0 = p.cut.begin(chunk);
    F f{p, reinterpret_cast<float*>(memory), group * per_group + skipped + tile_d % tiles * F::CPB, (group + 1) * per_group, group,
        t0, p.cut.end(b, chunk, p.l) - t0, chunk, b};
    const int steps = (f.len + F::STEPS - 1) / F::STEPS;
    if (threadIdx.x < F::SCANNERS)
        f.scanner(threadIdx.x, steps);
    else
        f.helper(threadIdx.x - F::SCANNERS, steps);
}

template <class T, int NC, int NS, int LN, int CH, int TT, int NH, int K, int MODE, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(NC + NH, MIN_BLOCKS) scan_forward(const ForwardParams p) {
    SHARED_MEMORY(memory);
    run_block<Forward<T, NC, NS, LN, CH, TT, NH, K, MODE, FLAGS>>(p, memory, MODE, blockIdx.x, p.tiles_per_group, 0);
}

template <class T, int NC, int NS, int LN, int CH, int TT, int NH, int K, int MODE, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(NC + NH, MIN_BLOCKS) scan_forward_walks(const __grid_constant__ Walks<ForwardParams> walks) {
    SHARED_MEMORY(memory);
    const ForwardParams& p = walks.each[blockIdx.x / walks.blocks];
    run_block<Forward<T, NC, NS, LN, CH, TT, NH, K, MODE, FLAGS>>(p, memory, MODE, blockIdx.x % walks.blocks, p.tiles_per_group, 0);
}

// The walks one after another in each block, which alone reads and writes its channels of its row: what one walk has added to the sum, the next
// finds in a cache.  Here `blocks` of the operands is the number of walks.
template <class T, int NC, int NS, int LN, int CH, int TT, int NH, int K, int MODE, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(NC + NH, MIN_BLOCKS) scan_forward_in_turn(const __grid_constant__ Walks<ForwardParams> walks) {
    SHARED_MEMORY(memory);
#pragma unroll 1
    for (int k = 0; k < walks.blocks; ++k) {
        const ForwardParams& p = walks.each[k];
        // all of the last walk is written, and nobody reads its tiles
        if (k > 0) __syncthreads();
        run_block<Forward<T, NC, NS, LN, CH, TT, NH, K, MODE, FLAGS>>(p, memory, MODE, blockIdx.x, p.tiles_per_group, 0);
    }
}

// Blocks of two shapes, for channels that do not fill the multiprocessors with blocks of one: those of the first shape come first, and so
// each has a multiprocessor of its own to share with one of the second, as long as there are no more of either than multiprocessors.
template <class T, int NC, int NH, int NS1, int LN1, int CH1, int TT1, int NS2, int LN2, int CH2, int TT2, int K, int FLAGS>
__global__ void __launch_bounds__(NC + NH, 2) scan_forward_two(const ForwardParams p) {
    SHARED_MEMORY(memory);
    using First = Forward<T, NC, NS1, LN1, CH1, TT1, NH, K, FULL, FLAGS>;
    const int first = p.first_tiles * p.groups * p.batch, block = blockIdx.x;
    if (block < first)
        run_block<First>(p, memory, FULL, block, p.first_tiles, 0);
    else
        run_block<Forward<T, NC, NS2, LN2, CH2, TT2, NH, K, FULL, FLAGS>>(p, memory, FULL, block - first, p.tiles_per_group - p.first_tiles,
                                                                         p.first_tiles * First::CPB);
}
