// Gradients of SSD:  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t,  out = y silu(z).
//
// Four launches.  `ssd_steps` forms step sizes, the running sums c of dt A within chunks of Q tokens, and behind a gate gy = gout silu(z).
// `ssd_backward_states` walks each head's chunks from the last to the first with the gradient of the state in registers, and leaves, per
// chunk, the gradient R of the state behind it.  `ssd_backward_chunks` has all that a chunk needs then: H, the state before it, which the
// forward saved, and R.  With L_ts = exp(c_t - c_s), s <= t, and S = C B^T, W = gy X^T, G = S L W:
//
//   gX = dt (S L)^T gy + dt e^(c_last - c) (B R^T) + D gy        gC = (sum over heads of W L dt) B   + sum over heads of e^c (gy H)
//                                                                gB = (sum over heads of W L dt)^T C + sum over heads of dt e^(c_last - c) (X R)
//   gdt = A gc + (column sums of G) + e^(c_last - c) B . (X R), where gc of a token is what flows past it: from s < t to t' >= t (dt G),
//   from H to tokens from t on (e^c C . (gy H)), from tokens before t to R, and from H to R.
//
// A block goes through the heads of a group (or its share of them) and keeps S and the sums for B and C in registers all the while, so that
// nothing per head and token but gX and gdt is written.  `ssd_backward_sums` adds up what blocks left, in a fixed order.
//
// On compute capability 9.0, in bf16 without documents and with tiles of 64 channels and 64 or 128 states, four warps multiply together (`GROUPED`,
// groups.cuh): two groups have all rows and half of the columns each, and what follows from one product is done while others are on their way.
//
// Documents: a chunk in which some start is done once for each of them, with zeros in place of the others' tokens, which are not written: no
// zero meets a NaN of another document.  c starts anew with a document.  More than P channels per head come P at a time.
#include "ssd_backward.cuh"

// What a block of `ssd_backward_chunks` has in shared memory: warps WM x WN, each with Q / WM rows and a WN-th of the columns of every product,
// and sums of up to HEADS heads that wait: what becomes of them is a chain of shuffles, for as many warps at once as there are heads
template <class T, int P, int N, int WM, int WN, int STAGES, int HEADS, int FLAGS>
struct ChunkMemory {
    static constexpr int Q = Chunk<T>::q, THREADS = 32 * WM * WN;
    static constexpr int GATE = FLAGS & GATED ? 1 : 0;
    // whether operands are read once for four warps (groups.cuh): those with states then lie in tiles of 64 columns
    static constexpr bool GROUPED = GROUPS && is_bf16<T> && !(FLAGS & RESET) && P == 64 && (N == 64 || N == 128) && WM == 4 && WN == 2;
    // elements: B, C, a matrix (Q, Q), with a gate in two parts; then stages of x, gy, gout and z, H, R and the steps' floats; then sums
    static constexpr int PS = Tile<T, P>::STRIDE, NS = Tile<T, N>::STRIDE, QS = Tile<T, Q>::STRIDE;
    static constexpr int C_at = Q * NS, M_at = 2 * Q * NS, stages_at = M_at + (1 + GATE) * Q * QS;
    static constexpr int gy_at = Q * PS, gout_at = 2 * Q * PS, z_at = 3 * Q * PS;
    static constexpr int H_at = (2 + 2 * GATE) * Q * PS, R_at = H_at + P * NS, steps_at = R_at + P * NS;
    // steps, what undoes the scales of H and R, D of the channels, and nothing up to where a tile can begin
    static constexpr int skip_at = SLOPE * Q + 32, floats = skip_at + P, border = GROUPED ? 512 : 1;
    static constexpr int stage = (steps_at + floats * 4 / (int)sizeof(T) + border - 1) / border * border;
    // sums of a head: over G's rows and e^c C . (gy H), over its columns, its diagonal, x . gy, e^(c_last - c) B . (X R), R . H of a warp or
    // a channel
    using Sum = typename SumType<T>::type;
    static constexpr int row_at = 0, col_at = WN * Q, diag_at = col_at + WM * Q, own_at = diag_at + Q, moved_at = own_at + Q,
                         kept_at = moved_at + WN * Q, count = kept_at + (GROUPED ? P : WM * WN);
    static constexpr int scratches = sizeof(T) == 2 ? 3 * WM * WN : 0;  // floats
    static constexpr int bytes = (stages_at + STAGES * stage) * (int)sizeof(T) + HEADS * count * (int)sizeof(Sum) + scratches * 4;
};

template <class T, int P, int N, int WM, int WN, int STAGES, int HEADS, int FLAGS>
struct BackwardChunks : ChunkMemory<T, P, N, WM, WN, STAGES, HEADS, FLAGS> {
    using M = ChunkMemory<T, P, N, WM, WN, STAGES, HEADS, FLAGS>;
    using M::Q, M::THREADS, M::GATE, M::GROUPED;
    static constexpr int MT = Q / WM / 16, NN = N / WN / 8, NQ = Q / WN / 8, NP = P / WN / 8, EACH = Q / 32;
    static constexpr bool ALIGNED = !(FLAGS & UNALIGNED), WHOLE = !(FLAGS & TILED);
    using State = typename StateType<T>::type;
    using Sum = typename M::Sum;
    using Channels = Tile<T, P>;
    using States = Tile<T, GROUPED ? 64 : N>;
    using Tokens = Tile<T, Q>;
    using Operand = GroupOperand<T>;

    const SsdBackwardParams& p;
    T* memory;
    int64 b, row;  // row: of the partial sums
    int chunk, group, split, first_head, heads, tiles, warp, lane, m0, wn;
    // of the document at work: its tokens, whether the state before the chunk comes into it and whether the one behind is its own
    int lo, hi;
    bool entered, left, again;

