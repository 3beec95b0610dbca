// The cross-entropy of rows of logits against a target each, and its gradient, scale * (softmax - onehot).
//
// Memory-bound.  A block has a row and reads it once: the largest logit and the sum of exponentials against it are kept together, thread by
// thread, and then over the block in a fixed order.  What fits of the row stays in shared memory until the gradient is written, a thread
// reading back what it put there itself; the rest is read again.  A second read of everything would not come from the L2 cache: the rows
// that are under way at once, and their gradients, are about as large as it is.  Sixteen bytes are moved at a time whatever v is: of a row
// that does not start at a multiple of 16 bytes, the elements before the first and behind the last one are a thread's each.
#include "vector.cuh"

struct CrossEntropyParams {
    const void* logits;    // (m, v), starting at a multiple of 16 bytes
    const int64* targets;  // (m)
    float* losses;         // (m)
    void* gradient;        // (m, v), as the logits
    int64 ignore;
    int v;
    float scale;
};

DEVICE float infinity() { return __uint_as_float(0x7f800000u); }
DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }

// the largest of some numbers, and the sum of exp(x - largest) over them
struct ExpSum {
    float top = -infinity(), sum = 0.f;

    // exponents are taken against 0 where there are only -inf yet, and each of them adds nothing
    static DEVICE float origin(float top) { return top == -infinity() ? 0.f : top; }

    template <int N>
    DEVICE void add(const float (&x)[N]) {
        float most = top, e[N];
#pragma unroll
        for (int c = 0; c < N; ++c) most = fmaxf(most, x[c]);
        const float to = origin(most);
#pragma unroll
        for (int c = 0; c < N; ++c) e[c] = exp2_fast((x[c] - to) * LOG2E);
#pragma unroll
        for (int w = N / 2; w > 0; w /= 2)
#pragma unroll
            for (int c = 0; c < w; ++c) e[c] += e[c + w];
        sum = fmaf(sum, exp2_fast((top - to) * LOG2E), e[0]);
        top = most;
    }
    DEVICE void add(float other_top, float other_sum) {
        const float most = fmaxf(top, other_top), to = origin(most);
        sum = sum * exp2_fast((top - to) * LOG2E) + other_sum * exp2_fast((other_top - to) * LOG2E);
        top = most;
    }
};

// which elements of a row are whose
template <class T, int THREADS>
struct Cut {
    static constexpr int N = Element<T>::lanes;
    int first, vectors, rounds, edge;  // elements before the first border, vectors from there, vectors of a thread, and its single element or -1

    DEVICE Cut(const T* row, int v) {
        const int off = (int)((unsigned long long)row % 16 / sizeof(T)), t = threadIdx.x;
        first = (N - off) % N < v ? (N - off) % N : v;
        vectors = (v - first) / N;
        rounds = (vectors + THREADS - 1) / THREADS;
        const int behind = first + vectors * N;
        edge = t < first ? t : t - first < v - behind ? behind + t - first : -1;
    }
};

// vectors of a thread that are in flight together
constexpr int U = 4;

template <class T, int THREADS, int KEEP, bool GRADIENT>
struct CrossEntropy {
    using V = Packed<T>;
    static constexpr int N = V::lanes;

    const T* row;
    T* out;
    char* kept;  // KEEP vectors of each thread
    Cut<T, THREADS> cut;

