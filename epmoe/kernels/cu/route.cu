// Logits -> ids, weights, slots, load counts: one warp per row, one launch.
//
// Does, operation by operation, what sched/route.py and sched/score.py define: every rounding is
// spelled with an intrinsic that the compiler may not fuse, so ids, weights and slots have the same
// bits as on the host.  Plain and redundant are one kernel: without tables nothing is looked up.
//
// A lane holds RUN neighbouring experts of one group, LANES lanes share a group, so expert numbers
// grow with the lane: of equal keys the lowest lane has the lowest expert.
//
// Constants from kernels/route.py: E K GROUPS KEEP LANES RUN; SCORE (0 softmax, 1 softmax_chosen,
// 2 sigmoid) BIAS RENORMALISE; ITEM bytes of a logit, HALF (fp16, not bf16); WIDE bytes of one load
// (0: value by value), BIAS_WIDE the same for the bias; WARPS rows of a block, GATHER (count in shared
// memory first); EXP_LIMIT EXP_ROUND LOG2_E LN2_HIGH LN2_LOW EXP_Q0..4.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 ALL = 0xffffffffu;
constexpr int SIZE = E / GROUPS;  // experts of a group
constexpr bool WHOLE = SIZE == LANES * RUN && GROUPS * LANES == 32;  // no lane has a gap

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ bool finite(float f) { return fabsf(f) < infinity(); }

// Unsigned numbers in the order of the floats; -0 equals +0; 0 is below all: "cannot be chosen".
__device__ __forceinline__ u32 ordered(float f) {
    const u32 bits = __float_as_uint(__fadd_rn(f, 0.0f));
    return bits ^ (u32(int(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float unordered(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// score.exp: the integer part of z / ln 2 sits in the low bits of the shifted number.
__device__ __forceinline__ float exponential(float z) {
    z = fminf(fmaxf(z, -EXP_LIMIT), EXP_LIMIT);
    const float shifted = __fadd_rn(__fmul_rn(z, LOG2_E), EXP_ROUND);
    const float n = __fsub_rn(shifted, EXP_ROUND);
    const float r = __fsub_rn(__fsub_rn(z, __fmul_rn(n, LN2_HIGH)), __fmul_rn(n, LN2_LOW));
    float q = __fadd_rn(__fmul_rn(EXP_Q4, r), EXP_Q3);
    q = __fadd_rn(__fmul_rn(q, r), EXP_Q2);
    q = __fadd_rn(__fmul_rn(q, r), EXP_Q1);
    q = __fadd_rn(__fmul_rn(q, r), EXP_Q0);
    const float e = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(r, r), q), r), 1.0f);
    return __fmul_rn(e, __uint_as_float((__float_as_uint(shifted) + 127u) << 23));
}

// 1 / d for 1 <= d < 2**126: the correctly rounded value, without the branch of __frcp_rn for numbers
// outside that range, which kept the compiler from overlapping the experts of a lane.
__device__ __forceinline__ float reciprocal(float d) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(d));
    return __fmaf_rn(y, __fmaf_rn(-d, y, 1.0f), y);
}
__device__ __forceinline__ float sigmoid(float x) {
    return reciprocal(__fadd_rn(exponential(-x), 1.0f));
}

__device__ __forceinline__ float widened(u32 half) {
#if HALF
    float f;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(half & 0xffffu));
    return f;
#else
    return __uint_as_float(half << 16);
#endif
}

__device__ __forceinline__ float logit(const void* logits, long long at) {
#if ITEM == 4
    return __ldg(static_cast<const float*>(logits) + at);
#else
    return widened(__ldg(static_cast<const unsigned short*>(logits) + at));
#endif
}

// COUNT words from an address that allows loads of BYTES.
template <int BYTES, int COUNT>
__device__ __forceinline__ void fetch(u32 (&to)[COUNT], const void* from) {
#pragma unroll
    for (int i = 0; i < COUNT * 4 / BYTES; ++i) {
        if constexpr (BYTES == 16) {
            const uint4 w = __ldg(static_cast<const uint4*>(from) + i);
            to[4 * i] = w.x, to[4 * i + 1] = w.y, to[4 * i + 2] = w.z, to[4 * i + 3] = w.w;
        } else if constexpr (BYTES == 8) {
            const uint2 w = __ldg(static_cast<const uint2*>(from) + i);
            to[2 * i] = w.x, to[2 * i + 1] = w.y;
        } else {
            to[i] = __ldg(static_cast<const u32*>(from) + i);
        }
    }
}

// The lane's logits; a place without an expert reads NaN, which can never be chosen.
__device__ __forceinline__ void load(float (&x)[RUN], const void* logits, long long at, int held) {
#if WIDE
    u32 raw[RUN * ITEM / 4];
    fetch<WIDE>(raw, static_cast<const char*>(logits) + at * ITEM);
#pragma unroll
    for (int v = 0; v < RUN; ++v)
        x[v] = ITEM == 4 ? __uint_as_float(raw[v * ITEM / 4])
                         : widened(v & 1 ? raw[v * ITEM / 4] >> 16 : raw[v * ITEM / 4] & 0xffffu);
#else
#pragma unroll
    for (int v = 0; v < RUN; ++v)
        x[v] = WHOLE || v < held ? logit(logits, at + v) : __int_as_float(0x7fffffff);
#endif
}

