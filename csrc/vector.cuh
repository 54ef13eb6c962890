// Memory 16 bytes at a time, wherever an array starts. Torch-free; host and device.
#pragma once

#include "team.cuh"

namespace avadclip {

template <class T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Vector {
  T at[WIDTH];
};

template <class T>
using Vector16 = Vector<T, 16 / sizeof(T)>;

// In one instruction, as it need not be where elements are narrow or come out of branches.
template <int WIDTH, class T>
HD Vector<T, WIDTH> load(const T* x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) * WIDTH == 16) return bits_as<Vector<T, WIDTH>>(*reinterpret_cast<const uint4*>(x));
#endif
  return *reinterpret_cast<const Vector<T, WIDTH>*>(x);
}
template <class T, int WIDTH>
HD void store(Vector<T, WIDTH> part, T* out) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) * WIDTH == 16) return __stwb(reinterpret_cast<uint4*>(out), bits_as<uint4>(part));
#endif
  *reinterpret_cast<Vector<T, WIDTH>*>(out) = part;
}

// Splits x[0..n) between the threads: whole(i) for the WIDTH elements from i on, which fill 16 aligned bytes, and
// single(i) for the few before the first and after the last of these.
template <class Team, class T, class Whole, class Single>
HD void each_aligned(const Team& team, const T* x, int64_t n, Whole whole, Single single) {
  constexpr int WIDTH = 16 / sizeof(T);
  const int64_t unaligned = (16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T);
  const int64_t head = unaligned < n ? unaligned : n, tail = head + (n - head) / WIDTH * WIDTH;
  team.each([&](int rank) {
    for (int64_t i = head + rank * WIDTH; i < tail; i += team.size() * WIDTH) whole(i);
    for (int64_t i = rank; i < head; i += team.size()) single(i);
    for (int64_t i = tail + rank; i < n; i += team.size()) single(i);
  });
}

// visit(i, x[i]) for i < n.
template <class Team, class T, class Visit>
HD void read_aligned(const Team& team, const T* x, int64_t n, Visit visit) {
  each_aligned(
      team, x, n,
      [&](int64_t i) {
        const auto part = load<16 / sizeof(T)>(x + i);
#pragma unroll
        for (int e = 0; e < 16 / int(sizeof(T)); ++e) visit(i + e, part.at[e]);
      },
      [&](int64_t i) { visit(i, x[i]); });
}

// out[i] = value(i) for i < n.
template <class Team, class T, class Value>
HD void write_aligned(const Team& team, T* out, int64_t n, Value value) {
  each_aligned(
      team, out, n,
      [&](int64_t i) {
        Vector16<T> part;
#pragma unroll
        for (int e = 0; e < 16 / int(sizeof(T)); ++e) part.at[e] = value(i + e);
        store(part, out + i);
      },
      [&](int64_t i) { out[i] = value(i); });
}

}  // namespace avadclip
