// The verbs of a round as separate launches: stage, pull, push, reduce.  The GEMMs lie between.
//
// They are the oracle of the fused kernel, what it falls back to, and what it is measured against.
// Constants: those of mailbox.cuh, RECORD (bytes of a row on the wire), WEIGHT_IN_FC2, and where the
// regions of a slab lie (comm/layout.py): WORDS_AT, HEADS_AT, COUNTS_AT, LISTS_AT, WEIGHTS_AT, ROWS_AT,
// RESULTS_AT.
#include "copy.cuh"
#include "reduce.cuh"

constexpr int BLOCK = 128;  // a slot's rows begin at a multiple of it (tiles.cuh)

// All threads of a block, one answer: the host may set the fault while they look (a layer that closes).
inline bool any_faulted(const World& world) { return __syncthreads_or(faulted(world)); }

// What a rank keeps of a round for itself, in its own memory.
struct Private {
    int* counts;      // [RANKS, LOCAL] rows of each source for each of my slots
    int* slot_rows;   // [LOCAL] their sums: what the GEMMs read
    u64* loads;       // [SLOTS] rows of every slot of all ranks, summed over rounds
    u64* origin;      // [pool] source << 32 | cell
    float* scale;     // [pool] router weights, if the second GEMM applies them
    u8* rows;         // [pool, RECORD]
    u8* results;      // [pool, RESULT]
    u32* staged;      // blocks that have staged their rows in this round
    u32* pushed;      // blocks that have pushed
    u32* reduced;     // blocks that have reduced
    u32* bad;         // choices that named no slot
    u32* came;        // 2 * round + kind of the last words that block 0 has seen from all ranks
    u32 pool, unused;  // rows of the pool
};

// The tables that turn a list entry of a source into a row of the pool.
struct Tables {
    int first[RANKS][LOCAL + 1];  // list entries of a source before each slot; the last is the sum
    int row[RANKS][LOCAL];        // a slot's rows of the sources before this one
    int begin[LOCAL];             // where a slot's rows begin in the pool
};

// From counts[r][l] in t.first[r][l + 1]; all threads of the block.
inline void make_tables(Tables& t) {
    for (int l = threadIdx.x; l < LOCAL; l += blockDim.x) {
        int sum = 0;
        for (int r = 0; r < RANKS; ++r) {
            t.row[r][l] = sum;
            sum += t.first[r][l + 1];
        }
        t.begin[l] = sum;  // how many, so far
    }
    __syncthreads();
    for (u32 job = threadIdx.x / 32; job <= RANKS; job += blockDim.x / 32) {  // a list, or the pool
        int base = 0;
        for (int from = 0; from < LOCAL; from += 32) {
            const int l = from + lane_index();
            int n = 0;
            if (l < LOCAL) n = job < RANKS ? t.first[job][l + 1] : (t.begin[l] + BLOCK - 1) / BLOCK * BLOCK;
            const int sum = base + scanned(n);
            if (l < LOCAL) {
                if (job < RANKS) t.first[job][l + 1] = sum;
                else t.begin[l] = sum - n;
            }
            base = __shfl_sync(~0u, sum, 31);
        }
        if (job < RANKS && lane_index() == 0) t.first[job][0] = 0;
    }
    __syncthreads();
}

// The pool row of entry j of source r.
inline int row_of(const Tables& t, int r, int j) {
    int low = 0, high = LOCAL;  // first[low] <= j < first[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (t.first[r][middle] <= j) low = middle;
        else high = middle;
    }
    return t.begin[low] + t.row[r][low] + j - t.first[r][low];
}

// Entry n of all work, sources in turn so that every link is busy; false when r has no entry j.
inline bool entry(const Tables& t, u32 rank, u32 n, int& r, int& j) {
    r = (rank + 1 + n) % RANKS;
    j = n / RANKS;
    return j < t.first[r][LOCAL];
}

inline int longest(const Tables& t) {
    int most = 0;
    for (int r = 0; r < RANKS; ++r) most = max(most, t.first[r][LOCAL]);
    return most;
}

