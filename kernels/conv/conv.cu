// The causal depthwise convolution: y_t = act(bias + sum_j weight_j x_{t-K+1+j}), over the inputs of t's own document.
//
// Memory-bound.  A thread owns N neighbouring channels and a strip of the length, and walks along it: the last inputs stay in registers,
// the next U steps are in flight.  Threads of a warp stand side by side in the channels, so a step of a warp is one run of memory.  A
// block is `columns` threads wide and 128 / `columns` strips long.  The backward walks the same way, recomputes the pre-activation,
// carries the last K gradients along, and so finishes the gradient of the input K - 1 steps behind.  It reads K - 1 steps beyond its
// strip instead of adding to a neighbour's results; sums for the filter are written per block and added up by `column_sums` in a fixed order.
#include "vector.cuh"

struct ConvParams {
    const void *x, *weight, *bias, *state;  // (b, l, d), (d, K), (d), (b, K - 1, d); contiguous in d
    const int64* doc;                       // (b, l)
    void* out;                              // (b, l, d)
    const void* gout;                       // backward: (b, l, d)
    void *gx, *gstate;                      // (b, l, d), (b, K - 1, d)
    float* part;                            // (b tiles_l, K + 1, d): sums for the taps, then for the bias
    int64 x_b, x_l, state_b, state_k, gout_b, gout_l, gx_b, gx_l;
    int l, d, columns, tiles_d, tiles_l, strip;
};

constexpr int THREADS = 128, U = 4;
enum ConvFlags { SILU = 8 };

// what neighbouring code of both directions needs: which channels and steps a thread has, and its documents
template <class T, class W, int K, int N, int FLAGS>
struct Strip {
    static constexpr bool ALIGNED = !(FLAGS & UNALIGNED), DOCS = FLAGS & RESET;
    using V = Vec<T, N>;

    const ConvParams& p;
    int column, ch, count, t0, t1, tile;
    int64 b;
    float taps[K][N], bias[N];

    DEVICE Strip(const ConvParams& p) : p(p) {
        const int tile_d = blockIdx.x % p.tiles_d, rest = blockIdx.x / p.tiles_d;
        tile = rest;
        b = rest / p.tiles_l;
        column = threadIdx.x % p.columns;
        ch = (tile_d * p.columns + column) * N;
        count = p.d - ch < N ? p.d - ch : N;
        t0 = (rest % p.tiles_l * (THREADS / p.columns) + (int)threadIdx.x / p.columns) * p.strip;
        t1 = count <= 0 || t0 >= p.l ? t0 : p.l - t0 < p.strip ? p.l : t0 + p.strip;
        load_taps<W, K, N, ALIGNED>((const W*)p.weight + (count > 0 ? (int64)ch * K : 0), count > 0 ? count : 0, taps);
        load_bias<W, N, ALIGNED>((const W*)p.bias, count > 0 ? ch : 0, count, bias);
    }

    // the inputs before t0, from the row or from the state, and their documents
    DEVICE void before(float (&seen)[K - 1 + U][N], int64 (&ids)[K - 1 + U]) const {
        const T* x = (const T*)p.x + b * p.x_b + ch;
#pragma unroll
        for (int j = 0; j < K - 1; ++j) {
            const int t = t0 - (K - 1) + j;
            const bool in_row = t >= 0, there = in_row || p.state != nullptr;
            const T* state = (const T*)p.state + (there ? b * p.state_b + (t + K - 1) * p.state_k + ch : 0);
            float value[N];
            V::template load<ALIGNED>(in_row ? x + (int64)t * p.x_l : state, there ? count : 0).unpack(value);
#pragma unroll
            for (int c = 0; c < N; ++c) seen[j][c] = value[c];
            ids[j] = document(t);
        }
    }

    // the state belongs to the row's first document; behind the row there is nothing to tell apart
    DEVICE int64 document(int t) const {
        if constexpr (!DOCS) return 0;
        return p.doc[b * p.l + (t < 0 ? 0 : t < p.l ? t : p.l - 1)];
    }

    DEVICE void documents(int t, int64 (&ids)[U]) const {
        if constexpr (DOCS)
#pragma unroll
            for (int i = 0; i < U; ++i) ids[i] = document(t + i);
    }

    // sum of weight and bias over the window that ends at seen[i + K - 1]
    DEVICE void convolve(const float (&seen)[K - 1 + U][N], const int64 (&ids)[K - 1 + U], int i, float (&y)[N]) const {
#pragma unroll
        for (int c = 0; c < N; ++c) y[c] = fmaf(taps[K - 1][c], seen[i + K - 1][c], bias[c]);
#pragma unroll
        for (int j = K - 2; j >= 0; --j) {
            const bool same = !DOCS || ids[i + j] == ids[i + K - 1];
#pragma unroll
            for (int c = 0; c < N; ++c) y[c] = fmaf(taps[j][c], same ? seen[i + j][c] : 0.f, y[c]);
        }
    }
};

