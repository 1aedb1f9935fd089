// What a fused round keeps, and what a rank knows when all have told it what they ask.
//
// Constants as in verbs.cu: RANKS, LOCAL, CHOICES, HIDDEN, MAX_ROWS, RECORD, WEIGHT_IN_FC2, *_AT; and
// BLOCKS, the most blocks of rows that routing can send here, of which RING have memory at a time;
// PARTS, CTAs that tell one peer.
#pragma once
#include "epilogue.cuh"
#include "mailbox.cuh"
#include "signals.cuh"
#include "stream.cuh"
#include "trace.cuh"

// What a rank keeps of a round for itself.  Blocks are counted over all that comes in a round; block
// b lies in the pools at b % RING, after FC2 of block b - RING has been done.  Counters of a block
// have two sets, one for odd and one for even rounds: a round clears the set of the next one, which
// nobody reads meanwhile.  PARTS_IN and STAGED only grow, by the same amount in every round, `epoch`
// rounds begun so far, ended by a fault or not; whoever waits for them compares by difference, so they
// may wrap.
struct Private {
    u64* loads;      // [SLOTS] rows of every slot of all ranks, summed over rounds
    u32* homes;      // [RING * BLOCK] where a row's results go: home_of(rank, cell)
    float* scale;    // [RING * BLOCK] router weights, if the second GEMM applies them
    u8* rows;        // [RING * BLOCK, RECORD]
    u16* mid;        // [RING * BLOCK, INNER]
    u32* blocks;     // [2][PROGRESS][BLOCKS]: see Progress
    u64* parts;      // [PARTS][SLOTS] choices that each part of my rows has: pulled << 32 | others
    int* scratch;    // [grid][LIVE_WORDS], where the table does not fit into shared memory
    u32* epoch;      // see Counter
    u64* trace;      // trace.cuh, written with TRACE only
};
enum Counter { EPOCH, PARTS_IN, STAGED, MOVED, BAD, NEXT };
// PARTS_IN counts CTAs that have written their part of `parts` (all at once where one CTA tells a peer),
// STAGED those whose rows and list entries can be read, MOVED those that have pulled and sent all that
// they will: 0 between launches, as is NEXT, the tiles of a counted order that were fetched (order.cuh).

// Read anew each time: kept for the whole kernel, these are three registers too many.
__shared__ u32* volatile counters;
__shared__ volatile u32 this_epoch, this_round;
inline u32* counter(Counter which) { return counters + which; }

enum Progress { ARRIVED, HALF, WHOLE, PROGRESS };  // rows in, FC1 tiles, FC2 tiles

inline u32* progress(const Private& mine, u32 epoch, u32 which) {
    return mine.blocks + ((epoch & 1) * PROGRESS + which) * BLOCKS;
}

// The cell of a rank that a row's results go to, in one word.
constexpr u32 HOMELESS = ~0u;
inline u32 home_of(u32 rank, u32 cell) { return rank << 29 | cell; }
// 0: of no row; after a fault a home may be another round's, or another layer's.
inline u64 address_of(const World& world, u32 home) {
    const u32 rank = home >> 29, cell = home & 0x1fffffff;
    return rank < RANKS && cell < CELLS ? world.slab[rank] + RESULTS_AT + (u64)cell * RESULT : 0;
}
static_assert(CELLS < (1 << 29) - 1 && RANKS <= 8, "a home has 29 bits for its cell, 3 for its rank");

// Where a block, counted over all that comes, lies in the pools.
inline int in_ring(u32 block) { return RING < BLOCKS ? block % RING : block; }

constexpr int N1 = gated(ACT) ? 2 * INNER : INNER;  // weight rows of FC1

// How often a block of `rows` rows (more than BLOCK count as BLOCK) is counted when a GEMM has done all
// its tiles: once for every 64 rows that a warpgroup has live, by each of its warps on the narrow path.
constexpr u32 tiles_of(int gemm, int rows) {
    const int columns = gemm ? HIDDEN : N1, tile = TALL ? 64 : TILE_N;
    return (columns + tile - 1) / tile * (rows > 64 ? 2 : 1) * (TALL ? 4 : 1);
}

// One warp of every CTA: every rank's word `kind` of this round.  The first CTA asks who is gone and
// says what is wrong; the others only look, without acquiring, and sleep between looks.  (When all 132
// asked like the first, the copies of those still at work became fifty times slower: 28 KiB took 22 us.)
inline bool await_words(const World& world, Kind kind, u32 round) {
    bool came = true;
    if (lane_index() < RANKS) {
        u32 value;
        came = blockIdx.x ? look_for(world, kind, lane_index(), round)
                          : await(world, kind, lane_index(), round, value);
    }
    came = __all_sync(~0u, came);
    __syncwarp();  // a vote orders no memory
    return came;
}

// A row that has several choices of one rank crosses the link once: it is pulled for the choice of the
// lowest slot and written for its siblings too.  In the list of a slot the choices that rows are pulled
// for come first.  Of each row in a list the asking rank says where its choices are, in one word each:
// which slot, and which entry of this slot's list.
constexpr u32 NOT_THEIRS = ~0u;  // of another rank, or none
inline u32 sibling_of(u32 slot, u32 entry) { return slot << 19 | entry; }
static_assert(CELLS <= 1 << 19 && LOCAL < 1 << 13, "19 bits for a sibling's entry, 13 for its slot");

