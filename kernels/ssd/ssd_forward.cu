// SSD (arXiv:2405.21060) forward: a block walks the chunks of one head, or of a tile of its channels, with their state in registers.
//
// Within a chunk Y = (C B^T o L) X + diag(into) C H^T, L[t, s] = dt_s exp(sum of dt A from s to t), and H = through H + X^T diag(onward) B.
// Where rows and heads are too few to fill the GPU, the length is cut into segments: STATES finds what each leaves behind by itself,
// ssd_pass_states what enters each, and then every segment is walked with its outputs.
#include "ssd.cuh"

enum { STATES = 128 };
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
    float *states, *passing;    // of segments: (b, segments, h, p, n) at their starts, and the decay (b, segments, h) over the one before
    int64 x_b, x_l, x_h, dt_b, dt_l, dt_h, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, z_h;
    int batch, l, h, p, n, groups, chunks, D_head, D_channel, softplus, wide_dt;
    int tiles, segments, span;  // tiles of channels per head; chunks per segment
    float low, high;
};

// Shared memory: the stages' tiles X, B, C, then the state as an operand, then (float32) the weights, the step sizes of two chunks, maxima, D.
template <class T, int P, int N, int STAGES, int FLAGS>
struct Layout {
    static constexpr bool HALF = sizeof(T) == 2, OUT = !(FLAGS & STATES);
    static constexpr int Q = Chunk<T>::q, PAD = 16 / sizeof(T), ROOM = HALF ? 2 * P + 16 : P + 16;
    static constexpr int X = P + PAD, B = N + PAD, H = B, M = Q + PAD;
    // rows of C that nobody reads any more hold the outputs in float32
    static constexpr int C = (N > ROOM ? N : ROOM) + PAD;
    static constexpr int TILES = Q * (X + B + (OUT ? C : 0));
    static constexpr int STATE = OUT ? P * H : 0, WEIGHTS = OUT && !HALF ? Q * M : 0;
    static constexpr int OPERANDS = (STAGES * TILES + STATE + WEIGHTS) * (int)sizeof(T);
    static constexpr int MAXIMA = OPERANDS + 2 * (int)sizeof(Steps<Q>), SKIP = MAXIMA + 16, BYTES = SKIP + 4 * P;
};

template <class T, int P, int N, int STAGES, int FLAGS>
struct Forward {
    using At = Layout<T, P, N, STAGES, FLAGS>;
    static constexpr int Q = At::Q, WIDE = Packed<T>::lanes;
    static constexpr bool HALF = At::HALF, OUT = At::OUT, PACKED = FLAGS & RESET, ALIGNED = !(FLAGS & UNALIGNED);
    // outputs: a warp has 16 tokens and P / SPLIT channels; states: P / 2 channels and N / 2 states
    static constexpr int SPLIT = 64 / Q, SPAN = P / SPLIT, YT = SPAN / 8, MT = P / 32, NT = N / 16;
    static constexpr int PER_ROW = SPAN / WIDE, ROWS = 32 / PER_ROW, VECTORS = 16 / ROWS;

    const SsdForwardParams& p;
    char* shared;
    int head, group, segment, first, channels, n;
    int64 b;
    float state[MT][NT][4];
    bool spoiled = false;  // what the state has taken up is not finite

    DEVICE Forward(const SsdForwardParams& params, char* memory) : p(params), shared(memory) {
        int i = blockIdx.x;
        const int segments = p.segments - (OUT ? 0 : 1);
        first = i % p.tiles * P, i /= p.tiles;
        head = i % p.h, i /= p.h, group = head / (p.h / p.groups);
        segment = i % segments, b = i / segments;
        channels = p.p - first < P ? p.p - first : P, n = p.n;
    }

