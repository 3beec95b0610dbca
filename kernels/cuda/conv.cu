// The causal depthwise convolution: y_t = act(bias + sum_j weight_j x_{t-K+1+j}), over the inputs of t's own document.
//
// Memory-bound.  A thread owns N neighbouring channels and a strip of the length, and walks along it: the last inputs stay in registers,
// the next U steps are in flight.  Threads of a warp stand side by side in the channels, so a step of a warp is one run of memory.  A
// block is `columns` threads wide and 128 / `columns` strips long.  The backward walks the same way, recomputes the pre-activation,
// carries the last K gradients along, and so finishes the gradient of the input K - 1 steps behind.  It reads K - 1 steps beyond its
// strip instead of adding to a neighbour's results; sums for the filter are written per block and added up by `conv_sum` in a fixed order.
#include "vector.cuh"

struct ConvParams {
    const void *x, *weight, *bias, *state;  // (b, l, d), (d, K), (d), (b, K - 1, d); contiguous in d
    const int64* doc;                       // (b, l)
    void* out;                              // (b, l, d)
    const void* gout;                       // backward: (b, l, d)
    void *gx, *gstate;                      // (b, l, d), (b, K - 1, d)
    float* part;                            // (b tiles_l, K + 1, d): sums for the taps, then for the bias
    int64 x_b, x_l, state_b, state_k, gout_b, gout_l;
    int l, d, columns, tiles_d, tiles_l, strip, silu;
};

