// What the forward and the backward of SSD share: chunks, their step sizes and decays, tiles of operands in shared memory.
#pragma once
#include "mma.cuh"

// template flag: there is z
enum { GATED = 2 };

template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;
template <class T>
constexpr bool is_fp16 = false;
template <>
constexpr bool is_fp16<fp16> = true;

// tokens of a chunk: the work within grows with them, that for the states falls
template <class T>
struct Chunk {
    static constexpr int q = sizeof(T) == 2 ? 64 : 32;
};

// A chunk's step sizes, in shared memory.  What passes between two tokens is the difference of two sums, each kept in two floats: behind one
// large step, a single float would have no digits for the small ones.
template <int Q>
struct Steps {
    float dt[Q];          // as used: 0 at padding and behind the end
    float hi[Q], lo[Q];   // hi + lo: sum of dt A log2(e) up to and with this token
    float into[Q];        // decay from the chunk's start, 0 where a document started in between
    float onward[Q];      // decay to the chunk's end times dt, likewise; over `gain`
    int doc[Q];           // documents that started in the chunk up to here
    int bad[Q];           // 1: something that the state takes up is not finite, 2: C is not (packed documents only)
    float through, gain;  // decay over the whole chunk, likewise; a power of two, 1 but for fp16
    float pad[2];
};

// 2^log, of a sum of logarithms
template <class T>
DEVICE float decay_by(float log) {
    if constexpr (sizeof(T) == 2) return exp2_fast(log);
    return decay_of<T>(log, 1.f);
}

// 2^k and 2^-k for which `largest` 2^k lies in [2^(to - 1), 2^to), as far as |k| <= 40
DEVICE void normal_range(float largest, int to, float& by, float& back) {
    int k = to - 1 - (int)((__float_as_uint(largest) >> 23 & 255) - 127);
    k = k > 40 ? 40 : k < -40 ? -40 : k;
    by = __uint_as_float((uint32)(127 + k) << 23), back = __uint_as_float((uint32)(127 - k) << 23);
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int m = 16; m > 0; m /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, m));
    return x;
}

DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// What a warp's lane reads of a chunk's step sizes, Q / 32 neighbouring tokens, before there is time to work on it: as it lies in memory, for to
// convert or to compare it is to wait for it
template <int Q>
struct RawSteps {
    static constexpr int PER = Q / 32;
    uint32 dt[PER], valid[PER], reset[PER];

    template <class T, bool RESET, class P>
    DEVICE void load(const P& p, int64 b, int head, int start) {
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const int t = start + threadIdx.x % 32 * PER + i;
            const bool there = t < p.l;
            const int64 at = b * p.dt_b + (there ? t : 0) * p.dt_l + head * p.dt_h, token = b * p.l + (there ? t : 0);
            dt[i] = valid[i] = reset[i] = 0;
            if (there) dt[i] = is_wide<T>(p) ? reinterpret_cast<const uint32*>(p.dt)[at] : reinterpret_cast<const uint16*>(p.dt)[at];
            if (there) valid[i] = p.valid == nullptr ? 1 : p.valid[token];
            if (RESET && there) reset[i] = p.reset[token];
        }
    }
    template <class T, class P>
    DEVICE static bool is_wide(const P& p) {
        return sizeof(T) == 4 || p.wide_dt;
    }
    // a step that is not finite is one of zero that is marked, where there are documents which it must not reach
    template <class T, bool RESET, class P>
    DEVICE float step(const P& p, int i, float bias, int& bad) const {
        float x[2];
        if (is_wide<T>(p)) Element<float>::unpack(dt[i], x);
        else Element<T>::unpack(dt[i], x);
        bad = 0;
        if (RESET && !(is_finite(x[0]) || (p.softplus && x[0] < 0.f))) bad = 1, x[0] = 0.f;
        float y = x[0] + bias;
        if (p.softplus) y = softplus<false>(y);
        y = y < p.low ? p.low : y > p.high ? p.high : y;
        return valid[i] ? y : 0.f;
    }
};

// What all steps of a head have in common: its decay rate times log2(e), and the bias
struct Rate {
    double rate;
    float bias;

    template <class P>
    DEVICE static Rate of(const P& p, int head) {
        return {(double)finite_rate(p.A[head]) * 1.4426950408889634, p.dt_bias == nullptr ? 0.f : p.dt_bias[head]};
    }
};

// Sums of a chunk's steps: a float has 24 bits for all of them together, of which differences of bf16 need no more
template <class T>
struct StepSum {
    using type = double;
};
template <>
struct StepSum<bf16> {
    using type = float;
};

