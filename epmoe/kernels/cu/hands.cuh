// How tiles of a round get from the feeding warp of a CTA to its warpgroups.
#pragma once
#include "exchange.cuh"

// What the caller of a round gives.
struct Call {
    const u8* x;
    const int* slots;
    const float* weights;
    const float* shared;
    u8* out;
    const u16* bias1;
    const u16* bias2;
    u32 rows;
    float limit;
    Head head;
};

// What the feeding warp hands to the warpgroups: one tile, or the end.
struct alignas(16) Hand {
    int gemm;    // 0: FC1, 1: FC2, 2: nothing more
    int slot;
    int row;     // first row, as it lies in the pools
    int block;   // its block, counted over all that comes
    int column;  // tile of columns
    int rows;    // live rows of the slot from there on, at most those of a tile
};

constexpr u32 HANDS = 2;        // tiles handed on ahead
constexpr u32 HAND_BYTES = 32;  // two barriers, then the tile

struct Hands {
    u32 base, slot = 0, phase = 0;  // shared address of the first

    inline u32 full() const { return base + slot * HAND_BYTES; }
    inline u32 empty() const { return full() + 8; }
    inline u32 tile() const { return full() + 16; }
    inline void next() {
        if (++slot == HANDS) slot = 0, phase ^= 1;
    }
    inline void give(const Hand& h) {  // one thread
        bar_wait(empty(), phase ^ 1);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(tile()), "r"(h.gemm + 4 * h.rows),
                     "r"(h.slot + (h.column << 16)), "r"(h.row), "r"(h.block)
                     : "memory");
        bar_arrive(full());
        next();
    }
    inline Hand take() {  // a warp
        bar_wait(full(), phase);
        const Quad q = load_shared(tile());
        __syncwarp();
        if (lane_index() == 0) bar_arrive(empty());
        next();
        return {(int)q.x % 4, (int)q.y & 0xffff, (int)q.z, (int)q.w, (int)q.y >> 16, (int)q.x / 4};
    }
};

inline void hands_init(u32 base) {
    for (u32 i = 0; i < HANDS; ++i) {
        bar_init(base + i * HAND_BYTES, 1);
        bar_init(base + i * HAND_BYTES + 8, GROUPS * 4);
    }
}

// The feeding warp waits for what a tile reads; after a fault it goes on, and what it reads is void.
inline void await_inputs(const World& world, const Private& mine, u32 epoch, int gemm, int block,
                         int rows) {
    const u32 target = gemm ? tiles_of(N1, rows) : min(rows, BLOCK);
    await_count(world, progress(mine, epoch, gemm ? HALF : ARRIVED) + block, target);
    fence_async_global();  // what follows reads with the copy engine
}
