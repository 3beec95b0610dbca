// Partial sums of the blocks of a launch, added up in a fixed order: those of a filter and its bias, or of a norm's weight.
#include "vector.cuh"

struct ColumnSumsParams {
    const float* part;     // (rows, k + 1, d)
    void *gweight, *gbias;  // (d, k), (d) or null
    int rows, k, d;
};

// 32 sums per block, eight threads each: thread m takes rows m, m + 8, ..., and the eight results are added in their order
template <class W>
__global__ void __launch_bounds__(256) column_sums(const ColumnSumsParams p) {
    SHARED_ARRAY(float, shared, 256);
    const int lane = threadIdx.x % 32, m = threadIdx.x / 32;
    const int64 size = (int64)(p.k + 1) * p.d, at = blockIdx.x * (int64)32 + lane;
    float sum = 0.f;
    if (at < size) {
        int row = m;
        for (; row + 24 < p.rows; row += 32) {
            float part[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) part[i] = p.part[(row + 8 * i) * size + at];
            sum += (part[0] + part[1]) + (part[2] + part[3]);
        }
        for (; row < p.rows; row += 8) sum += p.part[row * size + at];
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (m > 0 || at >= size) return;
    float total[1] = {0.f};
#pragma unroll
    for (int i = 0; i < 8; ++i) total[0] += shared[i * 32 + lane];
    const int j = (int)(at / p.d), ch = (int)(at - (int64)j * p.d);
    if (j < p.k)
        write_channels<W, 1>((W*)p.gweight + (int64)ch * p.k + j, total);
    else if (p.gbias != nullptr)
        write_channels<W, 1>((W*)p.gbias + ch, total);
}
