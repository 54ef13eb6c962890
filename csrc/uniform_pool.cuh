// Which rows of a video a pooled row is the mean of. Torch-free; host and device.
#pragma once

#include "scalar.cuh"

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

}  // namespace avadclip
