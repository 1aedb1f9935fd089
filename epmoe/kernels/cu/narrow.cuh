// The narrow path: few rows a slot, so the weights are the 64-row side of the instruction and the
// rows its narrow side; what counts is that weights stream without a pause.
//
// A tile is TALL weight rows (64 or 128) x up to 64 rows of the pool; a stage holds 128 of the K.
// With TALL 128 each warpgroup has half of a tile; with 64 they take whole tiles in turn: one may
// not wait for a stage before the other has passed the round of the ring before it, since a barrier
// tells only odd rounds from even ones.  Each tile's
// weights are read by one SM only, and the ring runs on into the next tile: 96 to 128 KiB of
// weights are under way per SM, three times what 4 TB/s needs.
#pragma once
#include "epilogue.cuh"

constexpr int CHUNK = 64;        // most rows of the pool in a tile
constexpr int NARROW_K = 128;
constexpr u32 TURN = 3;          // named barriers of the two warpgroups
constexpr int PITCH = 64 * 2 + 16;  // bytes of a staged result row: the odd quad spreads banks

template <int tall>
struct Narrow {
    static constexpr u32 weight_bytes = tall * NARROW_K * 2;
    static constexpr u32 row_bytes = CHUNK * NARROW_K * 2;
    static constexpr u32 stage_bytes = weight_bytes + row_bytes;
    static constexpr u32 stages = tall == 64 ? 6 : 4;
    static constexpr u32 staging_at = stages * stage_bytes;
    static constexpr u32 bars_at = staging_at + GROUPS * CHUNK * PITCH;
    static constexpr u32 order_at = bars_at + 2 * stages * 8;
    static constexpr u32 table_at = order_at + ORDER_BYTES;

    u32 base, stage = 0, phase = 0;

    inline u32 weights() const { return base + stage * stage_bytes; }
    inline u32 rows() const { return weights() + weight_bytes; }
    inline u32 full() const { return base + bars_at + stage * 8; }
    inline u32 empty() const { return full() + stages * 8; }
    inline void jump(u32 steps) {
        stage += steps;
        phase ^= (stage / stages) & 1;
        stage %= stages;
    }
    inline void init() const {
        for (u32 s = 0; s < stages; ++s) {
            bar_init(base + bars_at + s * 8, 1);
            bar_init(base + bars_at + (stages + s) * 8, tall == 64 ? 4 : 8);
        }
    }
};

// A tile: weight rows from tall * `tile` of the slot, `live` rows of the pool from `row`.
struct NarrowTile {
    int slot, tile, row, live;
};

// Chunks of a slot's rows share the weights, so they follow each other.
template <int slots, int tiles>
inline NarrowTile narrow_tile(const int* chunks, const int* blocks, const int* counts,
                              int t) {
    NarrowTile n;
    n.slot = slot_of<slots>(chunks, t, tiles);
    const int first = chunks[n.slot], have = chunks[n.slot + 1] - first;
    const int rest = t - first * tiles, chunk = rest % have;
    n.tile = rest / have;
    n.row = blocks[n.slot] * BLOCK + chunk * CHUNK;
    n.live = min(CHUNK, counts[n.slot] - chunk * CHUNK);
    return n;
}

// Rows are fetched in boxes of 8 (`few`) or 32 (`many`), so that 5 rows do not cost 64.  Weights of
// as many stages as are free go first.  `duties` as in gemm.cuh.
template <int tall, typename Duties>
inline void feed(Narrow<tall>& ring, const TensorMap& few, const TensorMap& many,
                 const TensorMap& weights, const NarrowTile& n, int steps, Duties duties) {
    const int wide = n.live <= 8 ? 8 : n.live <= 16 ? 16 : n.live <= 32 ? 32 : 64;
    Narrow<tall> ahead = ring;
    int sent = 0;
    const auto send_weights = [&] {
        bar_expect(ahead.full(), ring.weight_bytes + wide * NARROW_K * 2);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            tma_load(ahead.weights() + half * (tall * 128), weights, ahead.full(),
                     sent * NARROW_K + half * 64, n.tile * tall, n.slot);
        ++sent;
        ahead.jump(1);
    };
    const int first = min(steps, (int)ring.stages);
    while (sent < first && bar_test(ahead.empty(), ahead.phase ^ 1)) send_weights();
    duties.await();
    for (int k = 0; k < steps; ++k, ring.jump(1)) {
        duties.passes(steps - k);
        if (sent == k) {
            bar_wait(ahead.empty(), ahead.phase ^ 1);
            send_weights();
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int x = k * NARROW_K + half * 64;
            const u32 to = ring.rows() + half * (wide * 128);
            if (wide >= 32) {
                for (int r = 0; r < wide; r += 32)
                    tma_load(to + r * 128, many, ring.full(), x, n.row + r, 0);
            } else {
                for (int r = 0; r < wide; r += 8)
                    tma_load(to + r * 128, few, ring.full(), x, n.row + r, 0);
            }
        }
    }
}

