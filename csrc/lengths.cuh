// The lengths of videos as kernels read them: never outside of what lies in memory. Torch-free; host and device.
#pragma once

#include "team.cuh"

namespace avadclip {

// lengths (B) int32 or int64, each held to 1..rows, so that the host need not wait for the values. Null: all are `rows`.
struct Lengths {
  const void* data;
  bool wide;
  int64_t rows;

  HD int64_t operator[](int64_t b) const {
    if (data == nullptr) return rows;
    const int64_t n = wide ? static_cast<const int64_t*>(data)[b] : static_cast<const int32_t*>(data)[b];
    return n < 1 ? 1 : n > rows ? rows : n;
  }
  // The sum of those before b: where video b starts in packed rows.
  template <class Team>
  HD int64_t before(const Team& team, int64_t b) const {
    return team.sum([&](int rank) {
      int64_t sum = 0;
      for (int64_t i = rank; i < b; i += team.size()) sum += (*this)[i];
      return sum;
    });
  }
};

struct Video {
  int64_t first, n;
};

// The rows of video b among lengths.rows >= 1 packed ones: inside of them, whatever the lengths add up to.
template <class Team>
HD Video packed_video(const Team& team, Lengths lengths, int64_t b) {
  const int64_t before = lengths.before(team, b), n = lengths[b];
  const int64_t first = before < lengths.rows ? before : lengths.rows - 1;
  return {first, n < lengths.rows - first ? n : lengths.rows - first};
}

}  // namespace avadclip
