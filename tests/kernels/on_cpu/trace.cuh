// Nobody notes anything.
#pragma once
enum Span { STORE, LAND, IDLE, FIND_ROWS, LOAD };
struct Laps { void lap(int) {} void end() {} };
