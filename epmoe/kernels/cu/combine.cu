// Combine alone, in one launch: results of this rank's slots go home, and choices become rows.
//
// The second half of a round that dispatch.cu began, with the same constants.  Every CTA pushes rows,
// each of its moving warps from a ring of its own (copy.cuh), and sums rows when all ranks have pushed.
#include "copy.cuh"
#include "finish.cuh"
#include "reduce.cuh"

constexpr int COMBINERS = 896;  // threads, as many as 72 registers each leave: 128 rows of 7168 are one pass

// One thread: every row of the pool that is any, from number `n` on in steps of `step`, to its home.
inline void push_rows(const World& world, const Private& mine, const u8* results, const int* before,
                      const int* blocks, u32 rings, u32 n, u32 step) {
    Mover mover(rings, threadIdx.x / 32);
    int slot = 0;
    fence_async_global();
    move_rows<RESULT>(mover, [&](u64& from, u64& to) {
        for (; n < (u32)before[LOCAL]; n += step) {
            slot = at_or_after(before, slot, n);
            const u32 row = blocks[slot] * BLOCK + n - before[slot];
            to = address_of(world, mine.homes[row]);
            if (!to) continue;
            from = reinterpret_cast<u64>(results) + (u64)row * RESULT;
            n += step;
            return true;
        }
        return false;
    });
    fence_async_global();
    __threadfence_system();
}

extern "C" __global__ void __launch_bounds__(COMBINERS, 1)
    combine(const __grid_constant__ World world, const __grid_constant__ Private mine,
            const u8* results, const int* slot_rows, const __grid_constant__ Choices choices,
            const float* weights, const float* shared, u8* out, u32 rows) {
    extern __shared__ __align__(128) u8 rings[];
    __shared__ int before[LOCAL + 1], blocks[LOCAL + 1];  // rows, blocks of the pool before each slot
    const u32 round = round_now(world), warp = warp_index();
    Laps laps(mine.trace, WHOLE_CTA, threadIdx.x == 0);
    if (threadIdx.x == 0) counters = mine.epoch;
    if (warp == 0) count_units<LOCAL>(slot_rows, before, 1);
    if (warp == 1) count_units<LOCAL>(slot_rows, blocks, BLOCK);
    if (!__syncthreads_or(faulted(world)) && warp < MOVERS && elected())
        push_rows(world, mine, results, before, blocks, smem(rings), blockIdx.x + gridDim.x * warp,
                  gridDim.x * MOVERS);
    __syncthreads();
    laps.lap(WORK);
    if (threadIdx.x == 0) end_moves(world, round);
    const bool whole =
        __syncthreads_and(warp || (await_words(world, WORD_Y, round) && !faulted(world)));
    laps.lap(WAIT_Y);
    if (blockIdx.x == 0 && threadIdx.x == 0) open_next(world, whole);
    reduce_rows(world, choices, weights, shared, out, rows, whole, blockIdx.x * COMBINERS + threadIdx.x,
                gridDim.x * COMBINERS);
    laps.lap(REDUCE);
    laps.end();
}
