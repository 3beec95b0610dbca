// Step sizes out of their low-rank form, dt = low W^T with low (b, l, rank) and W (d, rank), for a tile of steps and channels at a time: one
// product on the tensor cores, sums in float32, rounded once to T, which is what a matrix product in front of the scan would leave.
#pragma once
#include "common.cuh"

// c += a b of 16 x 16 and 16 x 8 elements: lane 4 g + i holds rows g and g + 8, columns 2 i and 2 i + 1 (and both + 8) of a, column g and
// rows 2 i and 2 i + 1 (and both + 8) of b, and rows g and g + 8, columns 2 i and 2 i + 1 of c (PTX, mma.m16n8k16)
#ifdef HZ_EMULATE
template <class T>
void multiply_add(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    static uint32 held[1024][6];
    memcpy(held[threadIdx.x], a, 16), memcpy(held[threadIdx.x] + 4, b, 8);
    __syncwarp();
    const int warp = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, i = threadIdx.x % 4;
    for (int k = 0; k < 16; k += 2) {
        const int part = k % 8 / 2, half = k / 8;
        for (int row = 0; row < 2; ++row)
            for (int column = 0; column < 2; ++column) {
                float x[2], y[2];
                Element<T>::unpack(held[warp + g * 4 + part][half * 2 + row], x);
                Element<T>::unpack(held[warp + (2 * i + column) * 4 + part][4 + half], y);
                c[row * 2 + column] += x[0] * y[0] + x[1] * y[1];
            }
    }
    __syncwarp();
}
#else
template <class T>
DEVICE void multiply_add(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]);
#define HZ_MULTIPLY_ADD(T, name)                                                                                                     \
    template <>                                                                                                                      \
    DEVICE void multiply_add<T>(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {                                         \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                         \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                                     \
    }
HZ_MULTIPLY_ADD(bf16, "bf16")
HZ_MULTIPLY_ADD(fp16, "f16")
#undef HZ_MULTIPLY_ADD
#endif

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
