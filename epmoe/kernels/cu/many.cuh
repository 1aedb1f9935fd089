// The many-rows half of a round: both GEMMs as one stream of tiles of 128 rows x 256 columns.
#pragma once
#include "hands.cuh"

constexpr int COLUMNS1 = (N1 + TILE_N - 1) / TILE_N, COLUMNS2 = (HIDDEN + TILE_N - 1) / TILE_N;
constexpr int PER1 = (COLUMNS1 + 1) / 2, PER2 = (COLUMNS2 + 1) / 2;
constexpr int CTAS = 2, UNIT = BLOCK;
using Tiles = Stream<PER1, PER2, LAG, UNIT>;

constexpr u32 HAND_AT = ORDER_AT + ORDER_BYTES;  // after the ring and the staging
constexpr u32 LIVE_AT = HAND_AT + HANDS * HAND_BYTES;

struct Maps {
    TensorMap rows, w1, mid, w2, results;
};

inline void init_tiles(u32 base) {
    order_init<CTAS, 0>(base + ORDER_AT);
    hands_init(base + HAND_AT);
    ring_init(base);
}

// The feeding warp: tiles in the order of the stream, each when what it needs is there.
inline void feed_stream(const World& world, const Private& mine, const Maps& maps, const Live& live,
                        u32 base, u32 epoch, bool good) {
    const u32 rank = cluster_rank(), clusters = (gridDim.x - COMM) / 2;
    const u32 all = good ? Tiles::tiles(live) : 0;
    Ring ring{base};
    Hands hands{base + HAND_AT};
    Order<COUNTED, 2> order{base + ORDER_AT, reinterpret_cast<Shares*>(mine.epoch + NEXT)};
    Tiles stream;
    Laps laps(mine.trace, FEEDER);
    const auto lap = [&](Span span) {
        if (TRACE && lane_index() == 0) laps.lap(span);
    };
    if (TRACE && lane_index() == 0) laps.begin();
    for (;;) {
        const u32 t = order.lead(clusters, (blockIdx.x - COMM) / 2, all, [&] { return faulted(world); });
        lap(TURN_ID);
        if (t >= all) break;
        stream.to(live, t);
        const int rest = t - stream.begin;
        Tile tile =
            stream.gemm
                ? tile_in_group<COLUMNS2>(stream.slot, stream.row / BLOCK, stream.units, rest, rank)
                : tile_in_group<COLUMNS1>(stream.slot, stream.row / BLOCK, stream.units, rest, rank);
        if (tile.none) continue;
        if (lane_index() == 0) {
            const int rows = min(stream.rows - (tile.block * BLOCK - stream.row), BLOCK);
            lap(FIND_TILE);
            const int block = tile.block;
            tile.block = in_ring(block);
            hands.give({stream.gemm, tile.slot, tile.block * BLOCK, block, tile.column, rows});
            lap(HAND_ON);
            await_inputs(world, mine, epoch, stream.gemm, block, rows);
            lap(stream.gemm ? WAIT_HALF : WAIT_ROWS);
            feed(ring, stream.gemm ? maps.mid : maps.rows, stream.gemm ? maps.w2 : maps.w1, tile, rank,
                 (stream.gemm ? INNER : HIDDEN) / TILE_K);
            lap(FEED);
        }
        __syncwarp();
    }
    if (TRACE && lane_index() == 0) laps.end();
    if (lane_index() == 0) hands.give({2, 0, 0, 0, 0, 0});
    __syncwarp();
}

// A warpgroup: multiplies what it is handed, and counts a tile as done once its results can be read.
inline void multiply_stream(const Private& mine, const Maps& maps, const Call& call, u32 base,
                            u32 epoch, u32 group) {
    const u32 staging = base + STAGING_AT + group * STAGING_BYTES, thread = threadIdx.x % 128;
    const Out half{mine.mid, INNER, call.bias1, mine.scale, call.limit};
    const Out whole{reinterpret_cast<u16*>(mine.results), HIDDEN, call.bias2, mine.scale, call.limit};
    Ring ring{base};
    Hands hands{base + HAND_AT};
    Laps laps(mine.trace, group ? SECOND_GROUP : FIRST_GROUP);
    const auto lap = [&](Span span) {
        if (TRACE && thread == 0) laps.lap(span);
    };
    if (TRACE && thread == 0) laps.begin();
    int pending = -1;  // thread 0: the counter of a tile whose stores have not landed yet
    const auto flush = [&] {
        if (pending >= 0) {
            bulk_wait<0>();
            fence_async_global();
            add_release(mine.blocks + pending, 1);
            pending = -1;
        }
    };
    for (;;) {
        if (!bar_test(hands.full(), hands.phase)) flush();
        lap(FLUSH);
        const Hand hand = hands.take();
        lap(TAKE);
        if (hand.gemm == 2) break;
        const int steps = (hand.gemm ? INNER : HIDDEN) / TILE_K, slot = hand.slot;
        const int row = hand.row + group * 64, rows = min(64, hand.rows - (int)group * 64);
        if (rows <= 0) {
            skip(ring, steps);
            continue;
        }
        float sums[TILE_N / 2];
        multiply(ring, sums, group, steps, flush);
        flush();
        lap(hand.gemm ? FC2 : FC1);
        if (hand.gemm)
            write_out<NONE, BIAS, BIAS && WEIGHT_IN_FC2>(sums, whole, maps.results, staging, slot, row,
                                                         rows, hand.column, group);
        else
            write_out<ACT, BIAS, WEIGHT_IN_FC2>(sums, half, maps.mid, staging, slot, row, rows,
                                                hand.column, group);
        lap(OUT);
        const int done = progress(mine, epoch, hand.gemm ? WHOLE : HALF) - mine.blocks + hand.block;
        if (hand.column >= (hand.gemm ? COLUMNS2 : COLUMNS1)) continue;
        if (rows == 64) {
            if (thread == 0) pending = done;
        } else {
            __threadfence();
            fence_async_global();
            group_sync(1 + group);
            if (thread == 0) add_release(mine.blocks + done, 1);
        }
    }
    flush();
    if (TRACE && thread == 0) laps.end();
}
