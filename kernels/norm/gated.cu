// RMSNorm of groups of channels behind or in front of a gate: out = norm(x silu(z)), or norm(x) silu(z).  A row per block: read twice, the second
// time from a cache.
#include "front.cuh"
#include "overlap.cuh"

constexpr int MOST_GROUPS = 320;

struct GatedNormParams {
    const void *x, *gain, *gate;  // (m, k), (k) or null, (m, k)
    const void* shift;            // null
    void* out;                    // (m, k)
    int64 x_b, gate_b;
    int k, group_size, gate_behind;
    float eps;
};

template <class T>
__global__ void __launch_bounds__(THREADS) gated_norm(const GatedNormParams p) {
    SHARED_ARRAY(float, slots, MOST_GROUPS * WARPS);
    let_next_begin();
    wait_for_previous();
    Front<GatedNormParams, T, T, NORM + GATED>{p, (T*)p.out + blockIdx.x * (int64)p.k, 0, slots, (int)blockIdx.x, 1}.run();
}
