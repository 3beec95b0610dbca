// What a block of attention over a cache begins with: its share of heads and slots, and a new token's heads.
#pragma once
#include "overlap.cuh"
#include "vector.cuh"

struct AttendParams {
    const void* qkv;                      // (b, w, (h + 2 h_kv) p)
    void *k, *v;                          // (b, cap, h_kv, p)
    const void *q_gain, *k_gain;          // (p), each may be null
    const float* frequency;               // (rotated)
    int64 *pos, *length;                  // (b, cap), the position in a slot, -1 if empty, absent with several tokens; (b), tokens before these
    const int64* counts;                  // (b), tokens of a row that are no padding; with one token alone, absent, as `queries` is
    void* queries;                        // (b, w, h, p), with their norms and turned
    float* parts;                         // (b, w, h, splits, p + 4): sums, their largest exponent, and the sum of weights
    uint32* tickets;                      // (b, h_kv chunks + 1): blocks that are done of heads, and heads of a row; zero between launches
    void* out;                            // (b, w, h p)
    int64 qkv_b, qkv_w, k_b, k_s, k_h, v_b, v_s, v_h, pos_b;
    int w, h, h_kv, p, cap, splits, chunks, window, rotated, interleaved, normed;
    float scale, key_multiplier, eps;
};

constexpr int WARPS = 4, THREADS = 32 * WARPS, SLOTS = 16, TURN = WARPS * SLOTS, HEADS = 8;
constexpr int KEY = HEADS, VALUE = HEADS + 1, ROWS = HEADS + 2;  // of the new token: query heads, a key, a value
constexpr float NOTHING = -3e38f;                                // a score below all scores
constexpr float ROOM = 10.f;                                     // the largest weight is 2^10: fp16 has digits for smaller ones, too

DEVICE int ceil_div(uint32 a, uint32 b) { return (int)((a + b - 1) / b); }

// A block's place, and the slots that are its own
struct Place {
    // group: of the row's blocks, those of its queries, `there` of them, of one token from head `first` on; split: of the slots, or a token
    int split, group, chunk, kv, first, there;
    int64 b, position;                    // of the (first) new token
    int own = -1, used, per, begin, end;  // the new token's slot, if any; slots of the row, of a block, and of this one

    // `queries`: of a key head, heads or, of several tokens, the first token's heads, then the next one's
    DEVICE Place(const AttendParams& p, int chunks, int splits, int queries) {
        // who reads the same slots comes at the same time: chunks the same bytes, key heads those beside them
        const int of_row = p.h_kv * chunks, rest = blockIdx.x / of_row;
        group = blockIdx.x % of_row, split = rest % splits, b = rest / splits;
        chunk = group % chunks, kv = group / chunks;
        const int left = queries - chunk * HEADS;
        first = kv * (p.h / p.h_kv) + chunk * HEADS, there = left < HEADS ? left : HEADS;
    }
    // the n-th query's token, and its place among the heads of all tokens; `head`: of one token, the first query's
    DEVICE int token(const AttendParams& p, int n) const { return (chunk * HEADS + n) / (p.h / p.h_kv); }
    template <bool TOKENS>
    DEVICE int64 query(const AttendParams& p, int n, int64 head) const {
        if constexpr (!TOKENS) return head + n;
        const int per_kv = p.h / p.h_kv;
        return (b * p.w + token(p, n)) * p.h + kv * per_kv + (chunk * HEADS + n) % per_kv;
    }
    // `stand`: positions that have a token
    DEVICE void share_out(const AttendParams& p, int64 stand) {
        used = stand < p.cap ? (int)stand : p.cap;
        // whole turns: no turn goes into another block's slots
        per = ceil_div(ceil_div(used, p.splits), TURN) * TURN;
        begin = split * per < used ? split * per : used, end = begin + per < used ? begin + per : used;
    }
    // blocks that have any slots, one at least
    DEVICE int splits() const { return ceil_div(used, per); }
    DEVICE bool has_own() const { return begin <= own && own < end; }
};

// |angle| may be as large as a long text: the period is taken off in double, where the CUDA library's function goes through local memory
DEVICE void sine_and_cosine(float angle, float& s, float& c) {
    const double quarters = rint((double)angle * 0.6366197723675814);
    const float x = (float)fma(quarters, -1.5707963267948966, (double)angle), square = x * x;
    float sine = fmaf(-1.9515295891e-4f, square, 8.3321608736e-3f), cosine = fmaf(2.443315711809948e-5f, square, -1.388731625493765e-3f);
    sine = fmaf(fmaf(sine, square, -1.6666654611e-1f), square * x, x);
    cosine = fmaf(fmaf(cosine, square, 4.166664568298827e-2f), square * square, fmaf(-0.5f, square, 1.f));
    const int64 quarter = (int64)quarters;
    s = quarter & 1 ? cosine : sine, c = quarter & 1 ? sine : cosine;
    s = quarter & 2 ? -s : s, c = (quarter + 1) & 2 ? -c : c;
}

