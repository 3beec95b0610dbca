// Attention over a cache, of one token a row or of several: norms and rotation of its heads, its key and value into the cache, and the sum
// of values by scaled dot products.
//
// Memory-bound: every key and value that the token sees is read once, and products of tensor cores leave nothing else to wait for.  The
// slots of a row are split among blocks, each with up to 8 queries of one key head: heads, or heads of several tokens.  In a block, warps
// take 16 slots in turn, and keep sums of their own, rescaled as larger scores come (a softmax of base 2).  Sums meet in a fixed order:
// those of a block in shared memory, those of the blocks where the last of them arrives.  The number of splits depends on slots and heads
// alone, so a row's bits do not depend on the other rows, nor on how many tokens those have.
//
// A product does not care about the order in which its terms or its rows stand.  A lane takes 16 bytes of a key, and its eight elements stand
// where two products want eight of their 32 channels; of a value, they stand in the rows of four products.  So shared memory holds rows as they
// come, whole lines of memory at a time, and lanes take what they need from where no two of them meet on a bank.  What two products share is
// fixed by that: lane 4 g + i has scores of head g and slots 2 i, 2 i + 1, 2 i + 8, 2 i + 9, which is the place that the product by values wants
// them in, and it has values of these four slots.
//
// One token's key and value are not read back: they take the place of what has been fetched.  Those of several tokens are seen by blocks
// that have not formed them: a launch of its own comes first (`attend_keep`), and with TOKENS what it left is read like all the rest.
#include "mma.cuh"
#include "new_token.cuh"
#include "tickets.cuh"

template <class T, int HALVES, int STAGES, bool TOKENS>
struct Attend {
    // a head has P / 8 pieces of 16 bytes; a stage, 16 slots' keys and as many values
    static constexpr int P = 64 * HALVES, PIECES = P / 8, KEYS = P / 32, ROW = 2 * P, STAGE = 32 * ROW;
    const AttendParams& p;
    const Place& at;
    const T* heads;        // the new token's
    char* ring;            // the warp's stages
    const int g, i, from;  // lane 4 g + i, and its warp's first slots
    const T *k, *v;
    int64 positions[4];                  // what stands in the slots that are next
    float most = NOTHING, weight = 0.f;  // of query g: over the four lanes that share it, and of this lane's slots
    float sums[4 * HALVES][4] = {};      // channels 64 half + 8 g + 2 m and the next one of queries 2 i and 2 i + 1

    DEVICE Attend(const AttendParams& p, const Place& at, const T* heads, char* shared)
        : p(p), at(at), heads(heads), ring(shared + threadIdx.x / 32 * STAGES * STAGE), g(threadIdx.x % 32 / 4), i(threadIdx.x % 4),
          from(at.begin + threadIdx.x / 32 * SLOTS), k((const T*)p.k + at.b * p.k_b + at.kv * p.k_h),
          v((const T*)p.v + at.b * p.v_b + at.kv * p.v_h) {}

    // the slot of this lane's m-th score
    DEVICE int slot(int m) const { return 2 * i + m % 2 + m / 2 * 8; }

    // Where a stage has a piece of a slot's key or value.  Eight lanes that read together meet eight groups of banks: of keys they want four
    // pieces of two neighbouring slots, of values two pieces of every other slot of eight.
    static DEVICE int key_at(int s, int piece) { return s * ROW + (piece ^ s % 2 * 4) * 16; }
    static DEVICE int value_at(int s, int piece) { return (SLOTS + s) * ROW + (piece ^ (s & 6)) * 16; }

