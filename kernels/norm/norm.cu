// RMSNorm in front of a residual branch, h = x / rms(x) * weight, and in the backward the addition of the gradient that goes past it.
// What the branch before has to add to x may come along (ADD): then x is the sum, rounded to x's type, and is written too.
// LayerNorm (CENTRED) is the same of x less its mean, plus a bias.
//
// Memory-bound: a row is read once, kept in registers until its sum is known, and written once.  LANES threads share a row, thread t has
// vectors t, t + LANES, ... of N elements.  Up to 32 of them meet by shuffles and no warp waits for another; more meet at a barrier of
// their own.  Blocks stay and take row after row, so that the weight is read once (forward) and its gradient is summed in registers
// (backward): one row of partial sums per block, added up by `column_sums` in a fixed order.  The backward forms the sum of squares again:
// it comes with the one that it needs anyway, and so nothing but x is kept for it.  A mean is summed up before anything else, so that squares
// are those of what is left: far from zero, sums of x^2 would cancel.
#include "rows.cuh"

struct NormParams {
    const void *x, *add, *weight, *bias;  // (m, d); (m, d) with ADD, in the forward; (d) or null, the last one with CENTRED alone
    void *h, *sum;                 // (m, d); the latter with ADD
    const void *gh, *past;         // backward: gradients of h and of x as it goes past, (m, d); the latter may be null
    void *gx, *gadd;               // (m, d), the same numbers; the latter with ADD
    float* part;                   // (blocks, 1 or 2, d), or null where nobody asks for the gradient of the weight (and the bias)
    int64 x_row, add_row, gh_row, past_row, m;
    float eps;
    int d, blocks;
};

enum NormFlags {
    ADD = 8,       // what is added to x comes in, or its gradient goes out
    CENTRED = 16,  // less the mean
};

template <class X, class A, class H, class W, int LANES, int V, int FLAGS>
struct Rows : RowThreads<LANES, V, FLAGS & CENTRED ? 3 : 2> {
    using Threads = RowThreads<LANES, V, FLAGS & CENTRED ? 3 : 2>;
    using Threads::add_up, Threads::channel;
    static constexpr bool ALIGNED = !(FLAGS & UNALIGNED);
    static constexpr bool MEAN = FLAGS & CENTRED;
    using VX = Vec<X, N>;
    using VA = Vec<A, N>;
    using VH = Vec<H, N>;

    const NormParams& p;

    DEVICE Rows(const NormParams& p, float* slots) : Threads(slots), p(p) {}

    template <class T>
    DEVICE void load(const void* from, int64 stride, int64 row, Vec<T, N> (&to)[V]) const {
        const bool there = from != nullptr && row < p.m;
        const T* at = (const T*)from + (there ? row * stride : 0);
#pragma unroll
        for (int v = 0; v < V; ++v)
            to[v] = Vec<T, N>::template load<ALIGNED>(at + channel(v), there ? p.d - channel(v) : 0);
    }
    // to x what comes with it; the sum is kept, rounded, in its place, and written
    DEVICE void add(VX (&xs)[V], int64 row) const {
        VA more[V];
        load(p.add, p.add_row, row, more);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float x[N], a[N];
            xs[v].unpack(x), more[v].unpack(a);
#pragma unroll
            for (int c = 0; c < N; ++c) x[c] += a[c];
            xs[v] = VX::pack(x);
            store<X>(p.sum, row, v, x);
        }
    }
    template <class T>
    DEVICE void store(void* to, int64 row, int v, const float (&x)[N]) const {
        T* at = (T*)to + row * p.d + channel(v);
        Vec<T, N>::pack(x).template store<ALIGNED>(at, row < p.m ? p.d - channel(v) : 0);
    }
    DEVICE void bias(int v, float (&b)[N]) const { load_bias<W, N, ALIGNED>((const W*)p.bias, channel(v), p.d - channel(v), b); }
    DEVICE void weight(int v, float (&w)[N]) const {
        if (p.weight == nullptr) {
#pragma unroll
            for (int c = 0; c < N; ++c) w[c] = 1.f;
            return;
        }
        Vec<W, N>::template load<ALIGNED>((const W*)p.weight + channel(v), p.d - channel(v)).unpack(w);
    }

    // what is to be taken off a row's values
    DEVICE float centre(const VX (&xs)[V]) {
        if constexpr (!MEAN) return 0.f;
        float sums[1] = {0.f};
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float x[N];
            xs[v].unpack(x);
#pragma unroll
            for (int c = 0; c < N; ++c) sums[0] += x[c];
        }
        add_up(sums);
        return sums[0] / (float)p.d;
    }
    // a vector's values without it; zeros stay behind the last channel
    DEVICE void centred(const VX& xs, int v, float centre, float (&x)[N]) const {
        xs.unpack(x);
        if constexpr (MEAN) {
#pragma unroll
            for (int c = 0; c < N; ++c) x[c] = channel(v) + (ALIGNED ? 0 : c) < p.d ? x[c] - centre : 0.f;
        }
    }

    // 1 / rms, of a row that is there
    DEVICE float reciprocal_rms(float squares, int64 row) const {
        return row < p.m ? 1.f / sqrtf(squares / (float)p.d + p.eps) : 0.f;
    }
};

