// topk_mean on the CPU: a column's keys lie in scratch, where counting vectorises.
#include <algorithm>
#include <limits>

#include "stable.h"
#include "topk_mean.cuh"

namespace avadclip {
namespace {

// keys_t = key of column[t * stride], selects k of them, writes their indices; returns their mean.
template <class T>
CLONES acc_t<T> column_top(const T* column, int64_t stride, int n, int k, key_t_of<T>* keys, int32_t* index) {
  for (int t = 0; t < n; ++t) keys[t] = key_of(widen(column[t * stride]));
  const auto top = select_top(Serial{}, [&](int t) { return keys[t]; }, n, k);
  double sum = 0;
  for (int t = 0, found = 0; found < k; ++t) {
    if (!top.has(keys[t], t)) continue;
    sum += value_of(keys[t]);
    index[found++] = t;
  }
  return acc_t<T>(sum / k);
}

std::tuple<Tensor, Tensor> topk_mean(const Tensor& scores, const Tensor& lengths, int64_t divisor) {
  check_dims("scores", scores, "[B, T, C]", 3);
  check_divisor(divisor);
  const int64_t B = scores.size(0), T = scores.size(1), C = scores.size(2);
  STD_TORCH_CHECK(T < std::numeric_limits<int32_t>::max(), "T must be below 2^31, got ", T);
  const auto valid = read_lengths(lengths, B, T);
  const Tensor x = dense(scores);
  const int64_t K = T ? top_count(T, divisor) : 0;
  Tensor mean = empty(scores, {B, C}, scores.scalar_type()), index = empty(scores, {B, C, K}, ScalarType::Int);
  by_dtype(scores.scalar_type(), [&](auto type) {
    using S = decltype(type);
    torch::stable::parallel_for(0, B * C, 8, [&](int64_t begin, int64_t end) {
      std::vector<key_t_of<S>> keys(T);
      for (int64_t column = begin; column < end; ++column) {
        const int64_t b = column / C, c = column % C;
        const int n = int(valid[b]), k = top_count(n, divisor);
        int32_t* chosen = mutable_data<int32_t>(index) + column * K;
        narrow(column_top(data<S>(x) + b * T * C + c, C, n, k, keys.data(), chosen), mutable_data<S>(mean)[column]);
        std::fill(chosen + k, chosen + K, -1);
      }
    });
  });
  return {mean, index};
}

Tensor topk_mean_backward(const Tensor& grad, const Tensor& index, int64_t rows) {
  check_dims("index", index, "[B, C, K]", 3);
  const int64_t B = index.size(0), C = index.size(1), K = index.size(2);
  check("index", index, {B, C, K}, ScalarType::Int, grad);
  check("grad", grad, {B, C}, grad.scalar_type(), grad);
  const Tensor g = dense(grad), chosen = dense(index);
  const auto* all = data<int32_t>(chosen);
  STD_TORCH_CHECK(std::all_of(all, all + B * C * K, [=](int32_t t) { return t < rows; }), "index must be below ", rows);
  Tensor out = empty(grad, {B, rows, C}, grad.scalar_type());
  torch::stable::zero_(out);
  by_dtype(grad.scalar_type(), [&](auto type) {
    using S = decltype(type);
    torch::stable::parallel_for(0, B * C, 64, [&](int64_t begin, int64_t end) {
      for (int64_t column = begin; column < end; ++column) {
        const int32_t* t = data<int32_t>(chosen) + column * K;
        int64_t k = 0;
        while (k < K && t[k] >= 0) ++k;
        S* slope = mutable_data<S>(out) + column / C * rows * C + column % C;
        S share;
        narrow(widen(data<S>(g)[column]) / k, share);
        for (int64_t i = 0; i < k; ++i) slope[t[i] * C] = share;
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CPU, m) {
  m.impl("topk_mean", TORCH_BOX(&topk_mean));
  m.impl("topk_mean_backward", TORCH_BOX(&topk_mean_backward));
}

}  // namespace avadclip
