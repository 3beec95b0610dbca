// SSD (arXiv:2405.21060) forward: a block walks the chunks of one head, or of a tile of its channels, with their state in registers.
//
// Within a chunk Y = (C B^T o L) X + diag(into) C H^T, L[t, s] = dt_s exp(sum of dt A from s to t), and H = through H + X^T diag(onward) B.
// Where rows and heads are too few to fill the GPU, the length is cut into segments: STATES finds what each leaves behind by itself,
// ssd_pass_states what enters each, and then every segment is walked with its outputs.  Where they fill it, but not evenly, blocks take segments
// in turn, all the first ones first, and hand the state on in `last`: a block is done early, and no place stays without one for long.
#include "ssd.cuh"
#include "groups.cuh"
#include "vector.cuh"

// only what a segment leaves behind
enum { STATES = 128 };
// threads of a block
constexpr int WALKERS = 256;
#define NOT_A_NUMBER __uint_as_float(0x7fc00000u)

struct SsdForwardParams {
    const void *x, *dt;
    const float* A;
    const void *B, *C;
    const float* D;
    const void* z;
    const float* dt_bias;
    const uint8 *reset, *valid;
    const float* initial_state;
    void* out;
    float* last;
    void* saved;                // states at chunk starts for a backward, or null
    uint32* turns;              // null, or segments that blocks have taken, then for each walk those that are done
    float *states, *passing;    // of segments: (b, segments, h, p, n) at their starts, and the decay (b, segments, h) over the one before
    int64 x_b, x_l, x_h, dt_b, dt_l, dt_h, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, z_h;
    int batch, l, h, p, n, groups, chunks, D_head, D_channel, softplus, wide_dt;
    int tiles, segments, span;  // tiles of channels per head; chunks per segment
    float low, high;
};

// Shared memory: the stages' tiles X, B, C, then the state and the weights as operands, then step sizes, what forms them, maxima, D, what
// rows of weights were divided by.  16-bit states and weights lie as a warp's lanes hold them, 16 bytes each: no conflicts, and no bytes between rows.
template <class T, int P, int N, int STAGES, int FLAGS>
struct Layout {
    static constexpr bool HALF = sizeof(T) == 2, OUT = !(FLAGS & STATES);
    static constexpr int Q = Chunk<T>::q;
    static constexpr int X = Q * Tile<T, P>::STRIDE, B = Q * Tile<T, N>::STRIDE, TILES = X + B + (OUT ? B : 0);
    static constexpr int STATE = !OUT ? 0 : P * Tile<T, N>::STRIDE, WEIGHTS = !OUT ? 0 : Q * Tile<T, Q>::STRIDE;
    static constexpr int OPERANDS = (STAGES * TILES + STATE + WEIGHTS) * (int)sizeof(T);
    // warps that form step sizes, each those of a chunk at a time
    static constexpr int FORMERS = OUT ? 1 : WALKERS / 32;
    static constexpr int RATES = OPERANDS + 2 * FORMERS * (int)sizeof(Steps<Q>), MAXIMA = RATES + FORMERS * (int)sizeof(Rate), SKIP = MAXIMA + 32,
                         MOVED = SKIP + 4 * P, BYTES = MOVED + 8 * Q;
};

template <class T, int P, int N, int STAGES, int FLAGS>
struct Forward {
    using At = Layout<T, P, N, STAGES, FLAGS>;
    static constexpr int Q = At::Q, WIDE = Packed<T>::lanes, WARPS = WALKERS / 32, FORMERS = At::FORMERS;
    static constexpr bool HALF = At::HALF, OUT = At::OUT, PACKED = FLAGS & RESET, ALIGNED = !(FLAGS & UNALIGNED), GATES = FLAGS & GATED;
    // outputs: a warp has 16 tokens and P / SPLIT channels; states: 16 channels and N / ACROSS states, of which J tiles are summed at a time
    static constexpr int SPLIT = WARPS * 16 / Q, SPAN = P / SPLIT, YT = SPAN / 8;
    // of the gate, a lane reads four neighbouring channels of 16 bits at once, or two of 32
    using Gate = Vec<T, HALF ? 4 : 2>;
    static constexpr int GT = SPAN / (HALF ? 16 : 8);
    static constexpr int DOWN = P / 16, ACROSS = WARPS / DOWN, NT = N / ACROSS / 8, J = NT < 4 ? NT : 4;
    // whether right operands are read once for four warps (groups.cuh); B, C and the state then lie in tiles of 64 columns
    static constexpr bool GROUPED = GROUPS && is_bf16<T> && !PACKED && P == 64 && (N == 64 || N == 128);
    static constexpr bool ATTENDS = GROUPED && OUT;  // outputs are theirs, too
    // the warp that forms step sizes where there are outputs: of groups, one that has no weights to form
    static constexpr int FORMER = GROUPED ? 4 : WARPS - 1;

    const SsdForwardParams& p;
    char* shared;
    int head, group, segment, first, channels, n;
    int64 b;
    const T *next_x, *next_B, *next_C;  // a thread's first elements of the chunk to be fetched next
    T* out_at;                          // its first token's outputs
    float state[1][NT][4];
    bool spoiled = false;  // what the state has taken up is not finite

