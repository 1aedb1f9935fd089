// The few-rows half of a round: weights are the 64-row operand, 64 rows of the pool make a tile.
#pragma once
#include "hands.cuh"
#include "narrow.cuh"

static_assert(TALL == 128, "each warpgroup has half of a tile");

using Weights = Narrow<TALL>;
constexpr int PER1 = (N1 + TALL - 1) / TALL, PER2 = (HIDDEN + TALL - 1) / TALL;
constexpr int CTAS = 1, UNIT = CHUNK;
using Tiles = Stream<PER1, PER2, LAG, UNIT>;

constexpr u32 RING_END = Weights::bars_at, NARROW_ORDER_AT = Weights::order_at;
constexpr u32 HAND_AT = NARROW_ORDER_AT + ORDER_BYTES;
constexpr u32 LIVE_AT = HAND_AT + HANDS_BYTES;

struct Maps {
    TensorMap few_rows, many_rows, w1, few_mid, many_mid, w2;
};

inline void init_tiles(u32 base) {
    order_init<CTAS, 0>(base + NARROW_ORDER_AT);
    hands_init(base + HAND_AT);
    Weights{base}.init();
    bar_init_done();
}

inline void prefetch_maps(const Maps& maps) {
    for (const TensorMap* map : {&maps.few_rows, &maps.many_rows, &maps.w1, &maps.few_mid,
                                 &maps.many_mid, &maps.w2})
        prefetch_map(*map);
}

// The scouting warp: which tiles, in the order of the stream.
inline void scout_stream(const World& world, const Private& mine, const Live& live, u32 base) {
    const u32 clusters = gridDim.x - PULLERS, all = Tiles::tiles(live);
    Hands hands{base + HAND_AT};
    Order<COUNTED, 1> order{base + NARROW_ORDER_AT, reinterpret_cast<Shares*>(counter(NEXT))};
    Tiles stream;
    Laps laps(mine.trace, SCOUT, lane_index() == 0);
    for (;;) {
        hands.await_ask();
        laps.lap(IDLE);
        const u32 t = order.lead(clusters, blockIdx.x - PULLERS, all, [&] { return faulted(world); });
        laps.lap(TURN_ID);
        if (t >= all) break;
        stream.to(live, t);
        // Units of a group share the weights, so they follow each other.
        const int rest = t - stream.begin, unit = rest % stream.units;
        const int row = stream.row + unit * CHUNK, block = row / BLOCK;
        laps.lap(FIND_TILE);
        if (lane_index() == 0)
            hands.give({stream.gemm, false, min(CHUNK, stream.rows - unit * CHUNK),
                        min(BLOCK, stream.rows + stream.row - block * BLOCK), stream.slot,
                        rest / stream.units, in_ring(block) * BLOCK + row % BLOCK, block});
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
    Weights ring{base};
    Hands hands{base + HAND_AT};
    Laps laps(mine.trace, FEEDER, lane_index() == 0);
    for (;;) {
        const Hand hand = unpacked(hands.take());
        laps.lap(TAKE);
        if (hand.gemm == 2) break;
        if (elected()) {
            const NarrowTile n{hand.slot, hand.column, hand.row, hand.rows};
            const int steps = ((hand.gemm ? INNER : HIDDEN) + NARROW_K - 1) / NARROW_K;
            feed(ring, hand.gemm ? maps.few_mid : maps.few_rows,
                 hand.gemm ? maps.many_mid : maps.many_rows, hand.gemm ? maps.w2 : maps.w1, n, steps,
                 Feeding{world, mine, hands, hand, laps, epoch, steps});
            laps.lap(FEED);
        }
        __syncwarp();
    }
    laps.end();
}

// A warpgroup: what it writes goes out by ordinary stores.  Each warp counts a tile when its own
// stores are visible, not at once but when the next tile is under way: writing out and the fence
// took 3 us a tile, in which nobody emptied the ring.
inline void multiply_stream(const World& world, const Private& mine, const Maps& maps,
                            const Call& call, u32 base, u32 group) {
    const u32 staging = base + Weights::staging_at + group * CHUNK * PITCH;
    const Out half{mine.mid, INNER, call.bias1, mine.scale, call.limit};
    const Out whole{nullptr, HIDDEN, call.bias2, mine.scale, call.limit};
    Weights ring{base};
    Hands hands{base + HAND_AT};
    Laps laps(mine.trace, group ? SECOND_GROUP : FIRST_GROUP, threadIdx.x % 128 == 0);
    int pending = -1;  // the counter of the tile before
    const auto flush = [&] {
        if (pending < 0) return;
        __threadfence();
        fence_async_global();
        __syncwarp();
        if (lane_index() == 0) add_release(mine.blocks + pending, 1);
        pending = -1;
    };
    for (;;) {
        if (__any_sync(~0u, !bar_test(hands.full(), hands.phase()))) flush();
        laps.lap(FLUSH);
        const Hand hand = unpacked(hands.take());
        laps.lap(TAKE);
        if (hand.gemm == 2) break;
        const int steps = ((hand.gemm ? INNER : HIDDEN) + NARROW_K - 1) / NARROW_K;
        const NarrowTile n{hand.slot, hand.column, hand.row, hand.rows};
        if (hand.gemm)
            narrow_run<NONE, BIAS, BIAS && WEIGHT_IN_FC2>(
                ring, whole, staging, n, group, steps, flush,
                [&](int row) { return address_of(world, load_relaxed(mine.homes + row)); });
        else
            narrow_run<ACT, BIAS, WEIGHT_IN_FC2>(ring, half, staging, n, group, steps, flush,
                                                 [&](int row) { return half.address_of(row); });
        laps.lap(hand.gemm ? FC2 : FC1);
        flush();  // a product of one step has had no time for it
        // Who waits for FC2 wants its rows' memory, not its results; those are seen to at the end.
        if ((RING < BLOCKS || !hand.gemm) && n.tile * TALL + (int)group * 64 < (hand.gemm ? HIDDEN : N1))
            pending = progress(mine, this_epoch, hand.gemm ? WHOLE : HALF) - mine.blocks + hand.block;
    }
    flush();
    laps.end();
}
