// What the communicating part of a fused round does: stage, tell, pull, push.
//
// Constants as in verbs.cu: RANKS, LOCAL, CHOICES, HIDDEN, MAX_ROWS, RECORD, WEIGHT_IN_FC2, *_AT; and
// BLOCKS, the most blocks of rows that routing can send here, of which RING have memory at a time.
#pragma once
#include "epilogue.cuh"
#include "signals.cuh"
#include "stream.cuh"
#include "trace.cuh"

constexpr int SLOTS = RANKS * LOCAL;
constexpr u32 CELLS = MAX_ROWS * CHOICES;
constexpr int HEAD = 8;             // comm/layout.py
constexpr u32 RESULT = HIDDEN * 2;  // bytes of a result in bf16
static_assert(RESULT == RECORD, "pulls and pushes share a ring: a row and a result are alike");

// What a rank keeps of a round for itself.  Blocks are counted over all that comes in a round; block
// b lies in the pools at b % RING, after block b - RING has been pushed out.  Counters of a block
// have two sets, one for odd and one for even launches: a launch clears the set of the next one,
// which nobody reads meanwhile.  The other counters only grow: by the same amount in every launch,
// `epoch` launches so far.
struct Private {
    u64* loads;      // [SLOTS] rows of every slot of all ranks, summed over rounds
    u64* origin;     // [RING * BLOCK] source << 32 | cell
    float* scale;    // [RING * BLOCK] router weights, if the second GEMM applies them
    u8* rows;        // [RING * BLOCK, RECORD]
    u16* mid;        // [RING * BLOCK, INNER]
    u8* results;     // [RING * BLOCK, RESULT]
    u32* blocks;     // [2][PROGRESS][BLOCKS]: see Progress
    int* scratch;    // [grid][LIVE_WORDS], where the table does not fit into shared memory
    u32* epoch;      // see Counter
    u64* trace;      // trace.cuh, written with TRACE only
    const u8* weights;  // of the first GEMM
    u64 weight_bytes;
};
enum Counter { EPOCH, STAGED, PLANNED, PUSHED, FINISHED, BAD, NEXT, CAME };
// NEXT is the next tile of a counted order, 0 between launches.  CAME counts words that one CTA has
// seen for all: C, then Y, of every launch.
enum Progress { ARRIVED, HALF, WHOLE, LEFT, PROGRESS };  // rows in, FC1 tiles, FC2 tiles, rows out

inline u32* progress(const Private& mine, u32 epoch, u32 which) {
    return mine.blocks + ((epoch & 1) * PROGRESS + which) * BLOCKS;
}

// Where a block, counted over all that comes, lies in the pools.
inline int in_ring(u32 block) { return RING < BLOCKS ? block % RING : block; }

constexpr int N1 = gated(ACT) ? 2 * INNER : INNER;  // weight rows of FC1
constexpr int TILE_COLUMNS = TALL ? 64 : TILE_N;     // what one count of a tile stands for

// How often a block of `rows` rows (more than BLOCK count as BLOCK) is counted when a GEMM of
// `columns` columns has done all its tiles: once for every 64 rows that a warpgroup has live, by
// each of its warps on the narrow path.
constexpr u32 tiles_of(int columns, int rows) {
    return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS * (rows > 64 ? 2 : 1) * (TALL ? 4 : 1);
}

// Words are polled by one CTA of a rank, who counts on CAME what it has seen; the others wait there
// and sleep between looks.  When all 132 polled words, the copies of those still at work became
// fifty times slower (28 KiB took 22 us).
inline bool await_came(const World& world, const Private& mine, u32 target) {
    const u64 started = global_nanoseconds();
    const u64 limit = *reinterpret_cast<const u64*>(world.limit);
    for (u32 turn = 0; (int)(load_acquire(mine.epoch + CAME) - target) < 0; ++turn) {
        __nanosleep(turn < 64 ? 50 : 500);
        if (turn % 64 == 63 && (faulted(world) || global_nanoseconds() - started > 2 * limit))
            return false;  // twice: who polls the words gives up first, and says why
    }
    return true;
}

struct Head {
    long long field[HEAD];
};

