// mil_loss and mil_align_loss on CUDA, two launches each: a block a video makes its loss and all its gradients, one
// more block adds up the videos, always in the same order.
#include "mil_loss.cuh"
#include "stable_cuda.h"

namespace avadclip {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// A block a processor is enough: batches are smaller than chips, and fewer registers would spill.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) mil_loss_kernel(
    const T* logits, const float* labels, Lengths lengths, int64_t C, int divisor, bool stored, float* losses,
    float* slope) {
  extern __shared__ float room[];
  __shared__ int64_t partial[WARPS_MAX];
  const int64_t b = blockIdx.x, B = gridDim.x, T_ = lengths.rows;
  const int n = int(lengths[b]);
  float* out = slope + b * T_;
  const float loss = mil_video(Block{partial}, logits + b * T_, n, top_count(n, divisor), int(T_), 1.f - labels[b * C],
                               1.f / float(B), stored ? room : out, out);
  if (threadIdx.x == 0) losses[b] = loss;
}

// Shared memory: pooled scores, their slopes and labels (C each), selections (2 C), then the keys of all columns.
constexpr int TABLE = 5 * 4;  // bytes a class

template <class T>
__global__ void __launch_bounds__(THREADS, 1) mil_align_loss_kernel(
    const T* logits, const float* labels, const float* alpha, Lengths lengths, int C, int divisor, bool stored,
    float* losses, float* slope, float* alpha_slopes) {
  extern __shared__ float room[];
  __shared__ int64_t partial[WARPS_MAX];
  float *pooled = room, *pooled_slope = room + C, *label = room + 2 * C;
  auto* selected = reinterpret_cast<Selection<uint32_t>*>(room + 3 * C + C % 2);
  auto* keys = reinterpret_cast<uint32_t*>(room + TABLE / 4 * C + C % 2);
  const int64_t b = blockIdx.x, B = gridDim.x, rows = lengths.rows;
  const int n = int(lengths[b]), k = top_count(n, divisor), warp = threadIdx.x / 32;
  const auto key_of_class = [&](int c) {
    return Keys<T>{logits + b * rows * C + c, C, stored ? keys + int64_t(c) * n : nullptr};
  };
  if (stored) store_columns(Block{partial}, logits + b * rows * C, n, C, keys);
  for (int c = warp; c < C; c += WARPS) {
    const Keys<T> key = key_of_class(c);
    const auto top = key.select(Warp{}, n, k);
    const float mean = mean_of_selected(Warp{}, key, top, n, k);
    if (threadIdx.x % 32 == 0) {
      pooled[c] = mean;
      label[c] = labels[b * C + c];
      selected[c] = top;
    }
  }
  __syncthreads();
  const float loss = align_loss(Block{partial}, pooled, label, alpha, C, pooled_slope, alpha_slopes + b * C);
  if (threadIdx.x == 0) losses[b] = loss;
  for (int c = threadIdx.x; c < C; c += THREADS) pooled_slope[c] = pooled_slope[c] / float(k) / float(B);
  __syncthreads();
  align_slopes(Block{partial}, key_of_class, selected, pooled_slope, n, rows, C, slope + b * rows * C);
}

// Means over the batch: block 0 of the losses, block 1 + c of alpha's slopes.
__global__ void __launch_bounds__(THREADS) mean_over_batch_kernel(
    const float* losses, const float* alpha_slopes, int64_t B, int64_t C, float* loss, float* alpha_slope) {
  __shared__ int64_t partial[WARPS_MAX];
  const int64_t c = int64_t(blockIdx.x) - 1;
  const Block team{partial};
  const float total = team.sum([&](int rank) {
    float sum = 0;
    for (int64_t b = rank; b < B; b += team.size()) sum += c < 0 ? losses[b] : alpha_slopes[b * C + c];
    return sum;
  });
  if (threadIdx.x == 0) *(c < 0 ? loss : alpha_slope + c) = total / float(B);
}

template <int WIDTH>
__global__ void __launch_bounds__(THREADS) scale_kernel(
    const float* slope, const float* grad, int64_t count, float* out) {
  const float factor = *grad;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < count / WIDTH; i += int64_t(gridDim.x) * THREADS) {
    auto part = load<WIDTH>(slope + i * WIDTH);
#pragma unroll
    for (float& x : part.at) x *= factor;
    store(part, out + i * WIDTH);
  }
}

