// The end of a decoding step: the likeliest token of a row of logits, unless one is given, how likely it is, and all that is kept of the row.
//
// A block has a row.  It is read once, and once more where its exponentials are summed, then by a cache.
#include "vector.cuh"

struct ChooseParams {
    const float* logits;   // (b, v), rows in one piece
    const int64* given;    // (b), or null
    const int64* ends;     // (e), tokens that end a row
    const int64* limit;    // (b), tokens of a row at most
    int64* tokens;         // (b, m)
    float* logprobs;       // (b, m)
    int64* column;         // (b), where the next token goes
    int64* count;          // (b), tokens of a row so far
    int64* token;          // (b), the last one
    uint8* finished;       // (b)
    uint8* broken;         // (b), whether the best logit was no number
    int64 pad;             // of a row that has finished
    int64 row;             // from row to row of the logits
    int v, m, e;
};

constexpr int ALIGNED = 1, LIKELY = 2, THREADS = 1024;
// 16-byte vectors of a thread that are in flight together
constexpr int U = 4;

DEVICE float infinity() { return __uint_as_float(0x7f800000u); }

// f(x, i) for a thread's elements of a row, in their order
template <bool WHOLE, class F>
DEVICE void each(const float* row, int v, F f) {
    const int vectors = v / 4;
#pragma unroll 1
    for (int k = threadIdx.x; k < vectors; k += U * THREADS) {
        float4 x[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = k + u * THREADS;
            if (i >= vectors) continue;
            const float* at = row + 4 * i;
            x[u] = WHOLE ? *reinterpret_cast<const float4*>(at) : make_float4(at[0], at[1], at[2], at[3]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = k + u * THREADS;
            if (i < vectors) f(x[u].x, 4 * i), f(x[u].y, 4 * i + 1), f(x[u].z, 4 * i + 2), f(x[u].w, 4 * i + 3);
        }
    }
    if (const int i = 4 * vectors + threadIdx.x; i < v) f(row[i], i);
}

// the largest logit and its place, the first of equal ones; places are exact as floats
struct Best {
    float top = -infinity(), at = 0.f;

    DEVICE void add(float other_top, float other_at) {
        if (other_top > top || (other_top == top && other_at < at)) top = other_top, at = other_at;
    }
};

// over a warp, then over the warps: the same for every thread
DEVICE Best together(Best own, float* shared) {
#pragma unroll
    for (int w = 16; w > 0; w /= 2) {
        const float top = __shfl_xor_sync(0xffffffffu, own.top, w), at = __shfl_xor_sync(0xffffffffu, own.at, w);
        own.add(top, at);
    }
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 16] = own.top, shared[threadIdx.x / 16 + 1] = own.at;
    __syncthreads();
    Best all;
    for (int w = 0; w < THREADS / 32; ++w) all.add(shared[2 * w], shared[2 * w + 1]);
    return all;
}
DEVICE float together(float own, float* shared) {
#pragma unroll
    for (int w = 16; w > 0; w /= 2) own += __shfl_xor_sync(0xffffffffu, own, w);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
    __syncthreads();
    float all = 0.f;
    for (int w = 0; w < THREADS / 32; ++w) all += shared[w];
    return all;
}

template <int FLAGS>
__global__ void __launch_bounds__(THREADS) choose(const ChooseParams p) {
    SHARED_ARRAY(float, bests, THREADS / 16);
    SHARED_ARRAY(float, sums, THREADS / 32);
    const int b = blockIdx.x;
    const float* row = p.logits + b * p.row;
    Best own;
    // what is no number is the largest of all
    each<FLAGS & ALIGNED>(row, p.v, [&](float x, int i) { if (!(x <= own.top)) own.top = x == x ? x : infinity(), own.at = (float)i; });
    const Best best = together(own, bests);
    float sum = 1.f;
    if constexpr (FLAGS & LIKELY) {
        float part = 0.f;
        each<FLAGS & ALIGNED>(row, p.v, [&](float x, int i) { part += exp2_fast((x - best.top) * LOG2E); });
        sum = together(part, sums);
    }
    if (threadIdx.x != 0) return;
    const bool done = p.finished[b];
    const int64 token = done ? p.pad : p.given != nullptr ? p.given[b] : (int64)best.at, column = p.column[b];
    const int64 count = p.count[b] + (done ? 0 : 1);
    if (!done && !(fabsf(best.top) < infinity())) p.broken[b] = 1;
    p.tokens[b * (int64)p.m + column] = token;
    if constexpr (FLAGS & LIKELY) p.logprobs[b * (int64)p.m + column] = done ? 0.f : row[token] - best.top - logf(sum);
    p.column[b] = column + 1;
    p.count[b] = count;
    p.token[b] = token;
    bool end = done || count >= p.limit[b];
    for (int i = 0; i < p.e; ++i) end |= token == p.ends[i];
    p.finished[b] = end;
}
