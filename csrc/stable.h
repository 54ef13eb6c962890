// What every operator needs of torch's stable ABI: tensors, checks, dispatch on the dtype.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "scalar.cuh"

namespace avadclip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f with a value of the C++ type that stands for `dtype`.
template <class F>
auto by_dtype(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bf16{});
    default: STD_TORCH_CHECK(false, "dtype must be float32, float64 or bfloat16");
  }
  return f(float{});
}

inline ScalarType accumulator(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_empty(like, shape, dtype);
}

// lengths (B) int32 or int64 on the CPU -> their values, each in 1..rows.
inline std::vector<int64_t> read_lengths(const Tensor& lengths, int64_t batch, int64_t rows) {
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == batch, "lengths must have shape [", batch, "]");
  const Tensor values = dense(lengths);
  std::vector<int64_t> out(batch);
  for (int64_t b = 0; b < batch; ++b) {
    out[b] = lengths.scalar_type() == ScalarType::Int ? data<int32_t>(values)[b] : data<int64_t>(values)[b];
    STD_TORCH_CHECK(1 <= out[b] && out[b] <= rows, "lengths must lie in 1..", rows, ", got ", out[b]);
  }
  return out;
}

}  // namespace avadclip
