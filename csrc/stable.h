// What every operator needs of torch's stable ABI: tensors, checks, dispatch on the dtype.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
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

template <class Sizes>
std::string shape_of(const Sizes& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// Operators can be called past the checks in Python: an argument that would lead out of bounds raises here.
inline void check(const char* name, const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype,
                  const Tensor& first) {
  const auto got = x.sizes();
  STD_TORCH_CHECK(std::equal(got.begin(), got.end(), sizes.begin(), sizes.end()), name, " must have shape ",
                  shape_of(sizes), ", got ", shape_of(got));
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " must be of dtype ", dtype, ", got ", x.scalar_type());
  STD_TORCH_CHECK(x.device() == first.device(), name, " must be on the device of the first argument");
}
inline void check_dims(const char* name, const Tensor& x, const char* shape, int64_t dims) {
  STD_TORCH_CHECK(x.dim() == dims, name, " must have shape ", shape, ", got ", shape_of(x.sizes()));
}
inline void check_divisor(int64_t divisor) { STD_TORCH_CHECK(divisor >= 1, "divisor must be positive, got ", divisor); }

// lengths (B), or (batch) if it is known, int32 or int64 -> B
inline int64_t check_lengths(const Tensor& lengths, std::optional<int64_t> batch = {}, const char* name = "lengths") {
  check_dims(name, lengths, "[B]", 1);
  const int64_t B = lengths.size(0);
  STD_TORCH_CHECK(!batch || B == *batch, name, " must have shape [", *batch, "], got [", B, "]");
  STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Int || lengths.scalar_type() == ScalarType::Long, name,
                  " must be int32 or int64, got ", lengths.scalar_type());
  return B;
}

// lengths (B) on the CPU -> their values, each in 1..rows.
inline std::vector<int64_t> read_lengths(const Tensor& lengths, int64_t batch, int64_t rows,
                                         const char* name = "lengths") {
  check_lengths(lengths, batch, name);
  const Tensor values = dense(lengths);
  std::vector<int64_t> out(batch);
  for (int64_t b = 0; b < batch; ++b) {
    out[b] = lengths.scalar_type() == ScalarType::Int ? data<int32_t>(values)[b] : data<int64_t>(values)[b];
    STD_TORCH_CHECK(1 <= out[b] && out[b] <= rows, name, " must lie in 1..", rows, ", got ", out[b]);
  }
  return out;
}

// The first row of each video in packed rows, and how many there are.
inline std::vector<int64_t> starts(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> first(lengths.size() + 1);
  for (size_t b = 0; b < lengths.size(); ++b) first[b + 1] = first[b] + lengths[b];
  return first;
}

}  // namespace avadclip
