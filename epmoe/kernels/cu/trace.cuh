// Where the time of a round goes: cycles added up per CTA and role, with -D TRACE=1 only.
#pragma once
#include "ptx.cuh"

#ifndef TRACE
#define TRACE 0
#endif
constexpr int SPANS = 24;  // u64 of a CTA

// One thread's clock: `lap(i)` adds the time since the last lap to span i.
struct Laps {
    u64* spans;
    u64 last;

    inline explicit Laps(u64* of_cta) : spans(of_cta), last(TRACE ? clock64() : 0) {}
    inline void lap(int i) {
        if (!TRACE) return;
        const u64 now = clock64();
        spans[i] += now - last;
        last = now;
    }
    inline void count(int i) {
        if (TRACE) spans[i] += 1;
    }
};
