// LANES threads that share a row of channels: which of them a thread has, and sums over the row, and over the rows of a block.
#pragma once
#include "vector.cuh"

// elements of one access
constexpr int N = 4;
template <int LANES>
constexpr int threads = LANES > 256 ? LANES : 256;

// Thread t of a row has vectors t, t + LANES, ... of N elements, V in all.  Up to 32 threads meet by shuffles and no warp waits for
// another; more meet at a barrier of their own.  A row has up to SUMS_ sums at a time.
template <int LANES, int V, int SUMS_>
struct RowThreads {
    static constexpr int THREADS = threads<LANES>, GROUPS = THREADS / LANES, WARPS = LANES > 32 ? LANES / 32 : 1;
    static constexpr int SUMS = SUMS_, SLOTS = 2 * GROUPS * WARPS * SUMS;

    float* slots;  // two times, in turns, up to SUMS sums of each warp
    const int lane, group;
    int turn = 0;

    DEVICE RowThreads(float* slots) : slots(slots), lane(threadIdx.x % LANES), group(threadIdx.x / LANES) {}

    DEVICE int channel(int v) const { return (v * LANES + lane) * N; }

    // over the threads of a row, in the same order for all of them; slots of this turn are free again when the next turn's are full
    template <int K>
    DEVICE void add_up(float (&sums)[K]) {
#pragma unroll
        for (int mask = 1; mask < (LANES < 32 ? LANES : 32); mask *= 2)
#pragma unroll
            for (int k = 0; k < K; ++k) sums[k] += __shfl_xor_sync(~0u, sums[k], mask);
        if constexpr (WARPS > 1) {
            static_assert(K <= SUMS, "room for so many");
            float* own = slots + (turn * GROUPS + group) * WARPS * SUMS;
            turn ^= 1;
#pragma unroll
            for (int k = 0; k < K; ++k)
                if (lane % 32 == 0) own[lane / 32 * K + k] = sums[k];
            barrier_wait(1 + group, LANES);
#pragma unroll
            for (int k = 0; k < K; ++k) {
                sums[k] = 0.f;
#pragma unroll
                for (int i = 0; i < WARPS; ++i) sums[k] += own[i * K + k];
            }
        }
    }

    // what the rows of a block have summed up for each of d channels, added up in the order of the groups
    template <bool ALIGNED>
    DEVICE void write_sums(const float (&sums)[V][N], int d, float* part, float* shared) const {
        if constexpr (GROUPS > 1) {
            constexpr int wide = LANES * V * N;
#pragma unroll
            for (int v = 0; v < V; ++v)
#pragma unroll
                for (int c = 0; c < N; ++c) shared[group * wide + channel(v) + c] = sums[v][c];
            __syncthreads();
            for (int at = threadIdx.x; at < d; at += THREADS) {
                float sum = 0.f;
#pragma unroll
                for (int i = 0; i < GROUPS; ++i) sum += shared[i * wide + at];
                part[at] = sum;
            }
        } else {
#pragma unroll
            for (int v = 0; v < V; ++v) Vec<float, N>::pack(sums[v]).template store<ALIGNED>(part + channel(v), d - channel(v));
        }
    }
};
