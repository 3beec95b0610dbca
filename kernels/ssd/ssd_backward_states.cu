// Gradients of SSD, first part: step sizes, and the gradients of the states behind chunks; see ssd_backward.cu.
#include "ssd_backward.cuh"

// Step sizes of a chunk and a head: a warp each
template <class T>
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
    double log[EACH], sum = 0.;
    bool starts[EACH], mark = false;
    float first = Q;
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
    }
    first = warp_min(first);
    if (head == 0 && lane == 0) p.cuts[b * p.chunks + chunk] = (int)first;
    double c = sum_before(sum, mark, lane);
    const int64 plane = (int64)p.batch * p.h * p.chunks * Q;
    float* to = p.steps + ((b * p.h + head) * p.chunks + chunk) * Q + lane * EACH;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        c = starts[i] ? log[i] : c + log[i];
        const float hi = (float)c;
        to[i] = dt[i], to[plane + i] = hi, to[2 * plane + i] = (float)(c - hi), to[3 * plane + i] = slope[i];
    }
}

// A tile of P channels and N states of a head, walked from the last chunk to the first: four warps, two by two
template <class T, int P, int N, int FLAGS>
struct BackwardStates {
    static constexpr int Q = Chunk<T>::q, PAD = 16 / sizeof(T), PS = P + PAD, NS = N + PAD, MT = P / 32, NT = N / 16, STAGES = 3, THREADS = 128, PARTS = sizeof(T) == 2 ? 2 : 1;
    static constexpr bool ALIGNED = !(FLAGS & UNALIGNED), GATE = FLAGS & GATED;
    // elements of a stage (gout, z, C), then floats (c in two parts)
    static constexpr int z_at = Q * PS, C_at = z_at + GATE * Q * PS, sums_at = C_at + Q * NS, stage_bytes = sums_at * sizeof(T) + 2 * Q * 4;
    static constexpr int scratch_at = STAGES * stage_bytes + PARTS * Q * PS * sizeof(T), bytes = scratch_at + 16;
    using State = typename StateType<T>::type;

    const SsdBackwardParams& p;
    char* memory;
    int head, p0, n0;
    int64 b;

    DEVICE T* stage(int chunk) const { return reinterpret_cast<T*>(memory + chunk % STAGES * stage_bytes); }
    // the tokens of a chunk that are there, and those of them before a document starts
    DEVICE int all_rows(int chunk) const { return p.l - chunk * Q < Q ? p.l - chunk * Q : Q; }
    DEVICE int rows(int chunk) const {
        const int there = all_rows(chunk), cut = FLAGS & RESET ? p.cuts[b * p.chunks + chunk] : Q;
        return there < cut ? there : cut;
    }
    DEVICE void fetch(int chunk) const {
        const int limit = rows(chunk);
        T* to = stage(chunk);
        const int64 t = (int64)chunk * Q;
        fetch_tile<T, Q, P, PS, THREADS, ALIGNED>(to, (const T*)p.gout + b * p.gout_b + t * p.gout_l + head * p.gout_h + p0, p.gout_l, 0, limit, p.p - p0);
        if constexpr (GATE)
            fetch_tile<T, Q, P, PS, THREADS, ALIGNED>(to + z_at, (const T*)p.z + b * p.z_b + t * p.z_l + head * p.z_h + p0, p.z_l, 0, limit, p.p - p0);
        const int group = head / (p.h / p.groups);
        fetch_tile<T, Q, N, NS, THREADS, ALIGNED>(to + C_at, (const T*)p.C + b * p.C_b + t * p.C_l + group * p.C_g + n0, p.C_l, 0, limit, p.n - n0);
        const int64 plane = (int64)p.batch * p.h * p.chunks * Q;
        const float* steps = p.steps + plane + (b * p.h + head) * p.chunks * Q + t;
        float* sums = reinterpret_cast<float*>(to + sums_at);
        const int i = threadIdx.x;
        if (i < Q / 2) copy_async16(sums + 4 * i, steps + i / (Q / 4) * plane + i % (Q / 4) * 4, true);
    }
    static constexpr int LANES = Element<T>::lanes, ACROSS = P / LANES;
    // gy e^c of some neighbouring channels
    DEVICE void decayed(const T* from, int i, int limit, float (&g)[LANES]) const {
        const float* sums = reinterpret_cast<const float*>(from + sums_at);
        const int row = i / ACROSS, at = row * PS + i % ACROSS * LANES;
        const float into = zero_or(row < limit, exp2_of<T>(sums[row] + sums[Q + row]));
        Packed<T>::from(from + at).unpack(g);
        if constexpr (GATE) {
            float z[LANES];
            Packed<T>::from(from + z_at + at).unpack(z);
#pragma unroll
            for (int e = 0; e < LANES; ++e) g[e] *= z[e] * sigmoid(z[e]);
        }
#pragma unroll
        for (int e = 0; e < LANES; ++e) g[e] *= into;
    }
    // what makes gy e^c 2^8 at the most, for which fp16 has room, and what undoes it
    DEVICE float lift(const T* from, int limit, float& back) const {
        float by = back = 1.f;
        if constexpr (is_fp16<T>) {
            float largest = 0.f;
            for (int i = threadIdx.x; i < Q * ACROSS; i += THREADS) {
                float g[LANES];
                decayed(from, i, limit, g);
#pragma unroll
                for (int e = 0; e < LANES; ++e) largest = fmaxf(largest, fabsf(g[e]));
            }
            normal_range(block_max(largest, reinterpret_cast<float*>(memory + scratch_at)), 8, by, back);
        }
        return by;
    }
    // gy e^c, of 16 bits as a sum of two
    DEVICE void scale(const T* from, T* to, int limit, float by) const {
#pragma unroll
        for (int i = threadIdx.x; i < Q * ACROSS; i += THREADS) {
            const int at = i / ACROSS * PS + i % ACROSS * LANES;
            float g[LANES], big[LANES];
            decayed(from, i, limit, g);
#pragma unroll
            for (int e = 0; e < LANES; ++e) g[e] *= by;
            const Packed<T> packed = Packed<T>::pack(g);
            packed.template store<true>(to + at, LANES);
            if constexpr (PARTS == 2) {
                packed.unpack(big);
#pragma unroll
                for (int e = 0; e < LANES; ++e) g[e] -= big[e];
                Packed<T>::pack(g).template store<true>(to + Q * PS + at, LANES);
            }
        }
    }
    DEVICE static void times(float (&acc)[MT][NT][4], float by) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) acc[i][j][e] *= by;
    }
    template <class F>
    DEVICE void each(F f) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int row = p0 + warp / 2 * (P / 2) + lane / 4, col = n0 + warp % 2 * (N / 2) + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i)
