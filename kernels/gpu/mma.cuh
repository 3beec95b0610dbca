// Products of small tiles by a whole warp: 16-bit operands on tensor cores, float32 ones by fused multiply-adds, sums in float32.
//
// Operands lie in shared memory; a row is (an odd number) x 16 bytes long, so that eight of them fall on different banks.  Accumulators of a
// 16 x 8 tile: c[0], c[1] are row lane / 4, columns 2 (lane % 4) and the next one; c[2], c[3] the same eight rows below.
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
#endif

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

// acc += A B for 16 rows of k, A in registers, and the first `nt` (even) column tiles.  B lies as [n][k], or, B_ROWS, as [k][n].
template <class T, int MT, int NT, bool B_ROWS>
DEVICE void product_step(float (&acc)[MT][NT][4], const uint32 (&a)[MT][4], const T* b, int b_stride, int nt = NT) {
    static_assert(NT % 2 == 0, "two column tiles come at once");
    const int lane = threadIdx.x % 32, in = lane % 8, odd = lane / 8 % 2 * 8, high = lane / 16 * 8;
    const T* row = B_ROWS ? b + (in + odd) * b_stride + high : b + (in + high) * b_stride + odd;
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
        if (j < nt) {
            uint32 r[4];
            ldmatrix<B_ROWS>(r, row + (B_ROWS ? 8 * j : 8 * j * b_stride));
#pragma unroll
            for (int i = 0; i < MT; ++i) {
                multiply_add<T>(acc[i][j], a[i], {r[0], r[1]});
                multiply_add<T>(acc[i][j + 1], a[i], {r[2], r[3]});
            }
        }
    }
}

// 16 rows and 16 columns of A, which lies as [m][k] or, A_COLS, as [k][m]; SCALED: column k times scale[k]
template <class T, bool A_COLS, bool SCALED>
DEVICE void load_a(uint32 (&a)[4], const T* at, int stride, const float* scale) {
    const int lane = threadIdx.x % 32, in = lane % 8, odd = lane / 8 % 2 * 8, high = lane / 16 * 8;
    ldmatrix<A_COLS>(a, A_COLS ? at + (in + high) * stride + odd : at + (in + odd) * stride + high);
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

// acc += A B for 16 MT rows, 8 NT columns (of which the first `nt`, even) and `k` (a multiple of 16); operands as above
template <class T, int MT, int NT, bool A_COLS, bool B_ROWS, bool SCALED = false>
DEVICE void product(float (&acc)[MT][NT][4], const T* a, int a_stride, const T* b, int b_stride, int k, int nt = NT, const float* scale = nullptr) {
    if constexpr (sizeof(T) == 4) {
        product_fma<MT, NT, A_COLS, B_ROWS, SCALED>(acc, a, a_stride, b, b_stride, k, nt, scale);
    } else {
#pragma unroll 4
        for (int s = 0; s < k; s += 16) {
            uint32 left[MT][4];
#pragma unroll
            for (int i = 0; i < MT; ++i)
                load_a<T, A_COLS, SCALED>(left[i], a + (A_COLS ? s * a_stride + 16 * i : 16 * i * a_stride + s), a_stride, scale + s);
            product_step<T, MT, NT, B_ROWS>(acc, left, b + (B_ROWS ? s * b_stride : s), b_stride, nt);
        }
    }
}
