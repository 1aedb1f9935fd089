// From fp32 sums to bf16 rows: bias, activation, one rounding, and out through shared memory.
//
// The sums of m64nN lie so: thread with quad lane q = lane % 4 and g = lane / 4 of warp w has, for
// every 8 columns j, sums[4 j + 0, 1] = row 16 w + g, columns 8 j + 2 q + {0, 1}, and [4 j + 2, 3]
// the same of row 16 w + g + 8.  Gate and up weights are interleaved by 8 rows, so that the gate of
// a value (j even) and its up (j + 1) are in one thread, here and in the narrow path.
#pragma once
#include "gemm.cuh"

enum Act { NONE, SWIGLU, GEGLU, GELU, GPT_OSS, RELU2 };
constexpr bool gated(Act act) { return act == SWIGLU || act == GEGLU || act == GPT_OSS; }

// 2^x and 1 / x by the special function unit, relative error below 2^-21, denormals 0.  Without the
// scaling around them that __expf and __fdividef have for results that are of no account here: an
// epilogue is straight code, hundreds of these long, and comes from the instruction cache.
inline float exp2_near(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
inline float inverse_near(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

constexpr float LOG2_E = 1.4426950408889634f;
inline float sigmoid(float x, float factor = 1.0f) {  // of factor * x
    return inverse_near(1.0f + exp2_near(x * (-LOG2_E * factor)));
}

// x * (1 + erf(x / sqrt 2)) / 2 with erf by Abramowitz and Stegun 7.1.26 (off by at most 1.5e-7, as
// far as 1 + erff is from exact): no branch, a third of erff's instructions.
inline float gelu(float x) {
    const float a = fabsf(x) * 0.70710678118654752f;
    const float t = inverse_near(1.0f + 0.3275911f * a);
    float tail = 1.061405429f;
    tail = tail * t - 1.453152027f;
    tail = tail * t + 1.421413741f;
    tail = tail * t - 0.284496736f;
    tail = tail * t + 0.254829592f;
    tail *= t * exp2_near(-LOG2_E * a * a);  // 1 - erf(a)
    return 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
}

// A NaN stays one, which fminf and fmaxf would not promise.
inline float at_most(float x, float limit) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(limit));
    return x;
}
inline float at_least(float x, float limit) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(limit));
    return x;
}

// `up` is ignored by activations without a gate.  gate <= limit, |up| <= limit.
template <Act act>
inline float activate(float gate, float up, float limit) {
    if (act != NONE) gate = at_most(gate, limit);
    if (gated(act)) up = at_least(at_most(up, limit), -limit);
    switch (act) {
        case SWIGLU: return gate * sigmoid(gate) * up;
        case GEGLU: return gelu(gate) * up;
        case GPT_OSS: return gate * sigmoid(gate, 1.702f) * (up + 1.0f);
        case GELU: return gelu(gate);
        case RELU2: return gate < 0.0f ? 0.0f : gate * gate;
        default: return gate;
    }
}

// One value from its sums: bias, activation, router weight.  Without an activation this is the
// second GEMM, where the weight has been applied to the rows already and only the bias still needs
// it: W2 (m w) + b w.
template <Act act, bool biased, bool scaled>
inline float finish(float gate, float up, float gate_bias, float up_bias, float scale,
                    float limit) {
    if (act == NONE) return biased ? gate + (scaled ? gate_bias * scale : gate_bias) : gate;
    if (biased) gate += gate_bias, up += up_bias;
    const float value = activate<act>(gate, up, limit);
    return scaled ? value * scale : value;
}

// Keeps the compiler from computing many of these side by side: 64 erff at once spill.
inline void in_order(float& v) { asm volatile("" : "+f"(v)); }

// What the epilogue of one GEMM needs besides the sums.
struct Out {
    u16* values;          // [pool, width], if rows stay here
    int width;            // columns of a row of `values`
    const u16* bias;      // [slots, 2 width or width], in the order of the weights, or null
    const float* scale;   // [pool], the router weight of a row, or null
    float limit;

    inline u64 address_of(int row) const { return reinterpret_cast<u64>(values + (u64)row * width); }
};

