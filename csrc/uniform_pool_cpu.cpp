// uniform_pool on the CPU. Videos lie one after the other in (N, D).
#include <algorithm>
#include <memory>
#include <type_traits>

#include "stable.h"
#include "uniform_pool.cuh"

namespace avadclip {
namespace {

constexpr int WIDTH = 64;  // channels whose sums stay in registers

template <class T, class Width>
HD void sum_of_channels(const T* rows, int64_t count, int64_t stride, Width width, acc_t<T>* sum) {
  for (int d = 0; d < width; ++d) sum[d] = widen(rows[d]);
  for (int64_t t = 1; t < count; ++t)
    for (int d = 0; d < width; ++d) sum[d] += widen(rows[t * stride + d]);
}

template <class T, class Width>
HD void mean_of_channels(const T* rows, int64_t count, int64_t stride, Width width, T* out) {
  acc_t<T> sum[WIDTH];
  sum_of_channels(rows, std::min(count, PART), stride, width, sum);
  if (count > PART) {
    double whole[WIDTH];
    for (int d = 0; d < width; ++d) whole[d] = sum[d];
    for (int64_t begin = PART; begin < count; begin += PART) {
      sum_of_channels(rows + begin * stride, std::min(count - begin, PART), stride, width, sum);
      for (int d = 0; d < width; ++d) whole[d] += sum[d];
    }
    for (int d = 0; d < width; ++d) sum[d] = acc_t<T>(whole[d]);
  }
  for (int d = 0; d < width; ++d) narrow(sum[d] / acc_t<T>(count), out[d]);
}

template <class T>
CLONES void mean_of_rows(const T* rows, int64_t count, int64_t width, T* out) {
  int64_t d = 0;
  for (; d + WIDTH <= width; d += WIDTH)
    mean_of_channels(rows + d, count, width, std::integral_constant<int, WIDTH>{}, out + d);
  if (d < width) mean_of_channels(rows + d, count, width, int(width - d), out + d);
}

// What a row gets from one range that it is in.
template <class T>
CLONES void add_share(const T* grad, int64_t count, int64_t width, double* sum) {
  for (int64_t d = 0; d < width; ++d) sum[d] += widen(grad[d]) / acc_t<T>(count);
}
template <class T>
CLONES void narrow_row(const double* sum, int64_t width, T* out) {
  for (int64_t d = 0; d < width; ++d) narrow(acc_t<T>(sum[d]), out[d]);
}

Tensor uniform_pool(const Tensor& features, const Tensor& lengths, int64_t rows) {
  check_dims("features", features, "[N, D]", 2);
  STD_TORCH_CHECK(rows >= 1, "rows must be positive, got ", rows);
  const int64_t N = features.size(0), D = features.size(1), B = check_lengths(lengths);
  const auto first = starts(read_lengths(lengths, B, N));
  STD_TORCH_CHECK(first[B] == N, "lengths must sum to the ", N, " rows of features, got ", first[B]);
  const Tensor x = dense(features);
  Tensor out = empty(features, {B, rows, D}, features.scalar_type());
  by_dtype(features.scalar_type(), [&](auto type) {
    using S = decltype(type);
    torch::stable::parallel_for(0, B * rows, 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / rows;
        const Range range = pool_range(i % rows, first[b + 1] - first[b], rows);
        const S* from = data<S>(x) + (first[b] + range.begin) * D;
        mean_of_rows(from, range.count, D, mutable_data<S>(out) + i * D);
      }
    });
  });
  return out;
}

Tensor uniform_pool_backward(const Tensor& grad, const Tensor& lengths, int64_t total) {
  check_dims("grad", grad, "[B, rows, D]", 3);
  const int64_t B = grad.size(0), rows = grad.size(1), D = grad.size(2);
  const auto first = starts(read_lengths(lengths, B, total));
  STD_TORCH_CHECK(first[B] == total, "lengths must sum to ", total, ", got ", first[B]);
  const Tensor g = dense(grad);
  Tensor out = empty(grad, {total, D}, grad.scalar_type());
  by_dtype(grad.scalar_type(), [&](auto type) {
    using S = decltype(type);
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<double[]> sum(new double[D]);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t n = first[b + 1] - first[b];
        for (int64_t t = 0, row = 0; t < n; ++t) {
          std::fill_n(sum.get(), D, 0);
          // Ranges do not go back, so that one walk over both meets every pair of a row and a range it is in.
          while (row < rows && pool_range(row, n, rows).end() <= t) ++row;
          for (int64_t r = row; r < rows && pool_range(r, n, rows).begin <= t; ++r)
            add_share(data<S>(g) + (b * rows + r) * D, pool_range(r, n, rows).count, D, sum.get());
          narrow_row(sum.get(), D, mutable_data<S>(out) + (first[b] + t) * D);
        }
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CPU, m) {
  m.impl("uniform_pool", TORCH_BOX(&uniform_pool));
  m.impl("uniform_pool_backward", TORCH_BOX(&uniform_pool_backward));
}

}  // namespace avadclip