#pragma unroll
            for (int j = 0; j < NT; ++j)
                f(row + 8 * i, col + 8 * j, row + 8 * i < p.p ? p.n - col - 8 * j : 0, i / 2, j, i % 2 * 2);
    }
    DEVICE void run() const {
        const int warp = threadIdx.x / 32;
        const int64 size = (int64)p.p * p.n;
        float acc[MT][NT][4];
        each([&](int row, int col, int count, int i, int j, int e) {
            const float* from = p.glast + (b * p.h + head) * size + (int64)row * p.n + col;
            acc[i][j][e] = p.glast != nullptr && count > 0 ? from[0] : 0.f;
            acc[i][j][e + 1] = p.glast != nullptr && count > 1 ? from[1] : 0.f;
        });
        T* scaled = reinterpret_cast<T*>(memory + STAGES * stage_bytes);
        for (int ahead = 1; ahead < STAGES; ++ahead) {
            if (p.chunks >= ahead) fetch(p.chunks - ahead);
            copy_async_commit();
        }
#pragma unroll 1
        for (int chunk = p.chunks - 1; chunk >= 0; --chunk) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();
            if (chunk >= STAGES - 1) fetch(chunk - STAGES + 1);
            copy_async_commit();
            State* to = (State*)p.gstates + ((b * p.chunks + chunk) * p.h + head) * size;
            each([&](int row, int col, int count, int i, int j, int e) {
                write_pair<State, ALIGNED>(to + (int64)row * p.n + col, acc[i][j][e], acc[i][j][e + 1], count);
            });
            if (chunk == 0 && p.ginit == nullptr) break;
            const T* from = stage(chunk);
            const float* sums = reinterpret_cast<const float*>(from + sums_at);
            const int limit = rows(chunk);
            float back;
            const float by = lift(from, limit, back);
            scale(from, scaled, limit, by);
            // nothing passes the start of a document
            const bool whole = limit == all_rows(chunk);
            const float through = exp2_of<T>(sums[Q - 1] + sums[2 * Q - 1]);
#pragma unroll
            for (int i = 0; i < MT; ++i)
#pragma unroll
                for (int j = 0; j < NT; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) acc[i][j][e] = whole ? acc[i][j][e] * through * by : 0.f;
            __syncthreads();
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                product<T, MT, NT, true, true>(acc, scaled + part * Q * PS + warp / 2 * (P / 2), PS, from + C_at + warp % 2 * (N / 2), NS, Q);
            if constexpr (is_fp16<T>) times(acc, back);
        }
        if (p.ginit != nullptr)
            each([&](int row, int col, int count, int i, int j, int e) {
                float* at = p.ginit + (b * p.h + head) * size + (int64)row * p.n + col;
                if (count > 0) at[0] = acc[i][j][e];
                if (count > 1) at[1] = acc[i][j][e + 1];
            });
    }
};

template <class T, int P, int N, int FLAGS>
__global__ void __launch_bounds__(128) ssd_backward_states(const SsdBackwardParams p) {
    SHARED_MEMORY(memory);
    const int across = (p.n + N - 1) / N, down = (p.p + P - 1) / P;
    int at = blockIdx.x;
    const int n0 = at % across * N;
    at /= across;
    const int p0 = at % down * P;
    at /= down;
    BackwardStates<T, P, N, FLAGS>{p, memory, at % p.h, p0, n0, at / p.h}.run();
}
