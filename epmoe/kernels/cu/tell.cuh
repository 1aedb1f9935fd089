// How a round begins: rows into my slab, and into every peer's mailbox what I ask of its slots.
//
// A list for a peer has my choices of its slots, slot by slot, those that rows are pulled for first
// (exchange.cuh).  Where cells are few, one CTA makes it and all others stage rows.  Else PARTS CTAs make
// it together, each of a part of my rows: they count, and write their entries where the parts before
// them end.  (One CTA for a whole peer took 42 us for 2,048 rows.)  A warpgroup of each does that while
// the others of all CTAs stage: either is a chain of loads that take a microsecond.
#pragma once
#include "choices.cuh"
#include "exchange.cuh"

constexpr u32 TELLERS = RANKS * PARTS;  // CTAs
// At most, for one CTA a peer.  2 H200, qwen3-30b: 128 rows (1,024 cells) 71.4 us, in parts 71.9; 256 rows
// 87.3, in parts 85.1.
constexpr u32 FEW_CELLS = 1024;
constexpr u32 FULL_PART = (MAX_ROWS + PARTS - 1) / PARTS * CHOICES;
constexpr u32 ONE_PART = CELLS < FEW_CELLS ? CELLS : FEW_CELLS;
constexpr u32 PART = FULL_PART > ONE_PART ? FULL_PART : ONE_PART;  // cells, at most
constexpr u32 NO_SLOT = 0xffff;  // of the peer: the choice is another rank's, or none
static_assert(PART < 1 << 16 && LOCAL < NO_SLOT, "16 bits for a cell's place, 16 for its slot");

// What a CTA that tells has in shared memory, while the ring is not in use.
struct Telling {
    u32 asked[SLOTS];      // choices of each slot of all ranks, if there is one part
    u32 count[2][LOCAL];   // choices of each slot: others, and those that rows are pulled for
    u32 begin[2][LOCAL];   // where this part's entries of either kind begin in a slot's list
    u32 first[LOCAL + 1];  // where a slot's list begins; last: the end of all
    u32 sound;             // no fault so far: one answer for all who tell, whose barriers depend on it
    u16 slot[PART];        // of each cell: the peer's slot that it names
    u16 nth[PART];         // and which of the choices of its kind of that slot it is in this part
};
static_assert(sizeof(Telling) <= 196608, "max_rows is too large to be told");

// All CTAs from CTA `first` on, but for their first warpgroup: my rows into my slab.  Not after a fault: a
// peer may still be reading those of the round before.
inline void stage_rows(const World& world, const u8* x, const float* weights, u32 rows, u32 first,
                       u32 fault) {
    const u32 stagers = THREADS - 128, threads = (gridDim.x - first) * stagers;
    const u32 mine = (blockIdx.x - first) * stagers + threadIdx.x - 128;
    constexpr u32 LOADS = 4;  // under way at a time
    static_assert((u64)MAX_ROWS * (RECORD / 16) < 1ull << 31, "pieces are counted in 32 bits");
    const u32 quads = rows * (RECORD / 16);
    Quad* to = at<Quad>(world, world.rank, ROWS_AT);
    const Quad* from = reinterpret_cast<const Quad*>(x);
#pragma unroll 1
    for (u32 i = mine; i < quads; i += LOADS * threads) {
        Quad q[LOADS];
#pragma unroll
        for (u32 u = 0; u < LOADS; ++u)
            if (i + u * threads < quads) q[u] = from[i + u * threads];
        if (fault) return;
#pragma unroll
        for (u32 u = 0; u < LOADS; ++u)
            if (i + u * threads < quads) to[i + u * threads] = q[u];
    }
    if (WEIGHT_IN_FC2 && !fault) {
        float* w = at<float>(world, world.rank, WEIGHTS_AT);
#pragma unroll 1
        for (u32 i = mine; i < rows * CHOICES; i += threads) w[i] = weights[i];
    }
    fence_async_global();  // peers read the rows with the copy engine
}

