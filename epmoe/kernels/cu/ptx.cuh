// The Hopper instructions that the kernels are made of, one function each.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(64) TensorMap {
    u64 opaque[16];
};
struct alignas(16) Quad {
    u32 x, y, z, w;
};

// ---- who am I --------------------------------------------------------------------------------

// Warp-uniform for the compiler too: a shuffled index lets it keep role branches uniform.
inline u32 warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }
// Asked anew each time, where tiles are wide: kept for the whole kernel, predicates made of it were
// spilled.  Where weights are tall nothing was, and a loop that asks would ask in every step.
#if TALL
inline u32 lane_index() { return threadIdx.x % 32; }
#else
inline u32 lane_index() {
    u32 lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}
#endif

// The sum of a value over the lanes up to this one; all lanes of a warp together.
inline int scanned(int value) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
        asm volatile(
            "{.reg .pred below;\n"
            ".reg .s32 other;\n"
            "shfl.sync.up.b32 other|below, %0, %1, 0, 0xffffffff;\n"
            "@below add.s32 %0, %0, other;}"
            : "+r"(value)
            : "r"(step));
    return value;
}

inline u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

// A warpgroup gives the turn `id` to the other, which waits for it with turn_wait.
inline void turn_give(u32 id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }
inline void turn_wait(u32 id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }

// A barrier of the two warpgroups that multiply.
inline void both_sync() {
    __syncwarp();
    asm volatile("bar.sync 5, 256;" ::: "memory");
}

// The same, and whether all of their threads say so.
inline bool both_and(bool mine) {
    u32 all;
    __syncwarp();
    asm volatile(
        "{.reg .pred one, every;\n"
        "setp.ne.u32 one, %1, 0;\n"
        "bar.red.and.pred every, 5, 256, one;\n"
        "selp.u32 %0, 1, 0, every;}"
        : "=r"(all)
        : "r"((u32)mine)
        : "memory");
    return all;
}

// A barrier of one warpgroup (128 threads); id 0 belongs to __syncthreads.
inline void group_sync(u32 id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

// Give registers to or take them from this warpgroup's pool; every warp of the group together.
template <int count>
inline void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
inline void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

inline u64 global_nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

// ---- shared memory ---------------------------------------------------------------------------

inline u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// What ordinary stores wrote becomes visible to the copy engine and the tensor cores.
inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

inline void stmatrix4(u32 at, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

inline Quad load_shared(u32 at) {
    Quad q;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
                 : "r"(at)
                 : "memory");
    return q;
}

inline u32 load_shared_word(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}

inline void store_shared(u32 at, u16 v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(v) : "memory");
}

// ---- mbarriers -------------------------------------------------------------------------------

inline void bar_init(u32 bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

// Its memory may be used for something else.
inline void bar_end(u32 bar) {
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

inline void bar_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

inline void bar_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}

inline void bar_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Arrive at the barrier of the same name in the CTA `rank` of this cluster (this one included).  No
// `.release.cluster`: it becomes a MEMBAR.GPU and took a fifth off the whole GEMM (570 against
// 709 TFLOP/s), and nobody reads what the arriving warp wrote.
inline void bar_arrive_at(u32 bar, u32 rank) {
    asm volatile(
        "{.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(bar),
        "r"(rank)
        : "memory");
}

// Store a word at the same place in the CTA `rank` and count its 4 bytes on that CTA's barrier.
inline void store_at(u32 to, u32 bar, u32 rank, u32 value) {
    asm volatile(
        "{.reg .b32 there, its;\n"
        "mapa.shared::cluster.u32 there, %0, %2;\n"
        "mapa.shared::cluster.u32 its, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %3, [its];}" ::"r"(to),
        "r"(bar), "r"(rank), "r"(value)
        : "memory");
}

inline bool bar_try(u32 bar, u32 phase) {
    u32 done;
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(bar), "r"(phase)
        : "memory");
    return done;
}

// Like bar_try, but answers at once: try_wait sleeps for tens of microseconds before it says no.
inline bool bar_test(u32 bar, u32 phase) {
    u32 done;
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(bar), "r"(phase)
        : "memory");
    return done;
}

// Everything waited for here is fed by this same launch, so the wait ends unless the kernel itself
// is wrong; waits for other ranks have their own limits (signals.cuh), which come first: 2^26 tries
// were over before a limit of 5 s, so these are 64 times as many.
inline void bar_wait(u32 bar, u32 phase) {
    for (u32 tries = 0; !bar_try(bar, phase);)
        if (++tries == ~0u) asm volatile("trap;");
}

// ---- the copy engine -------------------------------------------------------------------------

inline void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// True for one lane of a warp, the same one each time, all lanes together.  Unlike `lane_index() == 0`
// it tells the assembler that what follows is done by one thread: without it every instruction of the
// copy engine gets a loop over lanes.
inline bool elected() {
    u32 mine;
    asm volatile(
        "{.reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(mine));
    return mine;
}

inline void tma_load(u32 to, const TensorMap& map, u32 bar, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
        "l"(&map), "r"(bar), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// Lands at the same place in both CTAs of the cluster and completes on both barriers.
inline void tma_load_both(u32 to, const TensorMap& map, u32 bar, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(&map), "r"(bar), "r"(x), "r"(y), "r"(z), "h"((u16)3)
        : "memory");
}

inline void tma_store(const TensorMap& map, u32 from, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
            &map),
        "r"(from), "r"(x), "r"(y), "r"(0)
        : "memory");
}

inline void bulk_load(u32 to, const void* from, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            to),
        "l"(from), "r"(bytes), "r"(bar)
        : "memory");
}

inline void bulk_store(void* to, u32 from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
}

inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// At most `left` groups of this thread still read shared memory.
template <int left>
inline void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(left) : "memory");
}

// At most `left` groups of this thread have not landed yet.
template <int left>
inline void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(left) : "memory");
}

// ---- global memory ---------------------------------------------------------------------------

inline void store_global(void* p, Quad q) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(q.x), "r"(q.y), "r"(q.z),
                 "r"(q.w)
                 : "memory");
}

inline Quad load_global(const void* p) {
    Quad q;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
                 : "l"(p));
    return q;
}

// Volatile, so that it stays where it is written: hoisted loads cost registers.
inline u32 load_const(const void* p) {
    u32 v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// From L2, where other SMs have put it; the caller knows that they have.
inline u32 load_relaxed(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

inline u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

inline void add_release(u32* p, u32 v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// ---- numbers ---------------------------------------------------------------------------------

// Two bf16 in one register, `low` first in memory; round to nearest even.
inline u32 pack_bf16(float low, float high) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

inline float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
inline float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
