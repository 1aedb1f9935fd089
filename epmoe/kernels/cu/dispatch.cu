// Dispatch alone, in one launch: rows go to the ranks that want them, each once (exchange.cuh).
//
// For experts that somebody else computes, and to measure the links: the fused round begins with the
// same steps.  Afterwards the rows that this rank's slots were asked for lie in its pool, those of a
// slot from a multiple of BLOCK rows on, as the grouped GEMM reads them; combine.cu takes the results.
// In rounds after a fault no slot has rows.
//
// Constants: those of exchange.cuh, with memory for every block: RING == BLOCKS.
#include "pull.cuh"
#include "tell.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    dispatch(const __grid_constant__ World world, const __grid_constant__ Private mine,
             int* slot_rows, const u8* x, const __grid_constant__ Choices choices,
             const float* weights, u32 rows, const __grid_constant__ Head head) {
    extern __shared__ __align__(1024) u8 shared[];
    Laps laps(mine.trace, WHOLE_CTA, threadIdx.x == 0);
    if (threadIdx.x == 0) counters = mine.epoch;
    tell(world, mine, x, choices, weights, rows, head, *reinterpret_cast<Telling*>(shared),
         mine.epoch[EPOCH], round_now(world));
    laps.lap(TELL);
    bool good = __syncthreads_and(warp_index() || await_words(world, WORD_C, this_round));
    laps.lap(WAIT_C);
    if (good) good = pull_rows(world, mine, smem(shared), shared, this_epoch, this_round, gridDim.x, laps);
    __syncthreads();
    laps.lap(PULL);
    laps.end();
    if (blockIdx.x) return;
    const Tables& t = *reinterpret_cast<const Tables*>(shared + TABLES_AT);
    for (int l = threadIdx.x; l < LOCAL; l += blockDim.x) slot_rows[l] = good ? t.before[RANKS][l] : 0;
}
