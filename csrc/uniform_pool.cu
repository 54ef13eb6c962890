// uniform_pool on CUDA, and packing of valid rows: a block a row, 16 bytes a thread.
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

// Rows of `words` words each between (B, rows) and packed: block (b, t). Lengths that do not sum to `total` leave rows
// out, or the end of the packed ones as it was; they lead nowhere else.
template <class Word, bool PACK>
__global__ void __launch_bounds__(THREADS) pack_kernel(
    const Word* from, Lengths lengths, int64_t total, int64_t words, Word* to) {
  __shared__ int64_t partial[WARPS_MAX];
  const int64_t b = blockIdx.x / lengths.rows, t = blockIdx.x % lengths.rows;
  const int64_t packed = lengths.before(Block{partial}, b) + t, padded = blockIdx.x;
  const bool valid = t < lengths[b] && packed < total;
  if (PACK && !valid) return;
  for (int64_t i = threadIdx.x; i < words; i += THREADS) {
    if (PACK)
      to[packed * words + i] = from[padded * words + i];
    else
      to[padded * words + i] = valid ? from[packed * words + i] : Word{};
  }
}

bool aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

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

template <bool PACK>
void move_rows(const Tensor& from, const Tensor& lengths, int64_t rows, int64_t total, const Tensor& to) {
  const int64_t B = lengths.size(0), bytes = from.size(from.dim() - 1) * from.element_size();
  const Tensor l = dense(lengths);
  const Lengths valid = device_lengths(l, B, rows, from);
  STD_TORCH_CHECK(from.element_size() % 2 == 0, "dtype must be of 2, 4 or 8 bytes, got ", from.scalar_type());
  STD_TORCH_CHECK(B <= total && total <= B * rows, "lengths cannot sum to ", total, ": ", B, " videos of ", rows);
  if (to.numel() == 0) return;
  const Launch launch(from);
  const auto run = [&](auto word) {
    using Word = decltype(word);
    pack_kernel<Word, PACK><<<blocks(B * rows), THREADS, 0, launch.stream>>>(
        data<Word>(from), valid, total, bytes / sizeof(Word), mutable_data<Word>(to));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (bytes % 16 == 0 && aligned(from))
    run(uint4{});
  else
    run(uint16_t{});
}

Tensor pack_rows(const Tensor& padded, const Tensor& lengths, int64_t total) {
  check_dims("padded", padded, "[B, T, D]", 3);
  check_lengths(lengths, padded.size(0));
  const Tensor x = dense(padded);
  Tensor out = empty(padded, {total, padded.size(2)}, padded.scalar_type());
  move_rows<true>(x, lengths, padded.size(1), total, out);
  return out;
}

Tensor unpack_rows(const Tensor& packed, const Tensor& lengths, int64_t rows) {
  check_dims("packed", packed, "[N, D]", 2);
  check_lengths(lengths);
  const Tensor x = dense(packed);
  Tensor out = empty(packed, {lengths.size(0), rows, packed.size(1)}, packed.scalar_type());
  move_rows<false>(x, lengths, rows, packed.size(0), out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CUDA, m) {
  m.impl("uniform_pool", TORCH_BOX(&uniform_pool));
  m.impl("uniform_pool_backward", TORCH_BOX(&uniform_pool_backward));
  m.impl("pack_rows", TORCH_BOX(&pack_rows));
  m.impl("unpack_rows", TORCH_BOX(&unpack_rows));
}

}  // namespace avadclip
