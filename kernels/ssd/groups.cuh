// Products of 64 rows by a group of four warps (wgmma, compute capability 9.0): a warp has 16 rows of the left operand in registers, and the right
// one is read from shared memory once for all four.  It lies in tiles of 64 columns of 16 bits, which begin at multiples of 1024 bytes: what a
// `Tile` does with their rows of 128 bytes is what these instructions expect.
#pragma once
#include "ssd.cuh"

#if defined(HZ_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool GROUPS = true;
#else
constexpr bool GROUPS = false;
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define GROUP_MEMORY(name) extern __shared__ __align__(1024) char name[]
// What threads have written into shared memory is there for these instructions, behind the next barrier
DEVICE void share_with_groups() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// in front of a sum's products, and behind them: they are on their way, until all but the PENDING last sums are there
DEVICE void group_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING, int NT>
DEVICE void group_wait(float (&c)[NT][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    // nothing reads a sum in front of this
#pragma unroll
    for (int j = 0; j < NT; ++j) asm volatile("" : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])::"memory");
}

// A right operand from a corner on.  Eight rows of 128 bytes are 1024 from the next eight, along n or along k.
template <class T>
struct GroupOperand {
    uint32 at;

    // the same for all lanes of a warp
    DEVICE explicit GroupOperand(Tile<T, 64> corner)
        : at(__shfl_sync(~0u, (uint32)__cvta_generic_to_shared(corner.at) >> 4 | 1u << 16, 0)) {}
    DEVICE GroupOperand(uint32 at, bool) : at(at) {}
    // so many elements on, a multiple of 8, the same for all lanes
    DEVICE GroupOperand past(int elements) const { return {at + (uint32)elements / 8, true}; }
    // columns beyond 64 lie in the next tile of 64 rows
    DEVICE GroupOperand on(int rows, int cols) const { return {at + (uint32)(rows * 128 + cols / 64 * 8192 + cols % 64 * 2) / 16, true}; }
};

// a predicate for whether what is there is added to, and the operand: the upper half says how rows lie
#define HZ_OPERAND(NAME, PLACE) ".reg .b64 " NAME ";\nmov.b64 " NAME ", {" PLACE ", h};\n"
#define HZ_BEGIN "{\n.reg .pred p;\n.reg .b32 h;\nmov.b32 h, 0x40000040;\n"
#define HZ_STEP(SIZE) "wgmma.mma_async.sync.aligned.m64" SIZE "k16.f32.bf16.bf16 {"
#define HZ_NAMES_4 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define HZ_NAMES_8 HZ_NAMES_4 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HZ_SUMS(J) "+f"(c[J][0]), "+f"(c[J][1]), "+f"(c[J][2]), "+f"(c[J][3])
#define HZ_SUMS_4 HZ_SUMS(0), HZ_SUMS(1), HZ_SUMS(2), HZ_SUMS(3)
#define HZ_SUMS_8 HZ_SUMS_4, HZ_SUMS(4), HZ_SUMS(5), HZ_SUMS(6), HZ_SUMS(7)