// All threads of all CTAs from `first` on: my rows into my slab.  The caller adds to STAGED after a
// barrier.
inline void stage_rows(const World& world, const u8* x, const float* weights, u32 rows, u32 first) {
    const u64 threads = (u64)(gridDim.x - first) * blockDim.x;
    const u64 mine = (blockIdx.x - first) * blockDim.x + threadIdx.x;
    const u64 quads = (u64)rows * (RECORD / 16);
    Quad* to = at<Quad>(world, world.rank, ROWS_AT);
    const Quad* from = reinterpret_cast<const Quad*>(x);
    constexpr int LOADS = 8;  // under way at a time
    for (u64 i = mine; i < quads; i += LOADS * threads) {
        Quad q[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; ++u)
            if (i + u * threads < quads) q[u] = from[i + u * threads];
#pragma unroll
        for (int u = 0; u < LOADS; ++u)
            if (i + u * threads < quads) to[i + u * threads] = q[u];
    }
    if (WEIGHT_IN_FC2) {
        float* w = at<float>(world, world.rank, WEIGHTS_AT);
        for (u64 i = mine; i < rows * CHOICES; i += threads) w[i] = weights[i];
    }
    fence_async_global();  // peers read the rows with the copy engine
    __threadfence_system();
}

// What the caller's ids say: experts, of which `table` knows the slot, or slots already.
struct Choices {
    const void* ids;
    const int* table;  // [experts], or null: ids are slots
    u32 known;         // ids below it name something
    u32 wide;          // ids are of 8 bytes, else of 4

    // -1 for no choice, -2 for an id that names nothing.
    inline int slot(u32 cell) const {
        const long long id = wide ? __ldg(static_cast<const long long*>(ids) + cell)
                                  : __ldg(static_cast<const int*>(ids) + cell);
        if (id < 0 || id >= known) return id == -1 ? -1 : -2;
        return table ? __ldg(table + id) : (int)id;
    }
};

// f(cell, slot) for every choice; loads go 16 at a time, since each takes a microsecond.
template <typename F>
inline void each_choice(const Choices& choices, u32 rows, F f) {
    const u32 all = rows * CHOICES;
    constexpr u32 LOADS = 16;
    for (u32 c = threadIdx.x; c < all; c += LOADS * blockDim.x) {
        int s[LOADS];
#pragma unroll
        for (u32 u = 0; u < LOADS; ++u) {
            const u32 cell = c + u * blockDim.x;
            s[u] = cell < all ? choices.slot(cell) : -1;
        }
#pragma unroll
        for (u32 u = 0; u < LOADS; ++u)
            if (s[u] != -1) f(c + u * blockDim.x, s[u]);
    }
}

// All threads of one CTA: counts, list and head into the mailbox of `peer`; returns the rows asked.
// `count` and `place` are SLOTS ints of shared memory each.
inline int tell(const World& world, const Private& mine, u32 peer, const Choices& choices, u32 rows,
                const Head& head, int* count, int* place) {
    for (int s = threadIdx.x; s < SLOTS; s += blockDim.x) count[s] = 0;
    __syncthreads();
    each_choice(choices, rows, [&](u32, int s) {
        if (s >= 0 && s < SLOTS) atomicAdd(&count[s], 1);
        else if (peer == world.rank) atomicAdd(mine.epoch + BAD, 1);
    });
    __syncthreads();
    if (threadIdx.x < 32) {
        int base = 0;
#pragma unroll 1
        for (int first = 0; first < LOCAL; first += 32) {
            const int l = first + lane_index(), n = l < LOCAL ? count[peer * LOCAL + l] : 0;
            const int sum = scanned(n);
            if (l < LOCAL) place[l] = base + sum - n;
            base += __shfl_sync(~0u, sum, 31);
        }
        if (threadIdx.x == 0) place[LOCAL] = base;
    }
    __syncthreads();
    const int total = place[LOCAL];
    int* counts = at<int>(world, peer, COUNTS_AT) + world.rank * SLOTS;
    int* list = at<int>(world, peer, LISTS_AT) + (u64)world.rank * CELLS;
    long long* heads = at<long long>(world, peer, HEADS_AT) + world.rank * HEAD;
    for (int s = threadIdx.x; s < SLOTS; s += blockDim.x) counts[s] = count[s];
    if (threadIdx.x < HEAD) heads[threadIdx.x] = head.field[threadIdx.x];
    each_choice(choices, rows, [&](u32 cell, int s) {
        if (s >= 0 && s < SLOTS && s / LOCAL == (int)peer) list[atomicAdd(&place[s % LOCAL], 1)] = cell;
    });
    __threadfence_system();
    __syncthreads();
    return total;
}

// What the movers of a CTA know of the round, in shared memory.
struct Tables {
    int count[RANKS][LOCAL];
    int first[RANKS][LOCAL];   // list entries of a source before each slot
    int block[LOCAL + 1];      // blocks of the pool before each slot
    int row[LOCAL + 1];        // rows before each slot
    int turn[LOCAL + 1];       // pull turns before each slot: RANKS times its longest source
};