    DEVICE Forward(const SsdForwardParams& params, char* memory, int i) : p(params), shared(memory) {
        first = i % p.tiles * P, i /= p.tiles;
        head = i % p.h, i /= p.h, group = head / (p.h / p.groups);
        b = i % p.batch, segment = i / p.batch;
        channels = p.p - first < P ? p.p - first : P, n = p.n;
    }

    DEVICE T* tiles(int c) const { return reinterpret_cast<T*>(shared) + (STAGES == 2 ? c % 2 * At::TILES : 0); }
    DEVICE Tile<T, P> X(int c) const { return {tiles(c)}; }
    DEVICE Tile<T, N> B(int c) const { return {tiles(c) + At::X}; }
    DEVICE Tile<T, N> C(int c) const { return {tiles(c) + At::X + At::B}; }
    // of B and the state, 64 columns
    static constexpr int PANEL = 64 * 64;
    DEVICE Tile<T, 64> B_panel(int c, int i) const { return {tiles(c) + At::X + i * PANEL}; }
    DEVICE Tile<T, 64> C_panel(int c, int i) const { return {tiles(c) + At::X + At::B + i * PANEL}; }
    DEVICE Tile<T, 64> H_panel(int i) const { return {H() + i * PANEL}; }
    DEVICE T* H() const { return reinterpret_cast<T*>(shared) + STAGES * At::TILES; }
    DEVICE T* weights() const { return H() + At::STATE; }
    DEVICE Steps<Q>& steps(int c) const { return reinterpret_cast<Steps<Q>*>(shared + At::OPERANDS)[c % (2 * FORMERS)]; }
    // read from memory, it would be waited for again for every chunk
    DEVICE Rate& rate(int former) const { return reinterpret_cast<Rate*>(shared + At::RATES)[former]; }
    DEVICE float* maxima() const { return reinterpret_cast<float*>(shared + At::MAXIMA); }
    DEVICE float* skip() const { return reinterpret_cast<float*>(shared + At::SKIP); }
    DEVICE float* moved(int part) const { return reinterpret_cast<float*>(shared + At::MOVED) + part * Q; }
    // a state's place: the row is a channel, the column one of n
    DEVICE static int row_of(int e) {
        return (GROUPED ? threadIdx.x / 32 % DOWN : threadIdx.x / 32 / ACROSS) * 16 + threadIdx.x % 32 / 4 + e / 2 * 8;
    }
    DEVICE static int column_of(int j, int e) {
        return (GROUPED ? threadIdx.x / 32 / DOWN : threadIdx.x / 32 % ACROSS) * (8 * NT) + 8 * j + threadIdx.x % 4 * 2 + e % 2;
    }
    // what a lane has of a 16 x 16 tile
    DEVICE static uint4& lane_of(T* tiles, int tile) { return reinterpret_cast<uint4*>(tiles)[32 * tile + threadIdx.x % 32]; }
    DEVICE int64 state_at(int64 of) const { return ((of * p.h + head) * p.p + first) * n; }

    // one chunk after the other
    DEVICE void begin_at(int c) {
        const int64 t = (int64)c * Q;
        next_x = own_place<T, P, WALKERS>(reinterpret_cast<const T*>(p.x) + b * p.x_b + t * p.x_l + head * p.x_h + first, p.x_l);
        next_B = own_place<T, GROUPED ? 64 : N, WALKERS>(reinterpret_cast<const T*>(p.B) + b * p.B_b + t * p.B_l + group * p.B_g, p.B_l);
        if constexpr (OUT) next_C = own_place<T, GROUPED ? 64 : N, WALKERS>(reinterpret_cast<const T*>(p.C) + b * p.C_b + t * p.C_l + group * p.C_g, p.C_l);
        out_at = reinterpret_cast<T*>(p.out) + ((b * p.l + t + 16 * tile_of() + threadIdx.x % 32 / 4) * p.h + head) * p.p + first + span_of();
    }
    DEVICE void fetch(int c) {
        const int rows = p.l - c * Q < Q ? p.l - c * Q : Q;
        fill_own<T, Q, ALIGNED, WALKERS>(X(c), next_x, p.x_l, rows, channels);
        if constexpr (GROUPED) {
#pragma unroll
            for (int i = 0; i < N / 64; ++i) fill_own<T, Q, ALIGNED, WALKERS>(B_panel(c, i), next_B + 64 * i, p.B_l, rows, n - 64 * i);
        } else {
            fill_own<T, Q, ALIGNED, WALKERS>(B(c), next_B, p.B_l, rows, n);
        }
        if constexpr (OUT && GROUPED) {
#pragma unroll
            for (int i = 0; i < N / 64; ++i) fill_own<T, Q, ALIGNED, WALKERS>(C_panel(c, i), next_C + 64 * i, p.C_l, rows, n - 64 * i);
        } else if constexpr (OUT) {
            fill_own<T, Q, ALIGNED, WALKERS>(C(c), next_C, p.C_l, rows, n);
        }
        if constexpr (OUT) next_C += Q * p.C_l;
        next_x += Q * p.x_l, next_B += Q * p.B_l;
        copy_async_commit();
    }

