// Types, conversions and the few special functions that every kernel shares.  No header of the CUDA toolkit is needed.
#pragma once

#ifdef HZ_EMULATE
#include "emulate.h"
#else
typedef long long int64;
typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;

#define DEVICE __device__ __forceinline__
// on a border of 128 bytes, as a `Tile` needs it
#define SHARED_MEMORY(name) extern __shared__ __align__(128) char name[]

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// A barrier of `threads` threads between two groups: one arrives, and what it wrote is there for the other, which waits.  Warps go there
// as a whole.
DEVICE void barrier_arrive(int id, int threads) {
    __syncwarp();
    asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void barrier_wait(int id, int threads) {
    __syncwarp();
    asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// 16 bytes into shared memory, or zeros if they are not there
DEVICE void copy_async16(void* shared, const void* global, bool there) {
    uint32 to = (uint32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(there ? 16 : 0) : "memory");
}
// 4 bytes, of which the first `bytes` are there and the others become zero
DEVICE void copy_async4(void* shared, const void* global, int bytes) {
    uint32 to = (uint32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// A number that the compiler shall keep, and not form again wherever it is used
DEVICE int keep_in_register(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
DEVICE float half_bits_to_float(uint16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
DEVICE uint32 pack_half(float lo, float hi) {
    uint32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
DEVICE uint32 pack_bfloat(float lo, float hi) {
    uint32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
#endif

struct bf16 {
    uint16 bits;
};
struct fp16 {
    uint16 bits;
};

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// A rate of -inf forgets all at every step; as a finite number it leaves alone what a step of zero leaves alone.
DEVICE float finite_rate(float A) { return A < -1e30f ? -1e30f : A; }

// A log2(e)
DEVICE float rate_of(float A) { return finite_rate(A * LOG2E); }

// exp(dt A), a2 being A log2(e).  The unit's results are up to 5e-8 low on average (H100), which long memories add up step by step: the
// gradient of A was 5 times as far off as PyTorch's.  In float32 a polynomial takes over near 1, mean error 4e-10, where memory is long.
template <class T>
DEVICE float decay_of(float dt, float a2) {
    const float x = dt * a2, a = exp2_fast(x);
    if constexpr (sizeof(T) == 2) return a;
    float p = 0.0012409014161676168f;
    p = fmaf(p, x, 0.009598178789019585f);
    p = fmaf(p, x, 0.05550234019756317f);
    p = fmaf(p, x, 0.24022644758224487f);
    p = fmaf(p, x, 0.6931471824645996f);
    return fabsf(x + 0.125f) <= 0.125f ? fmaf(p, x, 1.f) : a;
}

template <class T>
struct Element;  // lanes: elements in a 16-byte vector; unpack, pack: one 32-bit word
template <>
struct Element<float> {
    static constexpr int lanes = 4, per_word = 1;
    static DEVICE void unpack(uint32 w, float* x) { x[0] = __uint_as_float(w); }
    static DEVICE uint32 pack(const float* x) { return __float_as_uint(x[0]); }
};
template <>
struct Element<bf16> {
    static constexpr int lanes = 8, per_word = 2;
    static DEVICE void unpack(uint32 w, float* x) {
        x[0] = __uint_as_float(w << 16);
        x[1] = __uint_as_float(w & 0xffff0000u);
    }
    static DEVICE uint32 pack(const float* x) { return pack_bfloat(x[0], x[1]); }
};
template <>
struct Element<fp16> {
    static constexpr int lanes = 8, per_word = 2;
    static DEVICE void unpack(uint32 w, float* x) {
        x[0] = half_bits_to_float((uint16)(w & 0xffffu));
        x[1] = half_bits_to_float((uint16)(w >> 16));
    }
    static DEVICE uint32 pack(const float* x) { return pack_half(x[0], x[1]); }
};

// 16 bytes of elements, as they lie in memory
template <class T>
struct Packed {
    static constexpr int lanes = Element<T>::lanes, per_word = Element<T>::per_word;
    uint32 w[4];

    DEVICE void unpack(float (&x)[lanes]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) Element<T>::unpack(w[i], x + i * per_word);
    }
    static DEVICE Packed pack(const float (&x)[lanes]) {
        Packed p;
#pragma unroll
        for (int i = 0; i < 4; ++i) p.w[i] = Element<T>::pack(x + i * per_word);
        return p;
    }
    static DEVICE Packed from(const void* at) {
        uint4 v = *reinterpret_cast<const uint4*>(at);
        return Packed{{v.x, v.y, v.z, v.w}};
    }
    template <bool ALIGNED>
    static DEVICE Packed load(const T* at, int count) {
        if constexpr (!ALIGNED) return scalar_load(at, count);
        uint4 v = make_uint4(0, 0, 0, 0);
        if (count > 0) v = *reinterpret_cast<const uint4*>(at);
        return Packed{{v.x, v.y, v.z, v.w}};
    }
    // bring `count` elements (none if it is <= 0) into shared memory, zeros behind them; asynchronous where 16 bytes can go at once
    template <bool ALIGNED>
    static DEVICE void fetch(void* shared, const T* at, int count) {
        if constexpr (ALIGNED)
            copy_async16(shared, at, count > 0);
        else
            scalar_load(at, count).template store<true>(reinterpret_cast<T*>(shared), lanes);
    }
    static DEVICE Packed scalar_load(const T* at, int count) {
        Packed p;
        if constexpr (sizeof(T) == 4) {
            const uint32* a = reinterpret_cast<const uint32*>(at);
#pragma unroll
            for (int i = 0; i < 4; ++i) p.w[i] = i < count ? a[i] : 0;
        } else {
            const uint16* a = reinterpret_cast<const uint16*>(at);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32 lo = 2 * i < count ? a[2 * i] : 0, hi = 2 * i + 1 < count ? a[2 * i + 1] : 0;
                p.w[i] = lo | hi << 16;
            }
        }
        return p;
    }
    template <bool ALIGNED>
    DEVICE void store(T* at, int count) const {
        if constexpr (ALIGNED) {
            if (count > 0) *reinterpret_cast<uint4*>(at) = make_uint4(w[0], w[1], w[2], w[3]);
            return;
        }
        if constexpr (sizeof(T) == 4) {
            uint32* a = reinterpret_cast<uint32*>(at);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i < count) a[i] = w[i];
        } else {
            uint16* a = reinterpret_cast<uint16*>(at);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < count) a[i] = (uint16)(w[i / 2] >> (16 * (i % 2)));
        }
    }
};

// N 16-bit elements, aligned to their size together
template <class T, int N>
DEVICE void read_packed(const T* at, float (&x)[N]) {
    if constexpr (N % 8 == 0) {
#pragma unroll
        for (int i = 0; i < N / 8; ++i) {
            uint4 v = reinterpret_cast<const uint4*>(at)[i];
            Element<T>::unpack(v.x, x + 8 * i), Element<T>::unpack(v.y, x + 8 * i + 2);
            Element<T>::unpack(v.z, x + 8 * i + 4), Element<T>::unpack(v.w, x + 8 * i + 6);
        }
    } else if constexpr (N == 4) {
        uint2 v = *reinterpret_cast<const uint2*>(at);
        Element<T>::unpack(v.x, x), Element<T>::unpack(v.y, x + 2);
    } else {
        static_assert(N == 2, "");
        Element<T>::unpack(*reinterpret_cast<const uint32*>(at), x);
    }
}

// CH neighbouring channels, as floats
template <class T, int CH>
DEVICE void read_channels(const T* at, float (&x)[CH]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int c = 0; c < CH; ++c) x[c] = reinterpret_cast<const float*>(at)[c];
    } else if constexpr (CH == 2) {
        Element<T>::unpack(*reinterpret_cast<const uint32*>(at), x);
    } else {
        float both[2];
        Element<T>::unpack(reinterpret_cast<const uint16*>(at)[0], both);
        x[0] = both[0];
    }
}
template <class T, int CH>
DEVICE void write_channels(T* at, const float (&x)[CH]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int c = 0; c < CH; ++c) reinterpret_cast<float*>(at)[c] = x[c];
    } else if constexpr (CH == 2) {
        *reinterpret_cast<uint32*>(at) = Element<T>::pack(x);
    } else {
        float both[2] = {x[0], 0.f};
        reinterpret_cast<uint16*>(at)[0] = (uint16)Element<T>::pack(both);
    }
}

