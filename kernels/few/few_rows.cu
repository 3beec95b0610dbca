// out = behind(front(x) W^T + bias) for a few rows of x: (b, k) by (n, k), as decoding has it.
//
// Memory-bound: W is read once, by 16-byte asynchronous copies that stay in flight from one tile of rows to the next.  A block takes tiles of
// up to 16 rows of W in turn, its warps share out k, and their sums meet in shared memory in a fixed order: an output's bits depend on
// nothing but its own rows.  Products are those of tensor cores, W on the left, so that 8 rows of x cost what one costs.  A sum does not care
// about the order of its terms: a lane takes 16 bytes of a row, and its eight elements stand where two products want eight of their 32.
// So a lane reads back what it has fetched itself, and no warp waits for another but at the end of a tile.  More rows of x than fit into shared
// memory are taken in parts, by blocks of their own, which read W from L2.
//
// In front: x as it is, or its norm (of a group of channels; gated), formed by every block for itself, rounded to W's type.
// Behind: an activation, a gate by the other half of the rows, the residual stream, or a step of a causal convolution.
#include "front.cuh"
#include "multiply_add.cuh"
#include "overlap.cuh"
#include "vector.cuh"

struct FewRowsParams {
    const void *x, *weight, *bias;                 // (b, k), (n, k), (n) or null
    const void *gain, *shift, *gate;               // of the norm: (k), (k), (b, k), each may be null
    const void* residual;                          // (b, n) or null
    void* conv_state;                              // (b, width - 1, channels) or null
    const void *conv_weight, *conv_bias;           // (channels, width), (channels) or null
    void* out;                                     // (b, n), or (b, n / 2) of pairs
    int64 x_b, weight_n, gate_b, residual_b, state_b, state_k;
    int b, n, k, part;                             // rows of x that a block has
    int rows, tiles, blocks;                       // rows of W in a tile; blocks of a part
    int per, stride;                               // pieces of a warp in a tile; elements from row to row of x in shared memory
    int group_size, gate_behind, activation;
    int conv_first, conv_channels, conv_width, silu;
    float eps, gate_multiplier, multiplier;
};

constexpr int STEP = 32, WIDEST = 8;  // elements of a row in a piece; taps of a filter
constexpr int COLUMN = 20;  // floats of a column of a tile's sums: lanes that store together meet different banks
enum Activations { NONE, SILU, GELU, RELU, RELU2 };
// what is behind the product: asked at run time, every question would be a read of constant memory and a branch per tile
enum BehindFlags { CONVOLVED = 64, ACTIVATED = 128, PAIRED = 256, ADDED = 512 };
// tiles of up to 8 rows: their pieces are half as large
enum TileFlags { HALVED = 1024 };
template <int FLAGS>
constexpr int PIECE = FLAGS & HALVED ? 512 : 1024;

DEVICE float activate(float x, int kind) {
    if (kind == SILU) return x * sigmoid(x);
    if (kind == GELU) return 0.5f * x * (1.f + erff(x * 0.70710678f));
    if (kind == RELU || kind == RELU2) x = x < 0.f ? 0.f : x;
    return kind == RELU2 ? x * x : x;
}

// The rows of x that a block has
struct Part {
    int first, count;
};

// all of it on its way at once, like the weights that were asked for before
template <class T>
DEVICE void copy_rows(const FewRowsParams& p, Part part, T* to) {
    for (int row = 0; row < part.count; ++row) {
        const T* from = (const T*)p.x + (part.first + row) * p.x_b;
#pragma unroll 4
        for (int e = threadIdx.x * 8; e < p.k; e += THREADS * 8) copy_async16(to + row * p.stride + e, from + e, true);
    }
    copy_async_commit();
    copy_async_wait<0>();
}

// Pieces of W, 16 rows by 32 elements, that a warp goes along, G at a time: its share of k for one tile after the other.  A lane has 16 bytes
// of rows g and g + 8 of each; of pairs, rows of the latter lie half of W behind; of tiles of up to 8 rows, there are none.
template <class T, int G, int FLAGS>
struct Pieces {
    static constexpr bool PAIRS = FLAGS & PAIRED, LOWER = !(FLAGS & HALVED);
    const int per, mine;             // pieces of a tile, and of those the ones in which a lane has elements
    const int all, rows_on;          // rows, and from tile to tile
    const int end_upper, end_lower;  // tiles that begin before these have a lane's rows
    const int64 on, apart;           // from the end of a lane's share of a row to its share of the next tile's; between its two rows
    const T* upper;                  // of the next piece
    int first, step = 0;             // its tile's first row, and its number there

