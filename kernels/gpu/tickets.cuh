// Which of some blocks is the last: each draws a ticket when it is done.  Nobody waits, and the counter is back at zero behind the last one.
#pragma once
#include "common.cuh"

// How many of `blocks` have drawn before.  What these threads did before they drew, and what others of their blocks did before a barrier in
// front of that, comes before what this thread does next.
#ifdef HZ_EMULATE
inline uint32 draw_ticket(uint32* at, int blocks) { return atomicInc(at, blocks - 1); }
#else
DEVICE uint32 draw_ticket(uint32* at, int blocks) {
    uint32 drawn;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(drawn) : "l"(at), "r"(blocks - 1) : "memory");
    return drawn;
}
#endif

// Whether all other blocks have been here before this one, which then sees what they wrote; `shared` is for nothing else
DEVICE bool is_last(uint32* at, int blocks, int* shared) {
    __syncthreads();
    if (threadIdx.x == 0) shared[0] = draw_ticket(at, blocks) == (uint32)blocks - 1;
    __syncthreads();
    return shared[0];
}
