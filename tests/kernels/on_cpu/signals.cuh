// Of cu/signals.cuh what finding rows needs: a slab, its words, who was told.
#pragma once
#include "ptx.cuh"
enum Kind { WORD_C, WORD_Y, WORD_LEAVE, OWN_BLOCKS };
enum Why { EXITED = 1, RAISED, STOPPED, CORRUPT, CLOSED, DIFFERS };
struct World { u64 slab[8]; u64 limit; u32 rank; };
template <typename T> T* at(const World& world, u32 rank, u64 offset) {
    return reinterpret_cast<T*>(world.slab[rank] + offset);
}
inline u64* cell_of(const World& world, u32 owner, u32 kind, u32 writer) {
    return at<u64>(world, owner, WORDS_AT) + kind * RANKS + writer;
}
inline u64 load_acquire_system(const u64* p) { return *p; }
inline u32 wrong_rank;
inline bool fail(const World&, u32, u32 rank, u32, u32, u64, u64) { wrong_rank = rank; return false; }
inline bool faulted(const World&) { return false; }
inline bool await(const World&, u32, u32, u32, u32&) { return true; }
inline bool look_for(const World&, u32, u32, u32) { return true; }