// All threads of the CTA.  False if a count cannot be or does not match the word it came with.
inline bool make_tables(const World& world, Tables& t, const u32* asked, u32 round) {
    bool good = true;
    for (int i = threadIdx.x; i < SLOTS; i += blockDim.x) {
        const int r = i / LOCAL, l = i % LOCAL;
        const int n = at<int>(world, world.rank, COUNTS_AT)[r * SLOTS + world.rank * LOCAL + l];
        t.count[r][l] = n;
        if (n < 0 || n > (int)CELLS) good = fail(world, CORRUPT, r, WORD_C, round, (u64)n, 0);
    }
    if (!__syncthreads_and(good)) return false;
    const u32 warp = threadIdx.x / 32;
    for (u32 job = warp; job < RANKS + 3; job += blockDim.x / 32) {
        int base = 0;
#pragma unroll 1
        for (int from = 0; from < LOCAL; from += 32) {
            const int l = from + lane_index();
            int value = 0;
            if (l < LOCAL) {
                int sum = 0, most = 0;
                for (int r = 0; r < RANKS; ++r) sum += t.count[r][l], most = max(most, t.count[r][l]);
                value = job < RANKS       ? t.count[job][l]
                        : job == RANKS     ? (sum + BLOCK - 1) / BLOCK
                        : job == RANKS + 1 ? sum
                                           : most * RANKS;
            }
            const int sum = scanned(value);
            if (l < LOCAL) {
                if (job < RANKS) t.first[job][l] = base + sum - value;
                else (job == RANKS ? t.block : job == RANKS + 1 ? t.row : t.turn)[l + 1] = base + sum;
            }
            base += __shfl_sync(~0u, sum, 31);
        }
        if (lane_index() == 0) {
            if (job < RANKS) {
                if (base != (int)asked[job])
                    good = fail(world, CORRUPT, job, WORD_C, round, asked[job], 0);
            } else {
                (job == RANKS ? t.block : job == RANKS + 1 ? t.row : t.turn)[0] = 0;
            }
        }
    }
    return __syncthreads_and(good);
}

// One CTA of the rank: heads must agree, and every slot's load is added up.
inline void check_heads(const World& world, const Private& mine, u32 round) {
    const long long* heads = at<long long>(world, world.rank, HEADS_AT);
    for (int i = threadIdx.x; i < RANKS * HEAD; i += blockDim.x)
        if (heads[i] != heads[world.rank * HEAD + i % HEAD])
            fail(world, DIFFERS, i / HEAD, i % HEAD, round, (u64)heads[i], 0);
    for (int s = threadIdx.x; s < SLOTS; s += blockDim.x) {
        u64 sum = 0;
        for (int r = 0; r < RANKS; ++r) sum += at<int>(world, world.rank, COUNTS_AT)[r * SLOTS + s];
        mine.loads[s] += sum;
    }
}

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

// Rows move in pieces of up to 7 KiB, one lane of a carrying warp to a piece.  Two batches of pieces
// are under way: one comes in while the one before it is written and the jobs of the next are looked
// up.  One thread with one row at a time cannot hide what it waits for: its list entry, its row, its
// stores and the fence before it says so took 10 us a row.
constexpr u32 BATCH_BYTES = RECORD > 14336 ? RECORD : 14336;
constexpr u32 CARRY_BYTES = 2 * BATCH_BYTES;  // of a warp
constexpr u32 CARRIERS = 200704 / CARRY_BYTES;
constexpr u32 PIECES = (RECORD + 7167) / 7168;
constexpr u32 PIECE = (RECORD + PIECES * 16 - 1) / (PIECES * 16) * 16;
constexpr u32 FIT = BATCH_BYTES / (PIECE * PIECES) ? BATCH_BYTES / (PIECE * PIECES) : 1;
constexpr u32 AT_ONCE = FIT * PIECES > 32 ? 32 / PIECES : FIT;  // rows of a batch
constexpr u32 CARRY_BARS = CARRIERS * CARRY_BYTES;              // one barrier a lane and batch
constexpr u32 CARRY_SHARED = CARRY_BARS + CARRIERS * 2 * 32 * 8;
static_assert(AT_ONCE * PIECES * PIECE <= BATCH_BYTES + 16 * PIECES, "a batch does not fit");