// A new token's heads in shared memory, in the precision of T as operations of their own would leave them; a warp has every fourth of them
template <class T, int P>
struct NewHeads {
    static constexpr int EACH = P / 32, MINE = (ROWS + WARPS - 1) / WARPS;
    const AttendParams& p;
    const Place& at;
    T* heads;  // (ROWS, P)
    const int lane, warp;
    T raw[MINE][EACH] = {}, gains[2][EACH] = {};
    float frequency[EACH / 2] = {};

    DEVICE NewHeads(const AttendParams& p, const Place& at, T* heads) : p(p), at(at), heads(heads), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {}

    DEVICE bool is_there(int row) const { return row < at.there || (row >= HEADS && row < ROWS); }
    // what nobody writes while models decode
    DEVICE void look_ahead() {
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int e = lane + 32 * j;
            if (e < p.p && p.q_gain != nullptr) gains[0][j] = ((const T*)p.q_gain)[e];
            if (e < p.p && p.k_gain != nullptr) gains[1][j] = ((const T*)p.k_gain)[e];
        }
    }
    // `token`: of the row
    DEVICE void look(int token = 0) {
        const T* qkv = (const T*)p.qkv + at.b * p.qkv_b + token * p.qkv_w;
#pragma unroll
        for (int j = 0; j < EACH / 2; ++j)
            if (lane + 32 * j < p.rotated) frequency[j] = p.frequency[lane + 32 * j];
#pragma unroll
        for (int m = 0; m < MINE; ++m) {
            const int row = warp + m * WARPS;
            const int count = is_there(row) ? p.p : 0;
            const T* from = qkv + (row < HEADS ? at.first + row : p.h + at.kv + (row == VALUE ? p.h_kv : 0)) * p.p;
#pragma unroll
            for (int j = 0; j < EACH; ++j)
                if (lane + 32 * j < count) raw[m][j] = from[lane + 32 * j];
        }
    }
    DEVICE void form() {
#pragma unroll
        for (int m = 0; m < MINE; ++m)
#pragma unroll
            for (int j = 0; j < EACH; ++j)
                if (warp + m * WARPS < ROWS) heads[(warp + m * WARPS) * P + lane + 32 * j] = raw[m][j];
        __syncwarp();
#pragma unroll 1
        for (int row = warp; row < VALUE; row += WARPS) {
            if (!is_there(row) || (row == KEY && !at.has_own())) continue;
            T* x = heads + row * P;
            if (p.normed || (row == KEY && p.key_multiplier != 1.f)) scale(x, row == KEY);
            if (p.rotated > 0) turn(x);
        }
    }
    DEVICE void scale(T* x, bool key) {
        const bool bare = (key ? p.k_gain : p.q_gain) == nullptr;
        float by = 1.f, squares = 0.f;
        if (p.normed) {
#pragma unroll
            for (int j = 0; j < EACH; ++j) squares = fmaf(read_one(x + lane + 32 * j), read_one(x + lane + 32 * j), squares);
#pragma unroll
            for (int m = 16; m > 0; m /= 2) squares += __shfl_xor_sync(~0u, squares, m);
            by = 1.f / sqrtf(squares / (float)p.p + p.eps);
        }
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int e = lane + 32 * j;
            float y = read_one(x + e);
            if (p.normed) y = rounded<T>(y * by * (bare ? 1.f : key ? read_one(gains[1] + j) : read_one(gains[0] + j)));
            write_one(x + e, key && p.key_multiplier != 1.f ? y * p.key_multiplier : y);
        }
        __syncwarp();
    }
    DEVICE void turn(T* x) {
#pragma unroll
        for (int j = 0; j < EACH / 2; ++j) {
            const int t = lane + 32 * j;
            if (t >= p.rotated) continue;
            const int first = p.interleaved ? 2 * t : t, second = p.interleaved ? 2 * t + 1 : t + p.rotated;
            const float a = read_one(x + first), b = read_one(x + second);
            float s, c;
            sine_and_cosine((float)at.position * frequency[j], s, c);
            write_one(x + first, a * c - b * s), write_one(x + second, b * c + a * s);
        }
        __syncwarp();
    }
    DEVICE void keep() const {
        T *k = (T*)p.k + at.b * p.k_b + at.own * p.k_s + at.kv * p.k_h, *v = (T*)p.v + at.b * p.v_b + at.own * p.v_s + at.kv * p.v_h;
        for (int e = threadIdx.x; e < p.p / 4; e += THREADS) {
            const int c = e / 2 * 8;
            Packed<T>::from(heads + (KEY + e % 2) * P + c).template store<true>((e % 2 ? v : k) + c, 8);
        }
    }
};