std::tuple<Tensor, Tensor> mil_loss(
    const Tensor& logits, const Tensor& labels, const Tensor& lengths, int64_t divisor) {
  check_dims("logits", logits, "[B, T]", 2);
  check_dims("labels", labels, "[B, C]", 2);
  check_divisor(divisor);
  const int64_t B = logits.size(0), T = logits.size(1), C = labels.size(1);
  check("labels", labels, {B, C}, ScalarType::Float, logits);
  STD_TORCH_CHECK(C > 0, "labels must have a class, the first being normal");
  STD_TORCH_CHECK(T < 1 << 30, "T must be below 2^30, got ", T);
  const Tensor x = dense(logits), y = dense(labels), l = dense(lengths);
  const Lengths valid = device_lengths(l, B, T, logits);
  Tensor loss = empty(logits, {}, ScalarType::Float), slope = empty(logits, {B, T}, ScalarType::Float);
  const Launch launch(logits);
  Tensor losses = empty(logits, {B}, ScalarType::Float);
  const bool stored = T * 4 <= SHARED_BYTES;
  if (B * T)
    by_cuda_dtype(logits.scalar_type(), [&](auto type) {
      using S = decltype(type);
      mil_loss_kernel<S><<<blocks(B), THREADS, stored ? T * 4 : 0, launch.stream>>>(
          data<S>(x), data<float>(y), valid, C, int(std::min<int64_t>(divisor, 1 << 30)), stored,
          mutable_data<float>(losses), mutable_data<float>(slope));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  mean_over_batch_kernel<<<1, THREADS, 0, launch.stream>>>(data<float>(losses), nullptr, B, 0,
                                                           mutable_data<float>(loss), nullptr);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, slope};
}

std::tuple<Tensor, Tensor, Tensor> mil_align_loss(
    const Tensor& logits, const Tensor& labels, const Tensor& lengths, const Tensor& alpha, int64_t divisor) {
  check_dims("logits", logits, "[B, T, C]", 3);
  check_divisor(divisor);
  const int64_t B = logits.size(0), T = logits.size(1), C = logits.size(2);
  check("labels", labels, {B, C}, ScalarType::Float, logits);
  check("alpha", alpha, {C}, ScalarType::Float, logits);
  STD_TORCH_CHECK(T < 1 << 30, "T must be below 2^30, got ", T);
  const int64_t table = TABLE * C + 8;
  STD_TORCH_CHECK(C > 0 && table <= SHARED_BYTES, "C must lie in 1..", SHARED_BYTES / TABLE - 1, ", got ", C);
  const Tensor x = dense(logits), y = dense(labels), a = dense(alpha), l = dense(lengths);
  const Lengths valid = device_lengths(l, B, T, logits);
  Tensor slope = empty(logits, {B, T, C}, ScalarType::Float);
  Tensor loss = empty(logits, {}, ScalarType::Float), alpha_slope = empty(logits, {C}, ScalarType::Float);
  Tensor losses = empty(logits, {B}, ScalarType::Float), alpha_slopes = empty(logits, {B, C}, ScalarType::Float);
  const Launch launch(logits);
  const bool stored = table + T * C * 4 <= SHARED_BYTES;
  if (B * T)
    by_cuda_dtype(logits.scalar_type(), [&](auto type) {
      using S = decltype(type);
      mil_align_loss_kernel<S><<<blocks(B), THREADS, table + (stored ? T * C * 4 : 0), launch.stream>>>(
          data<S>(x), data<float>(y), data<float>(a), valid, int(C),
          int(std::min<int64_t>(divisor, 1 << 30)), stored, mutable_data<float>(losses),
          mutable_data<float>(slope), mutable_data<float>(alpha_slopes));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  mean_over_batch_kernel<<<blocks(1 + C), THREADS, 0, launch.stream>>>(
      data<float>(losses), data<float>(alpha_slopes), B, C, mutable_data<float>(loss),
      mutable_data<float>(alpha_slope));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, slope, alpha_slope};
}

// Slopes were made in the forward pass; what is left is the chain rule's last factor.
Tensor scaled(const Tensor& slope, const Tensor& grad) {
  check("grad", grad, {}, ScalarType::Float, slope);
  STD_TORCH_CHECK(slope.scalar_type() == ScalarType::Float, "slope must be of dtype Float, got ", slope.scalar_type());
  const Tensor x = dense(slope);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  const Launch launch(slope);
  const int64_t count = x.numel();
  const bool vectors = count % 4 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  const auto kernel = vectors ? scale_kernel<4> : scale_kernel<1>;
  kernel<<<blocks(std::min<int64_t>((count + THREADS - 1) / THREADS, 4096)), THREADS, 0, launch.stream>>>(
      data<float>(x), data<float>(grad), count, mutable_data<float>(out));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor mil_loss_backward(const Tensor& grad, const Tensor& slope) { return scaled(slope, grad); }

std::tuple<Tensor, Tensor> mil_align_loss_backward(
    const Tensor& grad, const Tensor& slope, const Tensor& alpha_slope) {
  return {scaled(slope, grad), scaled(alpha_slope, grad)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CUDA, m) {
  m.impl("mil_loss", TORCH_BOX(&mil_loss));
  m.impl("mil_loss_backward", TORCH_BOX(&mil_loss_backward));
  m.impl("mil_align_loss", TORCH_BOX(&mil_align_loss));
  m.impl("mil_align_loss_backward", TORCH_BOX(&mil_align_loss_backward));
}

}  // namespace avadclip
