// All carrying warps of a rank, one after the other: what each lane is told to read and to write.
#include "carry.cuh"
static char stacks[MOST_LANES][1 << 16];
static void (*job)();
static int running;
static void enter() {
    job();
    --running;
    for (;;) swapcontext(&contexts[threadIdx.x], &home_context);
}
static void run(int lanes, void (*what)()) {
    job = what; running = lanes; cta = {lanes};
    for (Crowd& w : warps) w = {32};
    for (int i = 0; i < lanes; ++i) {
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = stacks[i];
        contexts[i].uc_stack.ss_size = sizeof(stacks[i]);
        makecontext(&contexts[i], enter, 0);
    }
    while (running)
        for (int i = 0; i < lanes; ++i) {
            threadIdx.x = i;
            swapcontext(&home_context, &contexts[i]);
        }
}
static World world; static Private mine; static Tables tables;
static u32 index_, warps_, most_, logged; static u32* log_; static bool good_;

// Per pulled row and choice: source, the row that is read, the cell, the row of the pool.
extern "C" int pull_all(u8* slab, u32 rank, u32* homes, u32* blocks, u32 warps_all, u32 most,
                        u32* log) {
    world = {}; mine = {};
    world.rank = rank;
    for (u32 r = 0; r < RANKS; ++r) world.slab[r] = r == rank ? (u64)slab : (u64)(r + 1) << 40;
    mine.homes = homes; mine.blocks = blocks;
    blockDim.x = MOST_LANES; good_ = true;
    run(MOST_LANES, [] { if (!make_tables(world, tables, 1)) good_ = false; });
    if (!good_) return -1 - (int)wrong_rank;
    log_ = log; logged = 0; warps_ = warps_all; most_ = most;
    for (index_ = 0; index_ < warps_all; ++index_)
        run(32, [] {
            Carrier c(world, mine, tables, 0, 1, index_, warps_);
            while (c.find(true)) {
                const u64 from = c.from;
                c.ask();
                c.place();
                if (from && c.row != Carrier::NOWHERE && logged < most_) {
                    u32* line = log_ + 4 * logged++;
                    line[0] = c.source();
                    line[1] = (u32)((from - world.slab[c.source()] - ROWS_AT) / RECORD);
                    line[2] = c.cell;
                    line[3] = c.row;
                }
                c.aim();
            }
            if (c.broken) good_ = false;
        });
    return good_ ? (int)logged : -100;
}
