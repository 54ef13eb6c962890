// distance_graph by blocks: out_i = sum_j a^|i-j| v_j as two first-order scans. Torch-free; host and device.
//   forth_i = v_i + a forth_{i-1},   back_i = a (v_{i+1} + back_{i+1}),   out_i = forth_i + back_i
//
// A block takes TILE_ROWS rows of LANES vectors of channels. A thread takes SEGMENT rows of one vector, which stay in
// its registers: it scans them alone, hands its totals over in shared memory, one thread a channel joins these, and the
// thread scans again from what came in. Tiles of a long video are joined in the same way, through global memory.
#pragma once

#include "vector.cuh"

namespace avadclip {

constexpr int SEGMENT = 8;
constexpr int SEGMENTS = 32;
constexpr int LANES = 8;
constexpr int TILE_ROWS = SEGMENT * SEGMENTS;
constexpr int TILE_THREADS = LANES * SEGMENTS;

// a, a^SEGMENT and a^TILE_ROWS, each rounded once: joins then do not add up the rounding of `a`.
struct Decay {
  float step, segment, tile;
};

// What a thread holds: its rows.
template <class T, int WIDTH>
struct Segment {
  Vector<T, WIDTH> rows[SEGMENT];
};

// Sums that cross the borders of one tile's segments, in shared memory: totals first, then what comes in.
template <int WIDTH>
struct Joins {
  float forth[SEGMENTS][LANES][WIDTH];
  float back[SEGMENTS][LANES][WIDTH];
};

// Steps 1 and 2: loads the rows t of the tile (first + 0..TILE_ROWS, t < n; others count as zero), and joins the
// segments. Afterwards joins.forth[s] comes into segment s from the rows before, joins.back[s] from those after.
// v: row 0, channel 0 of the tile's vectors; lanes: how many of LANES exist. carry_forth, carry_back: what comes into
// the tile for the channel at v, or null. total_forth, total_back: where what leaves the tile is put, or null.
template <class T, int WIDTH, class Team, class Own>
HD void join_segments(const Team& team, Own& own, Joins<WIDTH>& joins, const T* v, int64_t stride, int64_t first,
                      int64_t n, int lanes, Decay a, const float* carry_forth, const float* carry_back,
                      float* total_forth, float* total_back) {
  team.each([&](int rank) {
    const int lane = rank % LANES, segment = rank / LANES;
    auto& rows = own[rank].rows;
    float forth[WIDTH] = {}, back[WIDTH] = {};
#pragma unroll
    for (int i = 0; i < SEGMENT; ++i) {
      const int64_t t = first + segment * SEGMENT + i;
      rows[i] = {};
      if (lane < lanes && t < n) rows[i] = load<WIDTH>(v + t * stride + lane * WIDTH);
    }
#pragma unroll
    for (int i = 0; i < SEGMENT; ++i)
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) {
        forth[e] = widen(rows[i].at[e]) + a.step * forth[e];
        back[e] = a.step * (widen(rows[SEGMENT - 1 - i].at[e]) + back[e]);
      }
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      joins.forth[segment][lane][e] = forth[e];
      joins.back[segment][lane][e] = back[e];
    }
  });
  team.each([&](int rank) {
    // Two threads a channel: one goes forwards, one backwards, over the totals of the segments.
    const int channel = rank / 2, lane = channel / WIDTH, e = channel % WIDTH;
    if (lane >= lanes) return;
    float sum = 0;
    if (rank % 2 == 0) {
      if (carry_forth) sum = carry_forth[channel];
      for (int s = 0; s < SEGMENTS; ++s) {
        const float total = joins.forth[s][lane][e];
        joins.forth[s][lane][e] = sum;
        sum = total + a.segment * sum;
      }
      if (total_forth) total_forth[channel] = sum;
    } else {
      if (carry_back) sum = carry_back[channel];
      for (int s = SEGMENTS - 1; s >= 0; --s) {
        const float total = joins.back[s][lane][e];
        joins.back[s][lane][e] = sum;
        sum = total + a.segment * sum;
      }
      if (total_back) total_back[channel] = sum;
    }
  });
}

// Step 3: writes the tile, zeros in rows n <= t < rows.
template <class T, int WIDTH, class Team, class Own>
HD void write_tile(const Team& team, Own& own, const Joins<WIDTH>& joins, T* out, int64_t stride, int64_t first,
                   int64_t n, int64_t rows, int lanes, Decay a) {
  team.each([&](int rank) {
    const int lane = rank % LANES, segment = rank / LANES;
    if (lane >= lanes) return;
    auto& v = own[rank].rows;
    float forth[SEGMENT][WIDTH], state[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) state[e] = joins.forth[segment][lane][e];
#pragma unroll
    for (int i = 0; i < SEGMENT; ++i)
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) forth[i][e] = state[e] = widen(v[i].at[e]) + a.step * state[e];
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) state[e] = joins.back[segment][lane][e];
#pragma unroll
    for (int i = SEGMENT - 1; i >= 0; --i) {
      Vector<T, WIDTH> row;
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) {
        narrow(forth[i][e] + state[e], row.at[e]);
        state[e] = a.step * (widen(v[i].at[e]) + state[e]);
      }
      const int64_t t = first + segment * SEGMENT + i;
      if (t >= n) row = {};
      if (t < rows) store(row, out + t * stride + lane * WIDTH);
    }
  });
}

// Joins the tiles of one channel: totals in, what comes into each tile out. Tiles are `stride` apart.
HD void join_tiles(float* forth, float* back, int64_t tiles, int64_t stride, Decay a) {
  float sum = 0;
  for (int64_t s = 0; s < tiles; ++s) {
    const float total = forth[s * stride];
    forth[s * stride] = sum;
    sum = total + a.tile * sum;
  }
  sum = 0;
  for (int64_t s = tiles - 1; s >= 0; --s) {
    const float total = back[s * stride];
    back[s * stride] = sum;
    sum = total + a.tile * sum;
  }
}

}  // namespace avadclip
