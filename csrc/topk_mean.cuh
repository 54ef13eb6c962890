// Exact selection of the k largest of a row, ties to the lowest index. Torch-free; host and device.
#pragma once

#include "vector.cuh"

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

// The keys of one column, column[t * stride]: in shared memory where they fit (`stored`), else made anew at each look.
template <class T>
struct Keys {
  const T* column;
  int64_t stride;
  key_t_of<T>* stored;
  HD key_t_of<T> made(int t) const { return key_of(widen(column[t * stride])); }
  template <class Team>
  HD void store(const Team& team, int n) const {
    if (stored == nullptr) return;
    if (stride == 1) return read_aligned(team, column, n, [&](int64_t t, T x) { stored[t] = key_of(widen(x)); });
    team.each([&](int rank) {
      for (int t = rank; t < n; t += team.size()) stored[t] = made(t);
    });
  }
  template <class Team>
  HD Selection<key_t_of<T>> select(const Team& team, int n, int k) const {
    if (stored) return select_top(team, [this](int t) { return stored[t]; }, n, k);
    return select_top(team, [this](int t) { return made(t); }, n, k);
  }
  HD key_t_of<T> operator()(int t) const { return stored ? stored[t] : made(t); }
};

template <class Team, class T>
HD acc_t<T> mean_of_selected(
    const Team& team, const Keys<T>& key, Selection<key_t_of<T>> top, int n, int k) {
  return team.sum([&](int rank) {
    acc_t<T> sum = 0;
    for (int t = rank; t < n; t += team.size())
      if (top.has(key(t), t)) sum += value_of(key(t));
    return sum;
  }) / acc_t<T>(k);
}

// One column: its mean, and the chosen indices in rising order, then -1 up to `slots`.
template <class Team, class T>
HD void topk_column(const Team& team, Keys<T> key, int n, int k, int slots, T* mean, int32_t* index) {
  key.store(team, n);
  const auto top = key.select(team, n, k);
  const acc_t<T> value = mean_of_selected(team, key, top, n, k);
  const int share = (n + team.size() - 1) / team.size();  // neighbouring t to a thread, so that counts give the order
  const auto chosen = [&](int rank, auto visit) {
    for (int t = rank * share; t < n && t < (rank + 1) * share; ++t)
      if (top.has(key(t), t)) visit(t);
  };
  team.scan(
      [&](int rank) {
        int count = 0;
        chosen(rank, [&](int) { ++count; });
        return count;
      },
      [&](int rank, int at) { chosen(rank, [&](int t) { index[at++] = t; }); });
  team.each([&](int rank) {
    for (int i = k + rank; i < slots; i += team.size()) index[i] = -1;
    if (rank == 0) narrow(value, *mean);
  });
}

// The gradient of one column of `rows`, which is zero before: grad / k at each of its k indices, those within 0..rows.
template <class Team, class T>
HD void topk_column_backward(
    const Team& team, const int32_t* index, int slots, T grad, int64_t rows, T* slope, int64_t stride) {
  const auto chosen = [&](int i) { return index[i] >= 0 && index[i] < rows; };
  const int k = team.sum([&](int rank) {
    int count = 0;
    for (int i = rank; i < slots; i += team.size()) count += chosen(i);
    return count;
  });
  T share;
  narrow(widen(grad) / acc_t<T>(k), share);
  team.each([&](int rank) {
    for (int i = rank; i < slots; i += team.size())
      if (chosen(i)) slope[index[i] * stride] = share;
  });
}

}  // namespace avadclip
