// The last step of a round: a row's results become its output.
#pragma once
#include "tell.cuh"

// The sum over choices, ascending, in fp32, one rounding; NaN if the round is not `good`.  Thread
// `thread` of `threads` in the whole grid.
inline void reduce_rows(const World& world, const Choices& choices, const float* weights,
                        const float* shared, u8* out, u32 rows, bool good, u64 thread, u64 threads) {
    constexpr int quads = HIDDEN / 8, PAIR = 2;  // 16 loads under way at a time
    const u64 all = (u64)rows * quads;
    for (u64 i = thread; i < all; i += PAIR * threads) {
        float sum[PAIR][8] = {};
#pragma unroll 1
        for (int first = 0; first < CHOICES; first += 8) {
            // All loads first: the rows come with what says whether they count, not after it.
            Quad q[PAIR][8] = {};
            float w[PAIR][8];
            bool counts[PAIR][8] = {};
#pragma unroll
            for (int n = 0; n < PAIR; ++n) {
                const u64 item = i + n * threads;
                const u32 row = item / quads, quad = item % quads;
                if (item >= all) break;
                const u8* cells = at<u8>(world, world.rank, RESULTS_AT) + (u64)row * CHOICES * RESULT;
#pragma unroll
                for (int k = 0; k < 8 && k < CHOICES - first; ++k)
                    q[n][k] = load_global(cells + (first + k) * RESULT + quad * 16);
            }
#pragma unroll
            for (int n = 0; n < PAIR; ++n) {
                const u64 item = i + n * threads;
                const u32 cell = item / quads * CHOICES + first;
                if (item >= all) break;
#pragma unroll
                for (int k = 0; k < 8 && k < CHOICES - first; ++k) {
                    w[n][k] = WEIGHT_IN_FC2 ? 1.0f : __ldg(weights + cell + k);
                    counts[n][k] = choices.names(cell + k);
                }
            }
#pragma unroll
            for (int n = 0; n < PAIR; ++n)
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    // The cell of an unused choice holds an older round's bits.
                    const Quad v = counts[n][k] ? q[n][k] : Quad{};
                    const float weight = counts[n][k] ? w[n][k] : 0.0f;
                    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (int p = 0; p < 4; ++p) {
                        // Two roundings, as the host does: no fused multiply-add.  An unused choice
                        // adds 0 * 0 = 0, which changes no sum: they begin at +0.
                        float* s = sum[n] + 2 * p;
                        s[0] = __fadd_rn(s[0], __fmul_rn(weight, bf16_low(pairs[p])));
                        s[1] = __fadd_rn(s[1], __fmul_rn(weight, bf16_high(pairs[p])));
                    }
                }
        }
#pragma unroll
        for (int n = 0; n < PAIR; ++n) {
            const u64 item = i + n * threads;
            if (item >= all) break;
            float* s = sum[n];
            if (shared)
                for (int e = 0; e < 8; ++e) s[e] += shared[item * 8 + e];
            if (!good)
                for (int e = 0; e < 8; ++e) s[e] = __int_as_float(0x7fffffff);
            store_global(out + item * 16, {pack_bf16(s[0], s[1]), pack_bf16(s[2], s[3]),
                                           pack_bf16(s[4], s[5]), pack_bf16(s[6], s[7])});
        }
    }
}