template <class X, class A, class H, class W, int LANES, int V, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(threads<LANES>, MIN_BLOCKS) norm_forward(const NormParams p) {
    using R = Rows<X, A, H, W, LANES, V, FLAGS>;
    SHARED_ARRAY(float, slots, R::SLOTS);
    R f(p, slots);
    float w[V][N], b[R::MEAN ? V : 1][N];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        f.weight(v, w[v]);
        if constexpr (R::MEAN) f.bias(v, b[v]);
    }
#pragma unroll 1
    for (int64 first = blockIdx.x * (int64)R::GROUPS; first < p.m; first += p.blocks * (int64)R::GROUPS) {
        const int64 row = first + f.group;
        typename R::VX xs[V];
        f.load(p.x, p.x_row, row, xs);
        if constexpr (FLAGS & ADD) f.add(xs, row);
        const float centre = f.centre(xs);
        float sums[1] = {0.f};
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float x[N];
            f.centred(xs[v], v, centre, x);
#pragma unroll
            for (int c = 0; c < N; ++c) sums[0] = fmaf(x[c], x[c], sums[0]);
        }
        f.add_up(sums);
        const float r = f.reciprocal_rms(sums[0], row);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float x[N];
            f.centred(xs[v], v, centre, x);
#pragma unroll
            for (int c = 0; c < N; ++c) {
                if constexpr (R::MEAN)
                    x[c] = fmaf(x[c] * r, w[v][c], b[v][c]);
                else
                    x[c] = x[c] * r * w[v][c];
            }
            f.template store<H>(p.h, row, v, x);
        }
    }
}

template <class X, class A, class H, class W, int LANES, int V, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(threads<LANES>, MIN_BLOCKS) norm_backward(const NormParams p) {
    using R = Rows<X, A, H, W, LANES, V, FLAGS>;
    SHARED_ARRAY(float, slots, R::SLOTS);
    SHARED_ARRAY(float, shared, R::GROUPS > 1 ? R::THREADS * V * N : 1);
    R f(p, slots);
    float gw[V][N] = {}, gb[R::MEAN ? V : 1][N] = {};
#pragma unroll 1
    for (int64 first = blockIdx.x * (int64)R::GROUPS; first < p.m; first += p.blocks * (int64)R::GROUPS) {
        const int64 row = first + f.group;
        typename R::VX xs[V], past[V];
        typename R::VH gs[V];
        f.load(p.x, p.x_row, row, xs);
        f.load(p.gh, p.gh_row, row, gs);
        f.load(p.past, p.past_row, row, past);
        const float centre = f.centre(xs);
        float sums[R::SUMS] = {};  // of x^2, of x times the gradient of x / rms(x), and of that gradient
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float x[N], g[N], w[N];
            f.centred(xs[v], v, centre, x), gs[v].unpack(g), f.weight(v, w);
#pragma unroll
            for (int c = 0; c < N; ++c) {
                sums[0] = fmaf(x[c], x[c], sums[0]);
                sums[1] = fmaf(x[c], g[c] * w[c], sums[1]);
                if constexpr (R::MEAN) sums[2] = fmaf(g[c], w[c], sums[2]);
            }
        }
        f.add_up(sums);
        const float r = f.reciprocal_rms(sums[0], row), along = sums[1] / (float)p.d * r * r;
        const float level = R::MEAN ? sums[R::SUMS - 1] / (float)p.d : 0.f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float x[N], g[N], w[N], gx[N];
            f.centred(xs[v], v, centre, x), gs[v].unpack(g), past[v].unpack(gx), f.weight(v, w);
#pragma unroll
            for (int c = 0; c < N; ++c) {
                float through = fmaf(-along, x[c], g[c] * w[c]);
                if constexpr (R::MEAN) through -= level, gb[v][c] += g[c];
                gx[c] = fmaf(r, through, gx[c]);
                gw[v][c] = fmaf(g[c], x[c] * r, gw[v][c]);
            }
            f.template store<X>(p.gx, row, v, gx);
            if constexpr (FLAGS & ADD) f.template store<A>(p.gadd, row, v, gx);
        }
    }
    if (p.part == nullptr) return;
    float* part = p.part + blockIdx.x * (int64)p.d * (R::MEAN ? 2 : 1);
    f.template write_sums<R::ALIGNED>(gw, p.d, part, shared);
    if constexpr (R::MEAN) {
        __syncthreads();
        f.template write_sums<R::ALIGNED>(gb, p.d, part + p.d, shared);
    }
}
