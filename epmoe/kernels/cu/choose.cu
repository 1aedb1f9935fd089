// Which replica every choice goes to: sched/placement.choose_slots, the same slots bit for bit.
//
// The j-th choice of an expert takes its replica (j + first) % count.  Constants: EXPERTS, WIDTH
// (columns of the table of replicas), CELLS_PER_BLOCK, ID (int or long long).
#include "ptx.cuh"

constexpr int WARPS = CELLS_PER_BLOCK / 32;

// A block counts the choices before its own by itself: no second launch, nothing to reset.
extern "C" __global__ void __launch_bounds__(CELLS_PER_BLOCK)
    choose(const ID* ids, int* slots, const int* replicas_EX, const int* counts_E, u32 cells,
           u32 first) {
    __shared__ u32 before[EXPERTS];      // choices in earlier blocks
    __shared__ u16 inside[WARPS][EXPERTS];  // in each warp of this block
    const u32 thread = threadIdx.x, warp = thread / 32, start = blockIdx.x * CELLS_PER_BLOCK;
    for (u32 i = thread; i < EXPERTS; i += CELLS_PER_BLOCK) before[i] = 0;
    for (u32 i = thread; i < WARPS * EXPERTS; i += CELLS_PER_BLOCK) inside[0][i] = 0;
    __syncthreads();
    for (u32 c = thread; c < start; c += CELLS_PER_BLOCK) {
        const long long id = ids[c];
        if (id >= 0 && id < EXPERTS) atomicAdd(&before[id], 1u);
    }
    const u32 cell = start + thread;
    const long long id = cell < cells ? (long long)ids[cell] : -1;
    const bool live = id >= 0 && id < EXPERTS;
    const u32 same = __match_any_sync(~0u, live ? (int)id : -1);
    const u32 earlier = __popc(same & ((1u << lane_index()) - 1));
    if (live && earlier == 0) inside[warp][id] = __popc(same);
    __syncthreads();
    if (cell >= cells) return;
    if (!live) {
        slots[cell] = id == -1 ? -1 : -2;  // -2: `stage` counts it as a bad id
        return;
    }
    u32 turn = before[id] + earlier + first;
    for (u32 w = 0; w < warp; ++w) turn += inside[w][id];
    slots[cell] = replicas_EX[id * WIDTH + turn % (u32)counts_E[id]];
}
