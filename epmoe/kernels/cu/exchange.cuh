// What a fused round keeps, and how ranks tell each other what they ask: stage, tell, make tables.
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
