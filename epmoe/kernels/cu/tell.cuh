// How a round begins: rows into my slab, and into every peer's mailbox what I ask of its slots.
//
// A list for a peer has my choices of its slots, slot by slot, those that rows are pulled for first
// (exchange.cuh).  PARTS CTAs make it together, each of a part of my rows: they count, and write their
// entries where the parts before them end.  (One CTA for a whole peer took 42 us for 2,048 rows.)  A
// warpgroup of each does that while the others of all CTAs stage rows: each is a chain of loads that
// take a microsecond.
#pragma once
#include "exchange.cuh"

constexpr u32 TELLERS = RANKS * PARTS;  // CTAs
// As few as that are one part's, and nobody waits for others.  4 H200, qwen3-30b: at 16 rows 72 us
// instead of 76; at 128 rows (1,024 cells) 95.8 instead of 93.7.
constexpr u32 FEW_CELLS = 256;
constexpr u32 FULL_PART = (MAX_ROWS + PARTS - 1) / PARTS * CHOICES;
constexpr u32 ONE_PART = CELLS < FEW_CELLS ? CELLS : FEW_CELLS;
constexpr u32 PART = FULL_PART > ONE_PART ? FULL_PART : ONE_PART;  // cells, at most
static_assert(PART < 1 << 16 && LOCAL < (1 << 15) - 1, "an entry: 16 bits for its place, 15 for its slot");

struct Head {
    long long field[HEAD];
};

// What the caller's ids say: experts, of which `table` knows the slot, or slots already.
struct Choices {
    const void* ids;
    const int* table;  // [experts], or null: ids are slots
    u32 known;         // ids below it name something
    u32 wide;          // 1: ids are of 8 bytes, 0: of 4

    // Both without a branch, so that the loads of many cells are under way together.
    //
    // Whether the choice counts.
    inline bool names(u32 cell) const { return id(cell) < known; }
    // -1 for no choice, -2 for an id that names nothing.
    inline int slot(u32 cell) const {
        const u64 named = id(cell);
        const bool good = named < known;
        const int found = __ldg(table ? table + (good ? named : 0) : static_cast<const int*>(ids));
        return good ? table ? found : (int)named : named == ~0ull ? -1 : -2;
    }
    inline u64 id(u32 cell) const {
        const int* at = static_cast<const int*>(ids) + ((u64)cell << wide);
        const int low = __ldg(at), high = __ldg(at + wide);
        return (u64)(u32)(wide ? high : low >> 31) << 32 | (u32)low;
    }
};

// What a CTA that tells has in shared memory, while the ring is not in use.
struct Telling {
    u32 asked[SLOTS];      // choices of each slot of all ranks, if there is one part
    u32 count[2][LOCAL];   // choices of each slot: others, and those that rows are pulled for
    u32 begin[2][LOCAL];   // where this part's entries of either kind begin in a slot's list
    u32 first[LOCAL + 1];  // where a slot's list begins; last: the end of all
    u32 sound;             // no fault so far: one answer for the warpgroup, whose barriers depend on it
    u32 entry[PART];       // of each cell: slot << 17 | pulled << 16 | which of that slot in this part
};
static_assert(sizeof(Telling) <= 196608, "max_rows is too large to be told");

// All CTAs, but for their first warpgroup: my rows into my slab.  Not after a fault: a peer may still be
// reading those of the round before.
inline void stage_rows(const World& world, const u8* x, const float* weights, u32 rows, u32 fault) {
    const u64 stagers = THREADS - 128, threads = gridDim.x * stagers;
    const u64 mine = blockIdx.x * stagers + threadIdx.x - 128;
    const u64 quads = (u64)rows * (RECORD / 16);
    Quad* to = at<Quad>(world, world.rank, ROWS_AT);
    const Quad* from = reinterpret_cast<const Quad*>(x);
    constexpr int LOADS = 8;  // under way at a time
    for (u64 i = mine; i < quads; i += LOADS * threads) {
        Quad q[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; ++u)
            if (i + u * threads < quads) q[u] = from[i + u * threads];
        if (fault) return;
#pragma unroll
        for (int u = 0; u < LOADS; ++u)
            if (i + u * threads < quads) to[i + u * threads] = q[u];
    }
    if (WEIGHT_IN_FC2 && !fault) {
        float* w = at<float>(world, world.rank, WEIGHTS_AT);
        for (u64 i = mine; i < rows * CHOICES; i += threads) w[i] = weights[i];
    }
    fence_async_global();  // peers read the rows with the copy engine
}

