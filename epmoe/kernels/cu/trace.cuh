// A look inside, with -D TRACE=1 only: what each role of each CTA did, and when.
//
// A role is one thread that notes the end of every span of its time.  Clocks are those of the SM;
// the first and last note of a role carry the machine's nanoseconds too, so that clocks of different
// SMs can be laid side by side (kernels/trace.py reads this, and the names of the spans from here).
#pragma once
#include "ptx.cuh"

#ifndef TRACE
#define TRACE 0
#endif
enum Span {
    TELL, WAIT_C, PLAN, TURN_ID, FIND_TILE, HAND_ON, WAIT_ROWS, WAIT_HALF, FEED, TAKE, FLUSH,
    FC1, FC2, OUT, FIND_ROWS, LOAD, LAND, STORE, IDLE, WORK, WAIT_Y, REDUCE, TABLES, PULL,
};
enum Role { WHOLE_CTA, SCOUT, FEEDER, FIRST_GROUP, SECOND_GROUP, FIRST_CARRIER, LAST_CARRIER, TRACED };

struct Note {
    u64 end;
    u32 length, span;
};
constexpr u32 NOTES = 4096;  // of a role; the first is the header, what is more is dropped

struct Header {  // as long as two notes
    u64 clock, nanoseconds, last_clock, last_nanoseconds;
};

// What one thread notes, if it is the one of its role that does; the host has cleared the memory.
// `lap(span)` ends the span that began at the lap before.
struct Laps {
    Note* notes;
    bool on;
    u32 count = 2;
    u64 last = 0;

    inline Laps(u64* trace, Role role, bool on)
        : notes(reinterpret_cast<Note*>(trace) + (blockIdx.x * TRACED + role) * NOTES),
          on(TRACE && on) {
        if (!this->on) return;
        last = clock64();
        Header* header = reinterpret_cast<Header*>(notes);
        header->clock = last;
        header->nanoseconds = global_nanoseconds();
    }
    inline void lap(Span span) {
        if (!TRACE || !on) return;
        const u64 now = clock64();
        if (count < NOTES) notes[count++] = {now, (u32)(now - last), (u32)span};
        last = now;
    }
    inline void end() {
        if (!TRACE || !on) return;
        Header* header = reinterpret_cast<Header*>(notes);
        header->last_clock = clock64();
        header->last_nanoseconds = global_nanoseconds();
    }
};
