// The norm in front of a product: RMSNorm or LayerNorm (CENTRED) of groups of channels, or of what a gate lets through of them (GATED).
//
// A block of WARPS warps norms rows for itself.  Whatever rows there are, a sum over a group has the same order: warp w adds up every eighth
// run of 32 vectors, and the warps' sums follow each other.
#pragma once
#include "vector.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
enum FrontFlags { NORM = 8, CENTRED = 16, GATED = 32 };

// one instruction, where a division and a root are some forty, and branches
#ifdef HZ_EMULATE
inline float reciprocal_root(float x) { return 1.f / sqrtf(x); }
#else
DEVICE float reciprocal_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

template <int K>
DEVICE void add_up_lanes(float (&sums)[K]) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2)
#pragma unroll
        for (int i = 0; i < K; ++i) sums[i] += __shfl_xor_sync(~0u, sums[i], mask);
}

// Rows [first_row, first_row + rows) of x, normed, to `to`.
template <class P, class T, class X, int FLAGS>
struct Front {
    static constexpr int N = 4;
    const P& p;
    T* to;
    const int stride;  // from row to row there
    float* slots;      // WARPS of every group of these rows
    const int first_row, rows;

    // group i of all rows' groups: its row, and where it begins
    struct Group {
        int row, at;
    };
    DEVICE Group group(int i) const {
        const int each = p.k / p.group_size, row = i / each, at = i % each * p.group_size;
        return {row, at};
    }
    // V vectors of U groups, as they lie in memory, all on their way at once, whether they are all there or not: what is left over would be
    // waited for one by one.  A thread's first ones stay in registers from pass to pass.
    template <int U>
    struct Read {
        static constexpr int V = U == 1 ? 5 : FLAGS & (CENTRED | GATED) ? 2 : 3, ON = V * THREADS;
        Vec<X, N> x[V][U];
        Vec<T, N> z[FLAGS & GATED ? V : 1][FLAGS & GATED ? U : 1];
    };
    template <int U>
    DEVICE Read<U> read(const Group (&from)[U], int start) const {
        Read<U> r;
        const int vectors = p.group_size / N;
#pragma unroll
        for (int i = 0; i < Read<U>::V; ++i)
#pragma unroll
            for (int u = 0; u < U; ++u) {
                const int v = start + i * THREADS, at = v < vectors ? v * N : 0;
                r.x[i][u] = Vec<X, N>::template load<true>((const X*)p.x + (first_row + from[u].row) * p.x_b + from[u].at + at, v < vectors);
                if constexpr (FLAGS & GATED) r.z[i][u] = Vec<T, N>::template load<true>((const T*)p.gate + (first_row + from[u].row) * p.gate_b + from[u].at + at, v < vectors);
            }
        return r;
    }
    template <int U>
    DEVICE void gated(const Read<U>& r, int i, int u, float (&x)[N]) const {
        if constexpr (FLAGS & GATED) {
            float z[N];
            r.z[i][u].unpack(z);
#pragma unroll
            for (int c = 0; c < N; ++c) x[c] *= z[c] * sigmoid(z[c]);
        }
    }
    template <int U>
    DEVICE void unpack(const Read<U>& r, int i, int u, float (&x)[N]) const {
        r.x[i][u].unpack(x);
        if (!p.gate_behind) gated(r, i, u, x);
    }
    template <int U, bool SQUARES>
    DEVICE void add(const Read<U>& r, int start, const float (&centre)[U], float (&sums)[U]) const {
#pragma unroll
        for (int i = 0; i < Read<U>::V; ++i)
#pragma unroll
            for (int u = 0; u < U; ++u) {
                float x[N];
                unpack(r, i, u, x);
#pragma unroll
                for (int c = 0; c < N; ++c) {
                    const float left = start + i * THREADS < p.group_size / N ? x[c] - centre[u] : 0.f;
                    sums[u] = SQUARES ? fmaf(left, left, sums[u]) : sums[u] + left;
                }
            }
    }
    // means of x, or of the squares of what is left of it beyond the centre, for U groups from the first one on
    template <int U, bool SQUARES>
    DEVICE void add_up(const Group (&from)[U], const Read<U>& held, int first, int all, const float (&centre)[U]) const {
        float sums[U] = {};
        add<U, SQUARES>(held, threadIdx.x, centre, sums);
#pragma unroll 1
        for (int start = threadIdx.x + Read<U>::ON; start < p.group_size / N; start += Read<U>::ON)
            add<U, SQUARES>(read(from, start), start, centre, sums);
        add_up_lanes(sums);
#pragma unroll
        for (int u = 0; u < U; ++u)
            if (threadIdx.x % 32 == 0 && first + u < all) slots[(first + u) * WARPS + threadIdx.x / 32] = sums[u];
        __syncthreads();
    }
    DEVICE float mean(int i, float inverse) const {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += slots[i * WARPS + w];
        return sum * inverse;
    }