__device__ __forceinline__ void load_bias(float (&bias)[RUN], const float* from, int held) {
#if BIAS && BIAS_WIDE
    u32 raw[RUN];
    fetch<BIAS_WIDE>(raw, from);
#pragma unroll
    for (int v = 0; v < RUN; ++v) bias[v] = __uint_as_float(raw[v]);
#else
#pragma unroll
    for (int v = 0; v < RUN; ++v) bias[v] = BIAS && (WHOLE || v < held) ? __ldg(from + v) : 0.0f;
#endif
}

// Largest first, by merge exchange (Batcher; any RUN).  Sorting once and taking from the front costs
// a quarter of searching all RUN keys for each of the K choices.
__device__ __forceinline__ void sort(u64 (&pair)[RUN]) {
#pragma unroll
    for (int block = 1; block < RUN; block *= 2) {
#pragma unroll
        for (int step = block; step > 0; step /= 2) {
#pragma unroll
            for (int i = 0; i < RUN; ++i) {
                const int from = i - step % block;  // pairs begin here in runs of `step`
                const int j = i + step;
                if (from >= 0 && from / step % 2 == 0 && j < RUN && i / (2 * block) == j / (2 * block)) {
                    const u64 high = max(pair[i], pair[j]);
                    pair[j] = min(pair[i], pair[j]);
                    pair[i] = high;
                }
            }
        }
    }
}

// placement._mixed: which replica token and expert lead to, the same on every machine.
__device__ __forceinline__ u32 mixed(u32 token, u32 expert) {
    constexpr u32 MASK = 0x7fffffffu;
    u32 x = (token * 0x9E3779B1u + expert * 0x85EBCA77u) & MASK;
    x = ((x ^ (x >> 15)) * 0x2C1B3C6Du) & MASK;
    x = ((x ^ (x >> 12)) * 0x297A2D39u) & MASK;
    return x ^ (x >> 15);
}

struct Tables {
    const float* bias_E;
    const int* replicas_EX;
    const int* counts_E;
    int width;
    u32 first;
};
struct Results {
    int* ids_TK;
    float* weights_TK;
    int* slots_TK;
    float scale;
};

// Routes one row and writes its results; lane k returns choice k, -1 if there is none.
__device__ __forceinline__ int choose(const void* logits, int row, bool padding, const Tables& tables,
                                      const Results& to, int* ids) {
    const int lane = threadIdx.x % 32;
    const int group = lane / LANES;
    const int inside = lane % LANES * RUN;
    const int base = group * SIZE + inside;
    const int held = WHOLE ? RUN : group < GROUPS ? max(0, min(RUN, SIZE - inside)) : 0;

    // Scores and keys.  A key of 0 cannot be chosen.
    float x[RUN], bias[RUN];
    u32 key[RUN];
    load(x, logits, (long long)row * E + base, held);
    load_bias(bias, tables.bias_E + base, held);
    float most = 0.0f, sum = 0.0f;
#if SCORE == 0
    u32 top_logit = 0;
#pragma unroll
    for (int v = 0; v < RUN; ++v) top_logit = max(top_logit, finite(x[v]) ? ordered(x[v]) : 0u);
    most = unordered(__reduce_max_sync(ALL, top_logit));
    float e[RUN];
#pragma unroll
    for (int v = 0; v < RUN; ++v) {
        e[v] = finite(x[v]) ? exponential(__fsub_rn(x[v], most)) : 0.0f;
        sum = v ? __fadd_rn(sum, e[v]) : e[0];
    }
#pragma unroll
    for (int half = 16; half; half /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(ALL, sum, half));
#endif
    float by[RUN];
#pragma unroll
    for (int v = 0; v < RUN; ++v) {
#if SCORE == 2
        by[v] = sigmoid(x[v]);
#elif SCORE == 0 && BIAS
        by[v] = __fdiv_rn(e[v], sum);
#else
        by[v] = x[v];
#endif
#if BIAS
        by[v] = __fadd_rn(by[v], bias[v]);
#endif
        key[v] = finite(x[v]) && finite(by[v]) && !padding ? ordered(by[v]) : 0u;
    }

#if GROUPS > 1
    // A group is worth the sum of its two best.  Its rank: how many groups stand before it.
    float best = -infinity(), second = -infinity();
#pragma unroll
    for (int v = 0; v < RUN; ++v) {
        const float b = key[v] ? by[v] : -infinity();
        second = fmaxf(second, fminf(best, b));
        best = fmaxf(best, b);
    }
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        const float best2 = __shfl_xor_sync(ALL, best, step);
        const float second2 = __shfl_xor_sync(ALL, second, step);
        second = fmaxf(fminf(best, best2), fmaxf(second, second2));
        best = fmaxf(best, best2);
    }
    const float worth = __fadd_rn(best, second == -infinity() ? 0.0f : second);
    const u32 group_key = best == -infinity() ? 0u : ordered(worth);
    // Its lanes share the comparisons; a ballot brings the answers together.
    int before = 0;
