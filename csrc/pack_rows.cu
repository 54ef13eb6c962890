// pack_rows and unpack_rows on CUDA: a block a row, 16 bytes a thread.
#include "stable_cuda.h"

namespace avadclip {
namespace {

constexpr int THREADS = 128;

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
  m.impl("pack_rows", TORCH_BOX(&pack_rows));
  m.impl("unpack_rows", TORCH_BOX(&unpack_rows));
}

}  // namespace avadclip