// The slot l >= from with before[l] <= n < before[l + 1]; there is one.
inline int at_or_after(const int* before, int from, u32 n) {
    if (n < (u32)before[from + 1]) return from;
    int low = from + 1, high = LOCAL;  // before[low] <= n < before[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if ((u32)before[middle] <= n) low = middle;
        else high = middle;
    }
    return low;
}

// The n-th rank that rows come from: each rank begins right of itself, so that every link is busy.
inline u32 source_of(const World& world, u32 n) { return (world.rank + 1 + n) % RANKS; }

// What a CTA that pulls knows of the round, in shared memory; n counts sources as source_of does.
struct Tables {
    int pulled[RANKS][LOCAL];      // [n][slot] rows to pull, where rows come with their siblings
    int first[RANKS][LOCAL];       // [n][slot] entries of the source's list before the slot's
    int before[RANKS + 1][LOCAL];  // [n][slot] rows of the slot from sources before; at last, from all
    int block[LOCAL + 1];          // blocks of the pool before each slot
    int turn[LOCAL + 1];           // rows to pull before each slot

    // Rows that come with a sibling may lie anywhere in the pool, so all of it must have memory.
    static inline bool fits(int blocks) { return RING == BLOCKS || blocks <= (int)RING; }
    inline bool together() const { return fits(block[LOCAL]); }
    inline int count(u32 n, int slot) const { return before[n + 1][slot] - before[n][slot]; }
    inline int blocks(int slot) const { return (before[RANKS][slot] + BLOCK - 1) / BLOCK; }
};

// All threads of the CTA.  False if a count cannot be or does not match the word it came with.
inline bool make_tables(const World& world, Tables& t, u32 round) {
    bool good = true;
#pragma unroll 1
    for (int l = threadIdx.x; l < LOCAL; l += blockDim.x) {
        int counts[RANKS], pulled[RANKS], sum = 0;
#pragma unroll
        for (u32 n = 0; n < RANKS; ++n) {
            const u32 r = source_of(world, n);
            counts[n] = at<int>(world, world.rank, COUNTS_AT)[r * SLOTS + world.rank * LOCAL + l];
            pulled[n] = at<int>(world, world.rank, PULLED_AT)[r * LOCAL + l];
        }
#pragma unroll
        for (u32 n = 0; n < RANKS; ++n) {
            t.pulled[n][l] = pulled[n];
            t.before[n][l] = sum;
            sum += counts[n];
            if (counts[n] < 0 || counts[n] > (int)CELLS || pulled[n] < 0 || pulled[n] > counts[n])
                good = fail(world, CORRUPT, source_of(world, n), WORD_C, round,
                            (u64)pulled[n] << 32 | (u32)counts[n], 0);
        }
        t.before[RANKS][l] = sum;
    }
    if (!__syncthreads_and(good)) return false;
    const u32 warp = threadIdx.x / 32;
#pragma unroll 1
    for (u32 job = warp; job < RANKS + 2; job += blockDim.x / 32) {
        int* const sums = job < RANKS ? t.first[job] : job == RANKS ? t.block : t.turn;
        bool together = true;
        if (RING < BLOCKS && job == RANKS + 1) {
            int blocks = 0;
            for (int l = lane_index(); l < LOCAL; l += 32) blocks += t.blocks(l);
            together = Tables::fits(__reduce_add_sync(~0u, blocks));
        }
        int base = 0;
#pragma unroll 1
        for (int from = 0; from < LOCAL; from += 32) {
            const int l = from + lane_index();
            int value = 0;
            if (l < LOCAL) {
                if (job < RANKS) value = t.count(job, l);
                else if (job == RANKS) value = t.blocks(l);
                else if (!together) value = t.before[RANKS][l];
                else
                    for (u32 n = 0; n < RANKS; ++n) value += t.pulled[n][l];
            }
            const int sum = scanned(value);
            if (l < LOCAL) sums[l] = base + sum - value;
            base += __shfl_sync(~0u, sum, 31);
        }
        if (lane_index() == 0) {
            if (job < RANKS) {
                const u32 r = source_of(world, job);
                const u32 asked = (u32)load_acquire_system(cell_of(world, world.rank, WORD_C, r));
                if (base != (int)(asked & 0x7fffffff) || base > (int)CELLS)
                    good = fail(world, CORRUPT, r, WORD_C, round, asked, 0);
            } else {
                sums[LOCAL] = base;
            }
        }
    }
    return __syncthreads_and(good);
}

// Thread `thread` of `threads` of one CTA of the rank: heads must agree, every slot's load is added up.
inline void check_heads(const World& world, const Private& mine, u32 round, u32 thread, u32 threads) {
    const long long* heads = at<long long>(world, world.rank, HEADS_AT);
#pragma unroll 1
    for (u32 i = thread; i < RANKS * HEAD; i += threads)
        if (heads[i] != heads[world.rank * HEAD + i % HEAD])
            fail(world, DIFFERS, i / HEAD, i % HEAD, round, (u64)heads[i], 0);
#pragma unroll 1
    for (u32 s = thread; s < SLOTS; s += threads) {
        u64 sum = 0;
        for (int r = 0; r < RANKS; ++r) sum += at<int>(world, world.rank, COUNTS_AT)[r * SLOTS + s];
        mine.loads[s] += sum;
    }
}