    DEVICE void enter() {
        const float* from = nullptr;
        if (segment == 0 && p.initial_state != nullptr) from = p.initial_state + state_at(b);
        if (OUT && segment > 0) from = p.turns == nullptr ? p.states + state_at(b * p.segments + segment) : p.last + state_at(b);
        bool bad = false;
        each<1, NT>([&](int i, int j, int e) {
            const int row = row_of(e), column = column_of(j, e);
            float& x = state[i][j][e];
            x = from != nullptr && row < channels && column < n ? from[row * n + column] : 0.f;
            if (PACKED && !is_finite(x)) bad = true, x = 0.f;
        });
        if constexpr (PACKED) spoiled = __syncthreads_or(bad);
    }

    // Segments that are done of this walk.  They are taken in order: who waits, waits for a block that runs.
    DEVICE uint32* done() const { return p.turns + 1 + (b * p.h + head) * p.tiles + first / P; }
    DEVICE void wait_for_turn() const {
        if (threadIdx.x == 0) {
            while (*reinterpret_cast<volatile uint32*>(done()) < (uint32)segment) {}
            __threadfence();
        }
        __syncthreads();
    }
    DEVICE void pass_turn() const {
        __syncthreads();
        if (threadIdx.x != 0) return;
        __threadfence();
        *reinterpret_cast<volatile uint32*>(done()) = segment + 1;
    }

    template <class S>
    DEVICE void leave(S* to) const {
        each<1, NT>([&](int i, int j, int e) {
            const int row = row_of(e), column = column_of(j, e);
            if (row < channels && column < n) write_one_state(to + row * n + column, PACKED && spoiled ? NOT_A_NUMBER : state[i][j][e]);
        });
    }
    DEVICE static void write_one_state(float* at, float x) { *at = x; }
    DEVICE static void write_one_state(bf16* at, float x) {
        const float one[1] = {x};
        write_channels<bf16, 1>(at, one);
    }

    // fp16 has no room above: the largest state becomes 2^14
    DEVICE void note_largest() const {
        float largest = 0.f;
        each<1, NT>([&](int i, int j, int e) { largest = fmaxf(largest, fabsf(state[i][j][e])); });
        largest = warp_max(largest);
        if (threadIdx.x % 32 == 0) maxima()[threadIdx.x / 32] = largest;
    }

