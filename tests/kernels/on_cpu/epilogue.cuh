// Of cu/epilogue.cuh and what it includes: sizes.
#pragma once
#include "ptx.cuh"
enum Act { NONE }; constexpr bool gated(Act) { return false; }
constexpr Act ACT = NONE;
constexpr int BLOCK = 128, INNER = 64, TILE_N = 256, TALL = 0;
