// Products of small tiles by a whole warp: 16-bit operands on tensor cores, float32 ones by fused multiply-adds, sums in float32.
//
// Operands lie in shared memory, as a `Tile`.  Accumulators of a 16 x 8 tile: c[0], c[1] are row lane / 4, columns 2 (lane % 4) and the next one;
// c[2], c[3] the same eight rows below.
#pragma once
#include "multiply_add.cuh"

#ifdef HZ_EMULATE
#include "emulate_mma.h"
#else
// Four 8 x 8 tiles of 16-bit elements; lane i gives the address of row i % 8 of tile i / 8.
template <bool TRANSPOSED>
DEVICE void ldmatrix(uint32 (&r)[4], const void* row) {
    const uint32 at = (uint32)__cvta_generic_to_shared(row);
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
}
// An address in shared memory with some of its bits turned over
template <class T>
DEVICE T* turned(T* at, int bits) {
    return (T*)__cvta_shared_to_generic((uint32)__cvta_generic_to_shared(at) ^ bits);
}
#endif

// A place in a tile of COLS columns, in which 16 bytes each of eight rows fall on different banks, for copies and for ldmatrix alike.  Of 16 bits,
// vector v of row r lies where v ^ (r % 8) would, within 128 bytes, or, of rows of 64 bytes, v ^ (r / 2 % 4): tiles begin at multiples of 128 bytes,
// and to go on by some columns is an XOR with a constant.  Of 32 bits, rows are 16 bytes apart.
template <class T, int COLS>
struct Tile {
    static constexpr bool SWIZZLED = sizeof(T) == 2;
    static constexpr int STRIDE = SWIZZLED ? COLS : COLS + 4;
    static_assert(COLS == 32 || COLS % 64 == 0, "rows of 64 bytes, or of whole 128");
    T* at;

    // where an element lies from the tile's beginning on
    DEVICE static int offset(int row, int col) {
        const int plain = row * STRIDE + col;
        return SWIZZLED ? plain ^ (COLS == 32 ? row / 2 % 4 : row % 8) * 8 : plain;
    }
    // a corner, from which on others count: the row is a multiple of 8
    DEVICE Tile corner(int row, int col) const { return {at + row * STRIDE + col}; }
    // from a corner on
    DEVICE Tile place(int row, int col) const {
        T* plain = at + row * STRIDE + col;
        return {SWIZZLED ? turned(plain, (COLS == 32 ? row / 2 % 4 : row % 8) * 16) : plain};
    }
    // from a place on: a multiple of 8 rows, and columns of which its own has no bit
    DEVICE Tile on(int rows, int cols) const {
        return {SWIZZLED ? turned(at, cols % 64 * 2) + (cols / 64 * 64 + rows * STRIDE) : at + rows * STRIDE + cols};
    }
};

// Where a lane begins with ldmatrix at a corner: the second of its four tiles of 8 x 8 lies below the first (DOWN) or to the right of it
template <bool DOWN, class T, int COLS>
DEVICE Tile<T, COLS> lane_place(Tile<T, COLS> corner) {
    const int lane = threadIdx.x % 32, in = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    return DOWN ? corner.place(in + second, third) : corner.place(in + third, second);
}

// f(i, j, e) for every accumulator
template <int MT, int NT, class F>
DEVICE void each(F f) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) f(i, j, e);
}

// Two neighbouring 16 x 8 accumulators as the 16 x 16 left operand of the next product
template <class T>
DEVICE void pack_a(uint32 (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = Element<T>::pack(left), a[1] = Element<T>::pack(left + 2);
    a[2] = Element<T>::pack(right), a[3] = Element<T>::pack(right + 2);
}

// acc += A B for 16 rows of k, A in registers, and the first `nt` (even) column tiles.  B lies as [n][k], or, B_ROWS, as [k][n]; `b` is
// lane_place<B_ROWS> of it.
template <class T, int MT, int NT, bool B_ROWS, int COLS>
DEVICE void product_step(float (&acc)[MT][NT][4], const uint32 (&a)[MT][4], Tile<T, COLS> b, int nt = NT) {
    static_assert(NT % 2 == 0, "two column tiles come at once");
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
        if (j < nt) {
            uint32 r[4];
            ldmatrix<B_ROWS>(r, (B_ROWS ? b.on(0, 8 * j) : b.on(8 * j, 0)).at);
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                multiply_add<T>(acc[i][j], a[i], {r[0], r[1]});
                multiply_add<T>(acc[i][j + 1], a[i], {r[2], r[3]});
            }
        }
    }
}

