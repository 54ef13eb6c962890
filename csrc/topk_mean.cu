// topk_mean on CUDA: a block a column. Its keys lie in shared memory where they fit; counting needs no atomics.
#include "stable_cuda.h"
#include "topk_mean.cuh"

namespace avadclip {
namespace {

constexpr int THREADS = 128;

template <class T>
__global__ void __launch_bounds__(THREADS) topk_mean_kernel(
    const T* scores, Lengths lengths, int64_t C, int divisor, int slots, bool stored, T* mean, int32_t* index) {
  extern __shared__ uint32_t room[];
  __shared__ int64_t partial[WARPS_MAX];
  const int64_t column = blockIdx.x, b = column / C, c = column % C;
  const int n = int(lengths[b]), k = top_count(n, divisor);
  const Keys<T> key{scores + b * lengths.rows * C + c, C, stored ? room : nullptr};
  topk_column(Block{partial}, key, n, k, slots, mean + column, index + column * slots);
}

template <class T>
__global__ void __launch_bounds__(THREADS) topk_mean_backward_kernel(
    const T* grad, const int32_t* index, int64_t C, int64_t rows, int slots, T* slope) {
  __shared__ int64_t partial[WARPS_MAX];
  const int64_t column = blockIdx.x, b = column / C, c = column % C;
  topk_column_backward(Block{partial}, index + column * slots, slots, grad[column], rows, slope + b * rows * C + c, C);
}

std::tuple<Tensor, Tensor> topk_mean(const Tensor& scores, const Tensor& lengths, int64_t divisor) {
  check_dims("scores", scores, "[B, T, C]", 3);
  check_divisor(divisor);
  const int64_t B = scores.size(0), T = scores.size(1), C = scores.size(2), K = T ? top_count(T, divisor) : 0;
  STD_TORCH_CHECK(T < 1 << 30, "T must be below 2^30, got ", T);
  const Tensor x = dense(scores), l = dense(lengths);
  const Lengths valid = device_lengths(l, B, T, scores);
  Tensor mean = empty(scores, {B, C}, scores.scalar_type()), index = empty(scores, {B, C, K}, ScalarType::Int);
  if (B * T * C == 0) return {mean, index};
  const Launch launch(scores);
  const bool stored = T * 4 <= SHARED_BYTES;
  by_cuda_dtype(scores.scalar_type(), [&](auto type) {
    using S = decltype(type);
    topk_mean_kernel<S><<<blocks(B * C), THREADS, stored ? T * 4 : 0, launch.stream>>>(
        data<S>(x), valid, C, int(std::min<int64_t>(divisor, 1 << 30)), int(K), stored,
        mutable_data<S>(mean), mutable_data<int32_t>(index));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {mean, index};
}

Tensor topk_mean_backward(const Tensor& grad, const Tensor& index, int64_t rows) {
  check_dims("index", index, "[B, C, K]", 3);
  const int64_t B = index.size(0), C = index.size(1), K = index.size(2);
  check("index", index, {B, C, K}, ScalarType::Int, grad);
  check("grad", grad, {B, C}, grad.scalar_type(), grad);
  STD_TORCH_CHECK(K < 1 << 30, "K must be below 2^30, got ", K);
  const Tensor g = dense(grad), chosen = dense(index);
  Tensor out = empty(grad, {B, rows, C}, grad.scalar_type());
  if (out.numel() == 0) return out;
  const Launch launch(grad);
  torch::stable::zero_(out);
  by_cuda_dtype(grad.scalar_type(), [&](auto type) {
    using S = decltype(type);
    topk_mean_backward_kernel<S><<<blocks(B * C), THREADS, 0, launch.stream>>>(
        data<S>(g), data<int32_t>(chosen), C, rows, int(K), mutable_data<S>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CUDA, m) {
  m.impl("topk_mean", TORCH_BOX(&topk_mean));
  m.impl("topk_mean_backward", TORCH_BOX(&topk_mean_backward));
}

}  // namespace avadclip
