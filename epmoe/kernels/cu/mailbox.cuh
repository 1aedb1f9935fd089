// What the mailboxes of a slab hold, in numbers (comm/layout.py).
//
// Constants: RANKS, LOCAL (slots of a rank), CHOICES, HIDDEN, MAX_ROWS.
#pragma once
#include "ptx.cuh"

constexpr int SLOTS = RANKS * LOCAL;
constexpr u32 CELLS = MAX_ROWS * CHOICES;
constexpr u32 RESULT = HIDDEN * 2;  // bytes of a result in bf16
constexpr int HEAD = 8;

struct Head {
    long long field[HEAD];
};
