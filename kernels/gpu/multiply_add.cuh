// The product of a warp on tensor cores.
#pragma once
#include "common.cuh"

// c += a b of 16 x 16 and 16 x 8 elements: lane 4 g + i holds rows g and g + 8, columns 2 i and 2 i + 1 (and both + 8) of a, column g and
// rows 2 i and 2 i + 1 (and both + 8) of b, and rows g and g + 8, columns 2 i and 2 i + 1 of c (PTX, mma.m16n8k16)
#ifdef HZ_EMULATE
template <class T>
void multiply_add(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    static uint32 held[1024][6];
    memcpy(held[threadIdx.x], a, 16), memcpy(held[threadIdx.x] + 4, b, 8);
    __syncwarp();
    const int warp = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, i = threadIdx.x % 4;
    for (int k = 0; k < 16; k += 2) {
        const int part = k % 8 / 2, half = k / 8;
        for (int row = 0; row < 2; ++row)
            for (int column = 0; column < 2; ++column) {
                float x[2], y[2];
                Element<T>::unpack(held[warp + g * 4 + part][half * 2 + row], x);
                Element<T>::unpack(held[warp + (2 * i + column) * 4 + part][4 + half], y);
                c[row * 2 + column] += x[0] * y[0] + x[1] * y[1];
            }
    }
    __syncwarp();
}
#else
template <class T>
DEVICE void multiply_add(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]);
#define HZ_MULTIPLY_ADD(T, name)                                                                                                     \
    template <>                                                                                                                      \
    DEVICE void multiply_add<T>(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {                                         \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                         \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                                     \
    }
HZ_MULTIPLY_ADD(bf16, "bf16")
HZ_MULTIPLY_ADD(fp16, "f16")
#undef HZ_MULTIPLY_ADD
#endif