    DEVICE T* stage(int i) const { return memory + M::stages_at + i % STAGES * M::stage; }
    DEVICE States B() const { return {memory}; }
    DEVICE States C() const { return {memory + M::C_at}; }
    // (S L), or what it leaves when rounded.  With a gate there are no registers to hold places in it for all heads: they are formed anew, for the
    // compiler does not know this zero.
    DEVICE Tokens matrix(int part) const { return {memory + (GATE != 0 ? keep_in_register(0) : 0) + M::M_at + part * (Q * Tokens::STRIDE)}; }
    DEVICE static Channels x(T* in) { return {in}; }
    DEVICE static Channels gy(T* in) { return {in + M::gy_at}; }
    DEVICE static States H(T* in) { return {in + M::H_at}; }
    DEVICE static States R(T* in) { return {in + M::R_at}; }
    // a corner of a tile with states as columns
    DEVICE static States corner(States tile, int row, int col) {
        return GROUPED ? tile.corner(row + col / 64 * 64, col % 64) : tile.corner(row, col);
    }
    // where a group's states begin in a row of them
    DEVICE static int columns_of(int across) { return across * (8 * NN) / 64 * 4096 + across * (8 * NN) % 64; }
    DEVICE static const float* steps(const T* in) { return reinterpret_cast<const float*>(in + M::steps_at); }
    DEVICE Sum* sums(int waiting) const { return reinterpret_cast<Sum*>(memory + M::stages_at + STAGES * M::stage) + waiting * M::count; }
    DEVICE float* scratch(int which) const { return reinterpret_cast<float*>(sums(HEADS)) + which * (WM * WN); }
    // what undoes the scale of H (0) or R (1), in fp16
    DEVICE static float back(T* in, int which) { return is_fp16<T> ? steps(in)[SLOPE * Q + which] : 1.f; }

