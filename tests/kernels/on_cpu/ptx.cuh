// What the tested headers take from CUDA and from cu/ptx.cuh: lanes are contexts that run until they
// wait for others, at a vote of their warp or a barrier of their CTA.
#pragma once
#include <algorithm>
#include <numeric>
#include <ucontext.h>
using u8 = unsigned char; using u16 = unsigned short; using u32 = unsigned;
using u64 = unsigned long long;
using std::max; using std::min;
#define __shared__
struct Index { u32 x; };
inline Index threadIdx, blockIdx, blockDim;

constexpr int MOST_LANES = 96;
struct Crowd { int size, here = 0; u64 turn = 0; int value[32] = {}; };
inline ucontext_t contexts[MOST_LANES], home_context;
inline Crowd warps[MOST_LANES / 32], cta;
inline int vote;
inline void wait_for(Crowd& all) {
    const u64 turn = all.turn;
    if (++all.here == all.size) {
        all.here = 0;
        ++all.turn;
        return;
    }
    const u32 me = threadIdx.x;
    while (all.turn == turn) swapcontext(&contexts[me], &home_context);
}
inline u32 lane_index() { return threadIdx.x % 32; }
inline Crowd& my_warp() { return warps[threadIdx.x / 32]; }
template <typename F> inline int exchanged(int v, F f) {
    Crowd& all = my_warp();
    all.value[lane_index()] = v;
    wait_for(all);
    const int found = f(all.value);
    wait_for(all);
    return found;
}
inline int __shfl_sync(u32, int v, int from) {
    return exchanged(v, [&](int* all) { return all[from]; });
}
inline int scanned(int v) {
    const int lane = lane_index();
    return exchanged(v, [&](int* all) { return std::accumulate(all, all + lane + 1, 0); });
}
inline int __reduce_add_sync(u32, int v) {
    return exchanged(v, [](int* all) { return std::accumulate(all, all + 32, 0); });
}
inline bool __any_sync(u32, bool v) {
    return exchanged(v, [](int* all) { return std::any_of(all, all + 32, [](int one) { return one; }); });
}
inline bool __all_sync(u32, bool v) { return !__any_sync(0, !v); }
inline void __syncwarp() {}
inline bool __syncthreads_and(bool v) {
    wait_for(cta);
    vote = 1;
    wait_for(cta);
    vote &= v;
    wait_for(cta);
    return vote;
}
inline void __threadfence_system() {}
inline u32 load_acquire(const u32* p) { return *p; }
inline u64 global_nanoseconds() { return 0; }
inline void add_release(u32*, u32) {}
inline void bar_init(u32, u32) {}
inline void bar_init_done() {}
inline void bar_end(u32) {}
inline void bar_wait(u32, u32) {}
inline void bar_expect(u32, u32) {}
inline void bulk_store(void*, u32, u32) {}
inline void bulk_load(u32, const void*, u32, u32) {}
inline void bulk_commit() {}
template <int n> void bulk_wait() {}
template <int n> void bulk_wait_read() {}
inline void fence_async_global() {}
template <typename T> T __ldg(const T* p) { return *p; }