// A CTA that tells, or its first warpgroup: a part of my rows, one peer.
struct Teller {
    const World& world;
    const Private& mine;
    const Choices& choices;
    Telling& t;
    const bool one;  // part, of all rows, by all threads of the CTA
    const u32 threads, peer, part, from, to;  // cells from .. to - 1

    inline Teller(const World& world, const Private& mine, const Choices& choices, u32 rows,
                  Telling& t)
        : world(world), mine(mine), choices(choices), t(t), one(rows * CHOICES <= FEW_CELLS),
          threads(one ? THREADS : 128), peer((world.rank + 1 + blockIdx.x) % RANKS),
          part(blockIdx.x / RANKS), from(share(rows, part)), to(share(rows, part + 1)) {}

    inline void sync() const { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

    inline u32 share(u32 rows, u32 part) const {
        return min(rows, part * (one ? rows : (rows + PARTS - 1) / PARTS)) * CHOICES;
    }

    // How many choices this part has of each slot of the peer, for all to see.
    inline void count() const {
        constexpr u32 LOADS = 4;  // each takes a microsecond
        bool cleared = false;
#pragma unroll 1
        for (u32 c = from + threadIdx.x; !cleared || c < to; c += LOADS * threads) {
            Choices::Id id[LOADS];
            int found[LOADS];
#pragma unroll
            for (u32 u = 0; u < LOADS; ++u)
                id[u] = c + u * threads < to ? choices.id(c + u * threads) : Choices::Id{~0u, ~0u};
            if (!cleared) {  // while the first ids are on their way
#pragma unroll 1
                for (u32 l = threadIdx.x; l < 2 * LOCAL; l += threads) t.count[0][l] = 0;
#pragma unroll 1
                for (u32 l = threadIdx.x; one && l < SLOTS; l += threads) t.asked[l] = 0;
                sync();
                cleared = true;
            }
#pragma unroll
            for (u32 u = 0; u < LOADS; ++u) found[u] = choices.found(id[u]);
#pragma unroll
            for (u32 u = 0; u < LOADS; ++u) {
                const u32 cell = c + u * threads;
                if (cell >= to) break;
                const int named = choices.slot(id[u], found[u]);
                const u32 slot = named, theirs = slot - peer * LOCAL;
                t.slot[cell - from] = theirs < LOCAL ? theirs : NO_SLOT;
                if (one && slot < SLOTS) atomicAdd(&t.asked[slot], 1u);
                if (slot >= SLOTS && named != -1 && peer == world.rank) atomicAdd(mine.epoch + BAD, 1);
            }
        }
        sync();
#pragma unroll 1
        for (u32 c = threadIdx.x; c < to - from; c += threads) {
            const u32 slot = t.slot[c];
            if (slot != NO_SLOT) t.nth[c] = atomicAdd(&t.count[look_at(c).pulled][slot], 1u);
        }
        sync();
#pragma unroll 1
        for (u32 l = threadIdx.x; !one && l < LOCAL; l += threads)
            mine.parts[part * SLOTS + peer * LOCAL + l] = (u64)t.count[1][l] << 32 | t.count[0][l];
    }

    // A cell beside the others of its row.
    struct Look {
        bool wanted, pulled;  // the peer's slots want the row; it is pulled for this cell
    };
    inline Look look_at(u32 c) const {
        const u32 slot = t.slot[c], k = c % CHOICES;
        Look look{slot != NO_SLOT, slot != NO_SLOT};
#pragma unroll
        for (u32 other = 0; other < CHOICES; ++other) {
            const u32 its = t.slot[c - k + other];
            look.wanted |= its != NO_SLOT;
            look.pulled &= its > slot || (its == slot && other >= k);  // the lowest slot, then choice
        }
        return look;
    }

    // When all have counted: my entries into the peer's list; from the first part also the counts of
    // all slots and the head.  `t.first[LOCAL]` is then how many results I ask of the peer.
    inline void list(const Head& head) const {
        int* counts = at<int>(world, peer, COUNTS_AT) + world.rank * SLOTS;
        int* pulled = at<int>(world, peer, PULLED_AT) + world.rank * LOCAL;
        const u32 theirs = peer * LOCAL;
#pragma unroll 1
        for (u32 s = (part ? theirs : 0) + threadIdx.x; s < (part ? theirs + LOCAL : SLOTS); s += threads) {
            const u32 l = s - theirs;
            u64 all, before = 0;  // pulled << 32 | others
            if (!one) all = sum_of_parts(s, before);
            else all = l < LOCAL ? (u64)t.count[1][l] << 32 | t.count[0][l] : t.asked[s];
            const u32 these = all >> 32, count = these + (u32)all;
            if (part == 0) counts[s] = count;
            if (l >= LOCAL) continue;
            t.count[0][l] = count;
            t.begin[1][l] = before >> 32;
            t.begin[0][l] = these + (u32)before;
            if (part == 0) pulled[l] = these;
        }
        if (part == 0 && threadIdx.x < HEAD)
            (at<long long>(world, peer, HEADS_AT) + world.rank * HEAD)[threadIdx.x] =
                head.field[threadIdx.x];
        sync();
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
        sync();
        u32* list = at<u32>(world, peer, LISTS_AT) + (u64)world.rank * CELLS;
        u32* siblings = at<u32>(world, peer, SIBLINGS_AT) + (u64)world.rank * CELLS + from;
#pragma unroll 1
        for (u32 c = threadIdx.x; c < to - from; c += threads) {
            const Look look = look_at(c);
            if (!look.wanted) continue;
            const u32 slot = t.slot[c];
            u32 sibling = NOT_THEIRS;
            if (slot != NO_SLOT) {
                const u32 nth = t.begin[look.pulled][slot] + t.nth[c], place = t.first[slot] + nth;
                if (place < CELLS) list[place] = from + c;  // more only after a fault: a part not counted
                sibling = sibling_of(slot, nth);
            }
            siblings[c] = sibling;
        }
    }

    // All parts' choices of a slot, and those of the parts before this one: pulled << 32 | others.
    inline u64 sum_of_parts(u32 slot, u64& before) const {
        const u64* const counts = mine.parts + slot;
        u64 sum = 0;
#pragma unroll
        for (u32 p = 0; p < PARTS; ++p) {
            const u64 n = counts[p * SLOTS];
            sum += n;
            before += p < part ? n : 0;
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
    const Teller teller(world, mine, choices, rows, t);
    const bool tells = blockIdx.x < (teller.one ? RANKS : TELLERS);
    if (teller.one && blockIdx.x == 0 && threadIdx.x == 0) atomicAdd(counter(PARTS_IN), TELLERS);
    if (tells && threadIdx.x < teller.threads) {
        teller.count();
        if (!teller.one) teller.sync();
        if (threadIdx.x == 0) {
            t.sound = !fault;
            if (!teller.one) {
                add_release(counter(PARTS_IN), 1);
                await_count(world, counter(PARTS_IN), (epoch + 1) * TELLERS);
            }
        }
        teller.sync();
        if (t.sound) teller.list(head);
    } else if (threadIdx.x >= 128) {
        stage_rows(world, x, weights, rows, teller.one ? RANKS : 0, fault);
    }
    if (threadIdx.x == 0) this_epoch = epoch, this_round = round;
    fence_async();  // the copy engine fills this shared memory next
    // Who has made a whole list has staged nothing: the release of C is all that its stores need, and
    // it waits for the others only.  (One that saw a fault counts itself at once, and C of another may
    // then leave before all rows are staged: they are for results that will be NaN.)
    const bool says = blockIdx.x < RANKS, whole = says && teller.one;
    if (!whole) __threadfence_system();
    __syncthreads();
    if (threadIdx.x) return;
    if (!whole) add_release(counter(STAGED), 1);
    if (says && !fault &&
        await_count(world, counter(STAGED), (epoch + 1) * gridDim.x - (whole ? RANKS : 0)))
        publish(world, WORD_C, teller.peer, round, t.first[LOCAL]);
    if (whole) add_release(counter(STAGED), 1);
}
