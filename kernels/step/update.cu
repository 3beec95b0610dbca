// One token: the convolution, and the recurrence h = exp(dt A) h + dt x B,  y = (C h + D x) silu(z), states updated in place.
//
// Memory-bound: a state is read and written once.  A block belongs to one entry of the batch, which works on row rows[b] of the states
// (row b without an index); a negative row is skipped, its output zero.
//
// With K > 0 the convolution of Mamba-2's x, B and C comes first, in the same launch.  A block convolves its own channels of x, which no
// other block reads, and all of its group's B and C, which every block of the group reads.  So nobody may shift the state of B and C before
// all blocks of the group have read it: each, when its reads are done, draws a ticket, and the one that draws the last shifts.  Nobody
// waits.  A block's reads come before its barrier, the barrier before the fence and the ticket of its thread 0, and the last ticket is
// drawn after all others: the shift comes after every read.  The counter is back at zero behind the last ticket.
//
// In low-rank form (LOW_DT), the step sizes of Mamba are formed here, too: the lanes that share a channel share out the products of its row
// of the weight, which are small beside a launch of their own at a few rows of the batch.
#include "overlap.cuh"
#include "vector.cuh"

constexpr int THREADS = 128, SPAN = 512, RANKS = 512;
// states of so many bytes are asked for while the launch before still runs: more would be gone from L2 again, and stand in front of what that reads
constexpr int64 AHEAD = 32ll << 20;
// one A per head; B and C do not lie on borders of four elements; step sizes in low-rank form; norms of these, B and C
enum UpdateFlags { HEADS = 8, SPLIT = 16, LOW_DT = 32, NORMS = 64 };

// the state's row of a batch entry, negative where it is to be skipped
DEVICE int64 state_row(const void* rows, int wide, int64 b, int total) {
    if (rows == nullptr) return b;
    const int64 row = wide ? reinterpret_cast<const int64*>(rows)[b] : reinterpret_cast<const int*>(rows)[b];
    if (row >= total) __trap();
    return row;
}

struct ConvUpdateParams {
    const void* x;                    // (b, d)
    void* state;                      // (rows, K - 1, d)
    const void *weight, *bias, *rows;  // (d, K), (d), (b)
    void* out;                        // (b, d)
    int64 x_b, state_b, state_k;
    int d, tiles, silu, wide_rows, total;
};

template <class T, class S, class W, int K, int FLAGS>
__global__ void __launch_bounds__(THREADS) conv_update(const ConvUpdateParams p) {
    constexpr int N = 4;
    constexpr bool ALIGNED = !(FLAGS & UNALIGNED);
    let_next_begin();
    wait_for_previous();
    const int64 b = blockIdx.x / p.tiles;
    const int ch = ((int)(blockIdx.x % p.tiles) * THREADS + (int)threadIdx.x) * N, count = p.d - ch;
    if (count <= 0) return;
    const int64 row = state_row(p.rows, p.wide_rows, b, p.total);
    float y[N] = {0.f, 0.f, 0.f, 0.f};
    if (row >= 0) {
        S* state = (S*)p.state + row * p.state_b + ch;
        Vec<S, N> old[K - 1];
#pragma unroll
        for (int j = 0; j < K - 1; ++j) old[j] = Vec<S, N>::template load<ALIGNED>(state + j * p.state_k, count);
        float x[N], taps[K][N];
        Vec<T, N>::template load<ALIGNED>((const T*)p.x + b * p.x_b + ch, count).unpack(x);
        load_taps<W, K, N, ALIGNED>((const W*)p.weight + (int64)ch * K, count < N ? count : N, taps);
        load_bias<W, N, ALIGNED>((const W*)p.bias, ch, count, y);
#pragma unroll
        for (int j = 0; j < K - 1; ++j) {
            float before[N];
            old[j].unpack(before);
#pragma unroll
            for (int c = 0; c < N; ++c) y[c] = fmaf(taps[j][c], before[c], y[c]);
            if (j > 0) old[j].template store<ALIGNED>(state + (j - 1) * p.state_k, count);
        }
        Vec<S, N>::pack(x).template store<ALIGNED>(state + (K - 2) * p.state_k, count);
#pragma unroll
        for (int c = 0; c < N; ++c) {
            y[c] = fmaf(taps[K - 1][c], x[c], y[c]);
            if (p.silu) y[c] *= sigmoid(y[c]);
        }
    }
    Vec<T, N>::pack(y).template store<ALIGNED>((T*)p.out + b * p.d + ch, count);
}