    // 16 slots, but the new token's, on their way into shared memory: neighbouring lanes ask for neighbouring pieces, since L2 takes as long for
    // a part of a line as for all of it
    DEVICE void fetch(char* to, int first) const {
        constexpr int TIMES = SLOTS * PIECES / 32, TOGETHER = 32 % PIECES ? PIECES / 8 : TIMES;
#pragma unroll(TOGETHER)
        for (int n = 0; n < TIMES; ++n) {
            const int e = 32 * n + threadIdx.x % 32, slot = e / PIECES, piece = e % PIECES, s = first + slot;
            const bool there = s < at.end && s != at.own && 8 * piece < p.p;
            copy_async16(to + key_at(slot, piece), k + s * p.k_s + 8 * piece, there);
            copy_async16(to + value_at(slot, piece), v + s * p.v_s + 8 * piece, there);
        }
        copy_async_commit();
    }
    DEVICE void look(int first) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const int s = first + slot(m);
            positions[m] = s < at.end ? p.pos[at.b * p.pos_b + s] : -1;
        }
    }
    // several stages are on their way, so that nothing is waited for that has not been asked for long before
    DEVICE void begin() const {
#pragma unroll
        for (int s = 0; s < STAGES; ++s) fetch(ring + s * STAGE, from + s * TURN);
    }
    // channels 32 j + 8 i and the next ones of query g
    DEVICE void queries(uint4 (&q)[KEYS]) const {
        const T* from = heads + g * P;
        if constexpr (TOKENS) from = (const T*)p.queries + at.query<true>(p, g < at.there ? g : 0, 0) * p.p;
#pragma unroll
        for (int j = 0; j < KEYS; ++j) {
            q[j] = make_uint4(0, 0, 0, 0);
            if (!TOKENS || 32 * j + 8 * i < p.p) q[j] = *reinterpret_cast<const uint4*>(from + 32 * j + 8 * i);
        }
    }
    DEVICE void along() {
        uint4 q[KEYS];
        queries(q);
        // the tokens' positions are slots
        int last = at.end - 1;
        if constexpr (TOKENS) last = at.position + at.token(p, g) < last ? (int)at.position + at.token(p, g) : last;
        int stage = 0;
#pragma unroll 1
        for (int first = from; first < at.end; first += TURN) {
            bool seen[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) seen[m] = TOKENS ? first + slot(m) <= last : sees(positions[m]) || first + slot(m) == at.own;
            if constexpr (!TOKENS) look(first + TURN);
            copy_async_wait<STAGES - 1>();
            __syncwarp();  // what other lanes have fetched is there
            char* here = ring + stage * STAGE;
            if constexpr (!TOKENS) mend(here, first, seen);
            take(here, seen, q);
            __syncwarp();  // and has been read by all
            fetch(here, first + STAGES * TURN);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        copy_async_wait<0>();
    }
    // The new token's key and value where they are missing; of slots that are not seen no values, as no number times zero would be none
    DEVICE void mend(char* stage, int first, const bool (&seen)[4]) const {
        if (at.own == first + g || at.own == first + g + 8) {
#pragma unroll
            for (int j = 0; j < KEYS; ++j) copy16(stage + key_at(at.own - first, 4 * j + i), heads + KEY * P + 32 * j + 8 * i);
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const bool is_own = at.own == first + slot(m);
            if (seen[m] && !is_own) continue;
#pragma unroll
            for (int h = 0; h < HALVES; ++h) {
                char* to = stage + value_at(slot(m), 8 * h + g);
                if (is_own)
                    copy16(to, heads + VALUE * P + 64 * h + 8 * g);
                else
                    *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
            }
        }
    }
    static DEVICE void copy16(void* to, const T* from) { *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from); }

    DEVICE bool sees(int64 x) const { return x >= 0 && x <= at.position && (p.window == 0 || x > at.position - p.window); }

    DEVICE void take(const char* stage, const bool (&seen)[4], const uint4 (&q)[KEYS]) {
        float products[2][4] = {}, score[4], keep[2];
#pragma unroll
        for (int j = 0; j < KEYS; ++j)
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const Packed<T> key = Packed<T>::from(stage + key_at(g + 8 * t, 4 * j + i));
                multiply_add<T>(products[t], {q[j].x, 0, q[j].y, 0}, {key.w[0], key.w[1]});
                multiply_add<T>(products[t], {q[j].z, 0, q[j].w, 0}, {key.w[2], key.w[3]});
            }