    // from memory or from what was kept of it; there: how many of the U vectors from round k on
    template <bool AGAIN>
    DEVICE void fetch(V (&x)[U], int k) const {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = (k + u) * THREADS + threadIdx.x;
            if (i >= cut.vectors) continue;
            if (AGAIN && k + u < KEEP)
                x[u] = V::from(kept + 16 * i);
            else
                x[u] = V::from(row + cut.first + i * N);
        }
    }

    DEVICE ExpSum read() const {
        ExpSum own;
        if (cut.edge >= 0) {
            float x[1];
            read_channels<T, 1>(row + cut.edge, x);
            own.add(x);
        }
#pragma unroll 1
        for (int k = 0; k < cut.rounds; k += U) {
            V x[U];
            fetch<false>(x, k);
#pragma unroll
            for (int u = 0; u < U; ++u) {
                const int i = (k + u) * THREADS + threadIdx.x;
                if (i >= cut.vectors) continue;
                if (k + u < KEEP) x[u].template store<true>((T*)(kept + 16 * i), N);
                float f[N];
                x[u].unpack(f);
                own.add(f);
            }
        }
        return own;
    }

    // over a warp, then over the warps in their order: the same for every thread
    static DEVICE ExpSum together(ExpSum own, float* shared) {
#pragma unroll
        for (int w = 16; w > 0; w /= 2) {
            const float top = __shfl_xor_sync(0xffffffffu, own.top, w), sum = __shfl_xor_sync(0xffffffffu, own.sum, w);
            own.add(top, sum);
        }
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 16] = own.top, shared[threadIdx.x / 16 + 1] = own.sum;
        __syncthreads();
        ExpSum all;
#pragma unroll
        for (int w = 0; w < THREADS / 32; ++w) all.add(shared[2 * w], shared[2 * w + 1]);
        return all;
    }

    // factor * exp(x - top), and less by `scale` at the target
    DEVICE void write(float top, float factor, int target, float scale) const {
        if (cut.edge >= 0) {
            float x[1];
            read_channels<T, 1>(row + cut.edge, x);
            x[0] = exp2_fast((x[0] - top) * LOG2E) * factor - (cut.edge == target ? scale : 0.f);
            write_channels<T, 1>(out + cut.edge, x);
        }
#pragma unroll 1
        for (int k = 0; k < cut.rounds; k += U) {
            V x[U];
            fetch<true>(x, k);
#pragma unroll
            for (int u = 0; u < U; ++u) {
                const int i = (k + u) * THREADS + threadIdx.x;
                if (i >= cut.vectors) continue;
                float g[N];
                x[u].unpack(g);
                const int at = target - (cut.first + i * N);
#pragma unroll
                for (int c = 0; c < N; ++c) g[c] = exp2_fast((g[c] - top) * LOG2E) * factor;
                if (at >= 0 && at < N) {
#pragma unroll
                    for (int c = 0; c < N; ++c) g[c] -= c == at ? scale : 0.f;
                }
                V::pack(g).template store<true>(out + cut.first + i * N, N);
            }
        }
    }

    DEVICE void clear() const {
        float zero[N] = {}, one[1] = {0.f};
        if (cut.edge >= 0) write_channels<T, 1>(out + cut.edge, one);
        for (int i = threadIdx.x; i < cut.vectors; i += THREADS) V::pack(zero).template store<true>(out + cut.first + i * N, N);
    }

    DEVICE void run(const CrossEntropyParams& p, float* shared) const {
        const int64 target = p.targets[blockIdx.x];
        float* loss = p.losses + blockIdx.x;
        if (target == p.ignore) {
            if (threadIdx.x == 0) *loss = 0.f;
            if constexpr (GRADIENT) clear();
            return;
        }
        const ExpSum all = together(read(), shared);
        // a target that is no word must not read another row, nor go unseen
        const bool known = target >= 0 && target < p.v;
        if (threadIdx.x == 0) {
            float x[1] = {not_a_number()};
            if (known) read_channels<T, 1>(row + target, x);
            *loss = logf(all.sum) + (all.top - x[0]);
        }
        if constexpr (GRADIENT) write(all.top, known ? p.scale / all.sum : not_a_number(), (int)(known ? target : -1), p.scale);
    }
};

template <class T, int THREADS, int KEEP, bool GRADIENT>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS) cross_entropy(const CrossEntropyParams p) {
    SHARED_MEMORY(kept);
    SHARED_ARRAY(float, sums, THREADS / 16);
    const int64 start = blockIdx.x * (int64)p.v;
    const T* row = (const T*)p.logits + start;
    CrossEntropy<T, THREADS, KEEP, GRADIENT>{row, (T*)p.gradient + start, kept, Cut<T, THREADS>(row, p.v)}.run(p, sums);
}
