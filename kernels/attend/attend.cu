// One token's attention: norms and rotation of its heads, its key and value into the cache, and the sum of values by scaled dot products.
//
// Memory-bound: every key and value that the token sees is read once.  The slots of a row are split among blocks, a few query heads of one key
// head each; in a block, LANES lanes share a key, 16 bytes each, and keep a sum of their own, rescaled as larger scores come (a softmax of
// base 2).  Sums meet in a fixed order: those of a block in shared memory, those of the blocks in `attend_combine`.  The number of splits
// depends on the slots alone, so a row's bits do not depend on the other rows.
//
// The new key and value are not read back: who has their slot among its own takes them as they are.
#include "overlap.cuh"
#include "vector.cuh"

struct AttendParams {
    const void* qkv;                      // (b, (h + 2 h_kv) p)
    void *k, *v;                          // (b, cap, h_kv, p)
    const void *q_gain, *k_gain;          // (p), each may be null
    const float* frequency;               // (rotated)
    int64 *pos, *length;                  // (b, cap), the position in a slot, -1 where it is empty; (b), tokens before this one
    float* parts;                         // (b, h, splits, p + 2): sums, their largest exponent, and the sum of weights
    void* out;                            // (b, h p)
    int64 qkv_b, k_b, k_s, k_h, v_b, v_s, v_h, pos_b;
    int h, h_kv, p, cap, splits, chunks, window, rotated, interleaved, normed;
    float scale, key_multiplier, eps;
};

constexpr int THREADS = 128, LEAST = 16;  // slots of a block, if there are any
constexpr float NOTHING = -3e38f;         // a score below all scores

template <class T>
DEVICE float rounded(float x) {
    T to;
    write_one(&to, x);
    return read_one(&to);
}

// A head of the new token in shared memory, normed, scaled and turned, in the precision of T as operations of their own would leave it; by a warp
template <class T>
DEVICE void take_head(const AttendParams& p, const T* from, const T* gain, float multiplier, float position, float* to) {
    constexpr int EACH = 8;  // up to 256 channels
    const int lane = threadIdx.x % 32;
    T raw[EACH] = {}, gains[EACH] = {};
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const int e = lane + 32 * j;
        if (e < p.p) raw[j] = from[e];
        if (e < p.p && gain != nullptr) gains[j] = gain[e];
    }
    float scale = 1.f, squares = 0.f;
    if (p.normed) {
#pragma unroll
        for (int j = 0; j < EACH; ++j) squares = fmaf(read_one(raw + j), read_one(raw + j), squares);
#pragma unroll
        for (int m = 16; m > 0; m /= 2) squares += __shfl_xor_sync(~0u, squares, m);
        scale = 1.f / sqrtf(squares / (float)p.p + p.eps);
    }
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        float x = read_one(raw + j);
        if (p.normed) x = rounded<T>(x * scale * (gain == nullptr ? 1.f : read_one(gains + j)));
        if (lane + 32 * j < p.p) to[lane + 32 * j] = multiplier == 1.f ? x : rounded<T>(x * multiplier);
    }
    __syncwarp();
#pragma unroll 1
    for (int t = lane; t < p.rotated; t += 32) {
        const int first = p.interleaved ? 2 * t : t, second = p.interleaved ? 2 * t + 1 : t + p.rotated;
        const float x = to[first], y = to[second];
        float s, c;
        sincosf(position * p.frequency[t], &s, &c);
        to[first] = rounded<T>(x * c - y * s), to[second] = rounded<T>(y * c + x * s);
    }
    __syncwarp();
}

// What a group of lanes has summed up of a head: 8 channels of it per lane
struct Sum {
    float most = NOTHING, weight = 0.f, y[8] = {};

    // U more keys; a score of NOTHING is one that is not seen
    template <int U>
    DEVICE void add(const float (&score)[U], const float (&v)[U][8]) {
        float top = most;
#pragma unroll
        for (int u = 0; u < U; ++u) top = score[u] > top ? score[u] : top;
        const float keep = exp2_fast(most - top);
        most = top, weight *= keep;
#pragma unroll
        for (int c = 0; c < 8; ++c) y[c] *= keep;
#pragma unroll
        for (int u = 0; u < U; ++u) {
            // a score that is no number is no smaller than any
            const float w = score[u] <= NOTHING ? 0.f : exp2_fast(score[u] - top);
            weight += w;
#pragma unroll
            for (int c = 0; c < 8; ++c) y[c] = fmaf(w, v[u][c], y[c]);
        }
    }
};

template <class T, int LANES, int HEADS>
struct Attend {
    static constexpr int P = LANES * 8, GROUPS = THREADS / LANES, U = 4, ROOM = P + 2;
    const AttendParams& p;
    const float* heads;  // HEADS query heads and the new key, P floats each, zeros behind p
    const int64 b;
    const int kv, lane, group;
    const int64 position;
    char* ring;  // the first 16 bytes that this lane has of it

