// What every CUDA operator needs of torch's stable ABI, besides stable.h.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "stable.h"

namespace avadclip {

// The device of a tensor for as long as this lives, and its current stream.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Launch(const Tensor& x) : guard(x.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

template <class F>
auto by_cuda_dtype(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(f16{});
    case ScalarType::BFloat16: return f(bf16{});
    default: STD_TORCH_CHECK(false, "dtype must be float32, float16 or bfloat16");
  }
  return f(float{});
}

// lengths (B) int32 or int64 on the device, read by kernels, held to 1..rows so that no value can lead out of bounds.
struct Lengths {
  const void* data;
  bool wide;
  int64_t rows;

  __device__ int64_t operator[](int64_t b) const {
    if (data == nullptr) return rows;
    const int64_t n = wide ? static_cast<const int64_t*>(data)[b] : static_cast<const int32_t*>(data)[b];
    return n < 1 ? 1 : n > rows ? rows : n;
  }
  // The sum of those before b: where video b starts in packed rows.
  template <class Team>
  __device__ int64_t before(const Team& team, int64_t b) const {
    return team.sum([&](int rank) {
      int64_t sum = 0;
      for (int64_t i = rank; i < b; i += team.size()) sum += (*this)[i];
      return sum;
    });
  }
};

inline Lengths device_lengths(const Tensor& lengths, int64_t batch, int64_t rows) {
  STD_TORCH_CHECK(lengths.is_cuda() && lengths.dim() == 1 && lengths.size(0) == batch && lengths.is_contiguous(),
                  "lengths must be a contiguous tensor [", batch, "] on the device");
  const bool wide = lengths.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || lengths.scalar_type() == ScalarType::Int, "lengths must be int32 or int64");
  return {lengths.const_data_ptr(), wide, rows};
}

inline unsigned blocks(int64_t count) {
  STD_TORCH_CHECK(count <= 0x7fffffff, "too many blocks: ", count);
  return unsigned(count);
}

constexpr int WARPS_MAX = 32;
constexpr int64_t SHARED_BYTES = 40 << 10;  // of dynamic shared memory, below what needs no opt-in

}  // namespace avadclip
