// The last step of a round: a row's results become its output.
#pragma once
#include "exchange.cuh"

// The sum over choices, ascending, in fp32, one rounding; NaN if the round is not `good`.  Thread
// `thread` of `threads` in the whole grid.
inline void reduce_rows(const World& world, const Choices& choices, const float* weights,
                        const float* shared, u8* out, u32 rows, bool good, u64 thread, u64 threads) {
    constexpr int quads = HIDDEN / 8;
    const u64 all = (u64)rows * quads;
    for (u64 i = thread; i < all; i += threads) {
        const u32 row = i / quads, quad = i % quads;
        float sum[8] = {};
        const u8* cells = at<u8>(world, world.rank, RESULTS_AT) + (u64)row * CHOICES * RESULT;
        for (int first = 0; first < CHOICES; first += 8) {  // eight loads under way at a time
            Quad q[8];
            float w[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const int choice = first + k;
                const int slot = choice < CHOICES ? choices.slot(row * CHOICES + choice) : -1;
                // The cell of an unused choice holds an older round's bits.
                q[k] = Quad{};
                w[k] = 0.0f;
                if (slot >= 0) {
                    q[k] = *reinterpret_cast<const Quad*>(cells + choice * RESULT + quad * 16);
                    w[k] = WEIGHT_IN_FC2 ? 1.0f : __ldg(weights + row * CHOICES + choice);
                }
            }
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const u32 pairs[4] = {q[k].x, q[k].y, q[k].z, q[k].w};
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    // Two roundings, as the host does: no fused multiply-add.  An unused choice
                    // adds 0 * 0 = 0, which changes no sum: they begin at +0.
                    sum[2 * p] = __fadd_rn(sum[2 * p], __fmul_rn(w[k], bf16_low(pairs[p])));
                    sum[2 * p + 1] = __fadd_rn(sum[2 * p + 1], __fmul_rn(w[k], bf16_high(pairs[p])));
                }
            }
        }
        if (shared)
            for (int e = 0; e < 8; ++e) sum[e] += shared[(u64)row * HIDDEN + quad * 8 + e];
        if (!good)
            for (int e = 0; e < 8; ++e) sum[e] = __int_as_float(0x7fffffff);
        const Quad packed = {pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                             pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7])};
        store_global(out + ((u64)row * quads + quad) * 16, packed);
    }
}
