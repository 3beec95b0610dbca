// Mamba-2's norm with a gate, per group of d channels: h = w u / rms(u) with u = x silu(z), or, BEFORE, h = w x / rms(x) silu(z).
//
// As norm.cu: a row, here a group's channels of a token, is read once, kept in registers until its sum is known, and written once.  A block
// takes rows of one group alone, so that the gradient of the weight is summed in registers.  The backward forms silu(z) and the mean square
// again: nothing but x and z is kept for it.  It also gives out h again to who asks for it, for two bytes more where a launch of its own
// would read four.  Rows of z and of its gradient may be slices of longer ones, of the projection that x, B and C are slices of, too.
#include "overlap.cuh"
#include "rows.cuh"

struct GatedNormParams {
    const void *x, *z, *weight;  // (m, groups d), (m, groups d), (groups d) or null
    void* h;                     // (m, groups d), of x's type; in the backward null where nobody asks for it
    const void* gh;              // backward: gradients of h, of x's type, x and z
    void *gx, *gz;
    float* part;  // (blocks of a group, groups d), or null where nobody asks for the gradient of the weight
    int64 x_row, z_row, gh_row, gz_row, m;
    float eps;
    int d, groups, blocks;  // the last: of one group
};

enum GatedNormFlags {
    BEFORE = 8,  // the norm comes before the gate
};

template <class X, class Z, class W, int LANES, int V, int FLAGS>
struct GatedRows : RowThreads<LANES, V, 2> {
    using Threads = RowThreads<LANES, V, 2>;
    using Threads::add_up, Threads::channel;
    static constexpr bool ALIGNED = !(FLAGS & UNALIGNED), FIRST = FLAGS & BEFORE;

    const GatedNormParams& p;
    const int own, turn_of_block;  // the group of this block, and its number among those of the group
    const int64 wide, begin;       // channels of all groups, and the first of this one

    DEVICE GatedRows(const GatedNormParams& p, float* slots)
        : Threads(slots),
          p(p),
          own(blockIdx.x % p.groups),
          turn_of_block(blockIdx.x / p.groups),
          wide(p.groups * (int64)p.d),
          begin(own * (int64)p.d) {}

    DEVICE int64 first_row() const { return turn_of_block * (int64)Threads::GROUPS; }
    DEVICE int64 next_rows() const { return p.blocks * (int64)Threads::GROUPS; }

    template <class T>
    DEVICE void load(const void* from, int64 stride, int64 row, Vec<T, N> (&to)[V]) const {
        const T* at = (const T*)from + (row < p.m ? row * stride + begin : 0);
#pragma unroll
        for (int v = 0; v < V; ++v)
            to[v] = Vec<T, N>::template load<ALIGNED>(at + channel(v), row < p.m ? p.d - channel(v) : 0);
    }
    template <class T>
    DEVICE void store(void* to, int64 stride, int64 row, int v, const float (&x)[N]) const {
        T* at = (T*)to + row * stride + begin + channel(v);
        Vec<T, N>::pack(x).template store<ALIGNED>(at, row < p.m ? p.d - channel(v) : 0);
    }
    DEVICE void weight(int v, float (&w)[N]) const {
        if (p.weight == nullptr) {
#pragma unroll
            for (int c = 0; c < N; ++c) w[c] = 1.f;
            return;
        }
        Vec<W, N>::template load<ALIGNED>((const W*)p.weight + begin + channel(v), p.d - channel(v)).unpack(w);
    }
    // 1 / rms, of a row that is there
    DEVICE float reciprocal_rms(float squares, int64 row) const {
        return row < p.m ? 1.f / sqrtf(squares / (float)p.d + p.eps) : 0.f;
    }
};

