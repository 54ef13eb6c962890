// uniform_pool on CUDA: a block a row, 16 bytes a thread.
#include "stable_cuda.h"
#include "uniform_pool.cuh"

namespace avadclip {
namespace {

constexpr int THREADS = 128;

template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS) uniform_pool_kernel(
    const T* features, Lengths lengths, int64_t rows, int64_t D, T* out) {
  __shared__ int64_t partial[WARPS_MAX];
  const Block team{partial};
  const int64_t b = blockIdx.x / rows, row = blockIdx.x % rows;
  const Video video = packed_video(team, lengths, b);
  pool_row<T, WIDTH>(team, features + video.first * D, pool_range(row, video.n, rows), D, out + blockIdx.x * D);
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS) uniform_pool_backward_kernel(
    const T* grad, Lengths lengths, int64_t B, int64_t rows, int64_t D, T* out) {
  __shared__ int64_t partial[WARPS_MAX];
  int64_t b = 0, t = blockIdx.x;  // the row of the packed videos, then of its own
  while (b + 1 < B && t >= lengths[b]) t -= lengths[b++];
  const int64_t left = lengths.rows - (blockIdx.x - t), n = lengths[b];
  pool_row_backward<T, WIDTH>(Block{partial}, grad + b * rows * D, t, n < left ? n : left, rows, D,
                              out + blockIdx.x * D);
}

// Calls f(T{}, WIDTH) with vectors of 16 bytes where every row starts at one.
template <class F>
void by_vector(const Tensor& x, int64_t D, F f) {
  by_cuda_dtype(x.scalar_type(), [&](auto type) {
    constexpr int WIDTH = 16 / sizeof(type);
    if (D % WIDTH == 0 && aligned(x))
      f(type, std::integral_constant<int, WIDTH>{});
    else
      f(type, std::integral_constant<int, 1>{});
  });
}

// Every video has a row: more than that cannot be known without waiting for the values.
Lengths packed_lengths(const Tensor& lengths, int64_t batch, int64_t total, const Tensor& first) {
  STD_TORCH_CHECK(batch <= total && (batch > 0 || total == 0), "lengths of ", batch, " videos cannot sum to ", total);
  return device_lengths(lengths, batch, total, first);
}

Tensor uniform_pool(const Tensor& features, const Tensor& lengths, int64_t rows) {
  check_dims("features", features, "[N, D]", 2);
  STD_TORCH_CHECK(rows >= 1, "rows must be positive, got ", rows);
  const int64_t N = features.size(0), D = features.size(1), B = check_lengths(lengths);
  const Tensor x = dense(features), l = dense(lengths);
  const Lengths valid = packed_lengths(l, B, N, features);
  Tensor out = empty(features, {B, rows, D}, features.scalar_type());
  if (out.numel() == 0) return out;
  const Launch launch(features);
  by_vector(x, D, [&](auto type, auto width) {
    using S = decltype(type);
    uniform_pool_kernel<S, width><<<blocks(B * rows), THREADS, 0, launch.stream>>>(
        data<S>(x), valid, rows, D, mutable_data<S>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

Tensor uniform_pool_backward(const Tensor& grad, const Tensor& lengths, int64_t total) {
  check_dims("grad", grad, "[B, rows, D]", 3);
  const int64_t B = grad.size(0), rows = grad.size(1), D = grad.size(2);
  const Tensor g = dense(grad), l = dense(lengths);
  const Lengths valid = packed_lengths(l, B, total, grad);
  Tensor out = empty(grad, {total, D}, grad.scalar_type());
  if (out.numel() == 0) return out;
  const Launch launch(grad);
  by_vector(g, D, [&](auto type, auto width) {
    using S = decltype(type);
    uniform_pool_backward_kernel<S, width><<<blocks(total), THREADS, 0, launch.stream>>>(
        data<S>(g), valid, B, rows, D, mutable_data<S>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CUDA, m) {
  m.impl("uniform_pool", TORCH_BOX(&uniform_pool));
  m.impl("uniform_pool_backward", TORCH_BOX(&uniform_pool_backward));
}

}  // namespace avadclip