    template <int COLS, class F>
    DEVICE void each(F f) const {
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i)
#pragma unroll
            for (int j = 0; j < COLS; ++j) f(m0 + lane / 4 + 8 * i, (wn * COLS + j) * 8 + lane % 4 * 2, i / 2, j, i % 2 * 2);
    }
    // f(row, i, j, e, whether it is the second of a pair) for what this lane has of the diagonal
    template <int COLS, class F>
    DEVICE void on_diagonal(F f) const {
        const int odd = lane / 4 - lane % 4 * 2;
        if (odd != 0 && odd != 1) return;
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i)
#pragma unroll
            for (int j = 0; j < COLS; ++j)
                if ((COLS % 2 != 0 || (i + j) % 2 == 0) && m0 + 8 * i == (wn * COLS + j) * 8) f(m0 + lane / 4 + 8 * i, i / 2, j, i % 2 * 2, odd);
    }
    // where the first of those pairs lies in a tile; then `pair` of it has that of i, j and e
    template <int COLS, class In>
    DEVICE In own(In tile) const {
        return tile.place(m0 + lane / 4, wn * (8 * COLS) + lane % 4 * 2);
    }
    DEVICE States own_states(States tile) const { return corner(tile, 0, wn * (8 * NN)).place(m0 + lane / 4, lane % 4 * 2); }
    template <class In>
    DEVICE static T* pair(In own, int i, int j, int e) {
        return own.on(16 * i + 4 * e, 8 * j).at;
    }
    // pairs of a tile as they lie, to be loaded in front of a wait; by a warp for itself, which has no registers for them, when they are needed
    template <int COLS>
    using Words = uint32[2 * MT][GROUPED ? COLS : 1];
    template <int COLS, class In>
    DEVICE static void load_words(In own, Words<COLS>& words) {
        if constexpr (GROUPED)
#pragma unroll
            for (int i = 0; i < 2 * MT; ++i)
#pragma unroll
                for (int j = 0; j < COLS; ++j) words[i][j] = *reinterpret_cast<const uint32*>(pair(own, i / 2, j, i % 2 * 2));
    }
    template <class In, int COLS>
    DEVICE static float2 word_of(In own, const uint32 (&words)[2 * MT][COLS], int i, int j, int e) {
        if constexpr (!GROUPED) return read_pair(pair(own, i, j, e));
        float x[2];
        Element<T>::unpack(words[2 * i + e / 2][j], x);
        return {x[0], x[1]};
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
    DEVICE static void over_states(float (&acc)[MT][COLS][4], States a, States b) {
        constexpr int AT_ONCE = sizeof(T) == 2 && N % 64 == 0 && N <= 128 ? 64 : 32;
#pragma unroll 1
        for (int k = 0; k < N; k += AT_ONCE) product<T, MT, COLS, false, false>(acc, a.corner(0, k), b.corner(0, k), AT_ONCE);
    }
    // the pairs of a product of channels with a state: of groups, when it is there, else some columns at a time
    using Part = float[MT][GROUPED ? NN : 1][4];
    template <class F>
    DEVICE void in_parts(Part& whole, Channels a, States state, F f) const {
        if constexpr (GROUPED) {
            each<NN>([&](int row, int col, int i, int j, int e) { f(i, j, e, whole[i][j][e], whole[i][j][e + 1]); });
            return;
        }
        constexpr int SOME = NN > 4 ? NN / 2 : NN;
#pragma unroll
        for (int j0 = 0; j0 < NN; j0 += SOME) {
            float part[MT][SOME][4];
            clear<SOME>(part);
            constexpr int AT_ONCE = N > 128 && sizeof(T) == 2 ? 16 : P;
#pragma unroll 1
            for (int k = 0; k < P; k += AT_ONCE)
                product<T, MT, SOME, false, true>(part, a.corner(m0, k), state.corner(k, (wn * NN + j0) * 8), AT_ONCE);
#pragma unroll
            for (int i = 0; i < 2 * MT; ++i)
#pragma unroll
                for (int j = 0; j < SOME; ++j) {
                    const float* x = part[i / 2][j] + i % 2 * 2;
                    f(i / 2, j0 + j, i % 2 * 2, x[0], x[1]);
                }
        }
    }
    // of the tiles of a head, sums are those of all
    DEVICE static void put(Sum* to, Sum x, bool first) { *to = WHOLE || first ? x : *to + x; }
    // COUNT values of each lane, summed over lanes whose numbers differ by STEP, 2 STEP, ... 2^(BITS - 1) STEP; every lane has one of the sums in the end, or,
    // where there are more lanes than values, several have the same: that with zeros in the other bits counts.
    // Returns which.
    template <int COUNT, int STEP, int BITS>
    DEVICE int share(const Sum (&x)[COUNT], Sum& sum) const {
        if constexpr (BITS == 0) {
            sum = x[0];
            return 0;
        } else if constexpr (COUNT == 1) {
            const Sum one[1] = {x[0] + shuffle(x[0], STEP)};
            return share<1, 2 * STEP, BITS - 1>(one, sum);
        } else {
            const bool high = lane & STEP;
            Sum half[COUNT / 2];
#pragma unroll
            for (int i = 0; i < COUNT / 2; ++i) half[i] = (high ? x[COUNT / 2 + i] : x[i]) + shuffle(high ? x[i] : x[COUNT / 2 + i], STEP);
            return share<COUNT / 2, 2 * STEP, BITS - 1>(half, sum) + (high ? COUNT / 2 : 0);
        }
    }
    // every row's sum over the warp's columns
    DEVICE void put_rows(const Sum (&rows)[2 * MT], Sum* to, bool first) const {
        Sum sum;
        const int i = share<2 * MT, 1, 2>(rows, sum);
        if ((lane & (4 - 2 * MT)) == 0) put(to + wn * Q + m0 + lane / 4 + 8 * i, sum, first);
    }
    // where this thread's first vector of the next head (or tile of it) lies: to form the addresses anew for each took as long as a product
    struct Next {
        const T *x, *gy, *gout, *z;
    };
    static constexpr bool COPIED = sizeof(State) == sizeof(T);  // else states are converted
    static constexpr int EACH16 = Q / 4, STEPS = (is_fp16<T> ? UNDO + 1 : UNDO) * EACH16;
    // rows of all states, in tiles as they are multiplied
    template <int ROWS>
    DEVICE void fetch_rows(States tile, const T* from, int64 stride, int lo, int hi) const {
        fetch_tile<T, ROWS, THREADS, ALIGNED>(tile, from, stride, lo, hi, p.n);
        if constexpr (GROUPED && N == 128) fetch_tile<T, ROWS, THREADS, ALIGNED>(corner(tile, 0, 64), from + 64, stride, lo, hi, p.n - 64);
    }
    DEVICE Next start(int head, int p0) const {
        const int64 t = (int64)chunk * Q;
        Next at;
        at.x = own_place<T, P, THREADS>((const T*)p.x + b * p.x_b + t * p.x_l + head * p.x_h + p0, p.x_l);
        at.gy = own_place<T, P, THREADS>((const T*)p.gy + b * p.gy_b + t * p.gy_l + head * p.gy_h + p0, p.gy_l);
        if (GATE != 0) {
            at.gout = own_place<T, P, THREADS>((const T*)p.gout + b * p.gout_b + t * p.gout_l + head * p.gout_h + p0, p.gout_l);
            at.z = own_place<T, P, THREADS>((const T*)p.z + b * p.z_b + t * p.z_l + head * p.z_h + p0, p.z_l);
        }
        return at;
    }
    DEVICE void fetch_steps(T* to, int head) const {
        if (threadIdx.x >= STEPS) return;
        const int64 plane = (int64)p.batch * p.h * p.chunks * Q, first = ((b * p.h + head) * p.chunks + chunk) * Q;
        copy_async16(to + M::steps_at + threadIdx.x * Element<T>::lanes, p.steps + first + threadIdx.x / EACH16 * plane + threadIdx.x % EACH16 * 4, true);
    }
    // D of every channel of the tile, whether it is one of a head or not
    DEVICE void fetch_skip(T* to, int head, int p0) const {
        float* at = reinterpret_cast<float*>(to + M::steps_at) + M::skip_at;
        static_assert(P <= THREADS);
        const int i = THREADS - 1 - threadIdx.x;  // others than those who fetch steps
        if (i >= P) return;
        const bool there = p.D != nullptr && p0 + i < p.p;
        copy_async4(at + i, (const float*)p.D + (there ? (int64)head * p.D_head + (p0 + i) * p.D_channel : 0), there ? 4 : 0);
    }
    DEVICE void fetch_state(T* to, const void* states, int head, int p0, int which) const {
        const State* from = (const State*)states + (((b * p.chunks + chunk) * p.h + head) * p.p + p0) * p.n;
        const int rows = p.p - p0;
        float* undo = reinterpret_cast<float*>(to + M::steps_at) + SLOPE * Q + which;
        if constexpr (COPIED)
            fetch_rows<P>(which ? R(to) : H(to), from, p.n, 0, rows);
        else
            convert_state<T, P, THREADS>(which ? R(to) : H(to), from, rows, p.n, undo, scratch(which));
    }
    DEVICE void fetch(int i, Next& at) const {
        T* to = stage(i);
        const int tile = WHOLE ? 0 : i % tiles, cols = p.p - tile * P, head = first_head + (WHOLE ? i : i / tiles);
        // sums over 256 states leave no registers to keep addresses in
        if constexpr (N > 128) at = start(head, tile * P);
        fetch_steps(to, head), fetch_skip(to, head, tile * P);
        fetch_vectors<T, Q, THREADS, ALIGNED>(x(to), at.x, p.x_l, lo, hi, cols);
        fetch_vectors<T, Q, THREADS, ALIGNED>(gy(to), at.gy, p.gy_l, lo, hi, cols);
        if constexpr (GATE != 0) {
            fetch_vectors<T, Q, THREADS, ALIGNED>(Channels{to + M::gout_at}, at.gout, p.gout_l, lo, hi, cols);
            fetch_vectors<T, Q, THREADS, ALIGNED>(Channels{to + M::z_at}, at.z, p.z_l, lo, hi, cols);
        }
        if (entered) fetch_state(to, p.saved, head, tile * P, 0);
        if (left) fetch_state(to, p.gstates, head, tile * P, 1);
        copy_async_commit();
        // on to the next tile, or from a head's last to the next head
        const bool last = WHOLE || tile == tiles - 1;
        const int back = WHOLE ? 0 : (tiles - 1) * P;
        at.x += last ? p.x_h - back : P, at.gy += last ? p.gy_h - back : P;
        if (GATE != 0) at.gout += last ? p.gout_h - back : P, at.z += last ? p.z_h - back : P;
    }

    // fp16, behind a gate: gy of all tokens at one scale, for sums over them; returns what undoes it
    DEVICE float level(T* in) const {
        if constexpr (!is_fp16<T> || GATE == 0) return 1.f;
        const float* undo = steps(in) + UNDO * Q;
        float most = 0.f;
        for (int t = lo; t < hi; ++t) most = fmaxf(most, undo[t]);
        for (int i = threadIdx.x; i < Q * P / 2; i += THREADS) {
            const int t = i / (P / 2);
            T* at = gy(in).place(t, i % (P / 2) * 2).at;
            const float by = zero_or(t >= lo && t < hi, undo[t] / most);
            const float2 g = read_pair(at);
            write_shared_pair(at, g.x * by, g.y * by);
        }
        __syncthreads();
        return most;
    }
    // S L dt into shared memory, W L dt to the sum over heads, and the sums of G, those of rows to `rows`; returns what undoes the scale of the
    // first
    // `multiply` makes W, unless there is none of it
    template <class F>
    DEVICE float weigh(T* in, float undo_gy, const float (&scores)[MT][NQ][4], float (&gscores)[MT][NQ][4], float (&W)[MT][NQ][4],
                       Sum (&rows)[2 * MT], Sum* f, bool first, F multiply) const {
        const float *to = steps(in) + m0 + lane / 4, *from = steps(in) + wn * (8 * NQ) + lane % 4 * 2;
        Sum cols[2 * NQ];
        // else all columns are behind all rows
        const bool some = wn * (8 * NQ) < m0 + 16 * MT;
        // bfloat16 has not the digits that the second part of a difference would save
        constexpr bool PARTS = !is_bf16<T>;
        float dt[2 * NQ], from_hi[2 * NQ], from_lo[2 * NQ], to_hi[2 * MT], to_lo[2 * MT];
        bool there[2 * MT];
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            rows[i] = 0.f, to_hi[i] = to[HI * Q + 8 * i], to_lo[i] = PARTS ? to[LO * Q + 8 * i] : 0.f;
            there[i] = !(FLAGS & RESET) || m0 + lane / 4 + 8 * i < hi;
        }
#pragma unroll
        for (int j = 0; j < NQ; ++j) {
            const float2 steps = read_pair(from + 8 * j), high = read_pair(from + HI * Q + 8 * j);
            dt[2 * j] = steps.x, dt[2 * j + 1] = steps.y, from_hi[2 * j] = high.x, from_hi[2 * j + 1] = high.y;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int t = (wn * NQ + j) * 8 + lane % 4 * 2 + k;
                // of another document, it may not be finite
                if ((FLAGS & RESET) && (t < lo || t >= hi)) dt[2 * j + k] = 0.f;
                cols[2 * j + k] = 0.f, from_lo[2 * j + k] = PARTS ? from[LO * Q + 8 * j + k] : 0.f;
            }
        }
        multiply(some);
        float largest = 0.f, by = 1.f, undo = 1.f;
        // how far the first column is behind the first row
        const int behind = wn * (8 * NQ) + lane % 4 * 2 - m0 - lane / 4;
        if (some) {
            on_diagonal<NQ>([&](int to, int i, int j, int e, bool odd) {
                const float w = (odd ? W[i][j][e + 1] : W[i][j][e]) * undo_gy;
                put(f + M::diag_at + to, w * (odd ? scores[i][j][e + 1] : scores[i][j][e]), first);
                put(f + M::own_at + to, w, first);
            });
            each<NQ>([&](int, int from, int i, int j, int e) {
                const int r = 2 * i + e / 2;
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int c = 2 * j + k, far = 8 * (r - j) - k;
                    const bool seen = behind <= far && there[r] && (!(FLAGS & RESET) || from + k >= lo);
                    float log = to_hi[r] - from_hi[c];
                    if (PARTS) log += to_lo[r] - from_lo[c];
                    const float L = zero_or(seen, exp2_of<T>(log)), SL = scores[i][j][e + k] * L;
                    if (is_fp16<T>) W[i][j][e + k] *= undo_gy;
                    const float w = W[i][j][e + k];
                    gscores[i][j][e + k] = fmaf(w, L * dt[c], gscores[i][j][e + k]);
                    // but for the diagonal, which no other tile of 8 x 8 has
                    const Sum G = (NQ % 2 == 0 && (r - j) % 2 != 0) || behind != far ? w * SL : 0.f;
                    rows[r] = c == 0 ? G * dt[c] : rows[r] + G * dt[c];
                    cols[c] = r == 0 ? G : cols[c] + G;
                    W[i][j][e + k] = SL * dt[c];
                    if (is_fp16<T>) largest = fmaxf(largest, fabsf(W[i][j][e + k]));
                }
            });
        } else {
            clear<NQ>(W);
        }
        if constexpr (is_fp16<T>) normal_range(block_max(largest, scratch(2)), 8, by, undo);
        const Tokens own = this->template own<NQ>(matrix(0));
        each<NQ>([&](int, int, int i, int j, int e) {
            T* at = pair(own, i, j, e);
            const float x = W[i][j][e] * by, y = W[i][j][e + 1] * by;
            write_shared_pair(at, x, y);
            if (GATE != 0) {
                const float2 big = read_pair(at);
                write_shared_pair(at + Q * Tokens::STRIDE, x - big.x, y - big.y);
            }
        });
        Sum sum;
        const int c = share<2 * NQ, 4, 3>(cols, sum);
        if ((lane / 4 & (8 - 2 * NQ)) == 0) put(f + M::col_at + m0 / (Q / WM) * Q + (wn * NQ + c / 2) * 8 + lane % 4 * 2 + c % 2, sum, first);
        return undo;
    }
    DEVICE static void add_products(float& sum, float2 a, float b0, float b1) { sum = fmaf(a.y, b1, fmaf(a.x, b0, sum)); }
    DEVICE static void add_products(double& sum, float2 a, float b0, float b1) { sum += fmaf(a.x, b0, a.y * b1); }
    // e^c (gy H) for C
    DEVICE void read(T* in, float undo_gy, Part& part, float (&gC)[MT][NN][4], Sum (&rows)[2 * MT]) const {
        float decay[2 * MT];
        Sum sum[2 * MT][2];
        const float* s = steps(in);
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            const int t = m0 + lane / 4 + 8 * i;
            sum[i][0] = sum[i][1] = 0.f, decay[i] = s[INTO * Q + t] * (back(in, 0) * undo_gy);
        }
        const States keys = own_states(C());
        // in front of the wait
        Words<NN> words;
        load_words<NN>(keys, words);
        if constexpr (GROUPED) group_wait<1>(part[0]);
        in_parts(part, gy(in), H(in), [&](int i, int j, int e, float x0, float x1) {
            const float by = decay[2 * i + e / 2];
            const float2 C = word_of(keys, words, i, j, e);
            gC[i][j][e] = fmaf(by, x0, gC[i][j][e]), gC[i][j][e + 1] = fmaf(by, x1, gC[i][j][e + 1]);
            add_products(sum[2 * i + e / 2][j % 2], C, x0, x1);
        });
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) rows[i] += (sum[i][0] + sum[i][1]) * decay[i];
    }
    // dt e^(c_last - c) (X R) for B
    DEVICE void write(T* in, Part& part, float (&gB)[MT][NN][4]) const {
        const float* s = steps(in);
        float weight[2 * MT];
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            const int t = m0 + lane / 4 + 8 * i;
            weight[i] = s[ONWARD * Q + t] * s[t] * back(in, 1);
        }
        in_parts(part, x(in), R(in), [&](int i, int j, int e, float x0, float x1) {
            const float by = weight[2 * i + e / 2];
            gB[i][j][e] = fmaf(by, x0, gB[i][j][e]), gB[i][j][e + 1] = fmaf(by, x1, gB[i][j][e + 1]);
        });
    }
    // what goes from the state before the chunk to the one behind it
    DEVICE void keep(T* in, Sum* f, bool first) const {
        Sum sum = 0.f;
        if constexpr (sizeof(T) == 2) {
            // the diagonal of H R^T: a sixteenth of what is multiplied, and a third of the instructions that one by one would take
            constexpr int DOWN = P / 16, MOST = WM * WN / DOWN, PARTS = MOST < N / 16 ? MOST : N / 16;
            const int row = warp / PARTS * 16, col = warp % PARTS * (N / PARTS), off = lane / 4 - lane % 4 * 2;
            float both[1][2][4] = {};
            if (warp < DOWN * PARTS) product<T, 1, 2, false, false>(both, H(in).corner(row, col), R(in).corner(row, col), N / PARTS);
            sum = zero_or(off == 0, both[0][0][0] + both[0][1][2]) + zero_or(off == 1, both[0][0][1] + both[0][1][3]);
        } else {
            for (int i = threadIdx.x; i < P * N; i += THREADS) sum += (Sum)*H(in).place(i / N, i % N).at * *R(in).place(i / N, i % N).at;
        }
        sum = warp_sum(sum);
        if (lane == 0) put(f + M::kept_at + warp, sum * (steps(in)[INTO * Q + Q - 1] * back(in, 0) * back(in, 1)), first);
    }
    // the same for each channel, of H R^T, of which a warp may have a part of the diagonal
    DEVICE void keep_diagonal(T* in, const float (&HR)[MT][NP][4], Sum* f, bool first) const {
        const float by = steps(in)[INTO * Q + Q - 1];
        on_diagonal<NP>([&](int row, int i, int j, int e, bool odd) { put(f + M::kept_at + row, (odd ? HR[i][j][e + 1] : HR[i][j][e]) * by, first); });
    }
    // dt e^(c_last - c) (B R^T) for x, over `undo`; and e^(c_last - c) B . (X R), which is that of x and B R^T
    DEVICE void outward(T* in, float undo, float (&gx)[MT][NP][4], Sum* f, bool first) const {
        if constexpr (!GROUPED) clear<NP>(gx), over_states(gx, B().corner(m0, 0), R(in).corner(wn * (8 * NP), 0));
        const float* s = steps(in);
        float decay[2 * MT], dt[2 * MT];
        Sum rows[2 * MT];
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            const int t = m0 + lane / 4 + 8 * i;
            rows[i] = 0.f, decay[i] = s[ONWARD * Q + t] * back(in, 1), dt[i] = s[t] / undo;
        }
        const Channels own = this->template own<NP>(x(in));
        Words<NP> words;
        load_words<NP>(own, words);
        if constexpr (GROUPED) group_wait<2>(gx[0]);
        each<NP>([&](int, int, int i, int j, int e) {
            const int r = 2 * i + e / 2;
            add_products(rows[r], word_of(own, words, i, j, e), gx[i][j][e], gx[i][j][e + 1]);
            gx[i][j][e] *= decay[r] * dt[r], gx[i][j][e + 1] *= decay[r] * dt[r];
        });
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) rows[i] *= decay[i];
        put_rows(rows, f + M::moved_at, first);
    }
    // the skip of this thread's j-th pair of columns
    DEVICE float2 skip(const T* in, int j) const { return read_pair(steps(in) + M::skip_at + (wn * NP + j) * 8 + lane % 4 * 2); }
    // acc += D times a tile of channels
    DEVICE void add_skip(T* in, Channels tile, float (&acc)[MT][NP][4]) const {
        const Channels own = this->template own<NP>(tile);
        each<NP>([&](int, int, int i, int j, int e) {
            const float2 x = read_pair(pair(own, i, j, e)), D = skip(in, j);
            acc[i][j][e] = fmaf(D.x, x.x, acc[i][j][e]), acc[i][j][e + 1] = fmaf(D.y, x.y, acc[i][j][e + 1]);
        });
    }
    DEVICE void inputs(T* in, int head, int p0, float undo, float undo_gy, float (&gx)[MT][NP][4]) const {
        product<T, MT, NP, true, true>(gx, matrix(0).corner(0, m0), gy(in).corner(0, wn * (8 * NP)), Q);
        const Channels own = this->template own<NP>(gy(in));
        each<NP>([&](int, int, int i, int j, int e) {
            const float2 g = read_pair(pair(own, i, j, e)), D = skip(in, j);
            gx[i][j][e] = fmaf(D.x * undo_gy, g.x, gx[i][j][e] * undo), gx[i][j][e + 1] = fmaf(D.y * undo_gy, g.y, gx[i][j][e + 1] * undo);
        });
        write_tile((T*)p.gx, head, p0, p.gx_row, gx);
    }
    // a warp's rows and columns of the head's channels from p0 on
    DEVICE void write_tile(T* to, int head, int p0, int64 row, const float (&x)[MT][NP][4]) const {
        constexpr int TOGETHER = sizeof(T) == 2 ? 2 : 1;
        const int first = p0 + wn * (8 * NP), column = TOGETHER == 2 ? column_of_four() : lane % 4 * 2;
        to += place(m0 + lane / 4, head, first + column, row);
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i, to += 8 * row) {
            const int t = m0 + lane / 4 + 8 * i, there = t >= lo && t < hi ? p.p - first - column : 0;
#pragma unroll
            for (int j = 0; j < NP; j += TOGETHER) {
                const float* at = x[i / 2][j] + i % 2 * 2;
                if constexpr (TOGETHER == 2) {
                    const uint2 words = four(Element<T>::pack(at), Element<T>::pack(at + 4));
                    const Vec<T, 4> quad{{words.x, words.y}};
                    quad.template store<ALIGNED>(to + 8 * j, there - 8 * j);
                } else {
                    write_pair<T, ALIGNED>(to + 8 * j, at[0], at[1], there - 8 * j);
                }
            }
        }
    }
    DEVICE int64 token(int t) const { return b * p.l + (int64)chunk * Q + t; }
    DEVICE int64 place(int t, int head, int channel, int64 row) const { return token(t) * row + (int64)head * p.p + channel; }
    // gout silu'(z) of a pair whose x lies at `at`
    DEVICE static float2 gate_slope(const T* at) {
        const float2 g = read_pair(at + M::gout_at), z = read_pair(at + M::z_at);
        float s0, s1;
        sigmoid2(z.x, z.y, s0, s1);
        return {g.x * s0 * fmaf(z.x, 1.f - s0, 1.f), g.y * s1 * fmaf(z.y, 1.f - s1, 1.f)};
    }
    // the gradient of the gate, gout y silu'(z), for which y is formed again
    DEVICE void gates(T* in, int head, int p0, float undo) const {
        float y[MT][NP][4];
        clear<NP>(y);
        if (entered) {
            over_states(y, C().corner(m0, 0), H(in).corner(wn * (8 * NP), 0));
            each<NP>([&](int t, int, int i, int j, int e) {
                const float by = steps(in)[INTO * Q + t] * (back(in, 0) / undo);
                y[i][j][e] *= by, y[i][j][e + 1] *= by;
            });
        }
#pragma unroll
        for (int part = 0; part < 2; ++part)
            product<T, MT, NP, false, true>(y, matrix(part).corner(m0, 0), x(in).corner(0, wn * (8 * NP)), Q);
        const Channels own = this->template own<NP>(x(in));
        each<NP>([&](int, int, int i, int j, int e) {
            const T* at = pair(own, i, j, e);
            const float2 x = read_pair(at), D = skip(in, j);
            y[i][j][e] = fmaf(D.x, x.x, y[i][j][e] * undo), y[i][j][e + 1] = fmaf(D.y, x.y, y[i][j][e + 1] * undo);
            const float2 f = gate_slope(at);
            y[i][j][e] *= f.x, y[i][j][e + 1] *= f.y;
        });
        write_tile((T*)p.gz, head, p0, p.gz_row, y);
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
            a.skip += f[M::own_at + t];
        }
        if (!entered || !left) return;
        if constexpr (GROUPED) {
            a.kept = warp_sum(f[M::kept_at + lane] + f[M::kept_at + 32 + lane]);
        } else {
            for (int w = 0; w < WM * WN; ++w) a.kept += f[M::kept_at + w];
        }
    }
    DEVICE void finish(const Sum* f, int head) const {
        // dt, and its derivative behind: asked for before they are needed
        const float* s = p.steps + ((b * p.h + head) * p.chunks + chunk) * Q;
        const int64 slopes = SLOPE * (int64)p.batch * p.h * p.chunks * Q;
        float dt[EACH], next[EACH], slope[EACH];
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int t = lane * EACH + i;
            dt[i] = s[t], next[i] = t + 1 < Q ? s[t + 1] : 0.f, slope[i] = s[slopes + t];
        }
        HeadSums a;
        gather(f, a);
        // what flows to a token less what flows from it, and what goes from it to the state behind the chunk
        const float A = finite_rate(reinterpret_cast<const float*>(p.A)[head]), rate = rate_of(A);
        Sum ahead[EACH], behind[EACH], from_start = 0.f, to_end = 0.f;
        bool ends[EACH], cut = false;