struct StateUpdateParams {
    void* state;                        // (rows, d, n)
    const void *x, *dt, *B, *C, *z;     // (b, d), (b, d / p), (b, g, n), (b, g, n), (b, d); with K > 0, x is (b, d + 2 g n) and holds B, C
    const float *A, *D, *bias;          // (d, n), or (d / p) with HEADS; (d / p, p) by strides; (d / p)
    const void *dt_weight, *dt_gain, *B_gain, *C_gain;  // LOW_DT: (d, rank), dt being (b, rank); NORMS: (rank), (n), (n), each may be null
    const void* rows;                   // (b)
    void* conv_state;                   // (rows, K - 1, d + 2 g n)
    const void *conv_weight, *conv_bias;
    uint32* tickets;                    // (rows, g), zero between launches
    void* out;                          // (b, d)
    int64 state_b, x_b, dt_b, B_b, B_g, C_b, C_g, z_b, conv_b, conv_k;
    int d, n, p, groups, tiles, span, D_head, D_channel, softplus, silu, wide_rows, total, log_rates, rank;
    float low, high, eps;
};

// LANES lanes share a channel, each has VECS times four of its states, kept as H; a thread has PER channels in flight
template <class T, class S, class W, class H, int K, int LANES, int VECS, int PER, int FLAGS>
struct StateUpdate {
    static constexpr int N = LANES * VECS * 4, AT_ONCE = THREADS / LANES;
    static constexpr bool ALIGNED = !(FLAGS & UNALIGNED), ONE_A = FLAGS & HEADS, LOW = FLAGS & LOW_DT;
    // floats that threads share: x, or step sizes in low-rank form, then B and C
    static constexpr int FIRST = K > 0 ? SPAN : LOW ? RANKS : 0, FLOATS = FIRST == 0 ? 1 : FIRST + 2 * N;
    // 16 bytes each of a channel's row of the weight that a lane holds
    static constexpr int CHUNKS = LOW ? 8 : 1;
    using F4 = Vec<float, 4>;
    using H4 = Vec<H, 4>;

    const StateUpdateParams& p;
    int64 b, row;
    H* states;  // of the row; a row has fewer than 2^31
    int group, ch0, ch_end, q;
    float h[PER][VECS][4], A[PER][ONE_A ? 1 : VECS][ONE_A ? 1 : 4], B[VECS][4], C[VECS][4];
    float dt[PER], bias[PER], x[PER], z[PER], skip[PER];
    Vec<T, 8> held[PER][CHUNKS];

    DEVICE int first_state(int v) const { return (v * LANES + q) * 4; }

