// What the kernels of SSD's gradients share; ssd_backward.cu says how they go about it.
#pragma once
#include "groups.cuh"
#include "vector.cuh"

// RESET, UNALIGNED and GATED as elsewhere; heads of more channels than a tile has
enum { TILED = 8 };

struct SsdBackwardParams {
    const void *x, *dt, *A, *B, *C, *D, *z, *dt_bias;
    const uint8 *reset, *valid;
    const void* gout;
    void* gy;             // gradient of what is gated, (b, l, h, p); gout without a gate
    const float* glast;   // (b, h, p, n) or null
    const void* saved;    // (b, chunks, h, p, n): states before chunks
    float* steps;         // (planes, b, h, chunks Q), see Planes
    int* cuts;            // (b, chunks): the first token of the chunk that starts a document; Q: none
    void* gstates;        // (b, chunks, h, p, n): gradients of the states behind chunks
    void *gx, *gdt, *gz;  // each in one piece within a token
    float* gBC;           // (splits, 2, b, l, g, n)
    float* gheads;        // (b chunks, h + h + skips): A, dt_bias, D
    float* ginit;         // (b, h, p, n) or null
    void *gB, *gC;
    float *gA, *gbias, *gD;
    int64 x_b, x_l, x_h, dt_b, dt_l, dt_h, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, z_h, gout_b, gout_l, gout_h, gy_b, gy_l, gy_h;
    int64 gx_row, gdt_row, gz_row, gBC_row;  // from token to token of all rows, of gB and gC alike
    int batch, l, h, p, n, groups, chunks, D_head, D_channel, softplus, wide_dt, splits;
    float low, high;
};

// planes of `steps`: step sizes, c in two parts, decays from the chunk's start (0 where a document starts in between) and to its end, what undoes
// the scale of gy, and, which `ssd_backward_chunks` alone reads where it lies, the derivative of the step size
enum Planes { DT, HI, LO, INTO, ONWARD, UNDO, SLOPE };

// states as they lie in memory: fp16 has not their range
template <class T>
struct StateType {
    using type = float;
};
template <>
struct StateType<bf16> {
    using type = bf16;
};

// Sums whose differences count: what flows to a token less what flows from it
template <class T>
struct SumType {
    using type = float;
};
template <>
struct SumType<float> {
    using type = double;
};

constexpr float FORGOTTEN = -160.f;  // the logarithm (base 2) of what is zero in float32

DEVICE bool forgets(float dt, float rate) { return dt * rate < FORGOTTEN; }

template <class T>
DEVICE float exp2_of(float x) {
    return decay_of<T>(x, 1.f);
}
DEVICE float zero_or(bool yes, float x) { return yes ? x : 0.f; }
DEVICE float warp_min(float x) {
#pragma unroll
    for (int m = 16; m > 0; m /= 2) x = fminf(x, __shfl_xor_sync(0xffffffffu, x, m));
    return x;
}
DEVICE float shuffle(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE double shuffle(double x, int mask) {
    const float hi = (float)x, lo = (float)(x - hi);
    return (double)__shfl_xor_sync(0xffffffffu, hi, mask) + __shfl_xor_sync(0xffffffffu, lo, mask);
}

template <class S>
DEVICE S warp_sum(S x) {
#pragma unroll
    for (int m = 16; m > 0; m /= 2) x += shuffle(x, m);
    return x;
}

// What lanes of a warp have before them: the sums of lower lanes' x, from the last of them that is marked on (not the mark of the own lane);
// with 31 - lane in place of `lane`, the sums of higher ones'
template <class S>
DEVICE S sum_before(S x, bool mark, int lane) {
    S before = 0, total = x;
    bool cut = false;
#pragma unroll
    for (int m = 1; m < 32; m *= 2) {
        const S other = shuffle(total, m);
        const bool marked = __shfl_xor_sync(0xffffffffu, mark ? 1.f : 0.f, m) != 0.f;
        if (lane & m) {
            if (!cut) before += other;
            cut |= marked;
            if (!mark) total += other;
        } else {
            total = marked ? other : total + other;
        }
        mark |= marked;
    }
    return before;
}

// A tile of ROWS x COLS elements into shared memory: rows lo to hi - 1 and the first `cols` columns, zeros elsewhere; `at` is the
// thread's own place
template <class T, int ROWS, int THREADS, bool ALIGNED, int COLS>
DEVICE void fetch_vectors(Tile<T, COLS> tile, const T* at, int64 stride, int lo, int hi, int cols) {
    constexpr int LANES = Element<T>::lanes, ACROSS = COLS / LANES, ONCE = THREADS / ACROSS, TIMES = (ROWS + ONCE - 1) / ONCE;
    static_assert(THREADS % ACROSS == 0 && (ROWS % ONCE == 0 || ROWS < ONCE), "every thread has as many vectors of one column, or one");
    static_assert(ONCE % 8 == 0 || !tile.SWIZZLED, "whose rows are a multiple of 8 apart");
    const int first = threadIdx.x / ACROSS, col = threadIdx.x % ACROSS * LANES;
    T* to = tile.at + tile.offset(first, col);  // of tiles of one size the same for a thread
#pragma unroll
    for (int j = 0; j < TIMES; ++j, at += ONCE * stride) {
        const int row = first + j * ONCE;
        if (ROWS < ONCE && row >= ROWS) break;
        Packed<T>::template fetch<ALIGNED>(to + j * ONCE * tile.STRIDE, at, row >= lo && row < hi ? cols - col : 0);
    }
}
template <class T, int ROWS, int THREADS, bool ALIGNED, int COLS>
DEVICE void fetch_tile(Tile<T, COLS> tile, const T* from, int64 stride, int lo, int hi, int cols) {
    fetch_vectors<T, ROWS, THREADS, ALIGNED>(tile, own_place<T, COLS, THREADS>(from, stride), stride, lo, hi, cols);
}

// the largest of 32 bits' magnitude over all threads of a block; `scratch` has a float per warp
DEVICE float block_max(float x, float* scratch) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 0; w < (int)blockDim.x / 32; ++w) x = fmaxf(x, scratch[w]);
    return x;
}