    DEVICE Pieces(const FewRowsParams& p, int tile, int column, int g)
        : per(p.per), mine((p.k - column + STEP - 1) / STEP), all(PAIRS ? p.n / 2 : p.n), rows_on(p.blocks * p.rows), end_upper(g < p.rows ? all - g : 0),
          end_lower(PAIRS ? end_upper : g + 8 < p.rows ? all - g - 8 : 0), on(rows_on * p.weight_n - per * STEP), apart((PAIRS ? all : 8) * p.weight_n),
          upper((const T*)p.weight + (tile * p.rows + g) * p.weight_n + column), first(tile * p.rows) {}
    // nothing, if no tile is left
    DEVICE void fetch(char* to) {
        if (first < all) {
            const int of_upper = first < end_upper ? mine - step : 0, of_lower = first < end_lower ? mine - step : 0;
            const T* lower = upper + apart;
#pragma unroll
            for (int s = 0; s < G; ++s) {
                copy_async16(to + s * PIECE<FLAGS>, upper + s * STEP, s < of_upper);
                if (LOWER) copy_async16(to + s * PIECE<FLAGS> + 512, lower + s * STEP, s < of_lower);
            }
            upper += G * STEP;
            if ((step += G) == per) step = 0, first += rows_on, upper += on;
        }
        copy_async_commit();
    }
};

// One of the outputs of a tile, and what is read for it beside the sums: as it lies in memory, for to convert it is to wait for it
template <class T, class O>
struct Output {
    bool there = false, convolved = false;
    int r, column, index, channel;  // among the tile's rows of W, the block's rows of x, all outputs, and the convolution's channels
    O residual{};
    T bias[2] = {}, level{}, before[WIDEST] = {}, taps[WIDEST] = {};
};

template <class T, class O, int NT, int FLAGS>
struct Behind {
    static constexpr bool PAIRS = FLAGS & PAIRED;
    const FewRowsParams& p;
    const Part part;
    const float* sums;  // (WARPS, 8 NT, COLUMN)

    DEVICE int count() const { return PAIRS ? p.n / 2 : p.n; }
    // all that an output needs, on its way while the tile's products are formed; nobody else writes any of it
    DEVICE Output<T, O> look(int tile, int o) const {
        Output<T, O> e;
        e.r = o % 16, e.column = o / 16, e.index = tile * p.rows + e.r, e.channel = e.index - p.conv_first;
        e.there = e.column < part.count && e.r < p.rows && e.index < count();
        if (!e.there) return e;
        const int64 row = part.first + e.column;
        if (p.bias != nullptr) {
            e.bias[0] = ((const T*)p.bias)[e.index];
            if (PAIRS) e.bias[1] = ((const T*)p.bias)[e.index + count()];
        }
        if (FLAGS & ADDED) e.residual = ((const O*)p.residual)[row * p.residual_b + e.index];
        e.convolved = FLAGS & CONVOLVED && e.channel >= 0 && e.channel < p.conv_channels;
        if (!e.convolved) return e;
        const T *state = (const T*)p.conv_state + row * p.state_b + e.channel, *weight = (const T*)p.conv_weight + e.channel * p.conv_width;
        if (p.conv_bias != nullptr) e.level = ((const T*)p.conv_bias)[e.channel];
#pragma unroll
        for (int j = 0; j < WIDEST; ++j) {
            if (j < p.conv_width - 1) e.before[j] = state[j * p.state_k];
            if (j < p.conv_width) e.taps[j] = weight[j];
        }
        return e;
    }
    DEVICE float sum(int column, int row) const {
        float y = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) y += sums[(w * 8 * NT + column) * COLUMN + row];
        return y;
    }
    DEVICE float convolve(float x, const Output<T, O>& e) const {
        T* state = (T*)p.conv_state + (part.first + e.column) * p.state_b + e.channel;
        const int last = p.conv_width - 1;
        float y = read_one(&e.level);
        x = rounded<T>(x);
#pragma unroll
        for (int j = 0; j < WIDEST; ++j) {
            const float input = j == last ? x : read_one(e.before + j);
            y = fmaf(read_one(e.taps + j), input, y);
            if (j > 0 && j <= last) write_one(state + (j - 1) * p.state_k, input);
        }
        return p.silu ? y * sigmoid(y) : y;
    }
    DEVICE void finish(const Output<T, O>& e) const {
        float y = sum(e.column, e.r) + read_one(e.bias), gate = y;
        // value and gate
        if (PAIRS) y = p.gate_multiplier * (sum(e.column, e.r + 8) + read_one(e.bias + 1));
        if (FLAGS & ACTIVATED) y = activate(y, p.activation);
        if (PAIRS) y *= gate;
        if (FLAGS & ADDED) y = fmaf(p.multiplier, y, read_one(&e.residual));
        if (FLAGS & CONVOLVED && e.convolved) y = convolve(y, e);
        write_one((O*)p.out + (int64)(part.first + e.column) * count() + e.index, y);
    }
    // a thread's first output, and, where a block has more of them than threads, its others
    DEVICE void run(int tile, const Output<T, O>& first) const {
        if (first.there) finish(first);
#pragma unroll 1
        for (int o = threadIdx.x + THREADS; o < 16 * part.count; o += THREADS) {
            const Output<T, O> e = look(tile, o);
            if (e.there) finish(e);
        }
    }
};