    // everything that a channel needs, before anything is stored: loads do not pass stores that they might overlap.  ALL: every lane has
    // its channels and its states
    template <bool ALL>
    DEVICE void load(int first) {
        const T *from_dt = (const T*)p.dt + b * p.dt_b, *from_x = (const T*)p.x + b * p.x_b, *from_z = (const T*)p.z + b * p.z_b;
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const int ch = first + i * AT_ONCE;
            const bool there = ALL || ch < ch_end;
#pragma unroll
            for (int v = 0; v < VECS; ++v) {
                const int j = first_state(v), count = ALL ? 4 : there ? p.n - j : 0, at = ch * (ALL ? N : p.n) + j;
                H4::template load<ALIGNED>(states + at, count).unpack(h[i][v]);
                if constexpr (!ONE_A) F4::template load<ALIGNED>(p.A + at, count).unpack(A[i][v]);
            }
            dt[i] = bias[i] = x[i] = z[i] = skip[i] = 0.f;
            if (!there) continue;
            // without heads, every channel is its own
            const int head = ONE_A ? ch / p.p : ch;
            if constexpr (!LOW) dt[i] = read_one(from_dt + head);
            if (p.bias != nullptr) bias[i] = p.bias[head];
            if constexpr (ONE_A) A[i][0][0] = p.A[head];
            if constexpr (K == 0) x[i] = read_one(from_x + ch);
            if (p.D != nullptr) skip[i] = p.D[ONE_A ? head * p.D_head + (ch - head * p.p) * p.D_channel : ch];
            if (p.z != nullptr) z[i] = read_one(from_z + ch);
        }
    }
    // what has to be worked out of what is loaded, which is on its way until then
    template <bool ALL>
    DEVICE void prepare(int first, const float* shared) {
        if constexpr (LOW) {
#pragma unroll
            for (int i = 0; i < PER; ++i) {
                const int ch = first + i * AT_ONCE;
                if (ALL || ch < ch_end) dt[i] = step_of(ch, held[i], shared);
            }
        }
        if (p.log_rates) {
#pragma unroll
            for (int i = 0; i < PER; ++i)
#pragma unroll
                for (int v = 0; v < (ONE_A ? 1 : VECS); ++v)
#pragma unroll
                    for (int e = 0; e < (ONE_A ? 1 : 4); ++e) A[i][v][e] = -exp2_fast(A[i][v][e] * LOG2E);
        }
    }

    DEVICE const T* weight_of(int ch) const { return (const T*)p.dt_weight + (int64)ch * p.rank; }
    // what nobody writes while models decode
    DEVICE void hold(int first) {
#pragma unroll
        for (int i = 0; i < PER; ++i)
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                const int ch = first + i * AT_ONCE, k = (c * LANES + q) * 8;
                held[i][c] = Vec<T, 8>::template load<true>(weight_of(ch) + k, ch < ch_end && k < p.rank);
            }
    }
    // this lane's share of a channel's step size
    DEVICE float step_of(int ch, const Vec<T, 8> (&held)[CHUNKS], const float* low) const {
        float sum = 0.f;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
            if ((c * LANES + q) * 8 < p.rank) add_products(held[c], low + (c * LANES + q) * 8, sum);
#pragma unroll 1
        for (int k = (CHUNKS * LANES + q) * 8; k < p.rank; k += LANES * 8)
            add_products(Vec<T, 8>::template load<true>(weight_of(ch) + k, 1), low + k, sum);
        return sum;
    }
    DEVICE static void add_products(const Vec<T, 8>& weight, const float* low, float& sum) {
        float w[8], x[8];
        weight.unpack(w), load_shared<8>(low, x);
#pragma unroll
        for (int c = 0; c < 8; ++c) sum = fmaf(w[c], x[c], sum);
    }

    // the low-rank form, and B and C where they are normed, in the precision of T, as launches of their own would have left them
    DEVICE void share_low(float* shared) const {
        const T *low = (const T*)p.dt + b * p.dt_b, *from_B = (const T*)p.B + b * p.B_b, *from_C = (const T*)p.C + b * p.C_b;
        if constexpr (FLAGS & NORMS) {
            const int warp = threadIdx.x / 32;
            if (warp == 0) share_normed(low, (const T*)p.dt_gain, p.rank, shared);
            if (warp == 1) share_normed(from_B, (const T*)p.B_gain, p.n, shared + FIRST);
            if (warp == 2) share_normed(from_C, (const T*)p.C_gain, p.n, shared + FIRST + N);
        } else {
            for (int k = threadIdx.x; k < p.rank; k += THREADS) shared[k] = read_one(low + k);
        }
        __syncthreads();
    }
    DEVICE void share_normed(const T* from, const T* gain, int count, float* to) const {
        float squares = 0.f;
        for (int k = threadIdx.x % 32; k < count; k += 32) squares = fmaf(read_one(from + k), read_one(from + k), squares);
#pragma unroll
        for (int m = 16; m > 0; m /= 2) squares += __shfl_xor_sync(~0u, squares, m);
        const float scale = 1.f / sqrtf(squares / (float)count + p.eps);
        for (int k = threadIdx.x % 32; k < count; k += 32) {
            T one;
            write_one(&one, read_one(from + k) * scale * (gain == nullptr ? 1.f : read_one(gain + k)));
            to[k] = read_one(&one);
        }
    }

    DEVICE void load_bc(const float* shared) {
#pragma unroll
        for (int v = 0; v < VECS; ++v) {
            const int j = first_state(v);
            if constexpr (K > 0 || FLAGS & NORMS) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    B[v][e] = j + e < p.n ? shared[FIRST + j + e] : 0.f;
                    C[v][e] = j + e < p.n ? shared[FIRST + N + j + e] : 0.f;
                }
            } else {
                const T* from_B = (const T*)p.B + b * p.B_b + group * p.B_g + (j < p.n ? j : 0);
                const T* from_C = (const T*)p.C + b * p.C_b + group * p.C_g + (j < p.n ? j : 0);
                Vec<T, 4>::template load<!(FLAGS & SPLIT)>(from_B, p.n - j).unpack(B[v]);
                Vec<T, 4>::template load<!(FLAGS & SPLIT)>(from_C, p.n - j).unpack(C[v]);
            }
        }
    }

    DEVICE float step_size(float dt) const {
        if (p.softplus) dt = softplus<false>(dt);
        // fminf and fmaxf would make a number of NaN
        return dt < p.low ? p.low : dt > p.high ? p.high : dt;
    }

    template <bool ALL>
    DEVICE void step(int first, const float* shared) {
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const int ch = first + i * AT_ONCE;
            const bool there = ALL || ch < ch_end;
            if (K > 0 && there) x[i] = shared[ch - ch0];
            if constexpr (LOW) {
#pragma unroll
                for (int m = LANES / 2; m > 0; m /= 2) dt[i] += __shfl_xor_sync(0xffffffffu, dt[i], m);
            }
            const float step = step_size(dt[i] + bias[i]), step2 = step * LOG2E, add = step * x[i];
            const float decay = ONE_A ? exp2_fast(step2 * finite_rate(A[i][0][0])) : 0.f;
            float y = 0.f;
#pragma unroll
            for (int v = 0; v < VECS; ++v) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float a = ONE_A ? decay : exp2_fast(step2 * finite_rate(A[i][ONE_A ? 0 : v][ONE_A ? 0 : e]));
                    h[i][v][e] = fmaf(a, h[i][v][e], add * B[v][e]);
                    y = fmaf(h[i][v][e], C[v][e], y);
                }
                const int j = first_state(v);
                H4::pack(h[i][v]).template store<ALIGNED>(states + ch * (ALL ? N : p.n) + j, ALL ? 4 : there ? p.n - j : 0);
            }