    DEVICE void dot(const float (&k)[8], const float (&q)[HEADS][8], float (&score)[HEADS]) const {
#pragma unroll
        for (int i = 0; i < HEADS; ++i) {
            score[i] = 0.f;
#pragma unroll
            for (int c = 0; c < 8; ++c) score[i] = fmaf(q[i][c], k[c], score[i]);
        }
#pragma unroll
        for (int m = LANES / 2; m > 0; m /= 2)
#pragma unroll
            for (int i = 0; i < HEADS; ++i) score[i] += __shfl_xor_sync(~0u, score[i], m);
    }
    DEVICE bool sees(int slot) const {
        const int64 at = p.pos[b * p.pos_b + slot];
        return at >= 0 && at <= position && (p.window == 0 || at > position - p.window);
    }
    // U slots for every group of lanes of [begin, end), but the new token's, on their way into what a lane has of shared memory for itself
    DEVICE void fetch(char* to, int first, int end, int own) const {
        const bool mine = lane * 8 < p.p;
        const T *keys = (const T*)p.k + b * p.k_b + kv * p.k_h, *values = (const T*)p.v + b * p.v_b + kv * p.v_h;
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int slot = first + u * GROUPS + group;
            const bool there = slot < end && slot != own && mine;
            copy_async16(to + 2 * u * THREADS * 16, keys + (there ? slot * p.k_s + lane * 8 : 0), there);
            copy_async16(to + (2 * u + 1) * THREADS * 16, values + (there ? slot * p.v_s + lane * 8 : 0), there);
        }
        copy_async_commit();
    }
    DEVICE void look(int first, int end, int own, bool (&seen)[U]) const {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int slot = first + u * GROUPS + group;
            seen[u] = slot < end && slot != own && sees(slot);
        }
    }
    // two times U slots are on their way, so that nothing is waited for that has not been asked for long before
    DEVICE void along(int begin, int end, int own, const float (&q)[HEADS][8], Sum (&sums)[HEADS]) const {
        constexpr int TURN = U * GROUPS, STAGE = 2 * U * THREADS * 16;
        bool seen[U], then[U];
        fetch(ring, begin, end, own), fetch(ring + STAGE, begin + TURN, end, own);
        look(begin, end, own, seen);
        int odd = 0;
#pragma unroll 1
        for (int first = begin; first < end; first += TURN, odd ^= 1) {
            look(first + TURN, end, own, then);
            copy_async_wait<1>();
            char* stage = ring + odd * STAGE;
            float scores[U][HEADS], v[U][8];
#pragma unroll
            for (int u = 0; u < U; ++u) {
                float k[8];
                read_packed<T, 8>(reinterpret_cast<const T*>(stage + 2 * u * THREADS * 16), k);
                read_packed<T, 8>(reinterpret_cast<const T*>(stage + (2 * u + 1) * THREADS * 16), v[u]);
                dot(k, q, scores[u]);
                // no number times zero would be none
#pragma unroll
                for (int c = 0; c < 8; ++c) v[u][c] = seen[u] ? v[u][c] : 0.f;
            }
#pragma unroll
            for (int i = 0; i < HEADS; ++i) {
                float of_head[U];
#pragma unroll
                for (int u = 0; u < U; ++u) of_head[u] = seen[u] ? scores[u][i] : NOTHING;
                sums[i].add(of_head, v);
            }
            fetch(stage, first + 2 * TURN, end, own);
#pragma unroll
            for (int u = 0; u < U; ++u) seen[u] = then[u];
        }
    }
    // the new token's key and value
    DEVICE void own(const float (&q)[HEADS][8], Sum (&sums)[HEADS]) const {
        float k[8], v[1][8], scores[HEADS];
        load_shared<8>(heads + HEADS * P + lane * 8, k);
        const T* from = (const T*)p.qkv + b * p.qkv_b + (p.h + p.h_kv + kv) * p.p + lane * 8;
#pragma unroll
        for (int c = 0; c < 8; ++c) v[0][c] = lane * 8 < p.p ? read_one(from + (lane * 8 < p.p ? c : 0)) : 0.f;
        dot(k, q, scores);
#pragma unroll
        for (int i = 0; i < HEADS; ++i) {
            const float one[1] = {group == 0 ? scores[i] : NOTHING};
            sums[i].add(one, v);
        }
    }
};