#pragma unroll
        for (int i = EACH - 1; i >= 0; --i) {
            const int t = lane * EACH + i;
            // nothing flows past a step that forgets all: digits of what is behind it must not come into sums before it
            ends[i] = t + 1 < Q && forgets(next[i], rate);
            // of another document, it may not be finite
            if (t < lo || t >= hi) dt[i] = 0.f;
            ahead[i] = a.row[i] - dt[i] * a.col[i];
            to_end = ends[i] ? ahead[i] : to_end + ahead[i];
            cut |= ends[i];
        }
        Sum rest = sum_before(to_end, cut, 31 - lane);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            behind[i] = from_start;
            from_start += dt[i] * a.moved[i];
        }
        const Sum before = sum_before(from_start, false, lane);
        Sum gA = 0.f, gbias = 0.f;
#pragma unroll
        for (int i = EACH - 1; i >= 0; --i) {
            const int t = lane * EACH + i;
            rest = ends[i] ? ahead[i] : rest + ahead[i];
            const Sum gc = forgets(dt[i], rate) ? (Sum)0 : rest + before + behind[i] + a.kept;
            const Sum graw = (A * gc + (a.col[i] + a.diag[i] + a.moved[i])) * slope[i];
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
    DEVICE void skips(T* in, int head, int p0, float undo_gy) const {
        float* to = p.gheads + row * (2 * p.h + (int64)p.h * p.p) + 2 * p.h + (int64)head * p.p;
        for (int col = threadIdx.x; col < P && p0 + col < p.p; col += THREADS) {
            Sum sum = 0.f;
            for (int t = lo; t < hi; ++t) {
                const T* at = x(in).place(t, col).at;
                sum += read_one(at + M::gy_at) * read_one(at) * undo_gy;
            }
            add_to(to + p0 + col, sum);
        }
    }

    DEVICE void score(Operand origin, int across, float (&scores)[MT][NQ][4]) const {
        if constexpr (GROUPED) {
            group_begin();
            group_product<T, N, false, false, true>(scores[0], origin.past(M::C_at), origin.past(across * (8 * NQ) * 64));
            group_commit();
            group_wait<0>(scores[0]);
        } else {
            over_states(scores, C().corner(m0, 0), B().corner(wn * (8 * NQ), 0));
        }
    }
    // a head (or a tile of it) by warps for themselves
    DEVICE void alone(T* in, int head, int tile, const float (&scores)[MT][NQ][4], float (&gscores)[MT][NQ][4], float (&gB)[MT][NN][4],
                      float (&gC)[MT][NN][4], Sum* f) const {
        Sum rows[2 * MT];
        float W[MT][NQ][4], gx[MT][NP][4];
        Part none;
        const bool first = tile == 0;
        const float undo_gy = level(in), undo = weigh(in, undo_gy, scores, gscores, W, rows, f, first, [&](bool some) {
            clear<NQ>(W);
            if (some) product<T, MT, NQ, false, false>(W, gy(in).corner(m0, 0), x(in).corner(wn * (8 * NQ), 0), P);
        });
        if (entered) read(in, undo_gy, none, gC, rows);
        put_rows(rows, f + M::row_at, first);
        if (left) {
            write(in, none, gB);
            outward(in, undo * undo_gy, gx, f, first);
            if (entered) keep(in, f, first);
        } else {
            clear<NP>(gx);
        }
        __syncthreads();
        inputs(in, head, tile * P, undo * undo_gy, undo_gy, gx);
        if constexpr (GATE != 0) gates(in, head, tile * P, undo);
        if (p.D_channel) skips(in, head, tile * P, undo_gy);
    }
    // the same by two groups of warps, `across` being the own one: products are on their way while others are worked on.  The stage lies at `at`.
    DEVICE void together(Operand origin, int at, int across, int head, int tile, const float (&scores)[MT][NQ][4], float (&gscores)[MT][NQ][4],
                         float (&gB)[MT][NN][4], float (&gC)[MT][NN][4], Sum* f) const {
        T* in = memory + at;
        Sum rows[2 * MT];
        float W[MT][NQ][4], gx[MT][NP][4], y[MT][NP][4], kept[MT][NP][4], slopes[MT][NP][4];
        Part part;
        const bool first = tile == 0;
        // rows of the group's tokens, its channels and its states
        const int tokens = across * (8 * NQ) * 64, channels = across * (8 * NP), states = columns_of(across);
        const Operand xs = origin.past(at), gys = xs.past(M::gy_at), Hs = xs.past(M::H_at), Rs = xs.past(M::R_at), weights = origin.past(M::M_at);
        weigh(in, 1.f, scores, gscores, W, rows, f, first, [&](bool) {
            group_begin();
            group_product<T, P, false, false, true>(W[0], gys, xs.past(tokens));
            group_commit();
            group_product<T, P, false, true, true>(part[0], gys, Hs.past(states));
            group_commit();
            group_wait<1>(W[0]);
        });
        group_begin();
        group_product<T, N, false, false, true>(gx[0], origin, Rs.past(channels * 64));
        group_commit();
        read(in, 1.f, part, gC, rows);
        put_rows(rows, f + M::row_at, first);
        group_begin();
        group_product<T, N, false, false, true>(kept[0], Hs, Rs.past(channels * 64));
        group_commit();
        group_product<T, P, false, true, true>(part[0], xs, Rs.past(states));
        group_commit();
        outward(in, 1.f, gx, f, first);
        group_wait<1>(kept[0]);
        keep_diagonal(in, kept, f, first);
        if constexpr (GATE != 0) group_begin(), group_product<T, N, false, false, true>(y[0], origin.past(M::C_at), Hs.past(channels * 64));
        group_commit();
        add_skip(in, gy(in), gx);
        share_with_groups();
        __syncthreads();
        group_begin();
        group_product<T, Q, true, true, false>(gx[0], weights, gys.past(channels));
        group_commit();
        group_wait<2>(part[0]);
        write(in, part, gB);
        if constexpr (GATE != 0) {
            const float* into = steps(in) + INTO * Q + m0 + lane / 4;
            const float decay[2] = {into[0], into[8]};
            group_wait<1>(y[0]);
            each<NP>([&](int, int, int i, int j, int e) { y[i][j][e] *= decay[e / 2], y[i][j][e + 1] *= decay[e / 2]; });
            add_skip(in, x(in), y);
            group_begin();
            group_product<T, Q, false, true, false>(y[0], weights, xs.past(channels));
            group_product<T, Q, false, true, false>(y[0], weights.past(Q * Q), xs.past(channels));
            group_commit();
            const Channels own = this->template own<NP>(x(in));
            each<NP>([&](int, int, int i, int j, int e) {
                const float2 f = gate_slope(pair(own, i, j, e));
                slopes[i][j][e] = f.x, slopes[i][j][e + 1] = f.y;
            });
        }
        group_wait<GATE>(gx[0]);
        write_tile((T*)p.gx, head, tile * P, p.gx_row, gx);
        if constexpr (GATE != 0) {
            group_wait<0>(y[0]);
            each<NP>([&](int, int, int i, int j, int e) { y[i][j][e] *= slopes[i][j][e], y[i][j][e + 1] *= slopes[i][j][e + 1]; });
            write_tile((T*)p.gz, head, tile * P, p.gz_row, y);
        }
        if (p.D_channel) skips(in, head, tile * P, 1.f);
    }

    // all heads, for the tokens of one document
    DEVICE void run() const {
        float gB[MT][NN][4], gC[MT][NN][4], scores[MT][NQ][4], gscores[MT][NQ][4];
        clear<NN>(gB), clear<NN>(gC), clear<NQ>(scores), clear<NQ>(gscores);
        // of a group, the same for all lanes, as the compiler is to know
        const Operand origin(Tile<T, 64>{memory});
        const int across = __shfl_sync(~0u, wn, 0);
        const int64 t0 = (int64)chunk * Q;
        __syncthreads();
        fetch_rows<Q>(B(), (const T*)p.B + b * p.B_b + t0 * p.B_l + group * p.B_g, p.B_l, lo, hi);
        fetch_rows<Q>(C(), (const T*)p.C + b * p.C_b + t0 * p.C_l + group * p.C_g, p.C_l, lo, hi);
        Next next = start(first_head, 0);
        fetch(0, next);
        const int count = heads * tiles;
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            T* in = stage(i);
            const int at = GROUPED ? __shfl_sync(~0u, i % STAGES * M::stage, 0) : 0;
            const int tile = WHOLE ? 0 : i % tiles, nth = WHOLE ? i : i / tiles, head = first_head + nth, waiting = nth % HEADS;
            Sum* f = sums(waiting);
            copy_async_wait<0>();
            if constexpr (GROUPED) share_with_groups();
            __syncthreads();
            if (STAGES > 1 && i + 1 < count) fetch(i + 1, next);
            if (i == 0) score(origin, across, scores);
            if constexpr (GROUPED)
                together(origin, M::stages_at + at, across, head, tile, scores, gscores, gB, gC, f);
            else
                alone(in, head, tile, scores, gscores, gB, gC, f);
            if ((WHOLE || tile == tiles - 1) && (waiting == HEADS - 1 || i == count - 1))
                for (int w = warp; w <= waiting; w += WM * WN) finish(sums(w), head - waiting + w);
            if (STAGES == 1 && i + 1 < count) {
                __syncthreads();
                fetch(i + 1, next);
            }
        }
        // the matrix is done with when all have come here
        __syncthreads();
        float by = 1.f, undo = 1.f;
        if constexpr (is_fp16<T>) {
            float largest = 0.f;
            each<NQ>([&](int, int, int i, int j, int e) { largest = fmaxf(largest, fmaxf(fabsf(gscores[i][j][e]), fabsf(gscores[i][j][e + 1]))); });
            normal_range(block_max(largest, scratch(2)), 8, by, undo);
            each<NN>([&](int, int, int i, int j, int e) {
                gB[i][j][e] *= by, gB[i][j][e + 1] *= by, gC[i][j][e] *= by, gC[i][j][e + 1] *= by;
            });
        }
        // of 16 bits a sum of two, one after the other: gy has been rounded, and rounding this, too, would show in B's gradient
#pragma unroll 1
        for (int part = 0; part < (sizeof(T) == 2 ? 2 : 1); ++part) {
            const Tokens own = this->template own<NQ>(matrix(0));
            each<NQ>([&](int, int, int i, int j, int e) {
                T* at = pair(own, i, j, e);
                if (part == 0) gscores[i][j][e] *= by, gscores[i][j][e + 1] *= by;
                write_shared_pair(at, gscores[i][j][e], gscores[i][j][e + 1]);
                const float2 big = read_pair(at);
                gscores[i][j][e] -= big.x, gscores[i][j][e + 1] -= big.y;
            });
            if constexpr (GROUPED) share_with_groups();
            __syncthreads();
            const int states = wn * (8 * NN);
            if constexpr (GROUPED) {
                const Operand sums = origin.past(M::M_at), columns = origin.past(columns_of(across));
                group_begin();
                group_product<T, Q, false, true, false>(gC[0], sums, columns);
                group_commit();
                group_product<T, Q, true, true, false>(gB[0], sums, columns.past(M::C_at));
                group_commit();
                group_wait<1>(gC[0]), group_wait<0>(gB[0]);
            } else {
                product<T, MT, NN, false, true>(gC, matrix(0).corner(m0, 0), B().corner(0, states), Q);
                product<T, MT, NN, true, true>(gB, matrix(0).corner(0, m0), C().corner(0, states), Q);
            }
            __syncthreads();
        }
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
    GROUP_MEMORY(memory);
    using F = BackwardChunks<T, P, N, WM, WN, STAGES, HEADS, FLAGS>;
    // of groups kept: the number of the thread, read anew wherever this is needed, would be waited for
    const int warp = F::GROUPED ? keep_in_register(threadIdx.x / 32) : threadIdx.x / 32, per_group = p.h / p.groups, per_split = (per_group + p.splits - 1) / p.splits;
    int at = blockIdx.x;
    const int split = at % p.splits;
    at /= p.splits;
    const int group = at % p.groups;
    at /= p.groups;
    const int chunk = at % p.chunks, first = split * per_split, last = first + per_split < per_group ? first + per_split : per_group;
    // every other row of warps from right to left: those above the diagonal, who have less to do, share a scheduler with others; groups have columns
    const int down = F::GROUPED ? warp % WM : warp / WN, across = F::GROUPED ? warp / WM : down % 2 ? WN - 1 - warp % WN : warp % WN;
    F f{{}, p, reinterpret_cast<T*>(memory), at / p.chunks, at, chunk, group, split, group * per_group + first, last - first, (p.p + P - 1) / P,
        warp, (int)threadIdx.x % 32, down * (F::Q / WM), across};
    f.documents();
}