// `between` as in gemm.cuh.
template <int tall, int wide, typename Between>
inline void multiply(Narrow<tall>& ring, float (&sums)[wide / 2], u32 group, int steps,
                     Between between) {
    u32 before = 0;
    const int pause = __any_sync(~0u, !bar_test(ring.full(), ring.phase)) ? 0 : 1;
    for (int k = 0; k < steps; ++k, ring.jump(1)) {
        if (k == pause) between();
        bar_wait(ring.full(), ring.phase);
        wgmma_begin();
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 own = tall == 128 ? group * 64 * 128 : 0;
            const u64 a = tile_descriptor(ring.weights() + half * (tall * 128) + own);
            const u64 b = tile_descriptor(ring.rows() + half * (wide * 128));
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                Wgmma<wide>::run(sums, a + 2 * i, b + 2 * i, (k | i | half) != 0);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (k && lane_index() == 0) bar_arrive(before);
        before = ring.empty();
    }
    wgmma_wait<0>();
    if (lane_index() == 0) bar_arrive(before);
#pragma unroll
    for (int i = 0; i < wide / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// One warpgroup's 64 weight rows from `left`: sums[4 j + 0, 1] are weight row 16 w + g of pool rows
// 8 j + 2 q + {0, 1}, sums[4 j + 2, 3] weight row 16 w + g + 8: gate and up of the same value.
// A row goes to `address_of(row)`, nowhere if that is 0.
template <Act act, bool biased, bool scaled, int wide, typename Address>
inline void write_narrow(float (&sums)[wide / 2], const Out& out, u32 staging, const NarrowTile& n,
                         int left, u32 group, Address address_of) {
    constexpr int per = gated(act) ? 2 : 1, quads = 8 / per;
    const u32 lane = lane_index(), warp = warp_index() % 4, thread = threadIdx.x % 128;
    const u32 g = lane / 4, q = lane % 4;
    float bias[2] = {0.0f, 0.0f};
    if (biased) {
        const u16* at = out.bias + (u64)n.slot * out.width * per + left + 16 * warp + g;
        bias[0] = __uint_as_float((u32)at[0] << 16);
        bias[1] = __uint_as_float((u32)at[8] << 16);
    }
    group_sync(1 + group);  // the results before these have left the staging rows
#pragma unroll
    for (int j = 0; j < wide / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int r = 8 * j + 2 * q + e;
            const float scale = scaled && r < n.live ? out.scale[n.row + r] : 1.0f;
            const float low = sums[4 * j + e], high = sums[4 * j + 2 + e];
            const u32 at = staging + r * PITCH;
            if (per == 2) {
                const float v = finish<act, biased, scaled>(low, high, bias[0], bias[1], scale,
                                                            out.limit);
                store_shared(at + (8 * warp + g) * 2, (u16)pack_bf16(v, 0.0f));
            } else {
                const float v =
                    finish<act, biased, scaled>(low, 0.0f, bias[0], 0.0f, scale, out.limit);
                const float w =
                    finish<act, biased, scaled>(high, 0.0f, bias[1], 0.0f, scale, out.limit);
                store_shared(at + (16 * warp + g) * 2, (u16)pack_bf16(v, 0.0f));
                store_shared(at + (16 * warp + g + 8) * 2, (u16)pack_bf16(w, 0.0f));
            }
        }
    }
    constexpr int turns = (wide * quads + 127) / 128;  // of a thread that writes out
    u64 to[turns];
#pragma unroll
    for (int i = 0; i < turns; ++i) {
        const int r = (thread + 128 * i) / quads;
        to[i] = r < n.live ? address_of(n.row + r) : 0;
    }
    group_sync(1 + group);
#pragma unroll
    for (int i = 0; i < turns; ++i) {
        const int r = (thread + 128 * i) / quads, c = (thread + 128 * i) % quads;
        if (to[i])
            store_global(reinterpret_cast<void*>(to[i] + 2 * (left / per + 8 * c)),
                         load_shared(staging + r * PITCH + c * 16));
    }
}

template <Act act, bool biased, bool scaled, int wide, int tall, typename Between, typename Address>
inline void narrow_as(Narrow<tall>& ring, const Out& out, u32 staging, const NarrowTile& n,
                      int left, u32 group, int steps, Between between, Address address_of) {
    float sums[wide / 2];
    if (tall == 64) turn_wait(TURN + group);
    multiply<tall, wide>(ring, sums, group, steps, between);
    if (tall == 64) turn_give(TURN + 1 - group);
    write_narrow<act, biased, scaled, wide>(sums, out, staging, n, left, group, address_of);
}

// Multiplies and writes one tile, as narrow as its rows allow.
template <Act act, bool biased, bool scaled, int tall, typename Between, typename Address>
inline void narrow_run(Narrow<tall>& ring, const Out& out, u32 staging, const NarrowTile& n,
                       u32 group, int steps, Between between, Address address_of) {
    const int left = n.tile * tall + (tall == 128 ? group * 64 : 0);
    if (left >= out.width * (gated(act) ? 2 : 1)) {  // the weights ended in the middle of the tile
        between();
        for (int k = 0; k < steps; ++k, ring.jump(1)) {
            bar_wait(ring.full(), ring.phase);
            if (lane_index() == 0) bar_arrive(ring.empty());
        }
    } else if (n.live <= 8) {
        narrow_as<act, biased, scaled, 8>(ring, out, staging, n, left, group, steps, between,
                                        address_of);
    } else if (n.live <= 16) {
        narrow_as<act, biased, scaled, 16>(ring, out, staging, n, left, group, steps, between,
                                         address_of);
    } else if (n.live <= 32) {
        narrow_as<act, biased, scaled, 32>(ring, out, staging, n, left, group, steps, between,
                                         address_of);
    } else {
        narrow_as<act, biased, scaled, 64>(ring, out, staging, n, left, group, steps, between,
                                         address_of);
    }
}