// 16 rows and 16 columns of A, which lies as [m][k] or, A_COLS, as [k][m], from lane_place<!A_COLS> of it on; SCALED: column k times scale[k]
template <class T, bool A_COLS, bool SCALED, int COLS>
DEVICE void load_a(uint32 (&a)[4], Tile<T, COLS> place, const float* scale) {
    const int lane = threadIdx.x % 32;
    ldmatrix<A_COLS>(a, place.at);
    if constexpr (SCALED) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 by = *reinterpret_cast<const float2*>(scale + lane % 4 * 2 + i / 2 * 8);
            float x[2];
            Element<T>::unpack(a[i], x);
            x[0] *= by.x, x[1] *= by.y;
            a[i] = Element<T>::pack(x);
        }
    }
}

template <int MT, int NT, bool A_COLS, bool B_ROWS, bool SCALED>
DEVICE void product_fma(float (&acc)[MT][NT][4], const float* a, int a_stride, const float* b, int b_stride, int k, int nt, const float* scale) {
    const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
#pragma unroll 1
    for (int s = 0; s < k; s += 4) {
        float left[MT][2][4];
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            float(&x)[4] = left[i / 2][i % 2];
            if constexpr (!A_COLS) load_shared<4>(a + (row + 8 * i) * a_stride + s, x);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if constexpr (A_COLS) x[e] = a[(s + e) * a_stride + row + 8 * i];
                if constexpr (SCALED) x[e] *= scale[s + e];
            }
        }
#pragma unroll
        for (int j = 0; j < NT; ++j) {
            if (j < nt) {
                float right[2][4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if constexpr (B_ROWS) {
                        const float2 v = *reinterpret_cast<const float2*>(b + (s + e) * b_stride + 8 * j + col);
                        right[0][e] = v.x, right[1][e] = v.y;
                    }
                }
                if constexpr (!B_ROWS) {
                    load_shared<4>(b + (8 * j + col) * b_stride + s, right[0]);
                    load_shared<4>(b + (8 * j + col + 1) * b_stride + s, right[1]);
                }
#pragma unroll
                for (int i = 0; i < MT; ++i)
#pragma unroll
                    for (int c = 0; c < 4; ++c)
#pragma unroll
                        for (int e = 0; e < 4; ++e) acc[i][j][c] = fmaf(left[i][c / 2][e], right[c % 2][e], acc[i][j][c]);
            }
        }
    }
}

// acc += A B for 16 MT rows, 8 NT columns (of which the first `nt`, even) and `k` (a multiple of 16); operands as above, from corners on
template <class T, int MT, int NT, bool A_COLS, bool B_ROWS, bool SCALED = false, int A, int B>
DEVICE void product(float (&acc)[MT][NT][4], Tile<T, A> a, Tile<T, B> b, int k, int nt = NT, const float* scale = nullptr) {
    if constexpr (sizeof(T) == 4) {
        product_fma<MT, NT, A_COLS, B_ROWS, SCALED>(acc, a.at, a.STRIDE, b.at, b.STRIDE, k, nt, scale);
    } else {
        a = lane_place<!A_COLS>(a), b = lane_place<B_ROWS>(b);
#pragma unroll 4
        for (int s = 0; s < k; s += 16) {
            uint32 left[MT][4];
#pragma unroll
            for (int i = 0; i < MT; ++i) load_a<T, A_COLS, SCALED>(left[i], A_COLS ? a.on(s, 16 * i) : a.on(16 * i, s), scale + s);
            product_step<T, MT, NT, B_ROWS>(acc, left, B_ROWS ? b.on(s, 0) : b.on(0, s), nt);
        }
    }
}