#pragma unroll
        for (int m = 0; m < 4; ++m) score[m] = seen[m] ? products[m / 2][m % 2] * (p.scale * LOG2E) : NOTHING;
        weigh(score, keep);
        const uint32 weights[2] = {Element<T>::pack(score), Element<T>::pack(score + 2)};
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
            Packed<T> value[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) value[m] = Packed<T>::from(stage + value_at(slot(m), 8 * h + g));
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                float(&sum)[4] = sums[4 * h + c];
                sum[0] *= keep[0], sum[1] *= keep[1], sum[2] *= keep[0], sum[3] *= keep[1];
                uint32 a[4];
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    a[2 * m] = __byte_perm(value[2 * m].w[c], value[2 * m + 1].w[c], 0x5410);
                    a[2 * m + 1] = __byte_perm(value[2 * m].w[c], value[2 * m + 1].w[c], 0x7632);
                }
                multiply_add<T>(sum, a, weights);
            }
        }
    }
    // scores become weights; what is left of queries 2 i and 2 i + 1 so far
    DEVICE void weigh(float (&score)[4], float (&keep)[2]) {
        float top = most;
#pragma unroll
        for (int m = 0; m < 4; ++m) top = score[m] > top ? score[m] : top;
#pragma unroll
        for (int m = 1; m < 4; m *= 2) {
            const float other = __shfl_xor_sync(~0u, top, m);
            top = other > top ? other : top;
        }
        const float kept = exp2_fast(most - top);
        most = top, weight *= kept;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            // a score that is no number is no smaller than any
            score[m] = score[m] <= NOTHING ? 0.f : exp2_fast(score[m] - top + ROOM);
            weight += score[m];
        }
        keep[0] = __shfl_sync(~0u, kept, 8 * i), keep[1] = __shfl_sync(~0u, kept, 8 * i + 4);
    }
    // (WARPS, HEADS, P + 4): what a warp has summed up, for the block
    DEVICE void leave(float* met) {
        float* mine = met + threadIdx.x / 32 * HEADS * (P + 4);
#pragma unroll
        for (int m = 1; m < 4; m *= 2) weight += __shfl_xor_sync(~0u, weight, m);
        if (i == 0) mine[g * (P + 4) + P] = most, mine[g * (P + 4) + P + 1] = weight;
#pragma unroll
        for (int h = 0; h < HALVES; ++h)
#pragma unroll
            for (int o = 0; o < 2; ++o) {
                float y[8];
#pragma unroll
                for (int c = 0; c < 8; ++c) y[c] = sums[4 * h + c / 2][c % 2 * 2 + o];
                store_shared<8>(mine + (2 * i + o) * (P + 4) + 64 * h + 8 * g, y);
            }
    }
};

// Four channels of a head, summed up over parts, which lie `apart` floats from each other; several are read before any is used
struct Sum {
    float most = NOTHING, weight = 0.f, y[4] = {};

    // `from`: a part's channels, behind `p` of which lie its largest exponent and sum of weights
    template <int TOGETHER>
    DEVICE void add(const float* from, int channel, int p, int apart, int count) {
#pragma unroll 1
        for (int first = 0; first < count; first += TOGETHER, from += TOGETHER * apart) {
            float part[TOGETHER][4], tops[TOGETHER], weights[TOGETHER], top = most;
#pragma unroll
            for (int s = 0; s < TOGETHER; ++s) {
                const float* at = from + (first + s < count ? s : 0) * apart;
                load_shared<4>(at + channel, part[s]);
                float of[2];
                load_shared<2>(at + p, of);
                tops[s] = of[0], weights[s] = of[1];
                top = tops[s] > top ? tops[s] : top;
            }
            const float keep = exp2_fast(most - top);
            most = top, weight *= keep;
#pragma unroll
            for (int c = 0; c < 4; ++c) y[c] *= keep;
#pragma unroll
            for (int s = 0; s < TOGETHER; ++s) {
                if (first + s < count) {
                    const float by = exp2_fast(tops[s] - top);
                    weight = fmaf(by, weights[s], weight);
#pragma unroll
                    for (int c = 0; c < 4; ++c) y[c] = fmaf(by, part[s][c], y[c]);
                }
            }
        }
    }
    template <class T>
    DEVICE void write(T* out) const {
        const float by = 1.f / weight, x[4] = {y[0] * by, y[1] * by, y[2] * by, y[3] * by};
        Vec<T, 4>::pack(x).template store<true>(out, 4);
    }
};

// f(query, channel) for each four channels of a block's queries
template <class F>
DEVICE void each_quad(const AttendParams& p, const Place& at, F f) {
    for (int o = threadIdx.x; o < at.there * (p.p / 4); o += THREADS) f(o / (p.p / 4), o % (p.p / 4) * 4);
}

