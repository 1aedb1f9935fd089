// Who takes the next tile: by a fixed stride, or by a counter that all clusters share.
//
// The counter hands ids out in ascending order, so a tile only ever waits for tiles that a CTA holds, or
// takes before it waits for anything: all CTAs run, and none waits before its first tile.  Both give the
// same bits, because no result depends on who computes it.  The warp that feeds the ring of the first
// CTA fetches an id and hands it to every role of its cluster, two ids ahead, so that the fetch is off
// the path.
#pragma once
#include "ptx.cuh"

constexpr u32 IDS = 2;                  // ids under way
constexpr u32 ORDER_BYTES = IDS * 24;   // two barriers and a word each

// Counter and count of finished clusters; both 0 between launches, the last cluster resets them.
struct Shares {
    u32 next, done;
};

// Readers of an id: `consumers` warps and the feeding warp of every CTA.
template <int ctas, int consumers>
inline void order_init(u32 at) {
    for (u32 i = 0; i < IDS; ++i) {
        bar_init(at + 16 * i, 1);
        bar_init(at + 16 * i + 8, ctas * (consumers + 1));
    }
}

// One role's view.  All lanes of a warp call `next` together.
template <bool counted, int ctas>
struct Order {
    u32 at;  // shared address
    Shares* shares;
    u32 id = 0, slot = 0, phase = 0, begun = 0;

    // `feeds`: this is the feeding warp of its CTA.
    inline u32 next(bool feeds) {
        const u32 clusters = gridDim.x / ctas;
        if (!counted) {
            id = begun ? id + clusters : blockIdx.x / ctas;
            begun = 1;
            return id;
        }
        const u32 full = at + 16 * slot, empty = full + 8, word = at + 16 * IDS + 4 * slot;
        if (feeds && lane_index() == 0) {
            bar_expect(full, 4);
            if (ctas == 1 || cluster_rank() == 0) {
                bar_wait(empty, phase ^ 1);
                const u32 taken = atomicAdd(&shares->next, 1);
                for (u32 r = 0; r < ctas; ++r) store_at(word, full, r, taken);
            }
        }
        __syncwarp();
        bar_wait(full, phase);
        id = load_shared_word(word);
        __syncwarp();
        if (lane_index() == 0) bar_arrive_at(empty, 0);
        if (++slot == IDS) slot = 0, phase ^= 1;
        return id;
    }

    // For feeding warps only: the id that the first CTA of the cluster chose for both, ~0u when there
    // is no more or when `stop` says so.  Stopping is decided in one place, and in a word that does
    // not depend on what a CTA takes for `all`: after a fault one of the two may know of no tile, and
    // a CTA that goes on alone would wait for the other's half of what they share.
    template <typename Stop>
    inline u32 lead(u32 clusters, u32 cluster, u32 all, Stop stop) {
        const u32 full = at + 16 * slot, empty = full + 8, word = at + 16 * IDS + 4 * slot;
        const u32 leader = ctas == 1 ? cluster_rank() : 0;  // a lone CTA may sit in a cluster too
        if (lane_index() == 0) {
            bar_expect(full, 4);
            if (cluster_rank() == leader) {
                bar_wait(empty, phase ^ 1);
                // To fetch an id takes a microsecond, so only who comes late (it has pulled rows, and is
                // past all `clusters`) fetches its first.
                if (!begun && (cluster < clusters || !counted)) id = cluster;
                else id = counted ? clusters + atomicAdd(&shares->next, 1) : id + clusters;
                begun = 1;
                const u32 chosen = stop() || id >= all ? ~0u : id;
                for (u32 r = 0; r < ctas; ++r) store_at(word, full, leader + r, chosen);
            }
        }
        __syncwarp();
        bar_wait(full, phase);
        const u32 chosen = load_shared_word(word);
        __syncwarp();
        if (lane_index() == 0) bar_arrive_at(empty, leader);
        if (++slot == IDS) slot = 0, phase ^= 1;
        return chosen;
    }

    // One thread of one role of each cluster, after its last `next`.
    inline void finish() {
        if (!counted) return;
        __threadfence();
        if (atomicAdd(&shares->done, 1) == gridDim.x / ctas - 1) {
            shares->next = 0;
            shares->done = 0;
        }
    }
};
