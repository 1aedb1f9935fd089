// What the caller's ids say of each cell.
#pragma once
#include "ptx.cuh"

// Ids of experts, of which `table` knows the slot, or of slots already.
struct Choices {
    const void* ids;
    const int* table;  // [experts], or null: ids are slots
    u32 known;         // ids below it name something
    u32 wide;          // 1: ids are of 8 bytes, 0: of 4

    // Both without a branch, so that the loads of many cells are under way together.
    //
    // Whether the choice counts.
    inline bool names(u32 cell) const { return names(id(cell)); }
    // -1 for no choice, -2 for an id that names nothing.
    inline int slot(u32 cell) const {
        const Id named = id(cell);
        const bool good = names(named);
        const int found = __ldg(table ? table + (good ? named.low : 0) : static_cast<const int*>(ids));
        return good ? table ? found : (int)named.low : (named.low & named.high) == ~0u ? -1 : -2;
    }

    struct Id {
        u32 low, high;  // of 4 bytes: the same twice
    };
    inline Id id(u32 cell) const {
        const u32* at = static_cast<const u32*>(ids) + ((u64)cell << wide);
        return {__ldg(at), __ldg(at + wide)};
    }
    inline bool names(const Id& id) const { return id.low < known && !(wide && id.high); }
};