template <class T, int LANES, int HEADS>
__global__ void __launch_bounds__(THREADS) attend_split(const AttendParams p) {
    using A = Attend<T, LANES, HEADS>;
    SHARED_MEMORY(ring);
    SHARED_ARRAY(float, heads, (HEADS + 1) * A::P);
    SHARED_ARRAY(float, met, A::GROUPS * HEADS * A::ROOM);
    let_next_begin();
    const int split = blockIdx.x % p.splits, chunk = blockIdx.x / p.splits % p.chunks, row = blockIdx.x / p.splits / p.chunks;
    const int kv = row % p.h_kv, per_kv = p.h / p.h_kv, first = kv * per_kv + chunk * HEADS;
    const int there = per_kv - chunk * HEADS < HEADS ? per_kv - chunk * HEADS : HEADS;
    const int64 b = row / p.h_kv;
    wait_for_previous();
    const int64 position = p.length[b];
    const int own = (int)(position % p.cap), used = position + 1 < p.cap ? (int)position + 1 : p.cap;
    const int even = (used + p.splits - 1) / p.splits, per = even < LEAST ? LEAST : even;
    const int begin = split * per < used ? split * per : used, end = begin + per < used ? begin + per : used;
    const T* qkv = (const T*)p.qkv + b * p.qkv_b;
    const bool has = begin <= own && own < end;

    for (int e = threadIdx.x; e < (HEADS + 1) * A::P; e += THREADS) heads[e] = 0.f;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x / 32; i <= HEADS; i += THREADS / 32) {
        const bool key = i == HEADS;
        if (key ? !has : i >= there) continue;
        const T *from = qkv + (key ? p.h + kv : first + i) * p.p, *gain = (const T*)(key ? p.k_gain : p.q_gain);
        take_head(p, from, gain, key ? p.key_multiplier : 1.f, (float)position, heads + i * A::P);
    }
    __syncthreads();
    if (has && chunk == 0) {
        for (int e = threadIdx.x; e < p.p; e += THREADS) {
            write_one((T*)p.k + b * p.k_b + own * p.k_s + kv * p.k_h + e, heads[HEADS * A::P + e]);
            write_one((T*)p.v + b * p.v_b + own * p.v_s + kv * p.v_h + e, read_one(qkv + (p.h + p.h_kv + kv) * p.p + e));
        }
        // other key heads' blocks may read the old one: they know the slot, and leave it out
        if (kv == 0 && threadIdx.x == 0) p.pos[b * p.pos_b + own] = position;
    }

    const A a{p, heads, b, kv, (int)threadIdx.x % LANES, (int)threadIdx.x / LANES, position, ring + threadIdx.x * 16};
    float q[HEADS][8];
    Sum sums[HEADS];
#pragma unroll
    for (int i = 0; i < HEADS; ++i) {
        load_shared<8>(heads + i * A::P + a.lane * 8, q[i]);
#pragma unroll
        for (int c = 0; c < 8; ++c) q[i][c] *= p.scale * LOG2E;
    }
    a.along(begin, end, own, q, sums);
    if (has) a.own(q, sums);
#pragma unroll
    for (int i = 0; i < HEADS; ++i) {
        float* to = met + (a.group * HEADS + i) * A::ROOM;
#pragma unroll
        for (int c = 0; c < 8; ++c) to[a.lane * 8 + c] = sums[i].y[c];
        if (a.lane == 0) to[A::P] = sums[i].most, to[A::P + 1] = sums[i].weight;
    }
    __syncthreads();
    for (int o = threadIdx.x; o < there * p.p; o += THREADS) {
        const int i = o / p.p, e = o % p.p;
        float most = NOTHING, weight = 0.f, y = 0.f;
        for (int g = 0; g < A::GROUPS; ++g) {
            const float m = met[(g * HEADS + i) * A::ROOM + A::P];
            most = m > most ? m : most;
        }
        for (int g = 0; g < A::GROUPS; ++g) {
            const float* from = met + (g * HEADS + i) * A::ROOM;
            const float keep = exp2_fast(from[A::P] - most);
            weight = fmaf(keep, from[A::P + 1], weight), y = fmaf(keep, from[e], y);
        }
        float* to = p.parts + (((int64)b * p.h + first + i) * p.splits + split) * (p.p + 2);
        to[e] = y;
        if (e == 0) to[p.p] = most, to[p.p + 1] = weight;
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS) attend_combine(const AttendParams p) {
    let_next_begin();
    wait_for_previous();
    const float* from = p.parts + (int64)blockIdx.x * p.splits * (p.p + 2);
    for (int e = threadIdx.x; e < p.p; e += THREADS) {
        float most = NOTHING, weight = 0.f, y = 0.f;
        for (int s = 0; s < p.splits; ++s) {
            const float m = from[s * (p.p + 2) + p.p];
            most = m > most ? m : most;
        }
        for (int s = 0; s < p.splits; ++s) {
            const float* part = from + s * (p.p + 2);
            const float keep = exp2_fast(part[p.p] - most);
            weight = fmaf(keep, part[p.p + 1], weight), y = fmaf(keep, part[e], y);
        }
        write_one((T*)p.out + (int64)blockIdx.x * p.p + e, y / weight);
    }
    if (blockIdx.x % p.h == 0 && threadIdx.x == 0) p.length[blockIdx.x / p.h] += 1;
}
