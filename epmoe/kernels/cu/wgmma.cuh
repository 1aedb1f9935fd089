// One warpgroup's matrix instruction: d (64 x N, fp32) += A (64 x 16) * B (16 x N), both in shared
// memory, K contiguous, 128-byte swizzle.  One class per N; the lists only differ in length.
#pragma once
#include "ptx.cuh"

// Describes a tile of 64 bf16 columns (128 bytes) a row, written by TMA with the 128-byte swizzle,
// at a multiple of 1024: groups of 8 rows lie 1024 bytes apart.  Moving 16 columns to the right
// inside the swizzle adds 32 bytes to the address, so `+ 2` to this value.
inline u64 tile_descriptor(u32 at) {
    return (u64)((at & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int left>
inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}

// clang-format off
#define D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define D16(i) D4(i), D4((i) + 4), D4((i) + 8), D4((i) + 12)
#define D64(i) D16(i), D16((i) + 16), D16((i) + 32), D16((i) + 48)

// `keep` 0: d = A * B (the first step of a tile); 1: d += A * B.
template <int columns> struct Wgmma;

template <> struct Wgmma<8> {
    static inline void run(float (&d)[4], u64 a, u64 b, u32 keep) {
        asm volatile("{.reg .pred p; setp.ne.b32 p, %6, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3},"
            " %4, %5, p, 1, 1, 0, 0;}"
            : D4(0) : "l"(a), "l"(b), "r"(keep));
    }
};
template <> struct Wgmma<16> {
    static inline void run(float (&d)[8], u64 a, u64 b, u32 keep) {
        asm volatile("{.reg .pred p; setp.ne.b32 p, %10, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7},"
            " %8, %9, p, 1, 1, 0, 0;}"
            : D4(0), D4(4) : "l"(a), "l"(b), "r"(keep));
    }
};
template <> struct Wgmma<32> {
    static inline void run(float (&d)[16], u64 a, u64 b, u32 keep) {
        asm volatile("{.reg .pred p; setp.ne.b32 p, %18, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15},"
            " %16, %17, p, 1, 1, 0, 0;}"
            : D16(0) : "l"(a), "l"(b), "r"(keep));
    }
};
template <> struct Wgmma<64> {
    static inline void run(float (&d)[32], u64 a, u64 b, u32 keep) {
        asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
            " %32, %33, p, 1, 1, 0, 0;}"
            : D16(0), D16(16) : "l"(a), "l"(b), "r"(keep));
    }
};
template <> struct Wgmma<128> {
    static inline void run(float (&d)[64], u64 a, u64 b, u32 keep) {
        asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"
            " %64, %65, p, 1, 1, 0, 0;}"
            : D64(0) : "l"(a), "l"(b), "r"(keep));
    }
};
template <> struct Wgmma<256> {
    static inline void run(float (&d)[128], u64 a, u64 b, u32 keep) {
        asm volatile("{.reg .pred p; setp.ne.b32 p, %130, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,"
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,"
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,"
            "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111,"
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127},"
            " %128, %129, p, 1, 1, 0, 0;}"
            : D64(0), D64(64) : "l"(a), "l"(b), "r"(keep));
    }
};

#undef D4
#undef D16
#undef D64
// clang-format on