// What one warp pulls and pushes; every lane has its own row of a batch.
//
// Pull turns: slot by slot, sources in turn, beginning right of me, so that every link is busy and
// a slot's first block is complete first.  Example, 2 ranks, rank 0, counts 2 (me) and 1 (rank 1)
// for a slot: rank 1's row is row 0 of the slot, mine are rows 1 and 2.
//
// A batch is a run of turns (of rows to push), so that it needs few blocks of the ring; it is as
// short as lets all warps have one.
struct Carrier {
    const World& world;
    const Private& mine;
    const Tables& t;
    const u32 epoch, round;
    u32 pull_step, push_step;  // from one batch to the next
    u32 pull, push;            // this lane's next turn, next row; past all if it has none
    int pull_slot = 0, push_slot = 0, left_slot = 0;
    bool pushed = true, broken = false;
    // Where the next pull goes.
    bool aimed = false;
    u32 row = NOWHERE, source_rank = 0, entry = 0;
    // The job of this lane, if it has one.
    bool has = false;
    u64 from = 0, to = 0;
    u32* done = nullptr;  // counts the row when it has landed

    static constexpr u32 NOWHERE = ~0u;

    // Warp `index` of `warps`.
    inline Carrier(const World& world, const Private& mine, const Tables& t, u32 epoch, u32 round,
                   u32 index, u32 warps)
        : world(world), mine(mine), t(t), epoch(epoch), round(round) {
        const auto share = [&](u32 all, u32& step, u32& first) {
            const u32 width = min(AT_ONCE, max((all + warps - 1) / warps, 1u));
            const u32 at = lane_index() / PIECES;
            step = warps * width;
            first = at < width ? index * width + at : NOWHERE;
        };
        share(t.turn[LOCAL], pull_step, pull);
        share(t.row[LOCAL], push_step, push);
    }

    // All lanes: find the next batch.  False if none can go now; with `wait` only when all is done
    // or broken.
    inline bool find(bool wait) {
        has = false;
        u64 started = 0;
        for (u32 turn = 1; !broken; ++turn) {
            const bool pulls = __any_sync(~0u, pull < (u32)t.turn[LOCAL]);
            const bool pushes = __any_sync(~0u, push < (u32)t.row[LOCAL]);
            if (!pulls && !pushes) return false;
            if (pulls) aim();
            const bool fits = pulls && room();
            if (pushes && !(fits && pushed) && whole()) {
                find_push();
                return true;
            }
            if (fits) {
                find_pull();
                return !broken;
            }
            if (!wait) return false;
            if (turn % 64 == 0) broken = __any_sync(~0u, too_long(started));
        }
        return false;
    }

    inline bool too_long(u64& started) const {
        if (faulted(world)) return true;
        const u64 now = global_nanoseconds();
        if (!started) started = now;
        if (now - started <= *reinterpret_cast<const u64*>(world.limit)) return false;
        fail(world, STOPPED, world.rank, 3, round, push, now - started);
        return true;
    }

    inline u32 source(u32 n) const { return (world.rank + 1 + n) % RANKS; }

    inline u32 rows_in(int slot, u32 block) const {  // `block` counted over all slots
        return min((u32)BLOCK, t.row[slot + 1] - t.row[slot] - (block - t.block[slot]) * BLOCK);
    }

    // Once a batch: where this lane's next pull goes.
    inline void aim() {
        if (aimed) return;
        aimed = true;
        row = NOWHERE;
        if (pull >= (u32)t.turn[LOCAL]) return;
        pull_slot = at_or_after(t.turn, pull_slot, pull);
        const u32 l = pull_slot, n = pull - t.turn[l], j = n / RANKS;
        source_rank = source(n);
        if (j >= (u32)t.count[source_rank][l]) return;
        u32 place = 0;  // rows of this slot whose turn is before mine
#pragma unroll 1
        for (u32 i = 0; i < RANKS; ++i)
            place += min((u32)t.count[source(i)][l], j + (i < n % RANKS));
        entry = t.first[source_rank][l] + j;
        row = t.block[l] * BLOCK + place;
    }

    // What was in the ring where the next batch goes has been pushed out.
    inline bool room() {
        if (RING == BLOCKS) return true;
        bool good = true;
        if (row != NOWHERE && row / BLOCK >= RING) {
            const u32 before = row / BLOCK - RING;
            left_slot = at_or_after(t.block, left_slot, before);
            good = load_acquire(progress(mine, epoch, LEFT) + before) >= rows_in(left_slot, before);
        }
        return __all_sync(~0u, good);
    }