// c += A B of 16 of k and 8 NT columns; the right operand lies as [n][k] or, B_ROWS, as [k][n]
template <class T, int NT, bool B_ROWS>
DEVICE void group_step(float (&c)[NT][4], const uint32 (&a)[4], GroupOperand<T> right) {
    static_assert(is_bf16<T> && (NT == 4 || NT == 8), "bf16, 32 or 64 columns");
#define HZ_IN "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(right.at), "n"(B_ROWS)
    if constexpr (NT == 4)
        asm volatile(HZ_BEGIN HZ_OPERAND("d", "%20") "setp.ne.b32 p, 1, 0;\n" HZ_STEP("n32")
                     HZ_NAMES_4 "}, {%16, %17, %18, %19}, d, p, 1, 1, %21;\n}"
                     : HZ_SUMS_4 : HZ_IN);
    else
        asm volatile(HZ_BEGIN HZ_OPERAND("d", "%36") "setp.ne.b32 p, 1, 0;\n" HZ_STEP("n64")
                     HZ_NAMES_8 "}, {%32, %33, %34, %35}, d, p, 1, 1, %37;\n}"
                     : HZ_SUMS_8 : HZ_IN);
#undef HZ_IN
}
// the same with both operands in shared memory, the left one lying as [m][k] or, A_COLS, as [k][m]; FIRST: c = A B
template <class T, int NT, bool A_COLS, bool B_ROWS, bool FIRST>
DEVICE void group_step(float (&c)[NT][4], GroupOperand<T> left, GroupOperand<T> right) {
    static_assert(is_bf16<T> && (NT == 4 || NT == 8), "bf16, 32 or 64 columns");
#define HZ_IN "r"(left.at), "r"(right.at), "n"(!FIRST), "n"(A_COLS), "n"(B_ROWS)
    if constexpr (NT == 4)
        asm volatile(HZ_BEGIN HZ_OPERAND("d", "%16") HZ_OPERAND("e", "%17") "setp.ne.b32 p, %18, 0;\n" HZ_STEP("n32")
                     HZ_NAMES_4 "}, d, e, p, 1, 1, %19, %20;\n}"
                     : HZ_SUMS_4 : HZ_IN);
    else
        asm volatile(HZ_BEGIN HZ_OPERAND("d", "%32") HZ_OPERAND("e", "%33") "setp.ne.b32 p, %34, 0;\n" HZ_STEP("n64")
                     HZ_NAMES_8 "}, d, e, p, 1, 1, %35, %36;\n}"
                     : HZ_SUMS_8 : HZ_IN);
#undef HZ_IN
}
#else
#define GROUP_MEMORY SHARED_MEMORY
DEVICE void share_with_groups() {}
DEVICE void group_begin() {}
DEVICE void group_commit() {}
template <int PENDING, int NT>
DEVICE void group_wait(float (&c)[NT][4]) {}
template <class T>
struct GroupOperand {
    Tile<T, 64> corner;
    DEVICE explicit GroupOperand(Tile<T, 64> corner) : corner(corner) {}
    DEVICE GroupOperand past(int elements) const { return GroupOperand({corner.at + elements}); }
    DEVICE GroupOperand on(int rows, int cols) const { return GroupOperand({corner.at + rows * 64 + cols / 64 * 4096 + cols % 64}); }
};
template <class T, int NT, bool B_ROWS>
DEVICE void group_step(float (&c)[NT][4], const uint32 (&a)[4], GroupOperand<T> right) {
    float(&sums)[1][NT][4] = reinterpret_cast<float(&)[1][NT][4]>(c);
    const uint32(&left)[1][4] = reinterpret_cast<const uint32(&)[1][4]>(a);
    product_step<T, 1, NT, B_ROWS>(sums, left, lane_place<B_ROWS>(right.corner));
}
template <class T, int NT, bool A_COLS, bool B_ROWS, bool FIRST>
DEVICE void group_step(float (&c)[NT][4], GroupOperand<T> left, GroupOperand<T> right) {
    const int row = threadIdx.x / 32 % 4 * 16;
    uint32 a[4];
    if constexpr (FIRST)
        for (int i = 0; i < 4 * NT; ++i) c[i / 4][i % 4] = 0.f;
    ldmatrix<A_COLS>(a, lane_place<!A_COLS>(left.corner.corner(A_COLS ? 0 : row, A_COLS ? row : 0)).at);
    group_step<T, NT, B_ROWS>(c, a, right);
}
#endif

// c += A B of K of k, or, FIRST, c = A B
template <class T, int K, bool A_COLS, bool B_ROWS, bool FIRST, int NT>
DEVICE void group_product(float (&c)[NT][4], GroupOperand<T> left, GroupOperand<T> right) {
    group_step<T, NT, A_COLS, B_ROWS, FIRST>(c, left, right);
#pragma unroll
    for (int k = 16; k < K; k += 16)
        group_step<T, NT, A_COLS, B_ROWS, false>(c, A_COLS ? left.on(k, 0) : left.on(0, k), B_ROWS ? right.on(k, 0) : right.on(0, k));
}