constexpr int THREADS = 128, U = 4;

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
    DEVICE void before(const T* x, float (&seen)[K - 1 + U][N], int64 (&ids)[K - 1 + U]) const {
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

// the gate of SiLU
template <int N>
DEVICE void sigmoids(const float (&x)[N], float (&s)[N]) {
#pragma unroll
    for (int c = 0; c < N; c += 2) sigmoid2(x[c], x[c + 1], s[c], s[c + 1]);
}

template <class V>
struct Window {
    V ahead[U];

    // steps t .. t + U of a row, none from `end` on
    template <bool ALIGNED, class T>
    DEVICE void fetch(const T* row, int64 stride, int t, int end, int count) {
#pragma unroll
        for (int i = 0; i < U; ++i) {
            const bool there = t + i < end;
            ahead[i] = V::template load<ALIGNED>(row + (there ? (int64)(t + i) * stride : 0), there ? count : 0);
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

template <class T, class W, int K, int N, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_forward(const ConvParams p) {
    using S = Strip<T, W, K, N, FLAGS>;
    using V = typename S::V;
    const S s(p);
    if (s.t1 <= s.t0) return;
    const T* x = (const T*)p.x + s.b * p.x_b + s.ch;
    T* out = (T*)p.out + s.b * p.l * p.d + s.ch;
    float seen[K - 1 + U][N];
    int64 ids[K - 1 + U];
    Window<V> next;
    next.template fetch<S::ALIGNED>(x, p.x_l, s.t0, s.t1, s.count);
    s.before(x, seen, ids);
#pragma unroll 1
    for (int t = s.t0; t < s.t1; t += U) {
#pragma unroll
        for (int i = 0; i < U; ++i) {
            next.ahead[i].unpack(seen[K - 1 + i]);
            ids[K - 1 + i] = s.document(t + i);
        }
        next.template fetch<S::ALIGNED>(x, p.x_l, t + U, s.t1, s.count);
#pragma unroll
        for (int i = 0; i < U; ++i) {
            float y[N];
            s.convolve(seen, ids, i, y);
            if (p.silu) {
                float gate[N];
                sigmoids(y, gate);
#pragma unroll
                for (int c = 0; c < N; ++c) y[c] *= gate[c];
            }
            if (t + i < s.t1) V::pack(y).template store<S::ALIGNED>(out + (int64)(t + i) * p.d, s.count);
        }
        move_on<K, N>(seen);
        if constexpr (S::DOCS) move_on<K>(ids);
    }
}

template <class T, class W, int K, int N, int FLAGS>
struct ConvBackward : Strip<T, W, K, N, FLAGS> {
    using S = Strip<T, W, K, N, FLAGS>;
    using V = typename S::V;
    using S::ALIGNED, S::DOCS, S::b, S::ch, S::count, S::p, S::t0, S::t1, S::taps;

    float gtaps[K][N], gbias[N];

    DEVICE ConvBackward(const ConvParams& p) : S(p) {
#pragma unroll
        for (int c = 0; c < N; ++c) {
            gbias[c] = 0.f;
#pragma unroll
            for (int j = 0; j < K; ++j) gtaps[j][c] = 0.f;
        }
    }

    // the gradient behind the activation, of the step whose window ends at seen[i + K - 1]; none outside the row
    DEVICE void gradient(const float (&seen)[K - 1 + U][N], const int64 (&ids)[K - 1 + U], int i, bool there, const float (&gout)[N],
                         float (&g)[N]) const {
        if (!p.silu) {
#pragma unroll
            for (int c = 0; c < N; ++c) g[c] = gout[c];
            return;
        }
        float y[N], gate[N];
        this->convolve(seen, ids, i, y);
        sigmoids(y, gate);
#pragma unroll
        for (int c = 0; c < N; ++c) g[c] = there ? gout[c] * gate[c] * fmaf(y[c], 1.f - gate[c], 1.f) : 0.f;
    }

    DEVICE void add(const float (&seen)[K - 1 + U][N], const int64 (&ids)[K - 1 + U], int i, const float (&g)[N]) {
#pragma unroll
        for (int c = 0; c < N; ++c) gbias[c] += g[c];
#pragma unroll
        for (int j = 0; j < K; ++j) {
            const bool same = !DOCS || ids[i + j] == ids[i + K - 1];
#pragma unroll
            for (int c = 0; c < N; ++c) gtaps[j][c] = fmaf(g[c], same ? seen[i + j][c] : 0.f, gtaps[j][c]);
        }
    }

    // the gradient of the input at `t`, the first of the steps that `gs` holds from index i on
    DEVICE void finish(const float (&gs)[K - 1 + U][N], const int64 (&ids)[K - 1 + U], int i, int t) const {
        const bool in_row = t >= t0 && t < t1, in_state = t < 0 && t0 == 0 && p.gstate != nullptr;
        if (!in_row && !in_state) return;
        float gx[N];
#pragma unroll
        for (int c = 0; c < N; ++c) gx[c] = 0.f;
#pragma unroll
        for (int j = 0; j < K; ++j) {
            const bool same = !DOCS || ids[i + j] == ids[i];
#pragma unroll
            for (int c = 0; c < N; ++c) gx[c] = fmaf(taps[K - 1 - j][c], same ? gs[i + j][c] : 0.f, gx[c]);
        }
        T* to = in_row ? (T*)p.gx + (b * p.l + t) * p.d : (T*)p.gstate + (b * (K - 1) + t + K - 1) * p.d;
        V::pack(gx).template store<ALIGNED>(to + ch, count);
    }

    DEVICE void walk() {
        if (t1 <= t0) return;
        const T* x = (const T*)p.x + b * p.x_b + ch;
        const T* gout = (const T*)p.gout + b * p.gout_b + ch;
        const int last = t1 + K - 1, end = last < p.l ? last : p.l;  // of the steps to go through, and of those inside the row
        float seen[K - 1 + U][N], gs[K - 1 + U][N];
        int64 ids[K - 1 + U];
        Window<V> next_x, next_g;
        next_x.template fetch<ALIGNED>(x, p.x_l, t0, end, count);
        next_g.template fetch<ALIGNED>(gout, p.gout_l, t0, end, count);
        this->before(x, seen, ids);
#pragma unroll
        for (int j = 0; j < K - 1; ++j)
#pragma unroll
            for (int c = 0; c < N; ++c) gs[j][c] = 0.f;
#pragma unroll 1
        for (int t = t0; t < last; t += U) {
            float go[U][N];
#pragma unroll
            for (int i = 0; i < U; ++i) {
                next_x.ahead[i].unpack(seen[K - 1 + i]);
                next_g.ahead[i].unpack(go[i]);
                ids[K - 1 + i] = this->document(t + i);
            }
            next_x.template fetch<ALIGNED>(x, p.x_l, t + U, end, count);
            next_g.template fetch<ALIGNED>(gout, p.gout_l, t + U, end, count);
#pragma unroll
            for (int i = 0; i < U; ++i) {
                gradient(seen, ids, i, t + i < end, go[i], gs[K - 1 + i]);
                // the steps behind the strip are their own thread's to add
                if (t + i < t1) add(seen, ids, i, gs[K - 1 + i]);
                finish(gs, ids, i, t + i - (K - 1));
            }
            move_on<K, N>(seen);
            move_on<K, N>(gs);
            if constexpr (DOCS) move_on<K>(ids);
        }
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

struct ConvSumParams {
    const float* part;     // (rows, k + 1, d)
    void *gweight, *gbias;  // (d, k), (d) or null
    int rows, k, d;
};

// 32 sums per block, eight threads each: thread m takes rows m, m + 8, ..., and the eight results are added in their order
template <class W>
__global__ void __launch_bounds__(256) conv_sum(const ConvSumParams p) {
    SHARED_ARRAY(float, shared, 256);
    const int lane = threadIdx.x % 32, m = threadIdx.x / 32;
    const int64 size = (int64)(p.k + 1) * p.d, at = blockIdx.x * (int64)32 + lane;
    float sum = 0.f;
    if (at < size) {
        int row = m;
        for (; row + 24 < p.rows; row += 32) {
            float part[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) part[i] = p.part[(row + 8 * i) * size + at];
            sum += (part[0] + part[1]) + (part[2] + part[3]);
        }
        for (; row < p.rows; row += 8) sum += p.part[row * size + at];
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (m > 0 || at >= size) return;
    float total[1] = {0.f};
#pragma unroll
    for (int i = 0; i < 8; ++i) total[0] += shared[i * 32 + lane];
    const int j = (int)(at / p.d), ch = (int)(at - (int64)j * p.d);
    if (j < p.k)
        write_channels<W, 1>((W*)p.gweight + (int64)ch * p.k + j, total);
    else if (p.gbias != nullptr)
        write_channels<W, 1>((W*)p.gbias + ch, total);
}