    DEVICE T* tiles(int c) const { return reinterpret_cast<T*>(shared) + (STAGES == 2 ? c % 2 * At::TILES : 0); }
    DEVICE T* X(int c) const { return tiles(c); }
    DEVICE T* B(int c) const { return tiles(c) + Q * At::X; }
    DEVICE T* C(int c) const { return tiles(c) + Q * (At::X + At::B); }
    DEVICE T* H() const { return reinterpret_cast<T*>(shared) + STAGES * At::TILES; }
    DEVICE Steps<Q>& steps(int c) const { return reinterpret_cast<Steps<Q>*>(shared + At::OPERANDS)[c % 2]; }
    DEVICE float* maxima() const { return reinterpret_cast<float*>(shared + At::MAXIMA); }
    DEVICE float* skip() const { return reinterpret_cast<float*>(shared + At::SKIP); }
    // a state's place: the row is a channel, the column one of n
    DEVICE static int row_of(int i, int e) { return threadIdx.x / 64 * (P / 2) + 16 * i + threadIdx.x % 32 / 4 + e / 2 * 8; }
    DEVICE static int column_of(int j, int e) { return threadIdx.x / 32 % 2 * (N / 2) + 8 * j + threadIdx.x % 4 * 2 + e % 2; }
    DEVICE int64 state_at(int64 of) const { return ((of * p.h + head) * p.p + first) * n; }

    DEVICE void fetch(int c) const {
        const int rows = p.l - c * Q < Q ? p.l - c * Q : Q;
        const int64 t = (int64)c * Q;
        const T* x = reinterpret_cast<const T*>(p.x) + b * p.x_b + t * p.x_l + head * p.x_h + first;
        fill_tile<T, Q, P, At::X, ALIGNED>(X(c), x, p.x_l, rows, channels);
        fill_tile<T, Q, N, At::B, ALIGNED>(B(c), reinterpret_cast<const T*>(p.B) + b * p.B_b + t * p.B_l + group * p.B_g, p.B_l, rows, n);
        if constexpr (OUT)
            fill_tile<T, Q, N, At::C, ALIGNED>(C(c), reinterpret_cast<const T*>(p.C) + b * p.C_b + t * p.C_l + group * p.C_g, p.C_l, rows, n);
        copy_async_commit();
    }

    DEVICE void enter() {
        const float* from = segment > 0 && OUT ? p.states + state_at(b * p.segments + segment)
                            : segment == 0 && p.initial_state != nullptr ? p.initial_state + state_at(b) : nullptr;
        bool bad = false;
        each<MT, NT>([&](int i, int j, int e) {
            const int row = row_of(i, e), column = column_of(j, e);
            float& x = state[i][j][e];
            x = from != nullptr && row < channels && column < n ? from[row * n + column] : 0.f;
            if (PACKED && !is_finite(x)) bad = true, x = 0.f;
        });
        if constexpr (PACKED) spoiled = __syncthreads_or(bad);
    }