    // The state as an operand; what it was divided by
    DEVICE float place() const {
        float by = 1.f, back = 1.f;
        if constexpr (is_fp16<T>) {
            float largest = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, maxima()[w]);
            normal_range(largest, 14, by, back);
        }
        if constexpr (GROUPED) {
            const int row = row_of(0), column = column_of(0, 0);
            const Tile<T, 64> own = H_panel(column / 64).corner(0, column % 64 / 8 * 8).place(row, threadIdx.x % 4 * 2);
#pragma unroll
            for (int j = 0; j < NT; ++j) {
                const Tile<T, 64> at = own.on(0, 8 * j);
                *reinterpret_cast<uint32*>(at.at) = Element<T>::pack(state[0][j]);
                *reinterpret_cast<uint32*>(at.on(8, 0).at) = Element<T>::pack(state[0][j] + 2);
            }
        } else if constexpr (HALF) {
            const int first = (row_of(0) / 16 * N + column_of(0, 0)) / 16;
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                float left[4], right[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) left[e] = state[0][j][e] * by, right[e] = state[0][j + 1][e] * by;
                lane_of(H(), first + j / 2) = make_uint4(Element<T>::pack(left), Element<T>::pack(right), Element<T>::pack(left + 2), Element<T>::pack(right + 2));
            }
        } else {
            each<1, NT>([&](int, int j, int e) { *Tile<T, N>{H()}.place(row_of(e), column_of(j, e)).at = state[0][j][e]; });
        }
        return back;
    }

    DEVICE void save(int c) const {
        if (p.saved == nullptr) return;
        const int64 at = state_at(b * p.chunks + c);
        if constexpr (GROUPED) {
            // as they are multiplied, in whole vectors
            T* to = reinterpret_cast<T*>(p.saved) + at;
#pragma unroll
            for (int k = 0; k < P * N / WIDE / WALKERS; ++k) {
                const int i = threadIdx.x + k * WALKERS, row = i / 8 % 64, column = i % 8 * WIDE, beyond = i / 512 * 64 + column;
                const Packed<T> states = Packed<T>::from(H_panel(i / 512).place(row, column).at);
                const int count = row < channels ? n - beyond : 0;
                if (ALIGNED || n % WIDE == 0) states.template store<true>(to + row * n + beyond, count);
                else states.template store<false>(to + row * n + beyond, count);
            }
        } else if constexpr (!is_bf16<T>) {
            leave(reinterpret_cast<float*>(p.saved) + at);
        } else if ((PACKED && spoiled) || (!ALIGNED && n % WIDE != 0)) {
            leave(reinterpret_cast<bf16*>(p.saved) + at);
        } else {
            const int row = row_of(0), column = column_of(0, 0) - threadIdx.x % 4 * 2 + column_of_four();
            bf16* to = reinterpret_cast<bf16*>(p.saved) + at + row * n + column;
#pragma unroll
            for (int e = 0; e < 4; e += 2, to += 8 * n) {
                const int columns = row + 4 * e < channels ? n - column : 0;
#pragma unroll
                for (int j = 0; j < NT; j += 2) {
                    const uint2 states = four(Element<T>::pack(state[0][j] + e), Element<T>::pack(state[0][j + 1] + e));
                    if (columns > 8 * j) *reinterpret_cast<uint2*>(to + 8 * j) = states;
                }
            }
        }
    }

    // Mark the tokens whose operands are not finite, with zeros in their place: not even a product with zero brings them to another document
    DEVICE bool look(int c) const {
        constexpr int PARTS = WALKERS / Q;
        const int row = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
        int bad = clean(X(c), row, part, PARTS) | clean(B(c), row, part, PARTS);
        if constexpr (OUT) bad |= 2 * clean(C(c), row, part, PARTS);
#pragma unroll
        for (int m = 1; m < PARTS; m *= 2) bad |= __shfl_xor_sync(~0u, bad, m);
        bad |= steps(c).bad[row];
        __syncwarp();
        if (part == 0) steps(c).bad[row] = bad;
        return __syncthreads_or(bad);
    }
    template <int COLUMNS>
    DEVICE static int clean(Tile<T, COLUMNS> tile, int row, int part, int parts) {
        int bad = 0;
        for (int k = part; k < COLUMNS / WIDE; k += parts) {
            T* at = tile.place(row, k * WIDE).at;
            float x[WIDE];
            Packed<T>::from(at).unpack(x);
            bool all = true;
#pragma unroll
            for (int i = 0; i < WIDE; ++i) all = all && is_finite(x[i]);
            if (all) continue;
            bad = 1;
            Packed<T>{{0, 0, 0, 0}}.template store<true>(at, WIDE);
        }
        return bad;
    }
    // whether something that the state has taken up by token t, in its document, is not finite
    DEVICE bool hurt(const Steps<Q>& s, int t) const {
        const int doc = s.doc[t];
        for (int k = t; k >= 0 && s.doc[k] == doc; --k)
            if (s.bad[k] & 1) return true;
        return doc == 0 && spoiled;
    }

    // C of a warp's tokens as a left operand: kept between its two products, or, where registers are few, read 16 columns at a time
    static constexpr bool KEPT = HALF && N <= 128 && !PACKED && !is_fp16<T>;
    static constexpr int TOGETHER = KEPT ? N / 16 : 4;
    struct Rows {
        uint32 a[KEPT ? N / 16 : 1][1][4];
    };
    DEVICE void load_rows(Rows& rows, int c, int tile, int k) const {
        load_a<T, false, false>(rows.a[KEPT ? k : 0][0], lane_place<true>(C(c).corner(16 * tile, 0)).on(0, 16 * k), nullptr);
    }

    // C B^T of 16 tokens and 8 S that are not behind them, which becomes what the tokens take of these; fp16: in rows that are made 2^14 at most
    template <int S>
    DEVICE void weigh(int c, int tile, int part, Rows& rows) const {
        float scores[1][S][4] = {};
        const Tile<T, N> keys = B(c).corner(WIDTH * part, 0);
        if constexpr (HALF) {
#pragma unroll(TOGETHER)
            for (int k = 0; k < N / 16; ++k) {
                if constexpr (!KEPT) load_rows(rows, c, tile, k);
                product_step<T, 1, S, false>(scores, rows.a[KEPT ? k : 0], lane_place<false>(keys).on(0, 16 * k));
            }
        } else {
            product<T, 1, S, false, false>(scores, C(c).corner(16 * tile, 0), keys, N);
        }
        settle<S>(c, tile, part, scores);
    }
    static constexpr int WIDTH = HALF ? 32 : 8;
    // the first S columns of scores
    template <int S, int ALL>
    DEVICE void settle(int c, int tile, int part, float (&scores)[1][ALL][4]) const {
        const Steps<Q>& s = steps(c);
        const int row = 16 * tile + threadIdx.x % 32 / 4, column = WIDTH * part + threadIdx.x % 4 * 2;
        float largest[2] = {0.f, 0.f};
        each<1, S>([&](int, int j, int e) {
            const int t = row + e / 2 * 8, from = column + 8 * j + e % 2;
            const float dt = s.dt[from];
            float log = s.hi[t] - s.hi[from];
            // bf16 has no use for the digits behind those of one float
            if constexpr (!is_bf16<T>) log += s.lo[t] - s.lo[from];
            // of 16-bit types, all columns but the last 16 are behind every row
            const bool keep = ((HALF && j < S - 2) || from <= t) & (!PACKED || s.doc[from] == s.doc[t]);
            float& x = scores[0][j][e];
            x = keep ? x * (decay_by<T>(log) * dt) : 0.f;
            if constexpr (is_fp16<T>) largest[e / 2] = fmaxf(largest[e / 2], fabsf(x));
        });
        if constexpr (is_fp16<T>) {
            float by[2], back;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                for (int m = 1; m < 4; m *= 2) largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], m));
                normal_range(largest[r], 14, by[r], back);
                if (threadIdx.x % 4 == 0) moved(part)[row + 8 * r] = back;
            }
            each<1, S>([&](int, int j, int e) { scores[0][j][e] *= by[e / 2]; });
        }
        if constexpr (GROUPED) {
            const Tile<T, Q> own = Tile<T, Q>{weights()}.place(row, column);
#pragma unroll
            for (int j = 0; j < S; ++j) {
                const Tile<T, Q> at = own.on(0, 8 * j);
                *reinterpret_cast<uint32*>(at.at) = Element<T>::pack(scores[0][j]);
                *reinterpret_cast<uint32*>(at.on(8, 0).at) = Element<T>::pack(scores[0][j] + 2);
            }
        } else if constexpr (HALF) {
#pragma unroll
            for (int j = 0; j < S / 2; ++j) {
                uint32 a[4];
                pack_a<T>(a, scores[0][2 * j], scores[0][2 * j + 1]);
                lane_of(weights(), tile * (tile + 1) / 2 + 2 * part + j) = make_uint4(a[0], a[1], a[2], a[3]);
            }
        } else {
            each<1, S>([&](int, int j, int e) { *Tile<T, Q>{weights()}.place(row + e / 2 * 8, column + 8 * j + e % 2).at = scores[0][j][e]; });
        }
    }

    // What lies on the diagonal and below, by six warps of eight
    DEVICE void weigh_all(int c, Rows& rows) const {
        if constexpr (!HALF) {
            const int warp = threadIdx.x / 32;
            if (warp < 6) weigh<1>(c, warp < 4, warp % 4, rows);
        } else {
            const int tile = tile_of(), part = threadIdx.x / 128;
            if (tile == (part ? 3 : 1) || (tile > 1 && !part)) weigh<4>(c, tile, part, rows);
            else if (tile == (part ? 2 : 0)) weigh<2>(c, tile, part, rows);
        }
    }

    // y += weights X, of J tiles of tokens; fp16: `back` is what y is over from there on
    template <int TILES>
    DEVICE void add_seen(int c, int span, float (&y)[1][YT][4], float (&back)[2]) const {
        const Tile<T, P> x = lane_place<true>(X(c).corner(0, span));
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            if constexpr (is_fp16<T>) {
                if (j % 2 == 0) {
                    float by[2];
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const float next = moved(j / 2)[16 * (TILES - 1) + threadIdx.x % 32 / 4 + 8 * r];
                        by[r] = back[r] * __uint_as_float((254u << 23) - __float_as_uint(next)), back[r] = next;
                    }
                    each<1, YT>([&](int, int i, int e) { y[0][i][e] *= by[e / 2]; });
                }
            }
            const uint4 w = lane_of(weights(), TILES * (TILES - 1) / 2 + j);
            const uint32 a[1][4] = {{w.x, w.y, w.z, w.w}};
            product_step<T, 1, YT, true>(y, a, x.on(16 * j, 0));
        }
    }

    // y of a warp's tokens, over `back` for each of the two rows that a thread has
    DEVICE void attend(int c, int tile, int span, Rows& rows, float unit, float (&y)[1][YT][4], float (&back)[2]) const {
        if constexpr (HALF) {
#pragma unroll(TOGETHER)
            for (int k = 0; k < N / 16; ++k) {
                if constexpr (!KEPT) load_rows(rows, c, tile, k);
                const uint32(&a)[4] = rows.a[KEPT ? k : 0][0];
#pragma unroll
                for (int j = 0; j < YT; j += 2) {
                    const uint4 h = lane_of(H(), (span / 16 + j / 2) * (N / 16) + k);
                    multiply_add<T>(y[0][j], a, {h.x, h.y}), multiply_add<T>(y[0][j + 1], a, {h.z, h.w});
                }
            }
        } else {
            product<T, 1, YT, false, false>(y, C(c).corner(16 * tile, 0), Tile<T, N>{H()}.corner(span, 0), N);
        }
        const float* at = steps(c).into + 16 * tile + threadIdx.x % 32 / 4;
        const float into[2] = {at[0], at[8]}, by[2] = {into[0] * unit, into[1] * unit};
        each<1, YT>([&](int, int j, int e) { y[0][j][e] = PACKED && into[e / 2] == 0.f ? 0.f : y[0][j][e] * by[e / 2]; });
        if constexpr (!HALF) product<T, 1, YT, false, true>(y, Tile<T, Q>{weights()}.corner(16 * tile, 0), X(c).corner(0, span), 16 * (tile + 1));
        else if (tile == 0) add_seen<1>(c, span, y, back);
        else if (tile == 1) add_seen<2>(c, span, y, back);
        else if (tile == 2) add_seen<3>(c, span, y, back);
        else add_seen<4>(c, span, y, back);
    }

    // A warp's tile of tokens, such that those who look back on many and on few share a scheduler, and its channels
    DEVICE static int tile_of() {
        return !HALF ? threadIdx.x / 128 : GROUPED || threadIdx.x < 128 ? threadIdx.x / 32 % 4 : 7 - threadIdx.x / 32;
    }
    DEVICE static int span_of() { return (HALF ? threadIdx.x / 128 : threadIdx.x / 32 % 4) * SPAN; }

    // C B^T by groups of warps, on its way
    DEVICE void score_together(int c, float (&scores)[1][4][4]) const {
        const GroupOperand<T> rows(C_panel(c, 0)), keys(B_panel(c, 0).corner(WIDTH * (threadIdx.x / 128), 0));
        group_begin();
        group_product<T, N, false, false, true>(scores[0], rows, keys);
        group_commit();
    }
    // y of a warp's tokens by groups of warps; `between` is done while the first products are on their way
    template <class F>
    DEVICE void attend_together(int c, int tile, int span, float (&scores)[1][4][4], float (&y)[1][YT][4], Gate (&gates)[2][GT], F between) {
        const int part = threadIdx.x / 128;
        const GroupOperand<T> rows(C_panel(c, 0)), states(H_panel(0).corner(span, 0));
        group_begin();
        group_product<T, N, false, false, true>(y[0], rows, states);
        group_commit();
        between();
        group_wait<1>(scores[0]);
        if (tile == (part ? 3 : 1) || (tile > 1 && !part)) settle<4>(c, tile, part, scores);
        else if (tile == (part ? 2 : 0)) settle<2>(c, tile, part, scores);
        ask_for_gates(c, gates);
        group_wait<0>(y[0]);
        const float* at = steps(c).into + 16 * tile + threadIdx.x % 32 / 4;
        const float into[2] = {at[0], at[8]};
        each<1, YT>([&](int, int j, int e) { y[0][j][e] *= into[e / 2]; });
        const GroupOperand<T> seen(Tile<T, 64>{weights()}), x(Tile<T, 64>{X(c).at}.corner(0, span));
        share_with_groups();
        __syncthreads();
        group_begin();
        group_product<T, Q, false, true, false>(y[0], seen, x);
        group_commit();
        group_wait<0>(y[0]);
    }

    // y by warps for themselves, over `back`
    DEVICE void attend_alone(int c, int tile, int span, float unit, float (&y)[1][YT][4], float (&back)[2], Gate (&gates)[2][GT], bool& bad) {
        const Steps<Q>& s = steps(c);
#pragma unroll 1
        for (int again = 0; again < 2; ++again) {
            // else the compiler forms places in tiles in front of this loop, more than there are registers for
            const int own = PACKED ? keep_in_register(c) : c;
            Rows rows;
            if constexpr (KEPT) {
#pragma unroll
                for (int k = 0; k < N / 16; ++k) load_rows(rows, c, tile, k);
            }
            weigh_all(own, rows);
            ask_for_gates(c, gates);  // now, needed at the end
            __syncthreads();
            each<1, YT>([&](int, int j, int e) { y[0][j][e] = 0.f; });
            back[0] = back[1] = 1.f;
            attend(own, tile, span, rows, unit, y, back);
            if (!PACKED || again) break;
            // a token that is not finite shows in its own output: only then is it looked for, and the work done again without it
            float zero = 0.f;
            each<1, YT>([&](int, int j, int e) { zero = fmaf(y[0][j][e], 0.f, zero); });
            if (!__syncthreads_or(zero != 0.f || s.bad[threadIdx.x % Q])) break;
            bad = look(c);
        }
    }

    DEVICE void ask_for_gates(int c, Gate (&gates)[2][GT]) const {
        if constexpr (GATES) {
            const int row = 16 * tile_of() + threadIdx.x % 32 / 4, span = span_of();
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int64 t = (int64)c * Q + row + 8 * r;
                const int at = span + (HALF ? column_of_four() : threadIdx.x % 4 * 2);
                const T* z = reinterpret_cast<const T*>(p.z) + b * p.z_b + head * p.z_h + t * p.z_l + first + at;
#pragma unroll
                for (int j = 0; j < GT; ++j) gates[r][j] = Gate::template load<ALIGNED>(z + SPAN / GT * j, t < p.l ? channels - at - SPAN / GT * j : 0);
            }
        }
    }

    // by groups of warps from scores that are on their way
    template <class F>
    DEVICE void outputs(int c, float unit, float (&scores)[1][4][4], bool& bad, F between) {
        const Steps<Q>& s = steps(c);
        const int tile = tile_of(), span = span_of(), row = 16 * tile + threadIdx.x % 32 / 4, channel = span + threadIdx.x % 4 * 2;
        Gate gates[2][GT];
        float y[1][YT][4], back[2] = {1.f, 1.f};
        if constexpr (GROUPED) attend_together(c, tile, span, scores, y, gates, between);
        else attend_alone(c, tile, span, unit, y, back, gates, bad);
        T* to = out_at;
        const Tile<T, P> skipped = X(c).place(row, channel);
#pragma unroll
        for (int r = 0; r < 2; ++r, to += 8 * (int64)p.h * p.p) {
            const int t = row + 8 * r;
            float out[YT][2];
#pragma unroll
            for (int j = 0; j < YT; ++j) out[j][0] = y[0][j][2 * r] * back[r], out[j][1] = y[0][j][2 * r + 1] * back[r];
            finish(out, skipped.on(8 * r, 0), skip() + channel, gates[r]);
            if (PACKED && (bad || spoiled) && (s.bad[t] & 2 || hurt(s, t))) {
#pragma unroll
                for (int j = 0; j < YT; ++j) out[j][0] = out[j][1] = NOT_A_NUMBER;
            }
            write_row(to, c * Q + t < p.l ? channels - span : 0, out);
        }
        out_at += Q * (int64)p.h * p.p;
    }

    // The skip and the gate of a token's channels
    DEVICE void finish(float (&y)[YT][2], Tile<T, P> skipped, const float* D, const Gate (&gates)[GT]) const {
        if (p.D != nullptr) {
#pragma unroll
            for (int j = 0; j < YT; ++j) {
                float x[2], by[2];
                read_channels<T, 2>(skipped.on(0, 8 * j).at, x);
                load_shared<2>(D + 8 * j, by);
                y[j][0] = fmaf(by[0], x[0], y[j][0]), y[j][1] = fmaf(by[1], x[1], y[j][1]);
            }
        }
        if constexpr (GATES) {
#pragma unroll
            for (int j = 0; j < GT; ++j) {
                Vec<T, 2> parts[YT / GT];
                if constexpr (HALF) {
                    const uint2 both = four(gates[j].w[0], gates[j].w[1]);
                    parts[0].w[0] = both.x, parts[1].w[0] = both.y;
                } else {
                    parts[0] = gates[j];
                }
#pragma unroll
                for (int i = 0; i < YT / GT; ++i) {
                    float z[2], gate[2];
                    parts[i].unpack(z);
                    sigmoids<2>(z, gate);
                    float(&at)[2] = y[YT / GT * j + i];
                    at[0] *= z[0] * gate[0], at[1] *= z[1] * gate[1];
                }
            }
        }
    }

    // A quad's channels of a token, of which `count` are there
    DEVICE void write_row(T* out, int count, const float (&y)[YT][2]) const {
        // heads of whole vectors lie on 16-byte borders, for they are written in one piece
        const bool aligned = ALIGNED || p.p % WIDE == 0;
        if constexpr (HALF) {
            if (aligned) {
                out += column_of_four(), count -= column_of_four();
#pragma unroll
                for (int j = 0; j < YT; j += 2) {
                    const uint2 neighbours = four(Element<T>::pack(y[j]), Element<T>::pack(y[j + 1]));
                    if (count > 8 * j) *reinterpret_cast<uint2*>(out + 8 * j) = neighbours;
                }
                return;
            }
        }
        out += threadIdx.x % 4 * 2, count -= threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < YT; ++j) {
            if (aligned) Vec<T, 2>::pack(y[j]).template store<true>(out + 8 * j, count - 8 * j);
            else Vec<T, 2>::pack(y[j]).template store<false>(out + 8 * j, count - 8 * j);
        }
    }

    // H = through H + X^T diag(onward) B.  A chunk's part is summed by itself: tensor cores cut sums off, which long memories would add up.
    DEVICE void advance(int c, bool bad) {
        const Steps<Q>& s = steps(c);
        const Tile<T, P> x = X(c).corner(0, row_of(0) / 16 * 16);
        const int column = column_of(0, 0) / 8 * 8;
        const Tile<T, N> keys = B(c).corner(0, column);
        if constexpr (PACKED) spoiled = (bad || spoiled) && hurt(s, Q - 1);
        if constexpr (HALF) {
            uint32 a[Q / 16][1][4];
#pragma unroll
            for (int k = 0; k < Q / 16; ++k) load_a<T, true, true>(a[k][0], lane_place<false>(x).on(16 * k, 0), s.onward + 16 * k);
            if constexpr (GROUPED) {
                float part[1][NT][4] = {};
                const GroupOperand<T> own(B_panel(c, column / 64).corner(0, column % 64));
                group_begin();
#pragma unroll
                for (int k = 0; k < Q / 16; ++k) group_step<T, NT, true>(part[0], a[k][0], own.on(16 * k, 0));
                group_commit();
                group_wait<0>(part[0]);
                take_up(s, 0, part);
                return;
            }
#pragma unroll
            for (int j = 0; j < NT; j += J) {
                float part[1][J][4] = {};
#pragma unroll
                for (int k = 0; k < Q / 16; ++k) product_step<T, 1, J, true>(part, a[k], lane_place<true>(keys).on(16 * k, 8 * j));
                take_up(s, j, part);
            }
        } else {
#pragma unroll
            for (int j = 0; j < NT; j += J) {
                float part[1][J][4] = {};
                product<T, 1, J, true, true, true>(part, x, keys.corner(0, 8 * j), Q, J, s.onward);
                take_up(s, j, part);
            }
        }
    }
    template <int TILES>
    DEVICE void take_up(const Steps<Q>& s, int first, const float (&part)[1][TILES][4]) {
        const float through = s.through, gain = is_fp16<T> ? s.gain : 1.f;
        each<1, TILES>([&](int i, int j, int e) {
            float& x = state[i][first + j][e];
            const float add = is_fp16<T> ? part[i][j][e] * gain : part[i][j][e];
            x = PACKED && through == 0.f ? add : fmaf(x, through, add);
        });
    }

    DEVICE void run() {
        const int begin = segment * p.span, end = begin + p.span < p.chunks ? begin + p.span : p.chunks;
        // where there are outputs, one warp forms step sizes, a chunk ahead; else each warp does those of every eighth chunk, eight ahead
        const int warp = threadIdx.x / 32, ahead = !OUT ? warp : warp == FORMER ? 0 : -1;
        float passing = 1.f;
        RawSteps<Q> raw;
        begin_at(begin);
        if (STAGES == 2) fetch(begin);
        if (ahead >= 0) {
            const Rate of = Rate::of(p, head);
            if (threadIdx.x % 32 == 0) rate(ahead) = of;
            raw.template load<T, PACKED>(p, b, head, (begin + ahead) * Q), form_steps<T, Q, PACKED>(p, raw, of, steps(begin + ahead));
            raw.template load<T, PACKED>(p, b, head, (begin + FORMERS + ahead) * Q);
        }
        if (OUT && p.D != nullptr && threadIdx.x < P)
            skip()[threadIdx.x] = threadIdx.x < channels ? p.D[head * p.D_head + (first + threadIdx.x) * p.D_channel] : 0.f;
        if (OUT && p.turns != nullptr && segment > 0) wait_for_turn();
        enter();
        if constexpr (OUT && is_fp16<T>) note_largest();
        // weights of tokens that come later stay zero
        if constexpr (ATTENDS)
            for (int i = threadIdx.x; i < Q * Q / WIDE; i += WALKERS) Packed<T>{{0, 0, 0, 0}}.template store<true>(weights() + i * WIDE, WIDE);
#pragma unroll 1
        for (int c = begin; c < end; ++c) {
            const int next = c + FORMERS + ahead;
            float unit = 1.f;
            bool bad = false;
            if (STAGES == 2) copy_async_wait<0>();
            if constexpr (GROUPED) share_with_groups();
            __syncthreads();  // the chunk before is done with, and what this one needs is there
            if (STAGES == 1 || c + 1 < end) fetch(c + STAGES - 1);
            const auto form = [&] {
                if constexpr (OUT) save(c);
                if (ahead >= 0 && (c - begin) % FORMERS == 0 && next < end) {
                    form_steps<T, Q, PACKED>(p, raw, rate(ahead), steps(next));
                    raw.template load<T, PACKED>(p, b, head, (next + FORMERS) * Q);
                }
            };
            float scores[1][4][4];
            if constexpr (ATTENDS && STAGES == 2) score_together(c, scores);
            if constexpr (OUT) unit = place();
            if constexpr (!ATTENDS) form();
            if (STAGES == 1) copy_async_wait<0>();
            if constexpr (GROUPED && (OUT || STAGES == 1)) share_with_groups();
            if (ATTENDS || STAGES == 1) __syncthreads();
            if constexpr (ATTENDS && STAGES == 1) score_together(c, scores);
            if constexpr (PACKED && !OUT) bad = look(c);
            if constexpr (OUT) outputs(c, unit, scores, bad, form);
            passing *= steps(c).through;
            advance(c, bad);
            if constexpr (OUT && is_fp16<T>) note_largest();
        }
        if constexpr (!OUT) {
            const int64 next = b * p.segments + segment + 1;
            leave(p.states + state_at(next));
            if (threadIdx.x == 0 && first == 0) p.passing[next * p.h + head] = passing;
        } else if (p.turns != nullptr || segment == p.segments - 1) {
            leave(p.last + state_at(b));
            if (segment < p.segments - 1) pass_turn();
        }
    }
};

