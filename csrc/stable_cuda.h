// What every CUDA operator needs of torch's stable ABI, besides stable.h.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "lengths.cuh"
#include "stable.h"

namespace avadclip {

// The device of a tensor for as long as this lives, and its current stream.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  // A call with tensors on several devices comes here if any of them is a GPU.
  static const Tensor& on_cuda(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), "all tensors must be on one GPU, the first is not on any");
    return x;
  }
  explicit Launch(const Tensor& x) : guard(on_cuda(x).get_device_index()) {
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

// `lengths` is contiguous, and its values stay unread: kernels hold them to 1..rows.
inline Lengths device_lengths(const Tensor& lengths, int64_t batch, int64_t rows, const Tensor& first) {
  check_lengths(lengths, batch);
  check("lengths", lengths, {batch}, lengths.scalar_type(), first);
  STD_TORCH_CHECK(batch == 0 || rows >= 1, "lengths must lie in 1..", rows);
  return {lengths.const_data_ptr(), lengths.scalar_type() == ScalarType::Long, rows};
}

inline bool aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

inline unsigned blocks(int64_t count) {
  STD_TORCH_CHECK(count <= 0x7fffffff, "too many blocks: ", count);
  return unsigned(count);
}

constexpr int WARPS_MAX = 32;
constexpr int64_t SHARED_BYTES = 40 << 10;  // of dynamic shared memory, below what needs no opt-in

}  // namespace avadclip