// All threads of a block: every rank's word of this round.  Block 0 polls the words, the host's
// page-locked memory among them; the others sleep and look at what it has seen.  When all blocks of
// reduce polled (528 then), a wait longer than 64 turns cost 560 to 600 us, whatever was waited for.
inline bool words_came(const World& world, const Private& mine, u32 kind, u32 round, u32* values) {
    const u32 target = 2 * round + kind;
    if (blockIdx.x == 0) {
        const bool came = await_all(world, kind, round, values);
        if (came && threadIdx.x == 0) {
            __threadfence_system();
            atomicExch(mine.came, target);
        }
        return came;
    }
    bool came = true;
    if (threadIdx.x == 0) {
        const u64 started = global_nanoseconds(), limit = *reinterpret_cast<const u64*>(world.limit);
        // Not by difference: these verbs may not have run for as many rounds as there are numbers.
        for (u32 turn = 0; came && load_acquire(mine.came) != target; ++turn) {
            __nanosleep(turn < 64 ? 50 : 500);
            if (turn % 64 != 63) continue;
            const u64 waited = global_nanoseconds() - started;
            came = !faulted(world);
            if (came && waited > 2 * limit)  // twice: block 0 gives up first and says why
                came = fail(world, STOPPED, world.rank, OWN_BLOCKS, round, *mine.came, waited);
        }
    }
    if (!__syncthreads_and(came)) return false;
    if (threadIdx.x < RANKS)
        values[threadIdx.x] =
            (u32)load_acquire_system(cell_of(world, world.rank, kind, threadIdx.x)) & 0x7fffffff;
    __syncthreads();
    return true;
}

// My rows into my slab, my counts and lists into the peers' mailboxes, then C to each.  Blocks
// 0 .. RANKS-1 serve one peer each and wait for the others, who copy rows and wait for nobody.
extern "C" __global__ void __launch_bounds__(1024)
    stage(const __grid_constant__ World world, const __grid_constant__ Private mine, const u8* x,
          const int* slots, const float* weights, u32 rows, const __grid_constant__ Head head) {
    __shared__ int count[SLOTS], place[SLOTS];
    if (any_faulted(world)) return;
    const u32 round = round_now(world), copiers = gridDim.x - RANKS;
    if (blockIdx.x >= RANKS) {
        const u32 block = blockIdx.x - RANKS, threads = copiers * blockDim.x;
        Quad* to = at<Quad>(world, world.rank, ROWS_AT);
        const Quad* from = reinterpret_cast<const Quad*>(x);
        const u64 quads = (u64)rows * (RECORD / 16);
        for (u64 i = block * blockDim.x + threadIdx.x; i < quads; i += threads) to[i] = from[i];
        if (WEIGHT_IN_FC2) {
            float* w = at<float>(world, world.rank, WEIGHTS_AT);
            for (u32 i = block * blockDim.x + threadIdx.x; i < rows * CHOICES; i += threads)
                w[i] = weights[i];
        }
        fence_async_global();  // peers read the rows with the copy engine
        __threadfence_system();
        __syncthreads();
        if (threadIdx.x == 0) add_release(mine.staged, 1);
        return;
    }
    const u32 peer = (world.rank + 1 + blockIdx.x) % RANKS;
    for (int s = threadIdx.x; s < SLOTS; s += blockDim.x) count[s] = 0;
    __syncthreads();
    for (u32 c = threadIdx.x; c < rows * CHOICES; c += blockDim.x) {
        const int s = slots[c];
        if (s >= 0 && s < SLOTS) atomicAdd(&count[s], 1);
        else if (s != -1 && blockIdx.x == 0) atomicAdd(mine.bad, 1);
    }
    __syncthreads();
    __shared__ int total;
    if (threadIdx.x < 32) {
        int base = 0;
        for (int from = 0; from < LOCAL; from += 32) {
            const int l = from + lane_index(), n = l < LOCAL ? count[peer * LOCAL + l] : 0;
            const int sum = base + scanned(n);
            if (l < LOCAL) place[peer * LOCAL + l] = sum - n;
            base = __shfl_sync(~0u, sum, 31);
        }
        if (threadIdx.x == 0) total = base;
    }
    __syncthreads();
    int* counts = at<int>(world, peer, COUNTS_AT) + world.rank * SLOTS;
    int* list = at<int>(world, peer, LISTS_AT) + (u64)world.rank * CELLS;
    long long* heads = at<long long>(world, peer, HEADS_AT) + world.rank * HEAD;
    for (int s = threadIdx.x; s < SLOTS; s += blockDim.x) counts[s] = count[s];
    if (threadIdx.x < HEAD) heads[threadIdx.x] = head.field[threadIdx.x];
    for (u32 c = threadIdx.x; c < rows * CHOICES; c += blockDim.x) {
        const int s = slots[c];
        if (s >= 0 && s < SLOTS && s / LOCAL == (int)peer) list[atomicAdd(&place[s], 1)] = c;
    }
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0 && await_count(world, mine.staged, copiers))
        publish(world, WORD_C, peer, round, total);
}

