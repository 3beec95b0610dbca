// Gradients of SSD, second part: the gradients of the states behind chunks; see ssd_backward.cu.
#include "ssd_backward.cuh"

// A tile of P channels and N states of a head, walked from the last chunk to the first: four warps with 16 channels each of all states, or two
// by two
template <class T, int P, int N, int FLAGS>
struct BackwardStates {
    static constexpr int Q = Chunk<T>::q, STAGES = 3, THREADS = 128;
    static constexpr int DOWN = P / 16, ACROSS = 4 / DOWN, NT = N / ACROSS / 8, LANES = Element<T>::lanes;
    static constexpr bool ALIGNED = !(FLAGS & UNALIGNED);
    // elements of a stage (gy, C), then floats (decays from the chunk's start, what undoes the scales of gy)
    static constexpr int C_at = Q * Tile<T, P>::STRIDE, decays_at = C_at + Q * Tile<T, N>::STRIDE;
    static constexpr int stage_bytes = decays_at * sizeof(T) + 2 * Q * 4, scratch_at = STAGES * stage_bytes;
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
    // where this thread's first vectors of the chunk that is fetched next lie
    struct Next {
        const T *gy, *C;
        const float* decays;
    };
    DEVICE Next start() const {
        const int64 t = (int64)(p.chunks - 1) * Q, plane = (int64)p.batch * p.h * p.chunks * Q;
        const int group = head / (p.h / p.groups), i = threadIdx.x % (Q / 2), which = i / (Q / 4) ? UNDO : INTO;
        return {own_place<T, P, THREADS>((const T*)p.gy + b * p.gy_b + t * p.gy_l + head * p.gy_h + p0, p.gy_l),
                own_place<T, N, THREADS>((const T*)p.C + b * p.C_b + t * p.C_l + group * p.C_g + n0, p.C_l),
                p.steps + (b * p.h + head) * p.chunks * Q + t + which * plane + i % (Q / 4) * 4};
    }
    DEVICE void fetch(int chunk, Next& at) const {
        const int limit = rows(chunk), i = threadIdx.x;
        T* to = stage(chunk);
        fetch_vectors<T, Q, THREADS, ALIGNED>(Tile<T, P>{to}, at.gy, p.gy_l, 0, limit, p.p - p0);
        fetch_vectors<T, Q, THREADS, ALIGNED>(Tile<T, N>{to + C_at}, at.C, p.C_l, 0, limit, p.n - n0);
        if (i < (is_fp16<T> ? Q / 2 : Q / 4)) copy_async16(reinterpret_cast<float*>(to + decays_at) + 4 * i, at.decays, true);
        at.gy -= Q * p.gy_l, at.C -= Q * p.C_l, at.decays -= Q;
    }
    // fp16: what makes gy e^c 2^8 at the most, for which it has room, and what undoes it; decays are those to multiply gy with then
    DEVICE float lift(T* from, int limit, float& back) const {
        float by, largest = 0.f, *decays = reinterpret_cast<float*>(from + decays_at);
        for (int i = threadIdx.x; i < Q * P / LANES; i += THREADS) {
            const int row = i / (P / LANES);
            float g[LANES];
            Packed<T>::from(Tile<T, P>{from}.place(row, i % (P / LANES) * LANES).at).unpack(g);
            const float decay = zero_or(row < limit, decays[row] * decays[Q + row]);
#pragma unroll
            for (int e = 0; e < LANES; ++e) largest = fmaxf(largest, fabsf(g[e] * decay));
        }
        normal_range(block_max(largest, reinterpret_cast<float*>(memory + scratch_at)), 8, by, back);
        for (int t = threadIdx.x; t < Q; t += THREADS) decays[t] = zero_or(t < limit, decays[t] * decays[Q + t] * by);
        __syncthreads();
        return by;
    }
    DEVICE int row() const { return p0 + threadIdx.x / 32 % DOWN * 16 + threadIdx.x % 32 / 4; }
    DEVICE int col() const { return n0 + threadIdx.x / 32 / DOWN * (8 * NT) + threadIdx.x % 4 * 2; }
    template <class F>
    DEVICE void each(F f) const {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < NT; ++j) f(row() + 8 * i, col() + 8 * j, row() + 8 * i < p.p ? p.n - col() - 8 * j : 0, j, 2 * i);
    }
    DEVICE void store(const float (&acc)[1][NT][4], int chunk) const {
        State* to = (State*)p.gstates + ((b * p.chunks + chunk) * p.h + head) * p.p * p.n;
        if constexpr (ALIGNED && sizeof(State) == 2 && NT % 4 == 0) {
            // 16 bytes per lane: pairs would take four times as many passes over lines
            const int lane = threadIdx.x % 4;
            State* at = to + (int64)row() * p.n + col() + 6 * lane;
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < NT; j += 4) {
                    Packed<State> words;
#pragma unroll
                    for (int k = 0; k < 4; ++k) words.w[k] = Element<State>::pack(acc[0][j + k] + 2 * i);
                    turn_quad(words.w);
                    if (row() + 8 * i < p.p) words.template store<true>(at + 8 * i * p.n + 8 * j, p.n - col() - 6 * lane - 8 * j);
                }
        } else {
            each([&](int row, int col, int count, int j, int e) {
                write_pair<State, ALIGNED>(to + (int64)row * p.n + col, acc[0][j][e], acc[0][j][e + 1], count);
            });
        }
    }
    DEVICE void run() const {
        const int warp = threadIdx.x / 32;
        const int64 size = (int64)p.p * p.n;
        float acc[1][NT][4];
        each([&](int row, int col, int count, int j, int e) {
            const float* from = p.glast + (b * p.h + head) * size + (int64)row * p.n + col;
            acc[0][j][e] = p.glast != nullptr && count > 0 ? from[0] : 0.f;
            acc[0][j][e + 1] = p.glast != nullptr && count > 1 ? from[1] : 0.f;
        });
        Next next = start();
#pragma unroll 1
        for (int ahead = 1; ahead < STAGES; ++ahead) {
            if (p.chunks >= ahead) fetch(p.chunks - ahead, next);
            copy_async_commit();
        }
#pragma unroll 1
        for (int chunk = p.chunks - 1; chunk >= 0; --chunk) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();
            if (chunk >= STAGES - 1) fetch(chunk - STAGES + 1, next);
            copy_async_commit();
            store(acc, chunk);
            if (chunk == 0 && p.ginit == nullptr) break;
            T* from = stage(chunk);
            const float* decays = reinterpret_cast<const float*>(from + decays_at);
            const int limit = rows(chunk);
            // nothing passes the start of a document
            const bool whole = !(FLAGS & RESET) || limit == all_rows(chunk);
            float through = decays[Q - 1], by = 1.f, back = 1.f;
            if constexpr (is_fp16<T>) by = lift(from, limit, back);
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) acc[0][j][e] = whole ? acc[0][j][e] * (through * by) : 0.f;
            product_of_scaled<T, NT, Q>(acc, Tile<T, P>{from + warp % DOWN * 16}, Tile<T, N>{from + C_at + warp / DOWN * (8 * NT)}, decays);
            if constexpr (is_fp16<T>)
#pragma unroll
                for (int j = 0; j < NT; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) acc[0][j][e] *= back;
        }
        if (p.ginit != nullptr)
            each([&](int row, int col, int count, int j, int e) {
                float* at = p.ginit + (b * p.h + head) * size + (int64)row * p.n + col;
                if (count > 0) at[0] = acc[0][j][e];
                if (count > 1) at[1] = acc[0][j][e + 1];
            });
    }
};

template <class T, int P, int N, int FLAGS>
__global__ void __launch_bounds__(128, P * N > 4096 ? 0 : 3) ssd_backward_states(const SsdBackwardParams p) {
    SHARED_MEMORY(memory);
    const int across = (p.n + N - 1) / N, down = (p.p + P - 1) / P;
    int at = blockIdx.x;
    const int n0 = at % across * N;
    at /= across;
    const int p0 = at % down * P;
    at /= down;
    BackwardStates<T, P, N, FLAGS>{p, memory, at % p.h, p0, n0, at / p.h}.run();
}
