// A team of threads that works on one row: one thread on the CPU, a warp or a block on a GPU, a loop in tests.
//
//   team.size()            how many threads
//   team.each(f)           f(rank) on every thread, then all wait
//   team.sum(f)            the sum of f(rank) over the team, known to all
//   team.scan(f, g)        g(rank, sum of f over the ranks below) on every thread, then all wait
//   PerThread<V, Team>     a V for each thread, by rank: registers
// Everything outside of the lambdas is the same on every thread, so that the algorithms read as plain sequential code.
#pragma once

#include "scalar.cuh"

#ifndef __CUDACC__
#include <vector>
#endif

namespace avadclip {

struct Serial {
  static constexpr HD int size() { return 1; }
  template <class F>
  HD void each(F f) const {
    f(0);
  }
  template <class F>
  HD auto sum(F f) const {
    return f(0);
  }
};

#ifdef __CUDACC__

template <class V>
__device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

struct Warp {
  static constexpr __device__ int size() { return 32; }
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    f(int(threadIdx.x & 31));
    __syncwarp();
  }
  template <class F>
  __device__ __forceinline__ auto sum(F f) const {
    return warp_sum(f(int(threadIdx.x & 31)));
  }
};

// A block of whole warps. `partial`: shared memory for one 8-byte value a warp.
struct Block {
  void* partial;
  __device__ int size() const { return int(blockDim.x); }
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }
  template <class F>
  __device__ __forceinline__ auto sum(F f) const {
    auto value = warp_sum(f(int(threadIdx.x)));
    auto* slots = static_cast<decltype(value)*>(partial);
    if ((threadIdx.x & 31) == 0) slots[threadIdx.x >> 5] = value;
    __syncthreads();
    value = slots[0];
    for (int warp = 1; warp < int(blockDim.x >> 5); ++warp) value += slots[warp];  // one order: deterministic
    __syncthreads();
    return value;
  }
  template <class F, class G>
  __device__ __forceinline__ void scan(F f, G g) const {
    const int own = f(int(threadIdx.x)), lane = threadIdx.x & 31;
    int through = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
      const int below = __shfl_up_sync(0xffffffffu, through, offset);
      if (lane >= offset) through += below;
    }
    auto* slots = static_cast<int*>(partial);
    if (lane == 31) slots[threadIdx.x >> 5] = through;
    __syncthreads();
    for (int warp = 0; warp < int(threadIdx.x >> 5); ++warp) through += slots[warp];
    g(int(threadIdx.x), through - own);
    __syncthreads();
  }
};

template <class V, class Team>
struct PerThread {
  V value;
  __device__ explicit PerThread(const Team&) {}
  __device__ V& operator[](int) { return value; }
};

#else

// A block of `threads` as a loop: how the tests run device code on the CPU.
struct Emulated {
  int threads;
  int size() const { return threads; }
  template <class F>
  void each(F f) const {
    for (int rank = 0; rank < threads; ++rank) f(rank);
  }
  template <class F>
  auto sum(F f) const {
    auto total = f(0);
    for (int rank = 1; rank < threads; ++rank) total += f(rank);
    return total;
  }
  template <class F, class G>
  void scan(F f, G g) const {
    std::vector<int> below(threads + 1);
    for (int rank = 0; rank < threads; ++rank) below[rank + 1] = below[rank] + f(rank);
    for (int rank = 0; rank < threads; ++rank) g(rank, below[rank]);
  }
};

template <class V, class Team>
struct PerThread {
  std::vector<V> values;
  explicit PerThread(const Team& team) : values(team.size()) {}
  V& operator[](int rank) { return values[rank]; }
};

#endif

}  // namespace avadclip