// All C are in: what was asked of me becomes rows of the pool, grouped by slot.
extern "C" __global__ void __launch_bounds__(MOVERS * 32)
    pull(const __grid_constant__ World world, const __grid_constant__ Private mine) {
    extern __shared__ __align__(128) u8 rings[];
    __shared__ Tables t;
    __shared__ u32 asked[RANKS];
    if (any_faulted(world)) return;
    const u32 round = round_now(world);
    if (!words_came(world, mine, WORD_C, round, asked)) return;
    for (int i = threadIdx.x; i < SLOTS; i += blockDim.x) {
        const int r = i / LOCAL, l = i % LOCAL;
        const int n = at<int>(world, world.rank, COUNTS_AT)[r * SLOTS + world.rank * LOCAL + l];
        t.first[r][l + 1] = n;
        if (blockIdx.x == 0) mine.counts[i] = n;
        if (n < 0 || n > (int)CELLS) fail(world, CORRUPT, r, WORD_C, round, (u64)n, 0);
    }
    if (any_faulted(world)) return;
    if (blockIdx.x == 0) {
        const long long* heads = at<long long>(world, world.rank, HEADS_AT);
        for (int i = threadIdx.x; i < RANKS * HEAD; i += blockDim.x)
            if (heads[i] != heads[world.rank * HEAD + i % HEAD])
                fail(world, DIFFERS, i / HEAD, i % HEAD, round, (u64)heads[i], 0);
        for (int s = threadIdx.x; s < SLOTS; s += blockDim.x) {
            u64 sum = 0;
            for (int r = 0; r < RANKS; ++r)
                sum += at<int>(world, world.rank, COUNTS_AT)[r * SLOTS + s];
            mine.loads[s] += sum;
        }
        for (int l = threadIdx.x; l < LOCAL; l += blockDim.x) {
            int sum = 0;
            for (int r = 0; r < RANKS; ++r) sum += t.first[r][l + 1];
            mine.slot_rows[l] = sum;
        }
    }
    make_tables(t);
    if (threadIdx.x < RANKS && t.first[threadIdx.x][LOCAL] != (int)asked[threadIdx.x])
        fail(world, CORRUPT, threadIdx.x, WORD_C, round, asked[threadIdx.x], 0);
    if (threadIdx.x == 0) {  // where ranks disagree on the call, a pool without rows is asked for some
        u32 all = 0;
        for (int r = 0; r < RANKS; ++r) all += t.first[r][LOCAL];
        if (all > mine.pool) fail(world, CORRUPT, world.rank, WORD_C, round, all, 0);
    }
    if (any_faulted(world)) return;
    fence_async_global();
    if (lane_index()) return;
    const u32 warp = threadIdx.x / 32;
    Mover mover(smem(rings), warp);
    const u32 step = gridDim.x * MOVERS, end = (u32)longest(t) * RANKS;
    u32 n = blockIdx.x + gridDim.x * warp;
    move_rows<RECORD>(mover, [&](u64& from, u64& to) {
        for (; n < end; n += step) {
            int r, j;
            if (!entry(t, world.rank, n, r, j)) continue;
            const u32 cell = at<u32>(world, world.rank, LISTS_AT)[(u64)r * CELLS + j];
            if (cell >= CELLS) return fail(world, CORRUPT, r, WORD_C, round, cell, 0);
            const int row = row_of(t, r, j);
            mine.origin[row] = (u64)r << 32 | cell;
            if (WEIGHT_IN_FC2) mine.scale[row] = at<float>(world, r, WEIGHTS_AT)[cell];
            from = world.slab[r] + ROWS_AT + (u64)(cell / CHOICES) * RECORD;
            to = reinterpret_cast<u64>(mine.rows) + (u64)row * RECORD;
            n += step;
            return true;
        }
        return false;
    });
}