// A chunk's step sizes by one warp
template <class T, int Q, bool RESET, class P>
DEVICE void form_steps(const P& p, const RawSteps<Q>& raw, const Rate& of, Steps<Q>& out) {
    using Sum = typename StepSum<T>::type;
    constexpr int PER = Q / 32;
    constexpr Sum FLOOR = -150;  // beyond it a step forgets all
    const int lane = threadIdx.x % 32;
    Sum sums[PER], all = 0;
    float dt[PER];
    int docs[PER], bad[PER], count = 0;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        dt[i] = raw.template step<T, RESET>(p, i, of.bias, bad[i]);
        const Sum log = dt[i] * (Sum)of.rate;
        sums[i] = all += log < FLOOR ? FLOOR : log;
        docs[i] = count += raw.reset[i];
    }
    const int started = count;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const Sum before = __shfl_up_sync(~0u, all, d);
        const int docs_before = RESET ? __shfl_up_sync(~0u, count, d) : 0;
        if (lane >= d) all += before, count += docs_before;
    }
    const Sum end = __shfl_sync(~0u, all, 31), before = __shfl_up_sync(~0u, all, 1);
    const int last = RESET ? __shfl_sync(~0u, count, 31) : 0, shift = count - started;
    float onward[PER], largest = 0.f, by = 1.f, gain = 1.f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        sums[i] += lane == 0 ? (Sum)0 : before, docs[i] += shift;
        onward[i] = docs[i] == last ? decay_by<T>((float)(end - sums[i])) * dt[i] : 0.f;
        largest = fmaxf(largest, fabsf(onward[i]));
    }
    // fp16 has no room below: the largest weight becomes about 1
    if constexpr (is_fp16<T>) normal_range(warp_max(largest), 0, by, gain);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const int t = lane * PER + i;
        const float hi = (float)sums[i];
        out.dt[t] = dt[i], out.hi[t] = hi, out.lo[t] = (float)(sums[i] - hi), out.doc[t] = docs[i], out.bad[t] = bad[i];
        out.into[t] = docs[i] == 0 ? decay_by<T>(hi) : 0.f;
        out.onward[t] = onward[i] * by;
    }
    if (lane == 0) out.through = last == 0 ? decay_by<T>((float)end) : 0.f, out.gain = gain;
}

// A thread's first element of a tile of COLS columns that lies at `at`
template <class T, int COLS, int THREADS>
DEVICE const T* own_place(const T* at, int64 stride) {
    constexpr int WIDE = Packed<T>::lanes, PER = COLS / WIDE;
    return at + threadIdx.x / PER * stride + threadIdx.x % PER * WIDE;
}

// `rows` x `cols` of memory as a tile of ROWS x COLS, zeros beyond; by the whole block, asynchronously where 16 bytes go at once, or 4.
// `from` is the thread's own place.
template <class T, int ROWS, bool ALIGNED, int THREADS, int COLS>
DEVICE void fill_own(Tile<T, COLS> tile, const T* from, int64 stride, int rows, int cols) {
    constexpr int WIDE = Packed<T>::lanes, PER_WORD = Packed<T>::per_word, PER = COLS / WIDE, ONCE = THREADS / PER;
    static_assert(THREADS % PER == 0 && ROWS % ONCE == 0 && (ONCE % 8 == 0 || !tile.SWIZZLED), "every thread has as many vectors, of one column");
    const int first = threadIdx.x / PER, col = threadIdx.x % PER * WIDE, count = cols - col;
    const Tile<T, COLS> own = tile.place(first, col);
    const bool words = !ALIGNED && ((unsigned long long)from | (unsigned long long)stride * sizeof(T)) % 4 == 0;
#pragma unroll
    for (int i = 0; i < ROWS / ONCE; ++i, from += ONCE * stride) {
        T* to = own.at + i * ONCE * tile.STRIDE;
        const int there = first + i * ONCE < rows ? count : 0;
        if (!words) {
            Packed<T>::template fetch<ALIGNED>(to, from, there);
            continue;
        }
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const int left = there - w * PER_WORD;
            copy_async4(to + w * PER_WORD, from + w * PER_WORD, left <= 0 ? 0 : left >= PER_WORD ? 4 : 2);
        }
    }
}

// Lanes of a quad have two words each, one of the left 8 columns of a tile of 16 and one of the right 8: then four neighbouring elements each, for
// whole sectors of 32 bytes of memory at once; and back.  The first of them is in `column_of_four`.
DEVICE uint2 four(uint32 left, uint32 right) {
    const bool odd = threadIdx.x % 2;
    const uint32 got = __shfl_xor_sync(~0u, (int)(odd ? left : right), 1);
    uint2 words;
    words.x = odd ? got : left, words.y = odd ? right : got;
    return words;
}
DEVICE int column_of_four() { return threadIdx.x % 2 * 8 + threadIdx.x / 2 % 2 * 4; }
