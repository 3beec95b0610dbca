// CUDA on one CPU thread, for tests: each thread of a block is a fiber, switched at barriers and shuffles, in an order drawn at random.
// Shared memory starts as NaN, or, every other time, as 0.75, and asynchronous copies happen only when they are waited for, so that a missing
// barrier or wait shows.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

typedef long long int64;
typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { uint32 x, y; };
struct alignas(16) uint4 { uint32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32 x, uint32 y, uint32 z, uint32 w) { return {x, y, z, w}; }

#define DEVICE inline
#define __global__ static
#define __grid_constant__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define SHARED_MEMORY(name) char* name = emulated::shared
#define SHARED_ARRAY(T, name, size) alignas(16) static T name[size]

struct Dim { int x; };
inline Dim threadIdx, blockIdx, blockDim, gridDim;

#ifdef __SANITIZE_THREAD__
// the thread sanitizer takes every fiber for a thread, and barriers, the start and the end of a block for all that orders them
extern "C" {
void* __tsan_create_fiber(unsigned);
void* __tsan_get_current_fiber();
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
struct Unwatched {
    Unwatched() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
    ~Unwatched() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
};
#else
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
struct Unwatched { Unwatched() {} };
#endif

namespace emulated {
struct Copy { void* to; const void* from; int size, there; };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    std::vector<std::vector<Copy>> groups{1};
    int barrier = -1;
    bool done = false;
    void* watched = nullptr;
};
inline std::vector<Fiber> fibers;
inline std::vector<int> arrived;  // per barrier: 16 named ones, then one per warp
inline std::vector<char> space;
inline char* shared;  // in it, on a border of 128 bytes
inline std::vector<uint32> lanes;
inline std::vector<int> turns;    // how often each barrier has opened
inline char orders[2][1024], start, end;
inline ucontext_t scheduler;
inline void* watched_scheduler;
inline std::function<void()> body;
inline std::mt19937 random{1};

constexpr int GUARD = 4096;  // bytes behind the shared memory that was asked for, which must stay untouched

inline void to_scheduler(Fiber& me) {
    __tsan_switch_to_fiber(watched_scheduler, 1);
    swapcontext(&me.context, &scheduler);
}
inline void wait_at(int barrier, int threads, bool wait = true) {
    Unwatched here;
    Fiber& me = fibers[threadIdx.x];
    char* order = &orders[turns[barrier] % 2][barrier];
    __tsan_release(order);
    if (++arrived[barrier] == threads) {
        arrived[barrier] = 0;
        ++turns[barrier];
        for (auto& f : fibers)
            if (f.barrier == barrier) f.barrier = -1;
    } else if (wait) {
        me.barrier = barrier;
    }
    to_scheduler(me);
    if (wait) __tsan_acquire(order);
}
inline void entry() {
    __tsan_acquire(&start);
    body();
    __tsan_release(&end);
    Fiber* me;
    {
        Unwatched here;
        me = &fibers[threadIdx.x], me->done = true;
    }
    to_scheduler(*me);
}
inline void run(int grid, int block, int shared_bytes, std::function<void()> kernel) {
    Unwatched here;
    static int launches = 0;
    const char fill = launches++ % 2 ? 0x3f : 0xff;
    body = kernel;
    blockDim.x = block, gridDim.x = grid;
    watched_scheduler = __tsan_get_current_fiber();
    for (int b = 0; b < grid; ++b) {
        blockIdx.x = b;
        space.assign(shared_bytes + GUARD + 127, fill);
        shared = (char*)(((size_t)space.data() + 127) / 128 * 128);
        lanes.assign(block, 0);
        arrived.assign(16 + (block + 31) / 32, 0);
        turns.assign(arrived.size(), 0);
        __tsan_acquire(&end);
        __tsan_release(&start);
        fibers = std::vector<Fiber>(block);
        for (auto& f : fibers) {
            f.stack.resize(128 << 10);
            getcontext(&f.context);
            f.context.uc_stack = {f.stack.data(), 0, f.stack.size()};
            f.context.uc_link = nullptr;
            makecontext(&f.context, entry, 0);
            f.watched = __tsan_create_fiber(0);
        }
        for (int left = block; left > 0;) {
            std::vector<int> ready;
            for (int t = 0; t < block; ++t)
                if (!fibers[t].done && fibers[t].barrier < 0) ready.push_back(t);
            if (ready.empty()) {
                fprintf(stderr, "deadlock: %d threads wait at barriers in block %d\n", left, b);
                abort();
            }
            std::shuffle(ready.begin(), ready.end(), random);
            for (int t : ready) {
                threadIdx.x = t;
                __tsan_switch_to_fiber(fibers[t].watched, 1);
                swapcontext(&scheduler, &fibers[t].context);
                left -= fibers[t].done;
            }
        }
        for (auto& f : fibers) __tsan_destroy_fiber(f.watched);
        for (int i = 0; i < GUARD; ++i)
            if (shared[shared_bytes + i] != fill) {
                fprintf(stderr, "block %d wrote %d bytes behind its %d bytes of shared memory\n", b, i + 1, shared_bytes);
                abort();
            }
    }
    __tsan_acquire(&end);
}
}  // namespace emulated