template <class X, class Z, class W, int LANES, int V, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(threads<LANES>, MIN_BLOCKS) gated_norm_forward(const GatedNormParams p) {
    using R = GatedRows<X, Z, W, LANES, V, FLAGS>;
    SHARED_ARRAY(float, slots, R::SLOTS);
    let_next_begin();
    wait_for_previous();
    R f(p, slots);
    float w[V][N];
#pragma unroll
    for (int v = 0; v < V; ++v) f.weight(v, w[v]);
#pragma unroll 1
    for (int64 first = f.first_row(); first < p.m; first += f.next_rows()) {
        const int64 row = first + f.group;
        Vec<X, N> xs[V];
        Vec<Z, N> zs[V];
        f.load(p.x, p.x_row, row, xs);
        f.load(p.z, p.z_row, row, zs);
        float u[V][N], sums[1] = {0.f};
#pragma unroll
        for (int v = 0; v < V; ++v) {
            xs[v].unpack(u[v]);
            if constexpr (!R::FIRST) {
                float z[N], s[N];
                zs[v].unpack(z), sigmoids(z, s);
#pragma unroll
                for (int c = 0; c < N; ++c) u[v][c] *= z[c] * s[c];
            }
#pragma unroll
            for (int c = 0; c < N; ++c) sums[0] = fmaf(u[v][c], u[v][c], sums[0]);
        }
        f.add_up(sums);
        const float r = f.reciprocal_rms(sums[0], row);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float h[N];
#pragma unroll
            for (int c = 0; c < N; ++c) h[c] = u[v][c] * r * w[v][c];
            if constexpr (R::FIRST) {
                float z[N], s[N];
                zs[v].unpack(z), sigmoids(z, s);
#pragma unroll
                for (int c = 0; c < N; ++c) h[c] *= z[c] * s[c];
            }
            f.template store<X>(p.h, f.wide, row, v, h);
        }
    }
}

// What the norm reads, the gradient of what it gives times its weight, and the gate with its slope, of N channels
template <bool FIRST>
struct GatedPart {
    float u[N], q[N], gate[N], slope[N];

    DEVICE GatedPart(const float (&x)[N], const float (&z)[N], const float (&g)[N]) {
        float s[N];
        sigmoids(z, s);
#pragma unroll
        for (int c = 0; c < N; ++c) {
            gate[c] = z[c] * s[c], slope[c] = fmaf(gate[c], 1.f - s[c], s[c]);
            u[c] = FIRST ? x[c] : x[c] * gate[c], q[c] = FIRST ? g[c] * gate[c] : g[c];
        }
    }
};

template <class X, class Z, class W, int LANES, int V, int FLAGS, int MIN_BLOCKS>
__global__ void __launch_bounds__(threads<LANES>, MIN_BLOCKS) gated_norm_backward(const GatedNormParams p) {
    using R = GatedRows<X, Z, W, LANES, V, FLAGS>;
    SHARED_ARRAY(float, slots, R::SLOTS);
    SHARED_ARRAY(float, shared, R::GROUPS > 1 ? R::THREADS * V * N : 1);
    R f(p, slots);
    float gw[V][N] = {};
#pragma unroll 1
    for (int64 first = f.first_row(); first < p.m; first += f.next_rows()) {
        const int64 row = first + f.group;
        Vec<X, N> xs[V], gs[V];
        Vec<Z, N> zs[V];
        f.load(p.x, p.x_row, row, xs);
        f.load(p.z, p.z_row, row, zs);
        f.load(p.gh, p.gh_row, row, gs);
        float sums[2] = {};  // of u^2, and of u times the gradient of u / rms(u)
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float x[N], z[N], g[N], w[N];
            xs[v].unpack(x), zs[v].unpack(z), gs[v].unpack(g), f.weight(v, w);
            const GatedPart<R::FIRST> a(x, z, g);
#pragma unroll
            for (int c = 0; c < N; ++c) {
                sums[0] = fmaf(a.u[c], a.u[c], sums[0]);
                sums[1] = fmaf(a.u[c], a.q[c] * w[c], sums[1]);
            }
        }
        f.add_up(sums);
        const float r = f.reciprocal_rms(sums[0], row), along = sums[1] / (float)p.d * r * r;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float x[N], z[N], g[N], w[N], gx[N], gz[N], h[N];
            xs[v].unpack(x), zs[v].unpack(z), gs[v].unpack(g), f.weight(v, w);
            const GatedPart<R::FIRST> a(x, z, g);
#pragma unroll
            for (int c = 0; c < N; ++c) {
                const float gu = r * fmaf(-along, a.u[c], a.q[c] * w[c]), normed = a.u[c] * r;
                gx[c] = R::FIRST ? gu : gu * a.gate[c];
                gz[c] = (R::FIRST ? g[c] * normed * w[c] : gu * x[c]) * a.slope[c];
                h[c] = normed * w[c] * (R::FIRST ? a.gate[c] : 1.f);
                gw[v][c] = fmaf(a.q[c], normed, gw[v][c]);
            }
            f.template store<X>(p.gx, f.wide, row, v, gx);
            f.template store<Z>(p.gz, p.gz_row, row, v, gz);
            if (p.h != nullptr) f.template store<X>(p.h, f.wide, row, v, h);
        }
    }
    if (p.part == nullptr) return;
    f.template write_sums<R::ALIGNED>(gw, p.d, p.part + f.turn_of_block * f.wide + f.begin, shared);
}
