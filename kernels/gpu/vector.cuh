// N neighbouring elements moved as one, and as few accesses as that takes.
#pragma once
#include "common.cuh"

// shared memory whose size the compiler knows: what is not taken of it stays a cache
#ifndef HZ_EMULATE
#define SHARED_ARRAY(T, name, size) __shared__ __align__(16) T name[size]
#endif

template <class T, int N>
struct Vec {
    static constexpr int bytes = N * (int)sizeof(T), words = bytes / 4, per_word = Element<T>::per_word;
    static_assert(bytes % 4 == 0, "whole words");
    uint32 w[words];

    DEVICE void unpack(float (&x)[N]) const {
#pragma unroll
        for (int i = 0; i < words; ++i) Element<T>::unpack(w[i], x + i * per_word);
    }
    static DEVICE Vec pack(const float (&x)[N]) {
        Vec v;
#pragma unroll
        for (int i = 0; i < words; ++i) v.w[i] = Element<T>::pack(x + i * per_word);
        return v;
    }
    // `count` elements are there (none if it is <= 0), the others become zero; an aligned vector is there whole or not at all
    template <bool ALIGNED>
    static DEVICE Vec load(const T* at, int count) {
        Vec v;
        if constexpr (!ALIGNED) {
            v.load_singly(at, count);
        } else if constexpr (words % 4 == 0) {
#pragma unroll
            for (int i = 0; i < words / 4; ++i) {
                uint4 a = make_uint4(0, 0, 0, 0);
                if (count > 0) a = reinterpret_cast<const uint4*>(at)[i];
                v.w[4 * i] = a.x, v.w[4 * i + 1] = a.y, v.w[4 * i + 2] = a.z, v.w[4 * i + 3] = a.w;
            }
        } else if constexpr (words == 2) {
            uint2 a = {0, 0};
            if (count > 0) a = *reinterpret_cast<const uint2*>(at);
            v.w[0] = a.x, v.w[1] = a.y;
        } else {
#pragma unroll
            for (int i = 0; i < words; ++i) v.w[i] = count > 0 ? reinterpret_cast<const uint32*>(at)[i] : 0;
        }
        return v;
    }
    template <bool ALIGNED>
    DEVICE void store(T* at, int count) const {
        if constexpr (!ALIGNED) {
            store_singly(at, count);
        } else if (count > 0) {
            if constexpr (words % 4 == 0) {
#pragma unroll
                for (int i = 0; i < words / 4; ++i)
                    reinterpret_cast<uint4*>(at)[i] = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
            } else if constexpr (words == 2) {
                *reinterpret_cast<uint2*>(at) = {w[0], w[1]};
            } else {
#pragma unroll
                for (int i = 0; i < words; ++i) reinterpret_cast<uint32*>(at)[i] = w[i];
            }
        }
    }

   private:
    DEVICE void load_singly(const T* at, int count) {
        if constexpr (sizeof(T) == 4) {
            const uint32* a = reinterpret_cast<const uint32*>(at);
#pragma unroll
            for (int i = 0; i < words; ++i) w[i] = i < count ? a[i] : 0;
        } else {
            const uint16* a = reinterpret_cast<const uint16*>(at);
#pragma unroll
            for (int i = 0; i < words; ++i) {
                uint32 lo = 2 * i < count ? a[2 * i] : 0, hi = 2 * i + 1 < count ? a[2 * i + 1] : 0;
                w[i] = lo | hi << 16;
            }
        }
    }
    DEVICE void store_singly(T* at, int count) const {
        if constexpr (sizeof(T) == 4) {
            uint32* a = reinterpret_cast<uint32*>(at);
#pragma unroll
            for (int i = 0; i < words; ++i)
                if (i < count) a[i] = w[i];
        } else {
            uint16* a = reinterpret_cast<uint16*>(at);
#pragma unroll
            for (int i = 0; i < N; ++i)
                if (i < count) a[i] = (uint16)(w[i / 2] >> (16 * (i % 2)));
        }
    }
};

// K filter taps of N channels, stored channel by channel: taps[j][c] is the weight of the input K - 1 - j steps back
template <class W, int K, int N, bool ALIGNED>
DEVICE void load_taps(const W* at, int count, float (&taps)[K][N]) {
    float flat[K * N];
#pragma unroll
    for (int i = 0; i < K; ++i) {
        float part[N];
        Vec<W, N>::template load<ALIGNED>(at + i * N, count * K - i * N).unpack(part);
#pragma unroll
        for (int c = 0; c < N; ++c) flat[i * N + c] = part[c];
    }
#pragma unroll
    for (int j = 0; j < K; ++j)
#pragma unroll
        for (int c = 0; c < N; ++c) taps[j][c] = flat[c * K + j];
}

template <class W, int N, bool ALIGNED>
DEVICE void load_bias(const W* bias, int ch, int count, float (&x)[N]) {
    Vec<W, N>::template load<ALIGNED>(bias + (bias == nullptr ? 0 : ch), bias == nullptr ? 0 : count).unpack(x);
}

template <class T>
DEVICE float read_one(const T* at) {
    float x[1];
    read_channels<T, 1>(at, x);
    return x[0];
}
template <class T>
DEVICE void write_one(T* at, float x) {
    const float one[1] = {x};
    write_channels<T, 1>(at, one);
}
// to the precision of T
template <class T>
DEVICE float rounded(float x) {
    T to;
    write_one(&to, x);
    return read_one(&to);
}