template <class T, int P, int N, int STAGES, int FLAGS>
__global__ void __launch_bounds__(WALKERS, 2) ssd_forward(const __grid_constant__ SsdForwardParams p) {
    GROUP_MEMORY(memory);
    int block = blockIdx.x;
    if (!(FLAGS & STATES) && p.turns != nullptr) {
        uint32* taken = reinterpret_cast<uint32*>(memory);
        if (threadIdx.x == 0) *taken = atomicInc(p.turns, ~0u);
        __syncthreads();
        block = *taken;
        __syncthreads();
    }
    Forward<T, P, N, STAGES, FLAGS>(p, memory, block).run();
}

// What enters each segment: the one before by itself, and what entered that one; a thread per state
__global__ void __launch_bounds__(256) ssd_pass_states(const __grid_constant__ SsdForwardParams p) {
    const int64 size = (int64)p.h * p.p * p.n, i = (int64)blockIdx.x * 256 + threadIdx.x, b = i / size, at = i % size;
    if (b >= p.batch) return;
    const int head = (int)(at / ((int64)p.p * p.n));
    float* states = p.states + b * p.segments * size + at;
    const float* passing = p.passing + b * p.segments * p.h + head;
    float x = states[size];
#pragma unroll 4
    for (int s = 2; s < p.segments; ++s) {
        const float keep = passing[s * p.h];
        // what is not finite ends where a document starts
        x = (p.reset != nullptr && keep == 0.f ? 0.f : keep * x) + states[s * size];
        states[s * size] = x;
    }
}
