// Which rows of a video a pooled row is the mean of. Torch-free; host and device.
#pragma once

#include "vector.cuh"

namespace avadclip {

struct Range {
  int64_t begin, count;
  HD int64_t end() const { return begin + count; }
};

// Row `row` of `rows`: from int(row * (n / rows)) to int((row + 1) * (n / rows)), in float64 as numpy's linspace has
// it; the last ends at n. An empty range takes its first row. 1 <= n.
HD Range pool_range(int64_t row, int64_t n, int64_t rows) {
  const double step = double(n) / double(rows);
  const int64_t begin = int64_t(double(row) * step);
  const int64_t end = row + 1 == rows ? n : int64_t(double(row + 1) * step);
  return {begin, end > begin ? end - begin : 1};
}

// The lowest pooled row that row t of n can be in: ranges before it end at or before t.
HD int64_t first_pool_row(int64_t t, int64_t n, int64_t rows) {
  const int64_t row = int64_t(double(t) * (double(rows) / double(n))) - 2;
  return row < 0 ? 0 : row;
}

constexpr int64_t PART = 64;  // rows that are added in float32: more would lose digits, and their sums go on in float64

// out (D) = the mean of the range's rows of video (n, D). D = WIDTH * vectors.
template <class T, int WIDTH, class Team>
HD void pool_row(const Team& team, const T* video, Range range, int64_t D, T* out) {
  using V = Vector<T, WIDTH>;
  team.each([&](int rank) {
    for (int64_t d = rank * WIDTH; d < D; d += team.size() * WIDTH) {
      double sum[WIDTH] = {};
      for (int64_t begin = range.begin; begin < range.end(); begin += PART) {
        const int64_t end = begin + PART < range.end() ? begin + PART : range.end();
        float part[WIDTH] = {};
        for (int64_t t = begin; t < end; ++t) {
          const V row = load<WIDTH>(video + t * D + d);
#pragma unroll
          for (int e = 0; e < WIDTH; ++e) part[e] += widen(row.at[e]);
        }
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) sum[e] += part[e];
      }
      V mean;
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) narrow(float(sum[e]) / float(range.count), mean.at[e]);
      store(mean, out + d);
    }
  });
}

// slope (D) = what row t of n gets from the pooled rows' gradient (rows, D): its share of every range it is in.
template <class T, int WIDTH, class Team>
HD void pool_row_backward(const Team& team, const T* grad, int64_t t, int64_t n, int64_t rows, int64_t D, T* slope) {
  using V = Vector<T, WIDTH>;
  team.each([&](int rank) {
    for (int64_t d = rank * WIDTH; d < D; d += team.size() * WIDTH) {
      double sum[WIDTH] = {};  // a short video's row can be in any number of ranges
      for (int64_t r = first_pool_row(t, n, rows); r < rows; ++r) {
        const Range range = pool_range(r, n, rows);
        if (range.begin > t) break;
        if (range.end() <= t) continue;
        const V row = load<WIDTH>(grad + r * D + d);
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) sum[e] += widen(row.at[e]) / float(range.count);
      }
      V out;
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) narrow(float(sum[e]), out.at[e]);
      store(out, slope + d);
    }
  });
}

}  // namespace avadclip
