// The many-rows half of a round: both GEMMs as one stream of tiles of 128 rows x TILE_N columns.
#pragma once
#include "hands.cuh"
#include "send.cuh"

constexpr int COLUMNS1 = (N1 + TILE_N - 1) / TILE_N, COLUMNS2 = (HIDDEN + TILE_N - 1) / TILE_N;
constexpr int PER1 = (COLUMNS1 + 1) / 2, PER2 = (COLUMNS2 + 1) / 2;
constexpr int CTAS = 2, UNIT = BLOCK;
using Tiles = Stream<PER1, PER2, LAG, UNIT>;

constexpr u32 RING_END = BARS_AT;
constexpr u32 HAND_AT = ORDER_AT + ORDER_BYTES;  // after the ring and the staging
constexpr u32 LIVE_AT = HAND_AT + HANDS_BYTES;

struct Maps {
    TensorMap rows, w1, mid, w2;
};

inline void init_tiles(u32 base) {
    order_init<CTAS, 0>(base + ORDER_AT);
    hands_init(base + HAND_AT);
    ring_init(base);
}

inline void prefetch_maps(const Maps& maps) {
    for (const TensorMap* map : {&maps.rows, &maps.w1, &maps.mid, &maps.w2}) prefetch_map(*map);
}

// The scouting warp: which tiles, in the order of the stream.
inline void scout_stream(const World& world, const Private& mine, const Live& live, u32 base) {
    const u32 rank = cluster_rank(), clusters = (gridDim.x - PULLERS) / 2;
    const u32 all = Tiles::tiles(live);
    Hands hands{base + HAND_AT};
    Order<COUNTED, 2> order{base + ORDER_AT, reinterpret_cast<Shares*>(counter(NEXT))};
    Tiles stream;
    Laps laps(mine.trace, SCOUT, lane_index() == 0);
    for (;;) {
        hands.await_ask();
        laps.lap(IDLE);
        const u32 t = order.lead(clusters, (blockIdx.x - PULLERS) / 2, all, [&] { return faulted(world); });
        laps.lap(TURN_ID);
        if (t >= all) break;
        stream.to(live, t);
        const int rest = t - stream.begin;
        const Tile tile =
            stream.gemm
                ? tile_in_group<COLUMNS2>(stream.slot, stream.row / BLOCK, stream.units, rest, rank)
                : tile_in_group<COLUMNS1>(stream.slot, stream.row / BLOCK, stream.units, rest, rank);
        laps.lap(FIND_TILE);
        if (tile.none) {
            if (lane_index() == 0) hands.ask();  // nobody else will
            __syncwarp();
            continue;
        }
        if (lane_index() == 0) {
            const int rows = min(stream.rows - (tile.block * BLOCK - stream.row), BLOCK);
            hands.give({stream.gemm, tile.same_rows, rows, rows, tile.slot, tile.column,
                        in_ring(tile.block) * BLOCK, tile.block});
        }
        __syncwarp();
        laps.lap(HAND_ON);
    }
    if (lane_index() == 0) hands.give({2});
    __syncwarp();
    laps.end();
}

// The feeding warp: weights depend on nothing, rows are fetched when they are there.
inline void feed_stream(const World& world, const Private& mine, const Maps& maps, u32 base,
                        u32 epoch) {
    const u32 rank = cluster_rank();
    Ring ring{base};
    Hands hands{base + HAND_AT};
    Laps laps(mine.trace, FEEDER, lane_index() == 0);
    for (;;) {
        const Hand hand = unpacked(hands.take());
        laps.lap(TAKE);
        if (hand.gemm == 2) break;
        if (elected()) {
            const Tile tile{hand.slot, hand.row / BLOCK, hand.column, hand.same_rows, false};
            const int steps = (hand.gemm ? INNER : HIDDEN) / TILE_K;
            feed(ring, hand.gemm ? maps.mid : maps.rows, hand.gemm ? maps.w2 : maps.w1, tile, hand.rows,
                 rank, steps, Feeding{world, mine, hands, hand, laps, epoch, steps});
            laps.lap(FEED);
        }
        __syncwarp();
    }
    laps.end();
}

// A warpgroup: multiplies what it is handed.  A tile of FC1 counts as done once its results can be
// read, one of FC2 when nobody needs its rows any more: its results are seen to at the end.
inline void multiply_stream(const World& world, const Private& mine, const Maps& maps,
                            const Call& call, u32 base, u32 group) {
    const u32 staging = base + STAGING_AT + group * STAGING_BYTES, thread = threadIdx.x % 128;
    const Out half{mine.mid, INNER, call.bias1, mine.scale, call.limit};
    const Out whole{nullptr, HIDDEN, call.bias2, mine.scale, call.limit};
    Ring ring{base};
    Hands hands{base + HAND_AT};
    Laps laps(mine.trace, group ? SECOND_GROUP : FIRST_GROUP, thread == 0);
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
        if (!bar_test(hands.full(), hands.phase())) flush();
        laps.lap(FLUSH);
        Quad packed = hands.take();
        laps.lap(TAKE);
        float sums[TILE_N / 2];
        u32 home = HOMELESS;
        {
            const Hand hand = unpacked(packed);
            if (hand.gemm == 2) break;
            const int steps = (hand.gemm ? INNER : HIDDEN) / TILE_K;
            const int row = hand.row + group * 64, rows = hand.rows - (int)group * 64;
            if (rows <= 0) {
                flush();  // what this tile waits for may be waiting for that
                skip(ring, steps);
                continue;
            }
            if (hand.gemm) {  // known once the first stage is there; not at the end, it takes 1 us
                if (!bar_test(ring.full(), ring.phase())) flush();
                bar_wait(ring.full(), ring.phase());
                home = home_of_row(mine, row, rows);
            }
            multiply(ring, sums, group, steps, flush);
        }
        flush();
        hold(packed);
        const Hand hand = unpacked(packed);
        const int slot = hand.slot;
        const int row = hand.row + group * 64, rows = min(64, hand.rows - (int)group * 64);
        laps.lap(hand.gemm ? FC2 : FC1);
        if (hand.gemm) {
            float scale[2] = {1.0f, 1.0f};
            load_scale<BIAS && WEIGHT_IN_FC2>(scale, whole, row, rows);
            group_sync(1 + group);  // of this tile all has been read, and the staging is free
            if (RING < BLOCKS && hand.column < COLUMNS2 && thread == 0)
                add_release(progress(mine, this_epoch, WHOLE) + hand.block, 1);
            send_out<BIAS, BIAS && WEIGHT_IN_FC2>(
                sums, whole, scale, address_of(world, home), staging, slot, hand.column);
            laps.lap(OUT);
            continue;
        }
        // `group`, asked anew: kept over the product it is a register too many for some epilogues.
        write_out<ACT, BIAS, WEIGHT_IN_FC2>(sums, half, maps.mid, staging, slot, row, rows, hand.column,
                                            warp_index() / 4);
        laps.lap(OUT);
        if (hand.column >= COLUMNS1) continue;
        const int done = progress(mine, this_epoch, HALF) - mine.blocks + hand.block;
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
    laps.end();
}