template <int N>
DEVICE void load_shared(const float* at, float (&x)[N]) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N / 4; ++i) {
            float4 v = reinterpret_cast<const float4*>(at)[i];
            x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
        }
    } else if constexpr (N == 2) {
        float2 v = *reinterpret_cast<const float2*>(at);
        x[0] = v.x, x[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = at[i];
    }
}

template <int N>
DEVICE void store_shared(float* at, const float (&x)[N]) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N / 4; ++i)
            reinterpret_cast<float4*>(at)[i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    } else if constexpr (N == 2) {
        *reinterpret_cast<float2*>(at) = make_float2(x[0], x[1]);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) at[i] = x[i];
    }
}

// max(x, 0) + log1p(exp(-|x|)).  log1p(e) = e p(e) on [0, 1]: the special-function unit, busy with the decays, is asked once, and small
// steps keep their relative accuracy.  p is of degree 8 (relative error 3e-8), or of degree 5 (8e-6) where inputs have 11 bits or fewer.
template <bool ROUGH>
DEVICE float softplus(float x) {
    float e = exp2_fast(fabsf(x) * -LOG2E), p;
    if constexpr (ROUGH) {
        p = -0.023869112133979797f;
        p = fmaf(p, e, 0.10122218728065491f);
        p = fmaf(p, e, -0.2100486010313034f);
        p = fmaf(p, e, 0.3252066373825073f);
        p = fmaf(p, e, -0.4993613660335541f);
        p = fmaf(p, e, 0.9999915957450867f);
    } else {
        p = 0.005126102361828089f;
        p = fmaf(p, e, -0.029074065387248993f);
        p = fmaf(p, e, 0.0775160863995552f);
        p = fmaf(p, e, -0.13602247834205627f);
        p = fmaf(p, e, 0.19076880812644958f);
        p = fmaf(p, e, -0.2483539879322052f);
        p = fmaf(p, e, 0.3331812024116516f);
        p = fmaf(p, e, -0.4999944567680359f);
        p = fmaf(p, e, 0.9999999403953552f);
    }
    return fmaf(p, e, fmaxf(x, 0.f));
}