// what is in flight of a row: the next U steps
template <class T, int N, bool ALIGNED>
struct Stream {
    using V = Vec<T, N>;
    const T* at;
    int64 stride;
    int count;
    V ahead[U];

    DEVICE Stream(const void* x, int64 offset, int64 stride, int t, int count) : at((const T*)x + offset + t * stride), stride(stride), count(count) {}
    // of the steps, the first `left` are there; ALL of them, it is known, in the middle of a strip
    template <bool ALL>
    DEVICE void fetch(int left) {
#pragma unroll
        for (int i = 0; i < U; ++i) {
            ahead[i] = V::template load<ALIGNED>(at, ALL && ALIGNED ? N : ALL || i < left ? count : 0);
            at += stride;
        }
    }
};

// the last K - 1 entries of a window become the first of the next
template <int K, class X>
DEVICE void move_on(X (&window)[K - 1 + U]) {
#pragma unroll
    for (int j = 0; j < K - 1; ++j) window[j] = window[j + U];
}
template <int K, int N>
DEVICE void move_on(float (&window)[K - 1 + U][N]) {
#pragma unroll
    for (int j = 0; j < K - 1; ++j)
#pragma unroll
        for (int c = 0; c < N; ++c) window[j][c] = window[j + U][c];
}

template <class T, class W, int K, int N, int FLAGS>
struct ConvForward : Strip<T, W, K, N, FLAGS> {
    using S = Strip<T, W, K, N, FLAGS>;
    using V = typename S::V;
    using S::ALIGNED, S::b, S::ch, S::count, S::p, S::t0, S::t1;

    Stream<T, N, ALIGNED> x;
    T* out;
    float seen[K - 1 + U][N];
    int64 ids[K - 1 + U], next_ids[U] = {};

    DEVICE ConvForward(const ConvParams& p) : S(p), x(p.x, b * p.x_b + ch, p.x_l, t0, count), out((T*)p.out + (b * p.l + t0) * p.d + ch) {}

    // U steps; ALL: these and the next U are inside the strip
    template <bool ALL>
    DEVICE void group(int t) {
#pragma unroll
        for (int i = 0; i < U; ++i) {
            x.ahead[i].unpack(seen[K - 1 + i]);
            ids[K - 1 + i] = next_ids[i];
        }
        x.template fetch<ALL>(t1 - t - U);
        this->documents(t + U, next_ids);
#pragma unroll
        for (int i = 0; i < U; ++i) {
            float y[N], gate[N];
            this->convolve(seen, ids, i, y);
            if constexpr (FLAGS & SILU) {
                sigmoids(y, gate);
#pragma unroll
                for (int c = 0; c < N; ++c) y[c] *= gate[c];
            }
            V::pack(y).template store<ALIGNED>(out, ALL && ALIGNED ? N : ALL || t + i < t1 ? count : 0);
            out += p.d;
        }
        move_on<K, N>(seen);
        if constexpr (S::DOCS) move_on<K>(ids);
    }

    DEVICE void walk() {
        if (t1 <= t0) return;
        x.template fetch<false>(t1 - t0);
        this->documents(t0, next_ids);
        this->before(seen, ids);
        int t = t0;
#pragma unroll 1
        for (; t + 2 * U <= t1; t += U) group<true>(t);
#pragma unroll 1
        for (; t < t1; t += U) group<false>(t);
    }
};

template <class T, class W, int K, int N, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_forward(const ConvParams p) {
    ConvForward<T, W, K, N, FLAGS>(p).walk();
}

template <class T, class W, int K, int N, int FLAGS>
struct ConvBackward : Strip<T, W, K, N, FLAGS> {
    using S = Strip<T, W, K, N, FLAGS>;
    using V = typename S::V;
    using S::ALIGNED, S::DOCS, S::b, S::ch, S::count, S::p, S::t0, S::t1, S::taps;

    const int last, end;  // of the steps to go through, and of those inside the row
    Stream<T, N, ALIGNED> x, gout;
    T* gx;
    float seen[K - 1 + U][N], gs[K - 1 + U][N];
    int64 ids[K - 1 + U], next_ids[U] = {};
    float gtaps[K][N], gbias[N];

    DEVICE ConvBackward(const ConvParams& p)
        : S(p),
          last(t1 + K - 1),
          end(last < p.l ? last : p.l),
          x(p.x, b * p.x_b + ch, p.x_l, t0, count),
          gout(p.gout, b * p.gout_b + ch, p.gout_l, t0, count),
          gx((T*)p.gx + b * p.gx_b + (t0 - (K - 1)) * p.gx_l + ch) {
#pragma unroll
        for (int c = 0; c < N; ++c) {
            gbias[c] = 0.f;
#pragma unroll
            for (int j = 0; j < K; ++j) gtaps[j][c] = 0.f;
        }
    }

