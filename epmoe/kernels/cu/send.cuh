// Results leave by themselves: the epilogue of FC2 writes each row into its home, the cell of the
// slab of the rank that asked for it, over NVLink where that is another one.
//
// No results pool, nobody who looks for finished blocks, and nothing left to move when the last tile
// is done.  A warp stages 16 rows x 128 columns, so that a row leaves in whole lines of 256 bytes.
#pragma once
#include "exchange.cuh"

// Of row 16 * warp + lane % 16 of the warpgroup's rows from pool row `row`.
inline u32 home_of_row(const Private& mine, int row, int live) {
    const int r = 16 * (warp_index() % 4) + lane_index() % 16;
    return r < live ? load_relaxed(mine.homes + row + r) : HOMELESS;
}

// The counterpart of write_out for rows that go home: each lane knows the address of one, or 0.  The
// caller has seen to it that nobody reads the staging buffer, and has loaded the router weights: the
// rows' place in the ring may be another's by now.
template <bool biased, bool scaled>
inline void send_out(float (&sums)[TILE_N / 2], const Out& out, const float (&scale)[2], u64 home,
                     u32 staging, int slot, int column) {
    const u32 lane = lane_index(), warp = warp_index() % 4, own = lane % 16, chunk = lane / 16;
    const u32 bias = slot * out.width + column * TILE_N + 2 * (lane % 4), stage = staging + warp * 4096;
#pragma unroll
    for (int first = 0; first < TILE_N; first += 128) {
        __syncwarp();  // the pass before has been read
#pragma unroll
        for (int j = 0; j < 16; j += 2) {
            u32 v[4];
            finish_pair<NONE, biased, scaled>(v, sums, out, first / 8 + j, bias, column * TILE_N,
                                              out.width, scale);
            stmatrix4(stage + own * 256 + ((j + chunk) ^ (own % 8)) * 16, v[0], v[1], v[2], v[3]);
        }
        __syncwarp();
        const u32 c = lane % 16;
        const int x = column * TILE_N + first + 8 * c;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            const u32 r = 2 * i + lane / 16;
            const u64 to = __shfl_sync(~0u, home, r);
            if (to && x < out.width)
                store_global(reinterpret_cast<void*>(to + 2 * x),
                             load_shared(stage + r * 256 + (c ^ (r % 8)) * 16));
        }
    }
}
