// out[rows of slot s] = act(rows[rows of slot s] * weights[s]^T), for many rows a slot and for few.
//
// Constants: SLOTS, N (weight rows of a slot), K, ACT, BIAS, SCALE, COUNTED (tiles by a counter, not
// by a stride); TALL is 0 for the wide path (clusters of 2), else the narrow path's tile height; SHARED,
// bytes of shared memory that the launch asks for.
#include "narrow.cuh"

constexpr int WIDTH = gated(ACT) ? N / 2 : N;

#if TALL == 0
constexpr int COLUMNS = (N + TILE_N - 1) / TILE_N;
constexpr int K_STEPS = K / TILE_K;
constexpr int PER = (COLUMNS + 1) / 2;
static_assert(TABLE_AT + 4 * (SLOTS + 1) <= SHARED, "the launch asks for too little shared memory");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm(const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap weights,
                 const __grid_constant__ TensorMap results, const int* counts, u16* values,
                 const u16* bias, const float* scale, float limit, Shares* shares) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = smem(shared), warp = warp_index(), rank = cluster_rank();
    const bool feeds = warp == GROUPS * 4;  // the other three of its group have nothing to do
    int* before = (int*)(shared + TABLE_AT);
    if (warp == 0) count_units<SLOTS>(counts, before, BLOCK);
    if (feeds && lane_index() == 0) {
        order_init<2, GROUPS * 4>(base + ORDER_AT);
        ring_init(base);
        prefetch_map(rows), prefetch_map(weights), prefetch_map(results);
    }
    __syncthreads();
    cluster_sync();

    const u32 tiles = before[SLOTS] * PER;
    Ring ring{base};
    Order<COUNTED, 2> order{base + ORDER_AT, shares};
    if (warp >= GROUPS * 4) {
        registers_down<72>();  // with 104, as in a round, this one spills (gelu, CUDA 13.5)
        for (u32 t; feeds && (t = order.next(true)) < tiles;) {
            const Tile tile = wide_tile<SLOTS, COLUMNS>(before, t, rank);
            const int live = counts[tile.slot] - (tile.block - before[tile.slot]) * BLOCK;
            if (!tile.none && elected())
                feed(ring, rows, weights, tile, live, rank, K_STEPS, Unhurried());
            __syncwarp();
        }
        if (feeds && rank == 0 && lane_index() == 0) order.finish();
        cluster_sync();
    } else {
        registers_up<216>();
        const u32 group = warp / 4, staging = base + STAGING_AT + group * STAGING_BYTES;
        const Out out{values, WIDTH, bias, scale, limit};
        for (u32 t; (t = order.next(false)) < tiles;) {
            const Tile tile = wide_tile<SLOTS, COLUMNS>(before, t, rank);
            if (tile.none) continue;
            const int row = tile.block * BLOCK + group * 64;
            const int live = min(64, counts[tile.slot] - (row - before[tile.slot] * BLOCK));
            if (live <= 0) {
                skip(ring, K_STEPS);
                continue;
            }
            float sums[TILE_N / 2];
            multiply(ring, sums, group, K_STEPS, Nothing());
            write_out<ACT, BIAS, SCALE>(sums, out, results, staging, tile.slot, row, live, tile.column,
                                        group);
        }
        if (threadIdx.x % 128 == 0) bulk_wait<0>();
        cluster_sync();  // a CTA that left could still be sent arrivals
    }
}
#else
constexpr int TILES = (N + TALL - 1) / TALL;
constexpr int K_STEPS = (K + NARROW_K - 1) / NARROW_K;
static_assert(Narrow<TALL>::table_at + 8 * (SLOTS + 1) <= SHARED, "the launch asks for too little shared memory");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm(const __grid_constant__ TensorMap few, const __grid_constant__ TensorMap many,
                 const __grid_constant__ TensorMap weights, const int* counts, u16* values,
                 const u16* bias, const float* scale, float limit, Shares* shares) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = smem(shared), warp = warp_index();
    const bool feeds = warp == GROUPS * 4;
    Narrow<TALL> ring{base};
    int* blocks = (int*)(shared + ring.table_at);
    int* chunks = blocks + SLOTS + 1;
    if (warp == 0) count_units<SLOTS>(counts, blocks, BLOCK);
    if (warp == 1) count_units<SLOTS>(counts, chunks, CHUNK);
    if (feeds && lane_index() == 0) {
        order_init<1, GROUPS * 4>(base + ring.order_at);
        ring.init();
        bar_init_done();
        prefetch_map(few), prefetch_map(many), prefetch_map(weights);
    }
    __syncthreads();

    const u32 tiles = chunks[SLOTS] * TILES;
    Order<COUNTED, 1> order{base + ring.order_at, shares};
    if (warp >= GROUPS * 4) {
        registers_down<FEED_REGISTERS>();
        for (u32 t; feeds && (t = order.next(true)) < tiles;) {
            const NarrowTile n = narrow_tile<SLOTS, TILES>(chunks, blocks, counts, t);
            if (elected()) feed(ring, few, many, weights, n, K_STEPS, Unhurried());
            __syncwarp();
        }
        if (feeds && lane_index() == 0) order.finish();
    } else {
        registers_up<MULTIPLY_REGISTERS>();
        const u32 group = warp / 4, staging = base + ring.staging_at + group * CHUNK * PITCH;
        const Out out{values, WIDTH, bias, scale, limit};
        u32 turn = 0;
        if (TALL == 64 && group == 1) turn_give(TURN);
        for (u32 t; (t = order.next(false)) < tiles;) {
            const NarrowTile n = narrow_tile<SLOTS, TILES>(chunks, blocks, counts, t);
            if (TALL == 64 && turn++ % 2 != group)
                ring.jump(K_STEPS);
            else
                narrow_run<ACT, BIAS, SCALE>(ring, out, staging, n, group, K_STEPS, Nothing{},
                                             [&](int row) { return out.address_of(row); });
        }
    }
}
#endif