    // the gradient behind the activation, from the one in front of it, of the step whose window ends at seen[i + K - 1]
    DEVICE void gradient(int i, float (&g)[N]) const {
        if constexpr (FLAGS & SILU) {
            float y[N], gate[N];
            this->convolve(seen, ids, i, y);
            sigmoids(y, gate);
#pragma unroll
            for (int c = 0; c < N; ++c) g[c] *= gate[c] * fmaf(y[c], 1.f - gate[c], 1.f);
        }
    }

    DEVICE void add(int i, const float (&g)[N]) {
#pragma unroll
        for (int c = 0; c < N; ++c) gbias[c] += g[c];
#pragma unroll
        for (int j = 0; j < K; ++j) {
            const bool same = !DOCS || ids[i + j] == ids[i + K - 1];
#pragma unroll
            for (int c = 0; c < N; ++c) gtaps[j][c] = fmaf(g[c], same ? seen[i + j][c] : 0.f, gtaps[j][c]);
        }
    }

    // the gradient of an input, K - 1 steps behind the step of index i
    DEVICE V finish(int i) const {
        float sum[N];
#pragma unroll
        for (int c = 0; c < N; ++c) sum[c] = 0.f;
#pragma unroll
        for (int j = 0; j < K; ++j) {
            const bool same = !DOCS || ids[i + j] == ids[i];
#pragma unroll
            for (int c = 0; c < N; ++c) sum[c] = fmaf(taps[K - 1 - j][c], same ? gs[i + j][c] : 0.f, sum[c]);
        }
        return V::pack(sum);
    }

    // U steps; ALL: these, the next U and the inputs that they finish are inside the strip
    template <bool ALL>
    DEVICE void group(int t) {
#pragma unroll
        for (int i = 0; i < U; ++i) {
            x.ahead[i].unpack(seen[K - 1 + i]);
            gout.ahead[i].unpack(gs[K - 1 + i]);
            ids[K - 1 + i] = next_ids[i];
        }
        x.template fetch<ALL>(end - t - U);
        gout.template fetch<ALL>(end - t - U);
        this->documents(t + U, next_ids);
#pragma unroll
        for (int i = 0; i < U; ++i) {
            float (&g)[N] = gs[K - 1 + i];
            if (ALL || t + i < end) gradient(i, g);
            // the steps behind the strip are their own thread's to add
            if (ALL || t + i < t1) add(i, g);
            const int at = t + i - (K - 1);
            const V done = finish(i);
            if (ALL || (at >= t0 && at < t1)) done.template store<ALIGNED>(gx, ALL && ALIGNED ? N : count);
            if (!ALL && at < 0 && t0 == 0 && p.gstate != nullptr)
                done.template store<ALIGNED>((T*)p.gstate + (b * (K - 1) + t + i) * p.d + ch, count);
            gx += (int)p.gx_l;  // of memory that we lay out
        }
        move_on<K, N>(seen);
        move_on<K, N>(gs);
        if constexpr (DOCS) move_on<K>(ids);
    }

    DEVICE void walk() {
        if (t1 <= t0) return;
        x.template fetch<false>(end - t0);
        gout.template fetch<false>(end - t0);
        this->documents(t0, next_ids);
        this->before(seen, ids);
#pragma unroll
        for (int j = 0; j < K - 1; ++j)
#pragma unroll
            for (int c = 0; c < N; ++c) gs[j][c] = 0.f;
        int t = t0;
#pragma unroll 1
        for (; t < t0 + K - 1; t += U) group<false>(t);
#pragma unroll 1
        for (; t + 2 * U <= t1; t += U) group<true>(t);
#pragma unroll 1
        for (; t < last; t += U) group<false>(t);
    }

    // over the strips of the block, in their order
    DEVICE void add_up(float* shared) const {
#pragma unroll
        for (int j = 0; j < K; ++j)
#pragma unroll
            for (int c = 0; c < N; ++c) shared[(j * THREADS + threadIdx.x) * N + c] = gtaps[j][c];
#pragma unroll
        for (int c = 0; c < N; ++c) shared[(K * THREADS + threadIdx.x) * N + c] = gbias[c];
        __syncthreads();
        const int wide = p.columns * N, first = ch - this->column * N;
        for (int i = threadIdx.x; i < (K + 1) * wide; i += THREADS) {
            const int j = i / wide, at = i - j * wide;
            float sum = 0.f;
            for (int k = at; k < THREADS * N; k += wide) sum += shared[j * THREADS * N + k];
            if (first + at < p.d) p.part[((int64)this->tile * (K + 1) + j) * p.d + first + at] = sum;
        }
    }
};

template <class T, class W, int K, int N, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_backward(const ConvParams p) {
    SHARED_ARRAY(float, sums, (K + 1) * THREADS * N);
    ConvBackward<T, W, K, N, FLAGS> f(p);
    f.walk();
    f.add_up(sums);
}