// Sums of B's and C's gradients over the shares of a group, then those of what heads have one of over batch and chunks
template <class T>
__global__ void __launch_bounds__(256) ssd_backward_sums(const SsdBackwardParams p) {
    SHARED_ARRAY(double, shared, 256);
    const int64 plane = (int64)p.batch * p.l * p.groups * p.n, blocks = (2 * plane + 1023) / 1024;
    if (blockIdx.x < blocks) {
        const int64 i = ((int64)blockIdx.x * 256 + threadIdx.x) * 4, wide = p.groups * p.n;
        // a division of 64 bits takes as long as the sum
        const auto place = [&](int64 i) {
            const int64 at = i < plane ? i : i - plane, token = plane < 1ll << 31 ? (uint32)at / (uint32)wide : at / wide;
            return (T*)(i < plane ? p.gB : p.gC) + token * p.gBC_row + (at - token * wide);
        };
        if (wide % 4 == 0) {
            if (i >= 2 * plane) return;
            float sum[4] = {0.f, 0.f, 0.f, 0.f};
            for (int s = 0; s < p.splits; ++s) {
                const float4 x = *reinterpret_cast<const float4*>(p.gBC + 2 * s * plane + i);
                sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
            }
            T* to = place(i);
#pragma unroll
            for (int k = 0; k < 4; ++k) write_one(to + k, sum[k]);
        } else {
            for (int64 k = i; k < i + 4 && k < 2 * plane; ++k) {
                float sum = 0.f;
                for (int s = 0; s < p.splits; ++s) sum += p.gBC[2 * s * plane + k];
                write_one(place(k), sum);
            }
        }
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
