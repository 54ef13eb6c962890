// distance_graph on the CPU: out_i = sum_j a^|i-j| v_j, a = exp(-1/scale), as two first-order scans, linear in T.
//   forth_i = v_i + a forth_{i-1},   back_i = a (v_{i+1} + back_{i+1}),   out_i = forth_i + back_i
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "stable.h"

namespace avadclip {
namespace {

constexpr int WIDTH = 64;  // channels scanned together: the state fits in registers, and T rows of it in the cache

// The rounding of `a` and of every step adds up over about `scale` rows: a longer memory is kept in float64.
constexpr double SHORT_MEMORY = 4;

// Channels 0..width of one video, rows `stride` apart; forth: rows * WIDTH scratch. S: the type of the state.
template <class S, class T, class Width>
HD void scan(const T* v, T* out, S* forth, int64_t rows, int64_t stride, Width width, S a) {
  S state[WIDTH] = {};
  for (int64_t t = 0; t < rows; ++t)
    for (int e = 0; e < width; ++e) forth[t * WIDTH + e] = state[e] = widen(v[t * stride + e]) + a * state[e];
  std::fill(state, state + WIDTH, S(0));
  for (int64_t t = rows - 1; t >= 0; --t)
    for (int e = 0; e < width; ++e) {
      narrow(acc_t<T>(forth[t * WIDTH + e] + state[e]), out[t * stride + e]);
      state[e] = a * (widen(v[t * stride + e]) + state[e]);
    }
}

template <class S, class T>
CLONES void scan_channels(const T* v, T* out, S* forth, int64_t rows, int64_t stride, int width, S a) {
  if (width == WIDTH)
    scan<S>(v, out, forth, rows, stride, std::integral_constant<int, WIDTH>{}, a);
  else
    scan<S>(v, out, forth, rows, stride, width, a);
}

Tensor distance_graph(const Tensor& values, double scale, const std::optional<Tensor>& lengths) {
  STD_TORCH_CHECK(values.dim() == 3 && scale > 0, "values must have shape [B, T, E] and scale be positive");
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
        const std::unique_ptr<S[]> forth(new S[T * WIDTH]);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / tiles, e = i % tiles * WIDTH, offset = b * T * E + e;
          const int width = int(std::min<int64_t>(WIDTH, E - e));
          D* to = mutable_data<D>(out) + offset;
          scan_channels<S>(data<D>(x) + offset, to, forth.get(), valid[b], E, width, decay);
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