inline void barrier_wait(int id, int threads) {
#ifndef HZ_WITHOUT_WAITS
    emulated::wait_at(id, threads);
#endif
}
inline void barrier_arrive(int id, int threads) { emulated::wait_at(id, threads, false); }
inline void __syncthreads() { emulated::wait_at(15, blockDim.x); }
inline void __syncwarp() { emulated::wait_at(16 + threadIdx.x / 32, 32); }
inline float __shfl_xor_sync(unsigned, float x, int mask) {
    memcpy(&emulated::lanes[threadIdx.x], &x, 4);
    __syncwarp();
    float y;
    memcpy(&y, &emulated::lanes[threadIdx.x ^ mask], 4);
    __syncwarp();
    return y;
}
inline void __threadfence() {}
inline void __trap() { abort(); }
inline uint32 atomicInc(uint32* at, uint32 last) {
    const uint32 old = *at;
    *at = old >= last ? 0 : old + 1;
    return old;
}
inline void copy_async16(void* to, const void* from, bool there) {
    Unwatched here;
    if ((size_t)to % 16 || (size_t)from % 16) fprintf(stderr, "16 bytes that are not aligned\n"), abort();
    emulated::fibers[threadIdx.x].groups.back().push_back({to, from, 16, there ? 16 : 0});
}
inline void copy_async4(void* to, const void* from, int bytes) {
    Unwatched here;
    if ((size_t)to % 4 || (size_t)from % 4) fprintf(stderr, "4 bytes that are not aligned\n"), abort();
    emulated::fibers[threadIdx.x].groups.back().push_back({to, from, 4, bytes});
}
inline void copy_async_commit() {
    Unwatched here;
    emulated::fibers[threadIdx.x].groups.emplace_back();
}
template <int PENDING>
void copy_async_wait() {
    std::vector<emulated::Copy> due;
    {
        Unwatched here;
        auto& groups = emulated::fibers[threadIdx.x].groups;
        for (; (int)groups.size() - 1 > PENDING; groups.erase(groups.begin()))
            due.insert(due.end(), groups.front().begin(), groups.front().end());
    }
    for (auto& c : due) {
        memset((char*)c.to + c.there, 0, c.size - c.there);
        if (c.there) memcpy(c.to, c.from, c.there);
    }
}

inline int keep_in_register(int x) { return x; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.f / x; }
inline uint32 __byte_perm(uint32 lo, uint32 hi, uint32 which) {
    uint32 y = 0;
    for (int i = 0; i < 4; ++i) y |= (uint32)((((uint64_t)hi << 32 | lo) >> ((which >> 4 * i & 7) * 8)) & 255) << 8 * i;
    return y;
}
inline float __uint_as_float(uint32 x) { float y; memcpy(&y, &x, 4); return y; }
inline uint32 __float_as_uint(float x) { uint32 y; memcpy(&y, &x, 4); return y; }
inline float half_bits_to_float(uint16 x) { _Float16 h; memcpy(&h, &x, 2); return (float)h; }
inline uint32 half_bits(float x) { _Float16 h = (_Float16)x; uint16 y; memcpy(&y, &h, 2); return y; }
inline uint32 pack_half(float lo, float hi) { return half_bits(lo) | half_bits(hi) << 16; }
inline uint32 bfloat_bits(float x) {
    uint32 u = __float_as_uint(x);
    return x != x ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
}
inline uint32 pack_bfloat(float lo, float hi) { return bfloat_bits(lo) | bfloat_bits(hi) << 16; }
