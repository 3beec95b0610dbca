// Gradients of SSD, first part: step sizes, and the way back through the gate; see ssd_backward.cu.
#include "ssd_backward.cuh"

// A warp takes the gradient of a head's chunk through the gate: gy = gout silu(z).  fp16 has not the range: each token's gy is made 2^8 at the
// most, and what undoes it is one of its steps.
template <class T, int FLAGS>
struct Gate {
    static constexpr int Q = Chunk<T>::q, LANES = Element<T>::lanes;
    static constexpr bool ALIGNED = !(FLAGS & UNALIGNED);
    const SsdBackwardParams& p;
    int64 b;
    int head, chunk;
    float* undo;

    // of a token, from channel c on
    DEVICE void gated(int64 t, int c, float (&g)[LANES]) const {
        float z[LANES], s[LANES];
        const int count = t < p.l ? p.p - c : 0;
        Packed<T>::template load<ALIGNED>((const T*)p.gout + b * p.gout_b + t * p.gout_l + head * p.gout_h + c, count).unpack(g);
        Packed<T>::template load<ALIGNED>((const T*)p.z + b * p.z_b + t * p.z_l + head * p.z_h + c, count).unpack(z);
        sigmoids(z, s);
#pragma unroll
        for (int e = 0; e < LANES; ++e) g[e] *= z[e] * s[e];
    }
    // as many lanes per token as it has vectors, a power of two
    DEVICE void run() const {
        const int lane = threadIdx.x % 32;
        int across = 1;
        while (across * LANES < p.p && across < 32) across *= 2;
        const int c0 = lane % across * LANES;
#pragma unroll 4
        for (int in = lane / across; in < Q; in += 32 / across) {
            const int64 t = (int64)chunk * Q + in;
            float by = 1.f, back = 1.f, g[LANES];
            if constexpr (is_fp16<T>) {
                float largest = 0.f;
                for (int c = c0; c < p.p; c += across * LANES) {
                    gated(t, c, g);
#pragma unroll
                    for (int e = 0; e < LANES; ++e) largest = fmaxf(largest, fabsf(g[e]));
                }
                for (int m = 1; m < across; m *= 2) largest = fmaxf(largest, shuffle(largest, m));
                normal_range(largest, 8, by, back);
                if (c0 == 0) undo[in] = back;
            }
            for (int c = c0; c < p.p; c += across * LANES) {
                gated(t, c, g);
#pragma unroll
                for (int e = 0; e < LANES; ++e) g[e] *= by;
                T* to = (T*)p.gy + (b * p.l + t) * p.h * p.p + (int64)head * p.p + c;
                Packed<T>::pack(g).template store<ALIGNED>(to, t < p.l ? p.p - c : 0);
            }
        }
    }
};

// Step sizes of a chunk and a head: a warp each
template <class T, int FLAGS>
__global__ void __launch_bounds__(128) ssd_steps(const SsdBackwardParams p) {
    constexpr int Q = Chunk<T>::q, EACH = Q / 32;
    const int lane = threadIdx.x % 32;
    const int64 at = (int64)blockIdx.x * 4 + threadIdx.x / 32;
    if (at >= (int64)p.batch * p.chunks * p.h) return;
    const int head = (int)(at % p.h), chunk = (int)(at / p.h % p.chunks);
    const int64 b = at / p.h / p.chunks;
    const float rate = rate_of(reinterpret_cast<const float*>(p.A)[head]);
    const float bias = p.dt_bias == nullptr ? 0.f : reinterpret_cast<const float*>(p.dt_bias)[head];
    float dt[EACH], slope[EACH];
    double log[EACH], sum = 0., c;
    bool starts[EACH], mark = false;
    float first = Q, last = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int in = lane * EACH + i, t = chunk * Q + in;
        const bool there = t < p.l && (p.valid == nullptr || p.valid[b * p.l + t]);
        starts[i] = t < p.l && p.reset != nullptr && p.reset[b * p.l + t];
        dt[i] = slope[i] = 0.f;
        if (there) {
            const int64 from = b * p.dt_b + t * p.dt_l + head * p.dt_h;
            const float raw = bias + (p.wide_dt ? reinterpret_cast<const float*>(p.dt)[from] : read_one((const T*)p.dt + from));
            const float open = p.softplus ? softplus<sizeof(T) == 2>(raw) : raw;
            dt[i] = open < p.low ? p.low : open > p.high ? p.high : open;
            slope[i] = open < p.low || open > p.high ? 0.f : p.softplus ? sigmoid(raw) : 1.f;
        }
        log[i] = forgets(dt[i], rate) ? FORGOTTEN : dt[i] * rate;
        sum = starts[i] ? log[i] : sum + log[i];
        mark |= starts[i];
        if (starts[i] && first == Q) first = (float)in;
        if (starts[i]) last = (float)in;
    }
    first = warp_min(first), last = warp_max(last);
    if (head == 0 && lane == 0) p.cuts[b * p.chunks + chunk] = (int)first;
    const double c0 = sum_before(sum, mark, lane);
    const int64 plane = (int64)p.batch * p.h * p.chunks * Q;
    float* to = p.steps + ((b * p.h + head) * p.chunks + chunk) * Q + lane * EACH;
    float hi[EACH], lo[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        c = starts[i] ? log[i] : (i == 0 ? c0 : c) + log[i];
        hi[i] = (float)c, lo[i] = (float)(c - hi[i]);
    }
    const float end_hi = __shfl_sync(~0u, hi[EACH - 1], 31), end_lo = __shfl_sync(~0u, lo[EACH - 1], 31);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        to[DT * plane + i] = dt[i], to[HI * plane + i] = hi[i], to[LO * plane + i] = lo[i], to[SLOPE * plane + i] = slope[i];
        to[INTO * plane + i] = zero_or(lane * EACH + i < first, exp2_of<T>(hi[i] + lo[i]));
        // none of another document's
        to[ONWARD * plane + i] = zero_or(lane * EACH + i >= last, exp2_of<T>((end_hi - hi[i]) + (end_lo - lo[i])));
        if (is_fp16<T> && !(FLAGS & GATED)) to[UNDO * plane + i] = 1.f;
    }
    if constexpr (FLAGS & GATED) Gate<T, FLAGS>{p, b, head, chunk, to - lane * EACH + UNDO * plane}.run();
}