    // U groups at once; the last of all stands in for those that are not there
    template <int U>
    DEVICE void normed(int first, int all) const {
        Group from[U];
        float centre[U] = {}, scale[U];
#pragma unroll
        for (int u = 0; u < U; ++u) from[u] = group(first + u < all ? first + u : all - 1);
        const Read<U> held = read(from, threadIdx.x);
        const float inverse = 1.f / (float)p.group_size;
        if constexpr (FLAGS & CENTRED) {
            add_up<U, false>(from, held, first, all, centre);
#pragma unroll
            for (int u = 0; u < U; ++u) centre[u] = mean(first + u < all ? first + u : all - 1, inverse);
            __syncthreads();
        }
        add_up<U, true>(from, held, first, all, centre);
#pragma unroll
        for (int u = 0; u < U; ++u) scale[u] = reciprocal_root(mean(first + u < all ? first + u : all - 1, inverse) + p.eps);
        write(from, held, threadIdx.x, all - first, centre, scale);
#pragma unroll 1
        for (int start = threadIdx.x + Read<U>::ON; start < p.group_size / N; start += Read<U>::ON)
            write(from, read(from, start), start, all - first, centre, scale);
    }
    template <int U>
    DEVICE void write(
        const Group (&from)[U], const Read<U>& r, int start, int there, const float (&centre)[U], const float (&scale)[U]
    ) const {
#pragma unroll
        for (int i = 0; i < Read<U>::V; ++i) {
            const int v = start + i * THREADS;
            if (v >= p.group_size / N) return;
            float w[U][N];
#pragma unroll
            for (int u = 0; u < U; ++u) Vec<T, N>::template load<true>(place(from[u].row, from[u].at + v * N), 1).unpack(w[u]);
#pragma unroll
            for (int u = 0; u < U; ++u) {
                float x[N], b[N];
                unpack(r, i, u, x);
                if constexpr (FLAGS & CENTRED) load_bias<T, N, true>((const T*)p.shift, from[u].at + v * N, 1, b);
#pragma unroll
                for (int c = 0; c < N; ++c)
                    x[c] = FLAGS & CENTRED ? fmaf((x[c] - centre[u]) * scale[u], w[u][c], b[c]) : x[c] * scale[u] * w[u][c];
                if (p.gate_behind) gated(r, i, u, x);
                Vec<T, N>::pack(x).template store<true>(place(from[u].row, from[u].at + v * N), u < there);
            }
        }
    }
    DEVICE T* place(int row, int column) const { return to + row * stride + column; }

    // the norm's weight to where rows will lie, by the threads that will read it there: nobody has to wait for it then
    DEVICE void bring_gain() const {
        constexpr int V = 5;
        const float ones[N] = {1.f, 1.f, 1.f, 1.f};
        const int vectors = p.group_size / N;
#pragma unroll 1
        for (int at = 0; at < p.k; at += p.group_size)
#pragma unroll 1
            for (int start = threadIdx.x; start < vectors; start += V * THREADS) {
                Vec<T, N> gain[V];
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    const int v = start + i * THREADS;
                    gain[i] = Vec<T, N>::pack(ones);
                    if (p.gain != nullptr) gain[i] = Vec<T, N>::template load<true>((const T*)p.gain + at + v * N, v < vectors);
                }
#pragma unroll 1
                for (int row = 0; row < rows; ++row)
#pragma unroll
                    for (int i = 0; i < V; ++i) {
                        const int v = start + i * THREADS;
                        gain[i].template store<true>(place(row, at + v * N), v < vectors);
                    }
            }
    }
    DEVICE void run() const {
        const int all = rows * (p.k / p.group_size);
        if (all == 1)
            normed<1>(0, all);
        else
            for (int i = 0; i < all; i += 4) normed<4>(i, all);
    }
};