// A float32 state into shared memory as fp16, which has not the range: the tile is made 2^8 at the most, and `back` gets what undoes it
template <class T, int ROWS, int THREADS, int COLS>
DEVICE void convert_state(Tile<T, COLS> tile, const float* from, int rows, int cols, float* back, float* scratch) {
    constexpr int PAIRS = COLS / 2;
    float largest = 0.f, by, undo;
    for (int i = threadIdx.x; i < ROWS * COLS; i += THREADS) {
        const int row = i / COLS, col = i % COLS;
        if (row < rows && col < cols) largest = fmaxf(largest, fabsf(from[(int64)row * cols + col]));
    }
    normal_range(block_max(largest, scratch), 8, by, undo);
    if (threadIdx.x == 0) *back = undo;
    for (int i = threadIdx.x; i < ROWS * PAIRS; i += THREADS) {
        const int row = i / PAIRS, col = i % PAIRS * 2;
        const float* at = from + (int64)row * cols + col;
        const float x[2] = {row < rows && col < cols ? at[0] * by : 0.f, row < rows && col + 1 < cols ? at[1] * by : 0.f};
        write_channels<T, 2>(tile.place(row, col).at, x);
    }
}

// Four tiles' words of a quad of lanes: before, lane i has those of columns 2 i, after, all of tile i
DEVICE void turn_quad(uint32 (&w)[4]) {
#pragma unroll
    for (int m = 1; m < 4; m *= 2) {
        const bool high = threadIdx.x & m;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (k & m) continue;
            const uint32 other = __float_as_uint(shuffle(__uint_as_float(high ? w[k] : w[k + m]), m));
            (high ? w[k] : w[k + m]) = other;
        }
    }
}

// acc += A B for 16 rows, 8 NT columns and K of what is summed over; A lies as [k][m], column k times scale[k], B as [k][n].  Of 16 bits, A times
// its scale is a sum of two, since it has been rounded once before, behind a gate.
template <class T, int NT, int K, int A, int B>
DEVICE void product_of_scaled(float (&acc)[1][NT][4], Tile<T, A> a, Tile<T, B> b, const float* scale) {
    if constexpr (sizeof(T) == 4) {
        product<T, 1, NT, true, true, true>(acc, a, b, K, NT, scale);
    } else {
        const int lane = threadIdx.x % 32;
        a = lane_place<false>(a), b = lane_place<true>(b);
#pragma unroll
        for (int s = 0; s < K; s += 16) {
            uint32 left[4], rest[4];
            load_a<T, true, false>(left, a.on(s, 0), nullptr);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 by = *reinterpret_cast<const float2*>(scale + s + lane % 4 * 2 + i / 2 * 8);
                float x[2], big[2];
                Element<T>::unpack(left[i], x);
                x[0] *= by.x, x[1] *= by.y;
                left[i] = Element<T>::pack(x);
                Element<T>::unpack(left[i], big);
                x[0] -= big[0], x[1] -= big[1];
                rest[i] = Element<T>::pack(x);
            }
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                uint32 r[4];
                ldmatrix<true>(r, b.on(s, 8 * j).at);
                multiply_add<T>(acc[0][j], left, {r[0], r[1]}), multiply_add<T>(acc[0][j + 1], left, {r[2], r[3]});
                multiply_add<T>(acc[0][j], rest, {r[0], r[1]}), multiply_add<T>(acc[0][j + 1], rest, {r[2], r[3]});
            }
        }
    }
}

// two neighbours, of which `count` are there
template <class T, bool ALIGNED>
DEVICE void write_pair(T* at, float x0, float x1, int count) {
    const float both[2] = {x0, x1};
    if constexpr (ALIGNED) {
        if (count > 0) {
            if constexpr (sizeof(T) == 2)
                write_channels<T, 2>(at, both);
            else
                *reinterpret_cast<float2*>(at) = {x0, x1};
        }
    } else {
        if (count > 0) write_one(at, x0);
        if (count > 1) write_one(at + 1, x1);
    }
}
template <class T>
DEVICE float2 read_pair(const T* at) {
    float x[2];
    if constexpr (sizeof(T) == 2)
        read_channels<T, 2>(at, x);
    else
        x[0] = reinterpret_cast<const float2*>(at)->x, x[1] = reinterpret_cast<const float2*>(at)->y;
    return {x[0], x[1]};
}
template <class T>
DEVICE void write_shared_pair(T* at, float x0, float x1) {
    write_pair<T, true>(at, x0, x1, 2);
}