// Sums of a warp's pieces: two, of the halves of each, so that a product seldom waits for the one before it.  The order in which they are
// formed is that of the pieces, however many of them there are at a time.
template <class T, int NT, int G, int FLAGS>
struct Sums {
    float c[2][NT][4] = {};

    // a group, all of whose reads are on their way before its products
    DEVICE void add(const char* group, const T* const (&rows)[NT], int at) {
        uint4 upper[G], lower[G] = {};
#pragma unroll
        for (int s = 0; s < G; ++s) {
            upper[s] = *reinterpret_cast<const uint4*>(group + s * PIECE<FLAGS>);
            if (!(FLAGS & HALVED)) lower[s] = *reinterpret_cast<const uint4*>(group + s * PIECE<FLAGS> + 512);
        }
#pragma unroll
        for (int s = 0; s < G; ++s) {
            const uint32 a[2][4] = {{upper[s].x, lower[s].x, upper[s].y, lower[s].y}, {upper[s].z, lower[s].z, upper[s].w, lower[s].w}};
#pragma unroll
            for (int j = 0; j < NT; ++j) {
                const uint4 x = *reinterpret_cast<const uint4*>(rows[j] + at + s * STEP);
                const uint32 left[2] = {x.x, x.y}, right[2] = {x.z, x.w};
                multiply_add<T>(c[0][j], a[0], left);
                multiply_add<T>(c[1][j], a[1], right);
            }
        }
    }
    DEVICE void store(float* to, int g, int i) const {
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int e = 0; e < (FLAGS & HALVED ? 2 : 4); ++e) to[(j * 8 + i * 2 + e % 2) * COLUMN + g + e / 2 * 8] = c[0][j][e] + c[1][j][e];
    }
};

// G: pieces that a warp takes at a time; GROUPS: of them, on their way
template <class T, class X, class O, int NT, int G, int GROUPS, int FLAGS>
__global__ void __launch_bounds__(THREADS, 2) few_rows(const FewRowsParams p) {
    SHARED_MEMORY(shared);
    constexpr int SUMS = WARPS * 8 * NT * COLUMN, GROUP = G * PIECE<FLAGS>, OWN = GROUPS * GROUP;
    float* sums = reinterpret_cast<float*>(shared + WARPS * OWN);  // twice, in turns
    T* xs = reinterpret_cast<T*>(sums + 2 * SUMS);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, i = lane % 4;
    const int which = (int)blockIdx.x / p.blocks, first_row = which * p.part, first_tile = (int)blockIdx.x - which * p.blocks;
    const int column = warp * p.per * STEP + i * 8;
    const Part part{first_row, p.b - first_row < p.part ? p.b - first_row : p.part};
    char* own = shared + warp * OWN + lane * 16;

    let_next_begin();
    Pieces<T, G, FLAGS> pieces(p, first_tile, column, g);
#pragma unroll 1
    for (int s = 0; s < GROUPS; ++s) pieces.fetch(own + s * GROUP);
    // x up to a whole group
    const int rest = (G * STEP - p.k % (G * STEP)) % (G * STEP);
#pragma unroll 1
    for (int e = threadIdx.x; e < part.count * rest; e += THREADS) write_one(xs + e / rest * p.stride + p.k + e % rest, 0.f);
    if constexpr (FLAGS & NORM) {
        const Front<FewRowsParams, T, X, FLAGS> front{p, xs, p.stride, sums, part.first, part.count};
        front.bring_gain();
        if (p.shift != nullptr) prefetch_all((const T*)p.shift, p.k);
        wait_for_previous();
        front.run();
    } else {
        wait_for_previous();
        copy_rows<T>(p, part, xs);
    }
    __syncthreads();

    const T* rows[NT];
#pragma unroll
    for (int j = 0; j < NT; ++j) rows[j] = xs + (j * 8 + g < part.count ? j * 8 + g : part.count - 1) * p.stride + column;
    // of a warp, the last ones may be no more than zeros
    const int whole = (p.k + STEP - 1) / STEP - warp * p.per;

    int group = 0, turn = 0;
    for (int tile = first_tile; tile < p.tiles; tile += p.blocks, turn ^= 1) {
        const Behind<T, O, NT, FLAGS> behind{p, part, sums + turn * SUMS};
        const Output<T, O> first = behind.look(tile, threadIdx.x);
        Sums<T, NT, G, FLAGS> mine;
#pragma unroll 1
        for (int s = 0; s < p.per; s += G) {
            copy_async_wait<GROUPS - 1>();
            char* at = own + group * GROUP;
            // the same for all lanes of the warp
            if (s < whole) mine.add(at, rows, s * STEP);
            pieces.fetch(at);
            group = group + 1 == GROUPS ? 0 : group + 1;
        }
        mine.store(sums + turn * SUMS + warp * 8 * NT * COLUMN, g, i);
        __syncthreads();
        behind.run(tile, first);
    }
}