// The first warpgroup of a CTA that tells: a part of my rows, one peer.
struct Teller {
    const World& world;
    const Private& mine;
    const Choices& choices;
    Telling& t;
    const bool one;  // part, of all rows
    const u32 peer, part, from, to;  // cells from .. to - 1

    inline Teller(const World& world, const Private& mine, const Choices& choices, u32 rows,
                  Telling& t)
        : world(world), mine(mine), choices(choices), t(t), one(rows * CHOICES <= FEW_CELLS),
          peer((world.rank + 1 + blockIdx.x) % RANKS), part(blockIdx.x / RANKS),
          from(share(rows, part)), to(share(rows, part + 1)) {}

    inline u32 share(u32 rows, u32 part) const {
        return min(rows, part * (one ? rows : (rows + PARTS - 1) / PARTS)) * CHOICES;
    }

    // How many choices this part has of each slot of the peer, for all to see.
    inline void count() const {
        for (int l = threadIdx.x; l < 2 * LOCAL; l += 128) t.count[0][l] = 0;
        if (one) {
            for (int s = threadIdx.x; s < SLOTS; s += 128) t.asked[s] = 0;
            group_sync(1);
        }
        constexpr u32 LOADS = 8;  // each takes a microsecond
        for (u32 c = from + threadIdx.x; c < to; c += LOADS * 128) {
            int s[LOADS];
#pragma unroll
            for (u32 u = 0; u < LOADS; ++u) {
                const u32 cell = c + u * 128;
                s[u] = cell < to ? choices.slot(cell) : -1;
            }
#pragma unroll
            for (u32 u = 0; u < LOADS; ++u) {
                const u32 cell = c + u * 128, slot = s[u];
                if (cell >= to) break;
                const bool theirs = slot < SLOTS && slot / LOCAL == peer;
                t.entry[cell - from] = theirs ? slot % LOCAL << 17 : NOT_THEIRS;
                if (one && slot < SLOTS) atomicAdd(&t.asked[slot], 1u);
                if (slot >= SLOTS && s[u] != -1 && peer == world.rank) atomicAdd(mine.epoch + BAD, 1);
            }
        }
        group_sync(1);
        for (u32 c = threadIdx.x * CHOICES; c < to - from; c += 128 * CHOICES) {
            u32* const row = t.entry + c;
            u32 lowest = NOT_THEIRS;  // slot, then choice
#pragma unroll
            for (u32 k = 0; k < CHOICES; ++k)
                if (row[k] != NOT_THEIRS) lowest = min(lowest, row[k] + k);
#pragma unroll
            for (u32 k = 0; k < CHOICES; ++k) {
                if (row[k] == NOT_THEIRS) continue;
                const u32 pulled = row[k] + k == lowest;
                row[k] += pulled << 16 | atomicAdd(&t.count[pulled][row[k] >> 17], 1u);
            }
        }
        group_sync(1);
        for (int l = threadIdx.x; !one && l < LOCAL; l += 128)
            mine.parts[part * SLOTS + peer * LOCAL + l] = t.count[1][l] << 16 | t.count[0][l];
    }

