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

// In one instruction: what makes the elements may branch, and a store of each would then go into the branches.
template <class T>
HD void store16(T* out, Vector16<T> part) {
#ifdef __CUDA_ARCH__
  __stwb(reinterpret_cast<uint4*>(out), bits_as<uint4>(part));
#else
  *reinterpret_cast<Vector16<T>*>(out) = part;
#endif
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
        const auto part = *reinterpret_cast<const Vector16<T>*>(x + i);
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
        store16(out + i, part);
      },
      [&](int64_t i) { out[i] = value(i); });
}

}  // namespace avadclip