// Results of two times 8 columns, as stmatrix takes them; `block` counts 8 columns of the GEMM, `left`
// is the first column of the tile, `all` what the slot has.
template <Act act, bool biased, bool scaled>
inline void finish_pair(u32 (&v)[4], float (&sums)[TILE_N / 2], const Out& out, int block, u32 bias,
                        int left, int all, const float (&scale)[2]) {
    constexpr int per = gated(act) ? 2 : 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int mine = block + per * i, b = 4 * mine;
        u32 gates = 0, ups = 0;  // biases of two neighbours
        if (biased && left + 8 * mine < all) {
            gates = load_const(out.bias + bias + 8 * mine);
            if (per == 2) ups = load_const(out.bias + bias + 8 * mine + 8);
        }
        float r[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (act == GELU || act == GEGLU) in_order(sums[b + e]);
            if (act == GEGLU) in_order(sums[b + 4 + e]);
            r[e] = finish<act, biased, scaled>(
                sums[b + e], per == 2 ? sums[b + 4 + e] : 0.0f, e % 2 ? bf16_high(gates) : bf16_low(gates),
                e % 2 ? bf16_high(ups) : bf16_low(ups), scale[e / 2], out.limit);
            if (act == GELU || act == GEGLU) in_order(r[e]);
        }
        v[2 * i] = pack_bf16(r[0], r[1]);
        v[2 * i + 1] = pack_bf16(r[2], r[3]);
    }
}

// The router weights of this lane's rows, upper and lower half of the warp's.
template <bool scaled>
inline void load_scale(float (&scale)[2], const Out& out, int row, int live) {
    if (!scaled) return;
    const int mine = 16 * (warp_index() % 4) + lane_index() / 4;
    if (mine < live) scale[0] = out.scale[row + mine];
    if (mine + 8 < live) scale[1] = out.scale[row + mine + 8];
}

// Writes the results of one warpgroup: `live` of its 64 rows from pool row `row`, from tile of
// columns `column`.  The staging buffer holds 128 columns; wider results go in two passes.
template <Act act, bool biased, bool scaled>
inline void write_out(float (&sums)[TILE_N / 2], const Out& out, const TensorMap& map, u32 staging,
                      int slot, int row, int live, int column, u32 group) {
    constexpr int per = gated(act) ? 2 : 1;            // columns of the GEMM to one of the result
    constexpr int wide = TILE_N / per;                 // columns of the result in this tile
    constexpr int pass = biased || wide < 128 ? 64 : 128;  // of one pass; the biases of more spill
    constexpr int quads = pass / 8;                    // 16 bytes each, of a row
    const u32 lane = lane_index(), warp = warp_index() % 4, thread = threadIdx.x % 128;
    const int left = column * wide, all = out.width * per;
    const u32 bias = slot * all + column * TILE_N + 2 * (lane % 4);
    float scale[2] = {1.0f, 1.0f};
    load_scale<scaled>(scale, out, row, live);
    // stmatrix: lane i names row i % 8 of the 8 x 8 matrix i / 8; matrices are (upper, lower half
    // of the warp's rows) of one 8 columns, then of the next 8.
    const u32 own = 16 * warp + lane % 16, chunk = lane / 16;
#pragma unroll
    for (int first = 0; first < wide; first += pass) {
        if (thread == 0) bulk_wait_read<0>();
        group_sync(1 + group);
#pragma unroll
        for (int j = 0; j < quads; j += 2) {
            u32 v[4];
            finish_pair<act, biased, scaled>(v, sums, out, per * (first / 8 + j), bias,
                                             column * TILE_N, all, scale);
            const u32 at = staging + j / 8 * 8192 + own * 128 + (((j % 8) + chunk) ^ (own % 8)) * 16;
            stmatrix4(at, v[0], v[1], v[2], v[3]);
        }
        const int x = left + first;
        if (live == 64) {
            fence_async();
            group_sync(1 + group);
            if (thread == 0) {
                tma_store(map, staging, x, row);
                if (pass > 64 && x + 64 < out.width) tma_store(map, staging + 8192, x + 64, row);
                bulk_commit();
            }
        } else {
            group_sync(1 + group);
#pragma unroll 1
            for (int i = 0; i < quads / 2; ++i) {
                const int r = thread / quads + 128 / quads * i, c = thread % quads;
                const u32 at = staging + c / 8 * 8192 + r * 128 + ((c % 8) ^ (r % 8)) * 16;
                if (r < live && x + 8 * c < out.width)
                    store_global(out.values + (u64)(row + r) * out.width + x + 8 * c,
                                 load_shared(at));
            }
        }
    }
}
