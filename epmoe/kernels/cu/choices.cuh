// What the caller's ids say of each cell.
#pragma once
#include "ptx.cuh"

// Ids of experts, of which `table` knows the slot, or of slots already.
struct Choices {
    const void* ids;
    const int* table;  // [experts], or null: ids are slots
    u32 known;         // ids below it name something
    u32 wide;          // 1: ids are of 8 bytes, 0: of 4

    struct Id {
        u32 low, high;  // of 4 bytes: the same twice
    };
    inline Id id(u32 cell) const {
        const u32* at = static_cast<const u32*>(ids) + ((u64)cell << wide);
        return {__ldg(at), __ldg(at + wide)};
    }
    inline bool names(const Id& id) const { return id.low < known && !(wide && id.high); }

    // Whether the choice counts.
    inline bool names(u32 cell) const { return names(id(cell)); }

    // The slot that an id names, if it names one, in two steps: whoever wants many takes all ids first,
    // then all from the table.  In one step the assembler puts an id's load, its table's and the next
    // id's one after the other, and each takes a microsecond.
    inline int found(const Id& named) const {
        return table ? __ldg(table + (names(named) ? named.low : 0)) : (int)named.low;
    }
    // -1 for no choice, -2 for an id that names nothing.
    inline int slot(const Id& named, int found) const {
        return names(named) ? found : (named.low & named.high) == ~0u ? -1 : -2;
    }
};
