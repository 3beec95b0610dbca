// Launches that overlap (programmatic dependent launch, compute capability 9.0 on).  A kernel that is launched so begins while the one
// before it still runs.  Every kernel of such a chain waits before it reads what another may have written and before it writes, so that
// none is done before all that stand in front of it are.  In front of that it may read what nobody writes while models decode, weights, and
// have fetched what it will read.
#pragma once
#include "common.cuh"

#ifdef HZ_EMULATE
inline void let_next_begin() {}
inline void wait_for_previous() {}
inline void prefetch(const void*) {}
#else
// the next kernel may begin once all blocks have come here
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// 32 bytes, at least, into L2, where what others write is never old
DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
#endif

// `count` elements, by all threads of a block
template <class T>
DEVICE void prefetch_all(const T* from, int count) {
    constexpr int SECTOR = 32 / (int)sizeof(T);
#pragma unroll 1
    for (int i = threadIdx.x * SECTOR; i < count; i += blockDim.x * SECTOR) prefetch(from + i);
}
