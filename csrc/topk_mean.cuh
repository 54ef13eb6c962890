// Exact selection of the k largest of a row, ties to the lowest index. Torch-free; host and device.
#pragma once

#include "team.cuh"

namespace avadclip {

HD int top_count(int64_t length, int64_t divisor) {
  const int64_t k = length / divisor + 1;
  return int(k < length ? k : length);
}

// The keys that are selected: those above the threshold, and those equal to it up to index `last`.
template <class Key>
struct Selection {
  Key threshold;
  int last;
  HD bool has(Key key, int t) const { return key > threshold || (key == threshold && t <= last); }
};

// The k largest of key(0..n), 1 <= k <= n. The threshold is found bit by bit from the top: the largest value that at
// least k keys reach. Each step counts, and counting needs no atomics, no sorting and no order of threads.
template <class Team, class KeyAt>
HD auto select_top(const Team& team, KeyAt key, int n, int k) {
  using Key = decltype(key(0));
  const auto count = [&](auto wanted) {
    return team.sum([&](int rank) {
      int found = 0;
      for (int t = rank; t < n; t += team.size()) found += wanted(t);
      return found;
    });
  };
  Selection<Key> top{0, n};
  if (k == n) return top;
  for (Key bit = Key(1) << (8 * sizeof(Key) - 1); bit; bit >>= 1) {
    const Key candidate = top.threshold | bit;
    const int reached = count([&](int t) { return key(t) >= candidate; });
    if (reached >= k) top.threshold = candidate;
    if (reached == k) return top;
  }
  // More keys than fit equal the threshold. `last` is the largest index with fewer than `needed` of them before it.
  const int needed = k - count([&](int t) { return key(t) > top.threshold; });
  top.last = 0;
  for (int bit = 1 << 30; bit; bit >>= 1) {
    const int candidate = top.last | bit;
    if (candidate >= n) continue;
    if (count([&](int t) { return t < candidate && key(t) == top.threshold; }) < needed) top.last = candidate;
  }
  return top;
}

}  // namespace avadclip