// Several tokens' heads: a block has up to 8 queries of a token and a key head, and, if they are the first ones, its key and value
template <class T, int HALVES>
__global__ void __launch_bounds__(THREADS) attend_keep(const AttendParams p) {
    constexpr int P = 64 * HALVES, PIECES = P / 8;
    SHARED_ARRAY(T, heads, ROWS * P);
    let_next_begin();
    const int per_kv = p.h / p.h_kv;
    Place at(p, ceil_div(per_kv, HEADS), p.w, per_kv);
    NewHeads<T, P> token(p, at, heads);
    token.look_ahead();
    wait_for_previous();
    at.position = p.length[at.b] + at.split, at.begin = 0, at.end = p.cap;
    // of padding nothing is read: its queries are zero, and their answers finite
    if (at.split < p.counts[at.b]) {
        token.look(at.split);
        if (at.chunk == 0 && at.position < p.cap) at.own = (int)at.position;
    }
    token.form();
    __syncthreads();
    if (at.has_own()) token.keep();
    T* to = (T*)p.queries + ((at.b * p.w + at.split) * p.h + at.first) * p.p;
    for (int e = threadIdx.x; e < at.there * PIECES; e += THREADS) {
        const int n = e / PIECES, c = e % PIECES * 8;
        if (c < p.p) Packed<T>::from(heads + n * P + c).template store<true>(to + n * p.p + c, 8);
    }
}

template <class T, int HALVES, int STAGES, bool TOKENS = false>
__global__ void __launch_bounds__(THREADS) attend_slots(const AttendParams p) {
    using A = Attend<T, HALVES, STAGES, TOKENS>;
    constexpr int ROW = A::P + 4;
    SHARED_MEMORY(ring);
    SHARED_ARRAY(T, heads, TOKENS ? 8 : ROWS * A::P);
    SHARED_ARRAY(int, last, 1);
    let_next_begin();
    Place at(p, p.chunks, p.splits, TOKENS ? p.w * (p.h / p.h_kv) : p.h / p.h_kv);
    NewHeads<T, A::P> token(p, at, heads);
    if constexpr (!TOKENS) token.look_ahead();
    wait_for_previous();
    const int64 position = at.position = p.length[at.b];
    if constexpr (TOKENS) {
        const int64 stand = position + p.counts[at.b];
        at.share_out(p, stand > 1 ? stand : 1);
    } else {
        token.look();
        at.own = (int)(position < p.cap ? position : position % p.cap);
        at.share_out(p, position + 1);
    }
    const int64 head = at.b * p.h + at.first;
    if (at.begin < at.end) {
        A a(p, at, heads, ring);
        a.begin();
        if constexpr (!TOKENS) {
            a.look(a.from);
            token.form();
            __syncthreads();
            if (at.has_own() && at.chunk == 0) {
                token.keep();
                // other key heads' blocks may read the old one: they know the slot, and do not ask
                if (at.kv == 0 && threadIdx.x == 0) p.pos[at.b * p.pos_b + at.own] = position;
            }
        }
        a.along();
        __syncthreads();
        float* met = reinterpret_cast<float*>(ring);
        a.leave(met);
        __syncthreads();
        const int splits = at.splits();
        each_quad(p, at, [&](int i, int channel) {
            Sum sum;
            sum.template add<WARPS>(met + i * ROW, channel, A::P, HEADS * ROW, WARPS);
            const int64 query = at.query<TOKENS>(p, i, head);
            if (splits == 1) return sum.write((T*)p.out + query * p.p + channel);
            float* to = p.parts + (query * p.splits + at.split) * (p.p + 4);
            store_shared<4>(to + channel, sum.y);
            if (channel == 0) to[p.p] = sum.most, to[p.p + 1] = sum.weight;
        });
    }
    const int of_row = p.h_kv * p.chunks;
    uint32* tickets = p.tickets + at.b * (of_row + 1);
    if (p.splits > 1 && !is_last(tickets + at.group, p.splits, last)) return;
    const int splits = at.splits();
    uint32 ticket = 0;
    if (!TOKENS && threadIdx.x == 0) ticket = atomicInc(tickets + of_row, of_row - 1);
    if (splits > 1) {
        each_quad(p, at, [&](int i, int channel) {
            const int64 query = at.query<TOKENS>(p, i, head);
            Sum sum;
            sum.template add<16>(p.parts + query * p.splits * (p.p + 4), channel, p.p, p.p + 4, splits);
            sum.write((T*)p.out + query * p.p + channel);
        });
    }
    // all blocks of the row have read it
    if (!TOKENS && threadIdx.x == 0 && ticket == (uint32)of_row - 1) p.length[at.b] = position + 1;
}