// Each result to its cell at its source; the last block to finish says Y to everyone.
extern "C" __global__ void __launch_bounds__(MOVERS * 32)
    push(const __grid_constant__ World world, const __grid_constant__ Private mine) {
    extern __shared__ __align__(128) u8 rings[];
    __shared__ Tables t;
    if (any_faulted(world)) return;
    const u32 round = round_now(world);
    // Not from the mailbox: after somebody's Y it may hold the next round.
    for (int i = threadIdx.x; i < SLOTS; i += blockDim.x)
        t.first[i / LOCAL][i % LOCAL + 1] = mine.counts[i];
    __syncthreads();
    make_tables(t);
    if (lane_index() == 0) {
        const u32 warp = threadIdx.x / 32;
        Mover mover(smem(rings), warp);
        const u32 step = gridDim.x * MOVERS, end = (u32)longest(t) * RANKS;
        u32 n = blockIdx.x + gridDim.x * warp;
        fence_async_global();
        move_rows<RESULT>(mover, [&](u64& from, u64& to) {
            for (; n < end; n += step) {
                int r, j;
                if (!entry(t, world.rank, n, r, j)) continue;
                const int row = row_of(t, r, j);
                from = reinterpret_cast<u64>(mine.results) + (u64)row * RESULT;
                to = world.slab[r] + RESULTS_AT + (mine.origin[row] & 0xffffffff) * RESULT;
                n += step;
                return true;
            }
            return false;
        });
        fence_async_global();
        __threadfence_system();
    }
    __syncthreads();
    __shared__ u32 last;
    if (threadIdx.x == 0) {
        __threadfence_system();
        last = atomicAdd(mine.pushed, 1) + 1 == gridDim.x;
        if (last) *mine.pushed = 0;
        __threadfence_system();
    }
    __syncthreads();
    if (last && threadIdx.x < RANKS) publish(world, WORD_Y, threadIdx.x, round, 0);
}

// All Y are in: the sum over choices, ascending, in fp32; one rounding.  After a fault: NaN.
//
// Three blocks on an SM: left to itself the assembler takes 32 registers, and a row's loads wait for
// one another.
extern "C" __global__ void __launch_bounds__(256, 3)
    reduce(const __grid_constant__ World world, const __grid_constant__ Private mine,
           const int* slots, const float* weights, const float* shared, u8* out, u32 rows) {
    __shared__ u32 values[RANKS];
    const bool good = !any_faulted(world) && words_came(world, mine, WORD_Y, round_now(world), values);
    const Choices choices{slots, nullptr, SLOTS, 0};
    reduce_rows(world, choices, weights, shared, out, rows, good,
                blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(mine.reduced, 1) + 1 == gridDim.x) {
            *mine.reduced = 0;
            *mine.staged = 0;  // the lane's rounds are also other layers': they cannot be counted by
            if (good) *reinterpret_cast<u64*>(world.round) += 1;
        }
    }
}