    template <class S>
    DEVICE void leave(S* to) const {
        each<MT, NT>([&](int i, int j, int e) {
            const int row = row_of(i, e), column = column_of(j, e);
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
        each<MT, NT>([&](int i, int j, int e) { largest = fmaxf(largest, fabsf(state[i][j][e])); });
        largest = warp_max(largest);
        if (threadIdx.x % 32 == 0) maxima()[threadIdx.x / 32] = largest;
    }

    // The state as an operand; what it was divided by
    DEVICE float place() const {
        float by = 1.f, back = 1.f;
        if constexpr (is_fp16<T>) {
            const float* m = maxima();
            normal_range(fmaxf(fmaxf(m[0], m[1]), fmaxf(m[2], m[3])), 14, by, back);
        }
        each<MT, NT>([&](int i, int j, int e) {
            const float x[2] = {state[i][j][e] * by, state[i][j][e | 1] * by};
            if (e % 2 == 0) write_channels<T, 2>(H() + row_of(i, e) * At::H + column_of(j, e), x);
        });
        return back;
    }

    DEVICE void save(int c) const {
        if (p.saved == nullptr) return;
        const int64 at = state_at(b * p.chunks + c);
        if constexpr (!is_bf16<T>) {
            leave(reinterpret_cast<float*>(p.saved) + at);
        } else if ((PACKED && spoiled) || (!ALIGNED && n % WIDE != 0)) {
            leave(reinterpret_cast<bf16*>(p.saved) + at);
        } else {
            bf16* to = reinterpret_cast<bf16*>(p.saved) + at;
#pragma unroll
            for (int k = threadIdx.x; k < P * N / WIDE; k += SSD_THREADS) {
                const int row = k / (N / WIDE), column = k % (N / WIDE) * WIDE;
                if (row < channels) Packed<T>::from(H() + row * At::H + column).template store<true>(to + (int64)row * n + column, n - column);
            }
        }
    }

    // Mark the tokens whose operands are not finite, with zeros in their place: not even a product with zero brings them to another document
    DEVICE bool look(int c) const {
        constexpr int PARTS = SSD_THREADS / Q;
        const int row = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
        int bad = clean<P>(X(c) + row * At::X, part, PARTS) | clean<N>(B(c) + row * At::B, part, PARTS);
        if constexpr (OUT) bad |= 2 * clean<N>(C(c) + row * At::C, part, PARTS);
#pragma unroll
        for (int m = 1; m < PARTS; m *= 2) bad |= __shfl_xor_sync(~0u, bad, m);
        bad |= steps(c).bad[row];
        __syncwarp();
        if (part == 0) steps(c).bad[row] = bad;
        return __syncthreads_or(bad);
    }
    template <int COLUMNS>
    DEVICE static int clean(T* row, int part, int parts) {
        int bad = 0;
        for (int k = part; k < COLUMNS / WIDE; k += parts) {
            float x[WIDE];
            Packed<T>::from(row + k * WIDE).unpack(x);
            bool all = true;
#pragma unroll
            for (int i = 0; i < WIDE; ++i) all = all && is_finite(x[i]);
            if (all) continue;
            bad = 1;
            Packed<T>{{0, 0, 0, 0}}.template store<true>(row + k * WIDE, WIDE);
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

    // C B^T becomes what a token takes of the tokens before it; fp16: in rows that are made 2^14 at the most, and their outputs with them
    template <int S>
    DEVICE void weigh(const Steps<Q>& s, float (&scores)[1][S][4], float (&y)[1][YT][4], int rows, int columns, float (&back)[2]) const {
        const int row = rows + threadIdx.x % 32 / 4, column = columns + threadIdx.x % 4 * 2;
        float largest[2] = {0.f, 0.f};
        each<1, S>([&](int, int j, int e) {
            const int t = row + e / 2 * 8, from = column + 8 * j + e % 2;
            // bf16 has no use for the digits behind those of one float
            const float log = s.hi[t] - s.hi[from] + (is_bf16<T> ? 0.f : s.lo[t] - s.lo[from]), dt = s.dt[from];
            // of 16-bit types, all columns but the last 16 are behind every row
            const bool keep = ((HALF && j < S - 2) || from <= t) & (!PACKED || s.doc[from] == s.doc[t]);
            const float weight = decay_by<T>(keep ? log : -200.f) * dt;
            float& x = scores[0][j][e];
            x = keep ? x * weight : 0.f;
            if constexpr (is_fp16<T>) largest[e / 2] = fmaxf(largest[e / 2], fabsf(x));
        });
        if constexpr (is_fp16<T>) {
            float by[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                for (int m = 1; m < 4; m *= 2) largest[r] = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], m));
                normal_range(largest[r], 14, by[r], back[r]);
            }
            each<1, S>([&](int, int j, int e) { scores[0][j][e] *= by[e / 2]; });
            each<1, YT>([&](int, int j, int e) { y[0][j][e] *= by[e / 2]; });
        }
    }

    // y += weights X
    template <int S>
    DEVICE void add_seen(float (&y)[1][YT][4], const float (&weights)[1][S][4], const T* x, int tile, int half) const {
        if constexpr (HALF) {
#pragma unroll
            for (int j = 0; j < S / 2; ++j) {
                uint32 a[1][4];
                pack_a<T>(a[0], weights[0][2 * j], weights[0][2 * j + 1]);
                product_step<T, 1, YT, true>(y, a, x + 16 * j * At::X, At::X);
            }
        } else {
            T* all = H() + At::STATE;
            const int row = 16 * tile + threadIdx.x % 32 / 4, column = half * (Q / SPLIT) + threadIdx.x % 4 * 2;
            each<1, S>([&](int, int j, int e) { all[(row + e / 2 * 8) * At::M + column + 8 * j + e % 2] = weights[0][j][e]; });
            __syncthreads();
            product<T, 1, YT, false, true>(y, all + 16 * tile * At::M, At::M, x, At::X, 16 * (tile + 1));
        }
    }

    // y of a warp's tokens, over `back` for each of the two rows that a thread has, with S tiles of 8 tokens to look back on
    template <int S>
    DEVICE void attend(int c, int tile, int half, float unit, float (&y)[1][YT][4], float (&back)[2]) const {
        const Steps<Q>& s = steps(c);
        const T *rows = C(c) + 16 * tile * At::C, *state = H() + half * SPAN * At::H, *keys = B(c) + half * S * 8 * At::B;
        float scores[1][S][4] = {};
        if constexpr (HALF) {
#pragma unroll 4
            for (int k = 0; k < N; k += 16) {
                uint32 a[1][4];
                load_a<T, false, false>(a[0], rows + k, At::C, nullptr);
                product_step<T, 1, YT, false>(y, a, state + k, At::H);
                product_step<T, 1, S, false>(scores, a, keys + k, At::B);
            }
        } else {
            product<T, 1, YT, false, false>(y, rows, At::C, state, At::H, N);
            if (half <= tile) product<T, 1, S, false, false>(scores, rows, At::C, keys, At::B, N);
        }
        const float* at = s.into + 16 * tile + threadIdx.x % 32 / 4;
        const float into[2] = {at[0], at[8]}, by[2] = {into[0] * unit, into[1] * unit};
        each<1, YT>([&](int, int j, int e) { y[0][j][e] = PACKED && into[e / 2] == 0.f ? 0.f : y[0][j][e] * by[e / 2]; });
        weigh(s, scores, y, 16 * tile, half * S * 8, back);
        add_seen(y, scores, X(c) + half * SPAN, tile, half);
    }

    DEVICE Packed<T> gate(int64 t, int offset) const {
        const T* z = reinterpret_cast<const T*>(p.z) + b * p.z_b + head * p.z_h + first + (t < p.l ? t * p.z_l : 0) + offset;
        const int count = t < p.l ? channels - offset : 0;
        if (ALIGNED || (count >= WIDE && (unsigned long long)z % 16 == 0)) return Packed<T>::template load<true>(z, count);
        return Packed<T>::template load<false>(z, count);
    }

    DEVICE void outputs(int c, int warp, float unit, bool& bad) const {
        const Steps<Q>& s = steps(c);
        const int tile = warp / SPLIT, half = warp % SPLIT, lane = threadIdx.x % 32, part = half * SPAN;
        const int offset = part + lane % PER_ROW * WIDE, row = 16 * tile + lane / PER_ROW;
        // asked for now, needed at the end; one by one they would take too many registers
        Packed<T> gates[VECTORS];
        if (ALIGNED && p.z != nullptr) {
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) gates[v] = gate((int64)c * Q + row + v * ROWS, offset);
        }
        float y[1][YT][4], back[2];
#pragma unroll 1
        for (int again = 0; again < 2; ++again) {
            each<1, YT>([&](int, int j, int e) { y[0][j][e] = 0.f; });
            back[0] = back[1] = 1.f;
            if constexpr (HALF) {
                if (tile == 0) attend<2>(c, tile, half, unit, y, back);
                else if (tile == 1) attend<4>(c, tile, half, unit, y, back);
                else if (tile == 2) attend<6>(c, tile, half, unit, y, back);
                else attend<8>(c, tile, half, unit, y, back);
            } else {
                attend<2>(c, tile, half, unit, y, back);
            }
            if (!PACKED || again) break;
            // a token that is not finite shows in its own output: only then is it looked for, and the work done again without it
            float zero = 0.f;
            each<1, YT>([&](int, int j, int e) { zero = fmaf(y[0][j][e], 0.f, zero); });
            if (!__syncthreads_or(zero != 0.f || s.bad[threadIdx.x % Q])) break;
            bad = look(c);
        }
        // through shared memory: from the products' order to rows
        constexpr int STRIDE = SPAN + 8;
        float* own = reinterpret_cast<float*>(C(c)) + warp * (Q * At::C * (int)sizeof(T) / 16);
        __syncwarp();
        each<1, YT>([&](int, int j, int e) {
            const float pair[2] = {y[0][j][e] * back[e / 2], y[0][j][e | 1] * back[e / 2]};
            if (e % 2 == 0) store_shared<2>(own + (lane / 4 + e / 2 * 8) * STRIDE + 8 * j + lane % 4 * 2, pair);
        });
        __syncwarp();
        T* out = reinterpret_cast<T*>(p.out) + ((b * p.l + c * Q + row) * p.h + head) * p.p + first + offset;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v, out += (int64)ROWS * p.h * p.p) {
            const int t = row + v * ROWS;
            if (!ALIGNED && p.z != nullptr) gates[v] = gate((int64)c * Q + t, offset);
            if (c * Q + t < p.l && channels > offset)
                finish(out, X(c) + t * At::X, offset, own + (t - 16 * tile) * STRIDE + offset - part, gates[v], PACKED && (bad || spoiled) && (s.bad[t] & 2 || hurt(s, t)));
        }
    }

    // The skip and the gate of neighbouring channels
    DEVICE void finish(T* out, const T* skipped, int offset, const float* at, const Packed<T>& gates, bool hurt) const {
        float y[WIDE], x[WIDE];
        load_shared<WIDE>(at, y);
        if (p.D != nullptr) {
            float D[WIDE];
            Packed<T>::from(skipped + offset).unpack(x);
            load_shared<WIDE>(skip() + offset, D);
#pragma unroll
            for (int i = 0; i < WIDE; ++i) y[i] = fmaf(D[i], x[i], y[i]);
        }
        if (p.z != nullptr) {
            float gate[WIDE];
            gates.unpack(x);
            sigmoids<WIDE>(x, gate);
#pragma unroll
            for (int i = 0; i < WIDE; ++i) y[i] *= x[i] * gate[i];
        }
        if (hurt) {
#pragma unroll
            for (int i = 0; i < WIDE; ++i) y[i] = NOT_A_NUMBER;
        }
        // heads of whole vectors lie on 16-byte borders, for they are written in one piece
        if (ALIGNED || p.p % WIDE == 0)
            Packed<T>::pack(y).template store<true>(out, channels - offset);
        else
            Packed<T>::pack(y).template store<false>(out, channels - offset);
    }

    // H = through H + X^T diag(onward) B.  A chunk's part is summed by itself: tensor cores cut sums off, which long memories would add up.
    DEVICE void advance(int c, bool bad) {
        const Steps<Q>& s = steps(c);
        const int warp = threadIdx.x / 32;
        const T *x = X(c) + warp / 2 * (P / 2), *keys = B(c) + warp % 2 * (N / 2);
        if constexpr (PACKED) spoiled = (bad || spoiled) && hurt(s, Q - 1);
        if constexpr (HALF) {
            uint32 a[Q / 16][MT][4];
#pragma unroll
            for (int k = 0; k < Q / 16; ++k)
#pragma unroll
                for (int i = 0; i < MT; ++i) load_a<T, true, true>(a[k][i], x + 16 * k * At::X + 16 * i, At::X, s.onward + 16 * k);
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                float part[MT][2][4] = {};
#pragma unroll
                for (int k = 0; k < Q / 16; ++k) product_step<T, MT, 2, true>(part, a[k], keys + 16 * k * At::B + 8 * j, At::B);
                take_up(s, j, part);
            }
        } else {
#pragma unroll
            for (int j = 0; j < NT; j += NT / 2) {
                float part[MT][NT / 2][4] = {};
                product<T, MT, NT / 2, true, true, true>(part, x, At::X, keys + 8 * j, At::B, Q, NT / 2, s.onward);
                take_up(s, j, part);
            }
        }
    }
    template <int J>
    DEVICE void take_up(const Steps<Q>& s, int first, const float (&part)[MT][J][4]) {
        const float through = s.through, gain = is_fp16<T> ? s.gain : 1.f;
        each<MT, J>([&](int i, int j, int e) {
            float& x = state[i][first + j][e];
            const float add = is_fp16<T> ? part[i][j][e] * gain : part[i][j][e];
            x = PACKED && through == 0.f ? add : fmaf(x, through, add);
        });
    }

    DEVICE void run() {
        const int begin = segment * p.span, end = begin + p.span < p.chunks ? begin + p.span : p.chunks, warp = threadIdx.x / 32;
        float passing = 1.f;
        RawSteps<Q> raw;
        if (STAGES == 2) fetch(begin);
        if (warp == 0) raw.template load<T>(p, b, head, begin * Q), form_steps<T, Q, PACKED>(p, raw, head, steps(begin));
        if (OUT && p.D != nullptr && threadIdx.x < P)
            skip()[threadIdx.x] = threadIdx.x < channels ? p.D[head * p.D_head + (first + threadIdx.x) * p.D_channel] : 0.f;
        enter();
        if constexpr (OUT && is_fp16<T>) note_largest();
#pragma unroll 1
        for (int c = begin; c < end; ++c) {
            // warps take turns at having the fewest tokens to look back on
            const int turn = (warp + c) % 4;
            const bool ahead = turn == 0 && c + 1 < end;
            float unit = 1.f;
            bool bad = false;
            __syncthreads();  // the chunk before is done with
            if (STAGES == 1) fetch(c);
            if constexpr (OUT) unit = place();
            copy_async_wait<0>();
            __syncthreads();
            if (STAGES == 2 && c + 1 < end) fetch(c + 1);
            if (ahead) raw.template load<T>(p, b, head, (c + 1) * Q);
            if constexpr (PACKED && !OUT) bad = look(c);
            if constexpr (OUT) save(c), outputs(c, turn, unit, bad);
            passing *= steps(c).through;
            advance(c, bad);
            if (ahead) form_steps<T, Q, PACKED>(p, raw, head, steps(c + 1));
            if constexpr (OUT && is_fp16<T>) note_largest();
        }
        if constexpr (!OUT) {
            const int64 next = b * p.segments + segment + 1;
            leave(p.states + state_at(next));
            if (threadIdx.x == 0 && first == 0) p.passing[next * p.h + head] = passing;
        } else if (segment == p.segments - 1) {
            leave(p.last + state_at(b));
        }
    }
};

// blocks per multiprocessor, for the registers that the state leaves
template <int STATE>
constexpr int blocks_of = STATE > 1024 ? 2 : 3;

template <class T, int P, int N, int STAGES, int FLAGS>
__global__ void __launch_bounds__(SSD_THREADS, blocks_of<P * N>) ssd_forward(const __grid_constant__ SsdForwardParams p) {
    SHARED_MEMORY(memory);
    Forward<T, P, N, STAGES, FLAGS>(p, memory).run();
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