#pragma unroll
            for (int m = LANES / 2; m > 0; m /= 2) y += __shfl_xor_sync(0xffffffffu, y, m);
            y = fmaf(skip[i], x[i], y);
            if (p.z != nullptr) y *= z[i] * sigmoid(z[i]);
            if (there && q == 0) write_one((T*)p.out + b * p.d + ch, y);
        }
    }

    // channel c of the convolution, in the precision of T, as a launch of its own would have left it
    DEVICE float convolve(int c) const {
        const S* state = (const S*)p.conv_state + row * p.conv_b + c;
        const W* weight = (const W*)p.conv_weight + (int64)c * K;
        float y = p.conv_bias == nullptr ? 0.f : read_one((const W*)p.conv_bias + c);
#pragma unroll
        for (int j = 0; j < K - 1; ++j) y = fmaf(read_one(weight + j), read_one(state + j * p.conv_k), y);
        y = fmaf(read_one(weight + K - 1), read_one((const T*)p.x + b * p.x_b + c), y);
        y *= p.silu ? sigmoid(y) : 1.f;
        T rounded;
        write_one(&rounded, y);
        return read_one(&rounded);
    }

    DEVICE void shift(int c) const {
        S* state = (S*)p.conv_state + row * p.conv_b + c;
        S kept[K - 1];
#pragma unroll
        for (int j = 0; j < K - 2; ++j) kept[j] = state[(j + 1) * p.conv_k];
        write_one(kept + K - 2, read_one((const T*)p.x + b * p.x_b + c));
#pragma unroll
        for (int j = 0; j < K - 1; ++j) state[j * p.conv_k] = kept[j];
    }

    // of the group's B and C together, entry j's channel
    DEVICE int channel_bc(int j) const { return p.d + (j < p.n ? group * p.n + j : (p.groups - 1 + group) * p.n + j); }

    // x of this block, and B and C of the group; a thread's loads are in flight together
    DEVICE void convolve_all(float* shared) const {
        constexpr int R = (2 * N + THREADS - 1) / THREADS;
        const int own = ch_end - ch0, tid = threadIdx.x;
        float x = convolve(ch0 + (tid < own ? tid : 0)), bc[R];
#pragma unroll
        for (int r = 0; r < R; ++r) bc[r] = convolve(channel_bc(tid + r * THREADS < 2 * p.n ? tid + r * THREADS : 0));
        for (int i = tid; i < own; i += THREADS) shared[i] = i == tid ? x : convolve(ch0 + i);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int j = tid + r * THREADS;
            if (j < 2 * p.n) shared[SPAN + (j < p.n ? j : N + j - p.n)] = bc[r];
        }
    }

    DEVICE void shift_all(bool bc) const {
        const int own = ch_end - ch0;
        for (int i = threadIdx.x; i < own + (bc ? 2 * p.n : 0); i += THREADS) shift(i < own ? ch0 + i : channel_bc(i - own));
    }

    // all of the block's channels; with a convolution, thread 0 draws a ticket once the block has read what others share
    template <bool ALL>
    DEVICE void run(float* shared, uint32& ticket) {
        const int first = threadIdx.x / LANES;
        // what takes longest first
        load<ALL>(ch0 + first);
        if constexpr (K == 0 && !(FLAGS & NORMS)) load_bc(shared);
        if constexpr (LOW) share_low(shared);
        if constexpr (K > 0) {
            convolve_all(shared);
            __syncthreads();
            if (p.tiles > 1 && threadIdx.x == 0) {
                __threadfence();
                ticket = atomicInc(p.tickets + row * p.groups + group, p.tiles - 1);
            }
        }
        if constexpr (K > 0 || FLAGS & NORMS) load_bc(shared);
        for (int base = ch0;;) {
            prepare<ALL>(base + first, shared);
            step<ALL>(base + first, shared);
            base += AT_ONCE * PER;
            if (base >= ch_end) break;
            load<ALL>(base + first);
            if constexpr (LOW) hold(base + first);
        }
    }
};