    inline void find_pull() {
        bool bad = false;
        if (row != NOWHERE) {
            const u32 cell =
                at<u32>(world, world.rank, LISTS_AT)[(u64)source_rank * CELLS + entry];
            const u32 place = in_ring(row / BLOCK) * BLOCK + row % BLOCK;
            if (cell >= CELLS) {
                bad = true;
                fail(world, CORRUPT, source_rank, WORD_C, round, cell, 0);
            } else {
                has = true;
                from = world.slab[source_rank] + ROWS_AT + (u64)(cell / CHOICES) * RECORD;
                to = reinterpret_cast<u64>(mine.rows) + (u64)place * RECORD;
                done = progress(mine, epoch, ARRIVED) + row / BLOCK;
                if (lane_index() % PIECES == 0) {
                    mine.origin[place] = (u64)source_rank << 32 | cell;
                    if (WEIGHT_IN_FC2)
                        mine.scale[place] = at<float>(world, source_rank, WEIGHTS_AT)[cell];
                }
            }
        }
        if (pull != NOWHERE) pull += pull_step;
        pushed = aimed = false;
        broken = __any_sync(~0u, bad);
    }

    // Every row of the next batch to push has its results.
    inline bool whole() {
        bool good = true;
        if (push < (u32)t.row[LOCAL]) {
            push_slot = at_or_after(t.row, push_slot, push);
            const u32 block = t.block[push_slot] + (push - t.row[push_slot]) / BLOCK;
            good = load_acquire(progress(mine, epoch, WHOLE) + block) >=
                   tiles_of(HIDDEN, rows_in(push_slot, block));
        }
        return __all_sync(~0u, good);
    }

    inline void find_push() {
        if (push < (u32)t.row[LOCAL]) {
            const u32 at = push - t.row[push_slot], block = t.block[push_slot] + at / BLOCK;
            const u32 place = in_ring(block) * BLOCK + at % BLOCK;
            const u64 origin = mine.origin[place];
            const u32 to_rank = origin >> 32, cell = (u32)origin;
            // After a fault a tile may count as done whose rows never came, with any origin.
            has = to_rank < RANKS && cell < CELLS;
            from = reinterpret_cast<u64>(mine.results) + (u64)place * RESULT;
            to = has ? world.slab[to_rank] + RESULTS_AT + (u64)cell * RESULT : 0;
            done = RING == BLOCKS ? nullptr : progress(mine, epoch, LEFT) + block;
        }
        if (push != NOWHERE) push += push_step;
        pushed = true;
    }
};

// One warp, `warp` of its CTA: all its rows.
inline void carry(Carrier& c, u32 base, u32 warp, Laps& laps) {
    const u32 lane = lane_index(), piece = lane % PIECES;
    const u32 stage = base + warp * CARRY_BYTES + lane * PIECE;
    const u32 bar = base + CARRY_BARS + (warp * 64 + lane) * 8;
    const u32 start = piece * PIECE, bytes = RECORD - start < PIECE ? RECORD - start : PIECE;
    bar_init(bar, 1);
    bar_init(bar + 256, 1);
    bar_init_done();
    __syncwarp();
    u32 turn = 0, phases = 0;  // which half is next; bit h: parity of half h
    // The batch that is coming in, and the counter of the one that is being written.
    u64 to = 0;
    u32 *done = nullptr, *written = nullptr;
    bool coming = false;
    const auto write = [&] {  // what came in goes out
        const u32 half = turn ^ 1;
        if (coming) {
            bar_wait(bar + half * 256, phases >> half & 1);
            phases ^= 1 << half;
            bulk_store(reinterpret_cast<void*>(to + start), stage + half * BATCH_BYTES, bytes);
        }
        bulk_commit();
        __syncwarp();
        laps.lap(STORE);
    };
    const auto count = [&](u32* counter) {  // its rows have landed
        fence_async_global();
        __syncwarp();
        if (counter && piece == 0) add_release(counter, 1);
        laps.lap(LAND);
    };
    bool more = c.find(true);
    laps.lap(IDLE);
    while (more) {
        const bool has = c.has;
        bulk_wait_read<0>();  // this half's last batch has left it
        if (has) {
            fence_async_global();
            bar_expect(bar + turn * 256, bytes);
            bulk_load(stage + turn * BATCH_BYTES, reinterpret_cast<const void*>(c.from + start), bytes,
                      bar + turn * 256);
        }
        __syncwarp();
        laps.lap(LOAD);
        write();
        bulk_wait<1>();
        count(written);
        written = coming ? done : nullptr;
        coming = has;
        to = c.to;
        done = has ? c.done : nullptr;
        turn ^= 1;
        more = c.find(false);
        laps.lap(FIND_ROWS);
        if (!more) {
            write();
            bulk_wait<0>();
            count(written);
            count(done);
            coming = false;
            written = done = nullptr;
            more = c.find(true);
            laps.lap(IDLE);
        }
    }
    __threadfence_system();
    laps.end();
}
