// What tokens have left behind, into the state that they were read from, in the rows where it is wanted: one launch for all layers.
//
// A block has a piece of what one thing of a layer has of one row: values that are taken over; the inputs that a filter still needs, which are
// the last ones of those that it had and of those that were read; or the keys and values that are in the cache already, where their positions are
// entered, or they are wiped out.
#include "vector.cuh"

constexpr int MOST = 48, THREADS = 256;
enum Kinds { VALUES, INPUTS, KEYS };

struct TakeParams {
    void* into[MOST];        // (b, n); (b, k, n); (b, cap, n)
    void* from[MOST];        // (b, n); (b, w, n); (b, cap, n): of keys, the values
    int64* pos[MOST];        // keys: (b, cap)
    int64* length[MOST];     // keys: (b), tokens before
    int64 from_b[MOST], from_l[MOST];
    int64 n[MOST];           // bytes
    int k[MOST];             // steps of a filter's state, or slots of a cache
    int kind[MOST], unit[MOST];  // bytes that are moved at once: 16, 4 or 2
    int begin[MOST + 1];     // the first block of each; (rows, pieces)
    const uint8* rows;       // (b)
    const int64* counts;     // (b), tokens of a row that were read
    int count, b;
};

struct Take {
    const TakeParams& p;
    int e, piece;
    int64 row, counts;
    bool wanted;

    DEVICE Take(const TakeParams& p) : p(p), e(0) {
        while (e + 1 < p.count && (int)blockIdx.x >= p.begin[e + 1]) ++e;
        const int at = blockIdx.x - p.begin[e], pieces = (p.begin[e + 1] - p.begin[e]) / p.b;
        row = at / pieces, piece = at % pieces;
        counts = p.counts[row], wanted = p.rows[row] != 0;
    }
    template <class U>
    DEVICE void values() const {
        const int64 end = p.n[e] / (int64)sizeof(U), at = (int64)piece * THREADS + threadIdx.x;
        const U* from = (const U*)((const char*)p.from[e] + row * p.from_b[e]);
        U* into = (U*)((char*)p.into[e] + row * p.n[e]);
        if (at < end) into[at] = from[at];
    }
    template <class U>
    DEVICE void inputs() const {
        const int64 end = p.n[e] / (int64)sizeof(U), at = (int64)piece * THREADS + threadIdx.x;
        if (at >= end) return;
        U* state = (U*)((char*)p.into[e] + row * p.k[e] * p.n[e]) + at;
        const char* read = (const char*)p.from[e] + row * p.from_b[e] + at * (int64)sizeof(U);
        // an entry is read before its place is taken, as there was a token at least
        for (int64 j = 0; j < p.k[e]; ++j) {
            const int64 t = j + counts - p.k[e];
            state[j * end] = t < 0 ? state[(j + counts) * end] : *reinterpret_cast<const U*>(read + t * p.from_l[e]);
        }
    }
    template <class U>
    DEVICE void keys() const {
        int64* length = p.length[e] + row;
        const int64 begin = *length, cap = p.k[e], stop = begin + counts < cap ? begin + counts : cap, each = p.n[e] / (int64)sizeof(U);
        if (wanted) {
            for (int64 s = begin + threadIdx.x; s < stop; s += THREADS) p.pos[e][row * cap + s] = s;
            __syncthreads();
            if (threadIdx.x == 0) *length = begin + counts;
        } else {
            // an empty slot is read with weight zero: it must not hold what is no number
            U *k = (U*)p.into[e] + (row * cap + begin) * each, *v = (U*)p.from[e] + (row * cap + begin) * each;
            for (int64 i = threadIdx.x; i < (stop - begin) * each; i += THREADS) k[i] = U{}, v[i] = U{};
        }
    }
    template <class U>
    DEVICE void run() const {
        if (p.kind[e] == KEYS)
            keys<U>();
        else if (wanted && p.kind[e] == VALUES)
            values<U>();
        else if (wanted)
            inputs<U>();
    }
};

__global__ void __launch_bounds__(THREADS) take_rows(const TakeParams p) {
    const Take take(p);
    if (p.unit[take.e] == 16)
        take.run<uint4>();
    else if (p.unit[take.e] == 4)
        take.run<uint32>();
    else
        take.run<uint16>();
}
