// Step sizes out of their low-rank form, dt = low W^T with low (b, l, rank) and W (d, rank), for a tile of steps and channels at a time: one
// product on the tensor cores, sums in float32, rounded once to T, which is what a matrix product in front of the scan would leave.
#pragma once
#include "multiply_add.cuh"

constexpr int MAX_RANK = 16;

// two neighbours of a row of `rank` elements, zeros behind its end, from wherever it starts
template <class T>
DEVICE uint32 two_of(const T* row, int k, int rank) {
    const uint16* at = reinterpret_cast<const uint16*>(row) + k;
    const uint32 first = k < rank ? at[0] : 0, second = k + 1 < rank ? at[1] : 0;
    return first | second << 16;
}

// How THREADS threads, whole warps, form STEPS steps of CHANNELS channels together, each warp its share of the channels.
template <class T, int STEPS, int CHANNELS, int THREADS>
struct LowRank {
    static constexpr int WARPS = THREADS / 32, COLUMNS = CHANNELS / 8, MINE = (COLUMNS + WARPS - 1) / WARPS;
    static_assert(STEPS % 16 == 0 && CHANNELS % 8 == 0 && THREADS % 32 == 0, "whole products of whole warps");

    uint32 weight[MINE][2];

    // `from` starts with the tile's first channel, of which `channels` exist
    DEVICE void load(const T* from, int rank, int channels, int tid) {
#pragma unroll
        for (int m = 0; m < MINE; ++m) {
            const int ch = (tid / 32 + m * WARPS) * 8 + tid % 32 / 4, there = ch < channels ? rank : 0;
#pragma unroll
            for (int k = 0; k < 2; ++k) weight[m][k] = two_of(from + (int64)ch * rank, k * 8 + tid % 4 * 2, there);
        }
    }

    // low(t, k): elements k and k + 1 of the low-rank form of step t; store(t + g, column, two) takes the step sizes of two channels
    template <class Low, class Store>
    DEVICE void form(int tid, Low low, Store store) const {
        const int g = tid % 32 / 4, i = tid % 4 * 2;
#pragma unroll
        for (int t = 0; t < STEPS; t += 16) {
            const uint32 a[4] = {low(t + g, i), low(t + g + 8, i), low(t + g, i + 8), low(t + g + 8, i + 8)};
#pragma unroll
            for (int m = 0; m < MINE; ++m) {
                const int column = (tid / 32 + m * WARPS) * 8;
                // the same for the whole warp
                if (COLUMNS % WARPS != 0 && column >= CHANNELS) continue;
                float c[4] = {0.f, 0.f, 0.f, 0.f};
                multiply_add<T>(c, a, weight[m]);
                store(t + g, column + i, Element<T>::pack(c));
                store(t + g + 8, column + i, Element<T>::pack(c + 2));
            }
        }
    }
};
