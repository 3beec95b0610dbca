// The norm in front of a product: RMSNorm or LayerNorm (CENTRED) of groups of channels, or of what a gate lets through of them (GATED).
//
// A block of WARPS warps norms rows for itself.  Whatever rows there are, a sum over a group has the same order: warp w adds up every eighth
// run of 32 vectors, and the warps' sums follow each other.
#pragma once
#include "vector.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
enum FrontFlags { NORM = 8, CENTRED = 16, GATED = 32 };

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
        const X* x;
        const T* gate;
    };
    DEVICE Group group(int i) const {
        const int each = p.k / p.group_size, row = i / each, at = i % each * p.group_size;
        const int64 of = first_row + row;
        return {row, at, (const X*)p.x + of * p.x_b + at, (const T*)p.gate + of * p.gate_b + at};
    }
    DEVICE void gated(const Group& from, int at, float (&x)[N]) const {
        float z[N];
        Vec<T, N>::template load<true>(from.gate + at, 1).unpack(z);
#pragma unroll
        for (int c = 0; c < N; ++c) x[c] *= z[c] * sigmoid(z[c]);
    }
    // zeros where nothing is there
    DEVICE void load(const Group& from, int at, bool there, float (&x)[N]) const {
        Vec<X, N>::template load<true>(from.x + (there ? at : 0), there).unpack(x);
        if ((FLAGS & GATED) && !p.gate_behind) gated(from, there ? at : 0, x);
    }
    // means of x, or of the squares of what is left of it beyond the centre, for U groups from the first one on; V vectors of each are on their
    // way at once, whether they are all there or not: what is left over would be waited for one by one
    template <int U, bool SQUARES>
    DEVICE void add_up(const Group (&from)[U], int first, int all, const float (&centre)[U]) const {
        constexpr int V = U == 1 ? 4 : 2;
        const int vectors = p.group_size / N;
        float sums[U] = {};
#pragma unroll 1
        for (int start = threadIdx.x; start < vectors; start += V * THREADS) {
            float x[V][U][N];
#pragma unroll
            for (int i = 0; i < V; ++i)
#pragma unroll
                for (int u = 0; u < U; ++u) load(from[u], (start + i * THREADS) * N, start + i * THREADS < vectors, x[i][u]);
#pragma unroll
            for (int i = 0; i < V; ++i)
#pragma unroll
                for (int u = 0; u < U; ++u)
#pragma unroll
                    for (int c = 0; c < N; ++c) {
                        const float left = start + i * THREADS < vectors ? x[i][u][c] - centre[u] : 0.f;
                        sums[u] = SQUARES ? fmaf(left, left, sums[u]) : sums[u] + left;
                    }
        }
        add_up_lanes(sums);
#pragma unroll
        for (int u = 0; u < U; ++u)
            if (threadIdx.x % 32 == 0 && first + u < all) slots[(first + u) * WARPS + threadIdx.x / 32] = sums[u];
        __syncthreads();
    }
    DEVICE float mean(int i) const {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += slots[i * WARPS + w];
        return sum / (float)p.group_size;
    }

    // U groups at once; the last of all stands in for those that are not there
    template <int U>
    DEVICE void normed(int first, int all) const {
        Group from[U];
        float centre[U] = {}, scale[U];
#pragma unroll
        for (int u = 0; u < U; ++u) from[u] = group(first + u < all ? first + u : all - 1);
        if constexpr (FLAGS & CENTRED) {
            add_up<U, false>(from, first, all, centre);
#pragma unroll
            for (int u = 0; u < U; ++u) centre[u] = mean(first + u < all ? first + u : all - 1);
            __syncthreads();
        }
        add_up<U, true>(from, first, all, centre);
#pragma unroll
        for (int u = 0; u < U; ++u) scale[u] = 1.f / sqrtf(mean(first + u < all ? first + u : all - 1) + p.eps);
        constexpr int V = U == 1 ? 4 : 1;
        const int vectors = p.group_size / N;
#pragma unroll 1
        for (int start = threadIdx.x; start < vectors; start += V * THREADS) {
            float x[V][U][N], w[V][U][N], b[V][U][N];
#pragma unroll
            for (int i = 0; i < V; ++i)
#pragma unroll
                for (int u = 0; u < U; ++u) {
                    const int v = start + i * THREADS, at = from[u].at + v * N;
                    load(from[u], v * N, v < vectors, x[i][u]);
                    Vec<T, N>::template load<true>((const T*)p.gain + at, p.gain != nullptr && v < vectors).unpack(w[i][u]);
                    if constexpr (FLAGS & CENTRED) load_bias<T, N, true>((const T*)p.shift, at, v < vectors, b[i][u]);
                }
#pragma unroll
            for (int i = 0; i < V; ++i)
#pragma unroll
                for (int u = 0; u < U; ++u)
                    if (start + i * THREADS < vectors && first + u < all)
                        write(from[u], (start + i * THREADS) * N, centre[u], scale[u], x[i][u], w[i][u], b[i][u]);
        }
    }
    DEVICE void write(
        const Group& from, int at, float centre, float scale, float (&x)[N], const float (&w)[N], const float (&b)[N]
    ) const {
#pragma unroll
        for (int c = 0; c < N; ++c) {
            const float gain = p.gain == nullptr ? 1.f : w[c];
            x[c] = FLAGS & CENTRED ? fmaf((x[c] - centre) * scale, gain, b[c]) : x[c] * scale * gain;
        }
        if ((FLAGS & GATED) && p.gate_behind) gated(from, at, x);
        Vec<T, N>::pack(x).template store<true>(to + from.row * stride + from.at + at, 1);
    }

    DEVICE void run() const {
        const int all = rows * (p.k / p.group_size);
        if (all == 1)
            normed<1>(0, all);
        else
            for (int i = 0; i < all; i += 4) normed<4>(i, all);
    }
};
