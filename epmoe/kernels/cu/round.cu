// One round in one launch: from a rank's rows to its results, over the slabs of all ranks.
//
// All CTAs stage rows and tell the peers what this rank asks of them.  When all ranks have told, the
// first PULLERS CTAs (whole clusters) pull rows, the others begin the tile loop over both GEMMs, and
// those that have pulled join them.  FC1 tiles wait for the rows of their block, FC2 tiles for the FC1
// tiles of theirs; each writes its results to where they are wanted.  At the end everyone reduces.  Any
// wait may fail (signals.cuh): then nobody begins anything new, everyone leaves, the output is NaN.
//
// Constants: those of exchange.cuh; INNER, ACT, BIAS, COUNTED, PULLERS, LAG; TALL as in grouped_gemm.cu.
#if TALL == 0
#include "many.cuh"
#else
#include "few.cuh"
#endif
#include "finish.cuh"
#include "pull.cuh"
#include "reduce.cuh"
#include "tell.cuh"

constexpr u32 FEEDS = GROUPS * 4, SCOUTS = FEEDS + 1;  // warps

// In shared memory where it fits: each acquire empties L1, so a table in global memory is slow.
constexpr u32 LIVE_WORDS = live_words(LOCAL, UNIT < BLOCK);
constexpr bool LIVE_SHARED = LIVE_AT + 4 * LIVE_WORDS <= MOST_SHARED;
static_assert(TABLES_AT + sizeof(Tables) <= RING_END, "the tables of the carriers do not fit");
static_assert(LIVE_AT <= MOST_SHARED, "the ring and the hands do not fit");

inline Live live_of(const Private& mine, u8* shared) {
    return Live(LIVE_SHARED ? reinterpret_cast<int*>(shared + LIVE_AT)
                            : mine.scratch + blockIdx.x * LIVE_WORDS,
                LOCAL, UNIT < BLOCK);
}

inline int rows_of(const World& world, int l) {
    const int* counts = at<int>(world, world.rank, COUNTS_AT) + world.rank * LOCAL + l;
    int sum = 0;
    for (int r = 0; r < RANKS; ++r) sum += counts[r * SLOTS];
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fused_round(const __grid_constant__ Maps maps, const __grid_constant__ World world,
                const __grid_constant__ Private mine, const __grid_constant__ Call call) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = smem(shared), warp = warp_index();
    Laps laps(mine.trace, WHOLE_CTA, threadIdx.x == 0);
    if (threadIdx.x == 0) counters = mine.epoch;
    if (threadIdx.x == FEEDS * 32) {  // not by `warp`: the comparison would be kept for below, and spill
        init_tiles(base);
        prefetch_maps(maps);
    }
    tell(world, mine, call.x, call.choices, call.weights, call.rows, call.head,
         *reinterpret_cast<Telling*>(shared), mine.epoch[EPOCH], round_now(world));
    laps.lap(TELL);
    const bool good = __syncthreads_and(warp || await_words(world, WORD_C, this_round));
    laps.lap(WAIT_C);
    if (good && blockIdx.x < PULLERS) {
        pull_rows(world, mine, base, shared, this_epoch, this_round, PULLERS, laps);
        cluster_sync();  // the copy engine of the other CTA writes here too
        laps.lap(PULL);
    } else {
        cluster_sync();  // barriers are made; whoever pulls needs them later
    }
    if (warp == 0) {
        const Live live = live_of(mine, shared);
        if (good) find_live<LOCAL, UNIT>(live, [&](int l) { return max(rows_of(world, l), 0); });
        __syncwarp();
        if (lane_index() == 0 && (!good || (u32)live.block[*live.count] > BLOCKS)) none_live(live);
    }
    __syncthreads();
    laps.lap(PLAN);
    if (warp >= FEEDS) {
        registers_down<FEED_REGISTERS>();
        if (warp == FEEDS) feed_stream(world, mine, maps, base, this_epoch);
        if (warp == SCOUTS) scout_stream(world, mine, live_of(mine, shared), base);
        cluster_sync();
    } else {
        registers_up<MULTIPLY_REGISTERS>();
        multiply_stream(world, mine, maps, call, base, warp / 4);
        __threadfence_system();  // this thread's results have arrived
        both_sync();
        if (threadIdx.x == 0) end_moves(world, this_round);
        laps.lap(WORK);
        const bool whole = both_and(warp || (await_words(world, WORD_Y, this_round) && !faulted(world)));
        if (blockIdx.x == 0 && threadIdx.x == 0) open_next(world, whole);
        laps.lap(WAIT_Y);
        reduce_rows(world, call.choices, call.weights, call.shared, call.out, call.rows, whole,
                    blockIdx.x * GROUPS * 128 + threadIdx.x, gridDim.x * GROUPS * 128);
        laps.lap(REDUCE);
        laps.end();
        __syncwarp();
        cluster_sync();  // a CTA that left could still be sent arrivals
    }
}
