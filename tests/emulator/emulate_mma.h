// The instructions of mma.cuh: the lanes of a warp leave their operands, and who comes last computes for all.
#pragma once

namespace emulated {
struct Lane { const void* row; uint32* r; };
inline Lane mine[1024];

// Only what is written is left to the others' threads; what is read of shared memory, the thread sanitizer is to see.
struct UnwatchedWrites {
#ifdef __SANITIZE_THREAD__
    UnwatchedWrites() { AnnotateIgnoreWritesBegin("", 0); }
    ~UnwatchedWrites() { AnnotateIgnoreWritesEnd("", 0); }
#else
    UnwatchedWrites() {}
#endif
};

// `compute` once for the warp, when all of its lanes have left what they have
template <class F>
inline void together(const Lane& lane, F compute) {
    const int warp = threadIdx.x / 32;
    bool last;
    {
        Unwatched here;
        mine[threadIdx.x] = lane;
        last = arrived[16 + warp] == 31;
    }
    if (last) {
        UnwatchedWrites here;
        compute(mine + 32 * warp);
    }
    __syncwarp();
}
}  // namespace emulated

// shuffles and votes beyond those of emulate.h
template <class X>
inline X shuffled(X x, int from) {
    static double kept[1024];
    memcpy(&kept[threadIdx.x], &x, sizeof(X));
    __syncwarp();
    memcpy(&x, &kept[threadIdx.x / 32 * 32 + from], sizeof(X));
    __syncwarp();
    return x;
}
template <class X>
inline X __shfl_sync(unsigned, X x, int from) { return shuffled(x, from); }
template <class X>
inline X __shfl_up_sync(unsigned, X x, int by) { return shuffled(x, std::max(0, (int)threadIdx.x % 32 - by)); }
inline int __shfl_xor_sync(unsigned, int x, int mask) { return shuffled(x, threadIdx.x % 32 ^ mask); }
inline int __syncthreads_or(int x) {
    static bool any[1024];
    any[threadIdx.x] = x != 0;
    __syncthreads();
    const bool found = std::any_of(any, any + blockDim.x, [](bool v) { return v; });
    __syncthreads();
    return found;
}

template <class T>
inline T* turned(T* at, int bits) { return (T*)((size_t)at ^ bits); }
template <bool TRANSPOSED>
inline void ldmatrix(uint32 (&r)[4], const void* row) {
    if ((size_t)row % 16) fprintf(stderr, "a row of ldmatrix that is not aligned\n"), abort();
    emulated::together({row, r}, [](emulated::Lane* lanes) {
        for (int lane = 0; lane < 32; ++lane)
            for (int tile = 0; tile < 4; ++tile) {
                uint32 both[2];
                for (int e = 0; e < 2; ++e) {
                    const int row = TRANSPOSED ? lane % 4 * 2 + e : lane / 4, column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + e;
                    both[e] = ((const uint16*)lanes[8 * tile + row].row)[column];
                }
                lanes[lane].r[tile] = both[0] | both[1] << 16;
            }
    });
}
