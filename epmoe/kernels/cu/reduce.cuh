// The last step of a round: a row's results become its output.
#pragma once
#include "choices.cuh"
#include "mailbox.cuh"
#include "signals.cuh"

// The sum over choices, ascending, in fp32, one rounding; NaN if the round is not `good`.  Thread
// `thread` of `threads` in the whole grid.
//
// This code runs once a round and comes from memory: a KiB of it costs up to half a microsecond (16
// KiB, of two items at a time, took 4 us for 128 rows of qwen3-30b; its loads took 2).
inline void reduce_rows(const World& world, const Choices& choices, const float* weights,
                        const float* shared, u8* out, u32 rows, bool good, u32 thread, u32 threads) {
    constexpr u32 quads = HIDDEN / 8;
    static_assert((u64)MAX_ROWS * quads < 1ull << 31, "items are counted in 32 bits");
#pragma unroll 1
    for (u32 item = thread; item < rows * quads; item += threads) {
        const u32 row = item / quads, quad = item % quads;
        const u8* cells = at<u8>(world, world.rank, RESULTS_AT) + (u64)row * CHOICES * RESULT + quad * 16;
        float sum[8] = {};
#pragma unroll 1
        for (u32 first = 0; first < CHOICES; first += 8) {
            // All loads first: the rows come with what says whether they count, not after it.
            Quad q[8] = {};
            float w[8] = {};
            bool counts[8] = {};
#pragma unroll
            for (u32 k = 0; k < 8 && k < CHOICES - first; ++k)
                q[k] = load_global(cells + (first + k) * RESULT);
#pragma unroll
            for (u32 k = 0; k < 8 && k < CHOICES - first; ++k) {
                const u32 cell = row * CHOICES + first + k;
                w[k] = WEIGHT_IN_FC2 ? 1.0f : __ldg(weights + cell);
                counts[k] = choices.names(cell);
            }
#pragma unroll
            for (u32 k = 0; k < 8; ++k) {
                // The cell of an unused choice holds an older round's bits.
                const Quad v = counts[k] ? q[k] : Quad{};
                const float weight = counts[k] ? w[k] : 0.0f;
                const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (u32 p = 0; p < 4; ++p) {
                    // Two roundings, as the host does: no fused multiply-add.  An unused choice
                    // adds 0 * 0 = 0, which changes no sum: they begin at +0.
                    sum[2 * p] = __fadd_rn(sum[2 * p], __fmul_rn(weight, bf16_low(pairs[p])));
                    sum[2 * p + 1] = __fadd_rn(sum[2 * p + 1], __fmul_rn(weight, bf16_high(pairs[p])));
                }
            }
        }
        if (shared)
            for (u32 e = 0; e < 8; ++e) sum[e] += shared[(u64)item * 8 + e];
        if (!good)
            for (u32 e = 0; e < 8; ++e) sum[e] = __int_as_float(0x7fffffff);
        store_global(out + (u64)item * 16, {pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                                            pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7])});
    }
}