#pragma unroll
    for (int at = 0; at < GROUPS; at += LANES) {
        const int g = at + lane % LANES;
        const u32 other = __shfl_sync(ALL, group_key, g * LANES);
        const bool first = g < GROUPS && (other > group_key || (other == group_key && g < group));
        before += __popc(__ballot_sync(ALL, first) >> group * LANES & ((1ull << LANES) - 1));
    }
    if (before >= KEEP) {
#pragma unroll
        for (int v = 0; v < RUN; ++v) key[v] = 0;
    }
#endif

    // K times: the largest key of the warp; of equals the lowest lane, in it the lowest place.
    u64 pair[RUN];
#pragma unroll
    for (int v = 0; v < RUN; ++v) pair[v] = u64(key[v]) << 32 | u32(RUN - 1 - v);
    sort(pair);
    if (lane < K) ids[lane] = -1;
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
        const u32 front = u32(pair[0] >> 32);
        const u32 top = __reduce_max_sync(ALL, front);
        if (top == 0) break;
        if (lane == __ffs(__ballot_sync(ALL, front == top)) - 1) {
            ids[k] = base + RUN - 1 - int(u32(pair[0]));
#pragma unroll
            for (int v = 0; v < RUN - 1; ++v) pair[v] = pair[v + 1];
            pair[RUN - 1] = 0;
        }
    }
    __syncwarp();
    const int mine = lane < K ? ids[lane] : -1;  // lane k has choice k

    // Tables first: their two dependent loads pass while the weights are computed.
    int slot = -1;
    if (to.slots_TK != nullptr && mine >= 0) {
        const u32 count = __ldg(tables.counts_E + mine);
        if (count - 1 < u32(tables.width)) {  // a broken table leads nowhere, never out of bounds
            const u32 turn = mixed(tables.first + row, mine) % count;
            slot = __ldg(tables.replicas_EX + mine * tables.width + turn);
        }
    }

    // Weights: the unbiased score again, from the logit (one cached load beats RUN selects).
    float w = 0.0f;
    if (mine >= 0) {
        w = logit(logits, (long long)row * E + mine);
#if SCORE == 2
        w = sigmoid(w);
#elif SCORE == 0
        w = __fdiv_rn(exponential(__fsub_rn(w, most)), sum);
#endif
    }
#if SCORE == 1
    const u32 top_chosen = __reduce_max_sync(ALL, mine >= 0 ? ordered(w) : 0u);
    w = mine >= 0 ? exponential(__fsub_rn(w, unordered(top_chosen))) : 0.0f;
#endif
#if RENORMALISE || SCORE == 1
    float total = w;
#pragma unroll
    for (int half = 16; half; half /= 2)
        if (half < K) total = __fadd_rn(total, __shfl_xor_sync(ALL, total, half));
    w = __fdiv_rn(w, __fadd_rn(total, 1e-20f));
#endif
    if (lane < K) {
        const long long cell = (long long)row * K + lane;
        to.ids_TK[cell] = mine;
        to.weights_TK[cell] = __fmul_rn(w, to.scale);
        if (to.slots_TK != nullptr) to.slots_TK[cell] = slot;
    }
    return mine;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
route(const void* logits, const float* bias_E, const int* replicas_EX, const int* counts_E,
      u64* loads_E, const int* live, int* ids_TK, float* weights_TK, int* slots_TK, int rows,
      int width, u32 first, float scale) {
    __shared__ int chosen[WARPS][K];
    const int warp = threadIdx.x / 32;
    const int row = blockIdx.x * WARPS + warp;
#if GATHER
    __shared__ u32 here[E];  // choices of this block
    for (int e = threadIdx.x; e < E; e += WARPS * 32) here[e] = 0;
    __syncthreads();
#endif
    int mine = -1;
    if (row < rows)
        mine = choose(logits, row, live != nullptr && row >= *live,
                      {bias_E, replicas_EX, counts_E, width, first},
                      {ids_TK, weights_TK, slots_TK, scale}, chosen[warp]);
    if (loads_E == nullptr) return;
#if GATHER
    // Neighbouring counters in one instruction: the L2 takes a sector of them at a time, while
    // scattered choices queue up at the few sectors that hold all counters.
    if (mine >= 0) atomicAdd(here + mine, 1u);
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += WARPS * 32)
        if (here[e]) atomicAdd(loads_E + e, u64(here[e]));
#else
    if (mine >= 0) atomicAdd(loads_E + mine, u64(1));
#endif
}
