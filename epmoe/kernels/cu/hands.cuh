// How tiles of a round get from the scouting warp of a CTA to those who work on them.
#pragma once
#include "tell.cuh"

// What the caller of a round gives.
struct Call {
    const u8* x;
    Choices choices;
    const float* weights;
    const float* shared;
    u8* out;
    const u16* bias1;
    const u16* bias2;
    u32 rows;
    float limit;
    Head head;
};

// What the scouting warp hands to the feeding warp and to the warpgroups: one tile, or the end.
struct Hand {
    int gemm;        // 0: FC1, 1: FC2, 2: nothing more
    bool same_rows;  // as in Tile
    int rows;        // live rows of the tile
    int due;         // live rows of its block: what FC1 waits for
    int slot;
    int column;      // tile of columns
    int row;         // first row, as it lies in the pools
    int block;       // its block, counted over all that comes
};

// To find a tile takes 2 to 4 us (an id from memory, a walk along the stream); when the feeding warp
// did it by itself, the ring ran dry at every tile.  It asks for the next one when ASK stages of its
// tile are left: whoever holds tiles ahead for longer ends later than the others (a tile of dsv3's
// FC1 takes 94 us; two ahead made 2,048 rows of it 190 us slower).
constexpr u32 HANDS = 2;
constexpr int ASK = 4;
constexpr u32 HAND_BYTES = 32;  // two barriers, then the tile
constexpr u32 HANDS_BYTES = HANDS * HAND_BYTES + 16;  // and the barrier of who asks

struct Hands {
    u32 base, turn = 0, asked = 0;  // shared address of the first; tiles so far; parity of asking

    inline void ask() const { bar_arrive(base + HANDS * HAND_BYTES); }
    inline void await_ask() {  // passes the first time
        bar_wait(base + HANDS * HAND_BYTES, asked ^ 1);
        asked ^= 1;
    }
    inline u32 phase() const { return turn / HANDS & 1; }
    inline u32 full() const { return base + turn % HANDS * HAND_BYTES; }
    inline u32 empty() const { return full() + 8; }
    inline u32 tile() const { return full() + 16; }
    inline void give(const Hand& h) {  // one thread
        bar_wait(empty(), phase() ^ 1);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(tile()),
                     "r"(h.gemm | h.same_rows << 2 | h.rows << 8 | h.due << 16),
                     "r"(h.slot | h.column << 16), "r"(h.row), "r"(h.block)
                     : "memory");
        bar_arrive(full());
        ++turn;
    }
    inline Quad take() {  // a warp
        bar_wait(full(), phase());
        const Quad packed = load_shared(tile());
        __syncwarp();
        if (lane_index() == 0) bar_arrive(empty());
        ++turn;
        return packed;
    }
};

inline Hand unpacked(const Quad& q) {
    return {(int)q.x & 3, (q.x & 4) != 0, (int)q.x >> 8 & 0xff, (int)q.x >> 16,
            (int)q.y & 0xffff, (int)q.y >> 16, (int)q.z, (int)q.w};
}

// Keeps a hand packed up to here: unpacked before the product it takes twice the registers.
inline void hold(Quad& q) { asm volatile("" : "+r"(q.x), "+r"(q.y), "+r"(q.z), "+r"(q.w)); }

inline void hands_init(u32 base) {
    bar_init(base + HANDS * HAND_BYTES, 1);
    for (u32 i = 0; i < HANDS; ++i) {
        bar_init(base + i * HAND_BYTES, 1);
        bar_init(base + i * HAND_BYTES + 8, GROUPS * 4 + 1);
    }
}

// What the feeding warp does in a tile besides: it waits for what the tile reads (after a fault it goes on,
// and what it reads is void), and asks for the next one in time.
struct Feeding {
    const World& world;
    const Private& mine;
    const Hands& hands;
    const Hand& hand;
    Laps& laps;
    u32 epoch;
    int steps;

    inline void await() const {
        laps.lap(FEED);
        const u32 target = hand.gemm ? tiles_of(0, hand.due) : hand.due;
        await_count(world, progress(mine, epoch, hand.gemm ? HALF : ARRIVED) + hand.block, target);
        fence_async_global();  // what follows reads with the copy engine
        laps.lap(hand.gemm ? WAIT_HALF : WAIT_ROWS);
    }
    inline void passes(int left) const {
        if (left == min(ASK, steps)) hands.ask();
    }
};