    // When all have counted: my entries into the peer's list; from the first part also the counts of
    // all slots and the head.  `t.first[LOCAL]` is then how many results I ask of the peer.
    inline void list(const Head& head) const {
        int* pulled = at<int>(world, peer, PULLED_AT) + world.rank * LOCAL;
        for (int l = threadIdx.x; l < LOCAL; l += 128) {
            const Sum sum = one ? Sum{t.count[1][l], t.count[0][l]} : sum_of_parts(peer * LOCAL + l);
            t.count[0][l] = sum.pulled + sum.others;
            t.begin[1][l] = sum.pulled_before;
            t.begin[0][l] = sum.pulled + sum.others_before;
            if (part == 0) pulled[l] = sum.pulled;
        }
        group_sync(1);
        if (threadIdx.x < 32) {
            int base = 0;
#pragma unroll 1
            for (int first = 0; first < LOCAL; first += 32) {
                const int l = first + lane_index(), n = l < LOCAL ? t.count[0][l] : 0, sum = scanned(n);
                if (l < LOCAL) t.first[l] = base + sum - n;
                base += __shfl_sync(~0u, sum, 31);
            }
            if (threadIdx.x == 0) t.first[LOCAL] = base;
        }
        group_sync(1);
        u32* list = at<u32>(world, peer, LISTS_AT) + (u64)world.rank * CELLS;
        u32* siblings = at<u32>(world, peer, SIBLINGS_AT) + (u64)world.rank * CELLS;
        for (u32 c = from + threadIdx.x * CHOICES; c < to; c += 128 * CHOICES) {
            u32 sibling[CHOICES];
            bool theirs = false;
#pragma unroll
            for (u32 k = 0; k < CHOICES; ++k) {
                const u32 entry = t.entry[c - from + k], slot = entry >> 17;
                sibling[k] = NOT_THEIRS;
                if (entry == NOT_THEIRS) continue;
                const u32 nth = t.begin[entry >> 16 & 1][slot] + (entry & 0xffff);
                const u32 place = t.first[slot] + nth;
                if (place < CELLS) list[place] = c + k;  // more only after a fault: a part not counted
                sibling[k] = sibling_of(slot, nth);
                theirs = true;
            }
            if (!theirs) continue;
#pragma unroll
            for (u32 k = 0; k < CHOICES; ++k) siblings[c + k] = sibling[k];
        }
        if (part) return;
        int* counts = at<int>(world, peer, COUNTS_AT) + world.rank * SLOTS;
        long long* heads = at<long long>(world, peer, HEADS_AT) + world.rank * HEAD;
        for (int s = threadIdx.x; s < SLOTS; s += 128) {
            const Sum sum = one ? Sum{t.asked[s]} : sum_of_parts(s);
            counts[s] = sum.pulled + sum.others;
        }
        if (threadIdx.x < HEAD) heads[threadIdx.x] = head.field[threadIdx.x];
    }

    // All parts' choices of a slot, and those of the parts before this one.
    struct Sum {
        u32 pulled, others = 0, pulled_before = 0, others_before = 0;
    };
    inline Sum sum_of_parts(u32 slot) const {
        Sum sum{0};
#pragma unroll
        for (u32 p = 0; p < PARTS; ++p) {
            const u32 n = mine.parts[p * SLOTS + slot];
            sum.pulled += n >> 16;
            sum.others += n & 0xffff;
            if (p < part) sum.pulled_before += n >> 16, sum.others_before += n & 0xffff;
        }
        return sum;
    }
};

// All threads of a CTA, of all: the round's beginning, up to the words C of this rank.
inline void tell(const World& world, const Private& mine, const u8* x, const Choices& choices,
                 const float* weights, u32 rows, const Head& head, Telling& t, u32 epoch, u32 round) {
    // Of an earlier launch: to acquire it would hold back all other loads for a microsecond.  Who sees a
    // fault that is set right now and who does not may differ: the rows are for this rank's results
    // only, which will be NaN.
    const u32 fault = *reinterpret_cast<const volatile u32*>(world.fault);
    const bool tells = blockIdx.x < TELLERS;
    const Teller teller(world, mine, choices, rows, t);
    if (threadIdx.x >= 128) {
        stage_rows(world, x, weights, rows, fault);
    } else if (tells) {
        teller.count();
        if (threadIdx.x == 0) t.sound = !fault;
        group_sync(1);
        if (threadIdx.x == 0) {
            if (teller.one) {
                atomicAdd(counter(PARTS_IN), 1);
            } else {
                add_release(counter(PARTS_IN), 1);
                await_count(world, counter(PARTS_IN), (epoch + 1) * TELLERS);
            }
        }
        group_sync(1);
        if (t.sound && (!teller.one || teller.part == 0)) teller.list(head);
    }
    if (threadIdx.x == 0) this_epoch = epoch, this_round = round;
    fence_async();  // the copy engine fills this shared memory next
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x) return;
    add_release(counter(STAGED), 1);
    if (!fault && blockIdx.x < RANKS && await_count(world, counter(STAGED), (epoch + 1) * gridDim.x))
        publish(world, WORD_C, teller.peer, round, t.first[LOCAL]);
}