DEVICE float sigmoid(float x) { return reciprocal(1.f + exp2_fast(x * -LOG2E)); }

// two sigmoids for one reciprocal; the clamp keeps the product finite
DEVICE void sigmoid2(float x0, float x1, float& s0, float& s1) {
    float w0 = 1.f + exp2_fast(fminf(x0 * -LOG2E, 60.f)), w1 = 1.f + exp2_fast(fminf(x1 * -LOG2E, 60.f));
    float r = reciprocal(w0 * w1);
    s0 = r * w1;
    s1 = r * w0;
}

template <int N>
DEVICE void sigmoids(const float (&x)[N], float (&s)[N]) {
#pragma unroll
    for (int i = 0; i + 1 < N; i += 2) sigmoid2(x[i], x[i + 1], s[i], s[i + 1]);
    if constexpr (N % 2) s[N - 1] = sigmoid(x[N - 1]);
}

// A walk over the tokens of a row: step t stands on token (t / n_inner) * stride_outer + (t % n_inner) * stride_inner, reversed or not.
// A division takes 25 instructions and a special function; t * magic >> shift is the same for every t below 2^31.
struct Walk {
    uint32 magic;
    int shift, first, turn;  // first + turn * t: t, or l - 1 - t where the walk is reversed
    int jump, step;          // stride_outer - n_inner * stride_inner, and stride_inner

    DEVICE int token(int t) const {
        t = first + turn * t;
        return (int)((unsigned long long)(uint32)t * magic >> shift) * jump + t * step;
    }
};

// Up to four launches as one, alike but for their operands and the walk that they follow, with `blocks` each: those of one walk over small
// maps are fewer than the multiprocessors hold.
template <class P>
struct Walks {
    P each[4];
    int blocks;
};

