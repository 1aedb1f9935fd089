// How a round ends: the promise Y, and the number of the next one.
#pragma once
#include "exchange.cuh"

// One thread of the first CTA, when it has seen Y: all CTAs have counted themselves MOVED, so none of them
// looks at a counter or at the round's number again.  (After a fault some may; then nothing counts.)
inline void open_next(const World& world, bool good) {
    *counter(NEXT) = 0;
    *counter(EPOCH) += 1;
    if (good) *reinterpret_cast<u64*>(world.round) += 1;
}

// One thread of a CTA that has pulled and sent all that it will: what it sent has arrived.  The last
// one says so by Y, the promise to read no mailbox and no row of this round any more, and to write no
// result.
inline void end_moves(const World& world, u32 round) {
    __threadfence();
    if (atomicAdd(counter(MOVED), 1) + 1 != gridDim.x) return;
    *counter(MOVED) = 0;  // begins anew in every launch, so it cannot wrap
    if (!faulted(world)) publish_all(world, WORD_Y, round);
}
