// The CTAs that pull: tables of what all ranks ask, then every warp carries rows.
#pragma once
#include "carry.cuh"

constexpr u32 MOST_SHARED = 231296;  // what a CTA may have, less 1024 of the static word

// Buffers and tables lie where other roles have their ring.
constexpr u32 TABLES_AT = (CARRY_SHARED + 127) / 128 * 128;
static_assert(TABLES_AT + sizeof(Tables) <= MOST_SHARED, "the tables of the carriers do not fit");

// All threads of a CTA that pulls, one of the first `pullers`; false if what came with C cannot be.  The
// caller syncs.
inline bool pull_rows(const World& world, const Private& mine, u32 base, u8* shared, u32 epoch,
                      u32 round, u32 pullers, Laps& laps) {
    Tables& t = *reinterpret_cast<Tables*>(shared + TABLES_AT);
#pragma unroll 1
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < PROGRESS * BLOCKS; i += pullers * blockDim.x)
        progress(mine, epoch + 1, ARRIVED)[i] = 0;
    bool good = make_tables(world, t, round);
    if (good && (u32)t.block[LOCAL] > BLOCKS)
        good = fail(world, CORRUPT, world.rank, WORD_C, round, t.block[LOCAL], 0);
    __syncthreads();
    laps.lap(TABLES);
    const u32 warp = threadIdx.x / 32;
    if (good && warp < CARRIERS) {
        Laps laps(mine.trace, warp ? LAST_CARRIER : FIRST_CARRIER,
                  lane_index() == 0 && (warp == 0 || warp == CARRIERS - 1));
        Carrier carrier(world, mine, t, epoch, round, warp * pullers + blockIdx.x, pullers * CARRIERS);
        carry(carrier, base, warp, laps);
    } else if (good && blockIdx.x == 0) {
        check_heads(world, mine, round, threadIdx.x - CARRIERS * 32, blockDim.x - CARRIERS * 32);
    }
    fence_async();  // what was written here by hand is written by the copy engine next
    return good;
}
