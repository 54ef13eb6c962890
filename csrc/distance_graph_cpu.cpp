// distance_graph on the CPU: out_i = sum_j a^|i-j| v_j, a = exp(-1/scale), as two first-order scans, linear in T.
//   forth_i = v_i + a forth_{i-1},   back_i = a (v_{i+1} + back_{i+1}),   out_i = forth_i + back_i
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "stable.h"

namespace avadclip {
namespace {

constexpr int WIDTH = 64;   // channels scanned together: the state fits in registers
constexpr int CHUNK = 256;  // rows between the two scans of a row: what the first one writes is still in the cache

// The rounding of `a` and of every step adds up over about `scale` rows: a longer memory is kept in float64.
constexpr double SHORT_MEMORY = 4;

// Channels 0..width of one video, rows `stride` apart. S: the type of the state.
// carry: one state a chunk, `back` at its last row. A first pass over the chunks makes it, the second one the output.
template <class S, class T, class Width>
HD void scan(const T* v, T* out, S* carry, int64_t rows, int64_t stride, Width width, S a) {
  const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
  S state[WIDTH] = {};
  for (int64_t c = chunks - 1; c >= 0; --c) {
    std::copy_n(state, WIDTH, carry + c * WIDTH);
    if (c == 0) break;
    for (int64_t t = std::min(rows, (c + 1) * CHUNK) - 1; t >= c * CHUNK; --t)
      for (int e = 0; e < width; ++e) state[e] = a * (widen(v[t * stride + e]) + state[e]);
  }
  S forth[CHUNK * WIDTH], ahead[WIDTH] = {};
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = c * CHUNK, last = std::min(rows, first + CHUNK);
    for (int64_t t = first; t < last; ++t)
      for (int e = 0; e < width; ++e)
        forth[(t - first) * WIDTH + e] = ahead[e] = widen(v[t * stride + e]) + a * ahead[e];
    std::copy_n(carry + c * WIDTH, WIDTH, state);
    for (int64_t t = last - 1; t >= first; --t)
      for (int e = 0; e < width; ++e) {
        narrow(acc_t<T>(forth[(t - first) * WIDTH + e] + state[e]), out[t * stride + e]);
        state[e] = a * (widen(v[t * stride + e]) + state[e]);
      }
  }
}

template <class S, class T>
CLONES void scan_channels(const T* v, T* out, S* carry, int64_t rows, int64_t stride, int width, S a) {
  if (width == WIDTH)
    scan<S>(v, out, carry, rows, stride, std::integral_constant<int, WIDTH>{}, a);
  else
    scan<S>(v, out, carry, rows, stride, width, a);
}

Tensor distance_graph(const Tensor& values, double scale, const std::optional<Tensor>& lengths) {
  check_dims("values", values, "[B, T, E]", 3);
  STD_TORCH_CHECK(scale > 0, "scale must be positive, got ", scale);
  const int64_t B = values.size(0), T = values.size(1), E = values.size(2);
  const auto valid = lengths ? read_lengths(*lengths, B, T) : std::vector<int64_t>(B, T);
  const Tensor x = dense(values);
  Tensor out = torch::stable::empty_like(x);
  const int64_t tiles = (E + WIDTH - 1) / WIDTH;
  by_dtype(values.scalar_type(), [&](auto type) {
    using D = decltype(type);
    const auto run = [&](auto state) {
      using S = decltype(state);
      const S decay = S(std::exp(-1 / scale));
      torch::stable::parallel_for(0, B * tiles, 1, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<S[]> carry(new S[(T + CHUNK - 1) / CHUNK * WIDTH]);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / tiles, e = i % tiles * WIDTH, offset = b * T * E + e;
          const int width = int(std::min<int64_t>(WIDTH, E - e));
          D* to = mutable_data<D>(out) + offset;
          scan_channels<S>(data<D>(x) + offset, to, carry.get(), valid[b], E, width, decay);
          for (int64_t t = valid[b]; t < T; ++t) std::fill_n(to + t * E, width, D{});
        }
      });
    };
    if (scale <= SHORT_MEMORY)
      run(acc_t<D>{});
    else
      run(double{});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CPU, m) {
  m.impl("distance_graph", TORCH_BOX(&distance_graph));
}

}  // namespace avadclip