// How the lanes of a warp are shared out: LN of them to each of the groups of channels.  Shared memory serves a load of 16 (or 8) bytes per
// lane in half the time if the four lanes of a quad do not ask for four different places; so neither the lanes of a group, who read
// different states, nor the groups, who read different channels, fill a quad.
template <int LN>
struct Lanes {
    static constexpr int groups = 32 / LN, near = LN > 1 ? 2 : 1;  // near: lanes of a group beside each other
    DEVICE static int group(int lane) { return lane / near % groups; }
    DEVICE static int share(int lane) { return lane % near + lane / (near * groups) * near; }
    DEVICE static int lane(int group, int share) { return share % near + group * near + share / near * (near * groups); }
};

// How a scan is cut along its length: the first `whole` rows of the batch not at all, the others into `first` steps and pieces of `length`.
struct LengthCut {
    int whole, chunks, first, length;

    DEVICE int begin(int chunk) const { return chunk == 0 ? 0 : first + (chunk - 1) * length; }
    DEVICE int end(int64 b, int chunk, int l) const { return b < whole || chunk == chunks - 1 ? l : begin(chunk + 1); }
    // among the pieces of the rows that are cut, and among all
    DEVICE int64 cut_piece(int64 b, int chunk) const { return (b - whole) * chunks + chunk; }
    DEVICE int64 piece(int64 b, int chunk) const { return b < whole ? b : whole + cut_piece(b, chunk); }
    // the i-th block of a tile of channels: the first pieces of all rows, then the second ones, ...
    DEVICE void place(int i, int batch, int64& b, int& chunk) const {
        const int behind = i - batch, rest = batch - whole;
        chunk = behind < 0 ? 0 : 1 + behind / rest;
        b = behind < 0 ? i : whole + behind % rest;
    }
};

// What a channel's NS states (or their gradients) have become behind `count` pieces of its row, one after the other:
// h <- exp(A sum dt) h + local.  `there` of the states exist; the first piece's lie at local and decay, the next ones' so far on.
template <int NS>
DEVICE void pass_pieces(float (&h)[NS], const float (&a2)[NS], int there, int count, const float* local, int64 next, const float* decay, int64 next_decay) {
    // several are read before any is used, or each would wait for the one before
    constexpr int TOGETHER = 4;
#pragma unroll 1
    for (int k = 0; k < count; k += TOGETHER) {
        float add[TOGETHER][NS], sum[TOGETHER], keep[TOGETHER];
#pragma unroll
        for (int m = 0; m < TOGETHER; ++m) {
            const bool ok = k + m < count && there > 0;
            sum[m] = ok ? decay[(k + m) * next_decay] : 0.f, keep[m] = ok ? decay[(k + m) * next_decay + 1] : 1.f;
#pragma unroll
            for (int j = 0; j < NS; ++j) add[m][j] = ok && j < there ? local[(k + m) * next + j] : 0.f;
        }
#pragma unroll
        for (int m = 0; m < TOGETHER; ++m)
#pragma unroll
            for (int j = 0; j < NS; ++j) h[j] = (keep[m] == 0.f ? 0.f : decay_of<float>(sum[m], a2[j]) * h[j]) + add[m][j];
    }
}

// What a kernel is compiled for beyond types and sizes: documents that start inside a row, a walk that is not 0, 1, 2, ..., rows that do
// not lie on 16-byte borders, rows that are cut, rows of B and C off those borders, dt in low-rank form, outputs formed in the backward
enum Flags { RESET = 1, WALK = 2, UNALIGNED = 4, CUT = 8, NARROW = 16, LOW_RANK = 32, OUTPUTS = 64 };

// The tokens of one row of the batch: an address per token.  Strides along the length fit 31 bits, offsets are 64 bits wide.
template <class T>
struct Tokens {
    T* base;
    int stride;

    DEVICE Tokens(const void* x, int64 offset, int64 stride_l) : base((T*)x + offset), stride((int)stride_l) {}
    DEVICE T* at(int token) const { return base + (int64)token * stride; }
};