template <class T, class S, class W, class H, int K, int LANES, int VECS, int PER, int FLAGS>
__global__ void __launch_bounds__(THREADS) state_update(const StateUpdateParams p) {
    using U = StateUpdate<T, S, W, H, K, LANES, VECS, PER, FLAGS>;
    SHARED_ARRAY(float, shared, U::FLOATS);
    SHARED_ARRAY(int, last, 1);
    const int tile = blockIdx.x % p.tiles, rest = blockIdx.x / p.tiles, per_group = p.d / p.groups;
    const int group = rest % p.groups, end = (group + 1) * per_group, ch0 = group * per_group + tile * p.span;
    const int ch_end = end - ch0 < p.span ? end : ch0 + p.span;
    const int64 b = rest / p.groups;
    let_next_begin();
    if (p.rows == nullptr && (int64)gridDim.x * p.span * p.n * (int)sizeof(H) <= AHEAD)
        prefetch_all((const H*)p.state + b * p.state_b + (int64)ch0 * p.n, (ch_end - ch0) * p.n);
    if constexpr (!U::ONE_A) prefetch_all(p.A + (int64)ch0 * p.n, (ch_end - ch0) * p.n);
    U u{p, b, 0, nullptr, group, ch0, ch_end, (int)threadIdx.x % LANES};
    if constexpr (U::LOW) u.hold(ch0 + threadIdx.x / LANES);
    wait_for_previous();
    u.row = state_row(p.rows, p.wide_rows, b, p.total), u.states = (H*)p.state + u.row * p.state_b;
    if (u.row < 0) {
        for (int ch = ch0 + threadIdx.x; ch < u.ch_end; ch += THREADS) write_one((T*)p.out + b * p.d + ch, 0.f);
        return;
    }
    uint32 ticket = 0;
    if (p.n == U::N && (u.ch_end - ch0) % (U::AT_ONCE * PER) == 0)
        u.template run<true>(shared, ticket);
    else
        u.template run<false>(shared, ticket);
    if constexpr (K > 0) {
        if (threadIdx.x == 0) last[0] = p.tiles == 1 || ticket == p.tiles - 1;
        __syncthreads();
        if (last[0]) __threadfence();
        u.shift_all(last[0]);
    }
}
