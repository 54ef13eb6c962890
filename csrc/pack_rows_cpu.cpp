// pack_rows and unpack_rows on the CPU: (B, T, D) -> (N, D), the rows t < lengths[b] one after the other; and back, with
// zeros in the other rows.
#include <algorithm>

#include "stable.h"

namespace avadclip {
namespace {

Tensor pack_rows(const Tensor& padded, const Tensor& lengths, int64_t total) {
  check_dims("padded", padded, "[B, T, D]", 3);
  const int64_t B = padded.size(0), T = padded.size(1), D = padded.size(2), bytes = D * padded.element_size();
  const auto first = starts(read_lengths(lengths, B, T));
  STD_TORCH_CHECK(first[B] == total, "lengths must sum to ", total, ", got ", first[B]);
  const Tensor x = dense(padded);
  Tensor out = empty(padded, {total, D}, padded.scalar_type());
  const char* from = data<char>(x);
  char* to = mutable_data<char>(out);
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      std::copy_n(from + b * T * bytes, (first[b + 1] - first[b]) * bytes, to + first[b] * bytes);
  });
  return out;
}

Tensor unpack_rows(const Tensor& packed, const Tensor& lengths, int64_t rows) {
  check_dims("packed", packed, "[N, D]", 2);
  const int64_t N = packed.size(0), D = packed.size(1), B = check_lengths(lengths), bytes = D * packed.element_size();
  const auto first = starts(read_lengths(lengths, B, rows));
  STD_TORCH_CHECK(first[B] == N, "lengths must sum to the ", N, " rows of packed, got ", first[B]);
  const Tensor x = dense(packed);
  Tensor out = empty(packed, {B, rows, D}, packed.scalar_type());
  const char* from = data<char>(x);
  char* to = mutable_data<char>(out);
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t n = first[b + 1] - first[b];
      std::copy_n(from + first[b] * bytes, n * bytes, to + b * rows * bytes);
      std::fill_n(to + (b * rows + n) * bytes, (rows - n) * bytes, 0);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CPU, m) {
  m.impl("pack_rows", TORCH_BOX(&pack_rows));
  m.impl("unpack_rows", TORCH_BOX(&unpack_rows));
}

}  // namespace avadclip
