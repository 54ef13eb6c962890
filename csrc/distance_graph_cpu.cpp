// distance_graph on the CPU: out_i = sum_j a^|i-j| v_j, a = exp(-1/scale), as two first-order scans, linear in T.
//   forth_i = v_i + a forth_{i-1},   back_i = a (v_{i+1} + back_{i+1}),   out_i = forth_i + back_i
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "stable.h"

namespace avadclip {
namespace {

constexpr int WIDTH = 64;   // channels scanned together: the state fits in registers
constexpr int CHUNK = 256;  // rows that all channels go through before the next: cache and pages are met once, not often

// The rounding of `a` and of every step adds up over about `scale` rows: a longer memory is kept in float64.
constexpr double SHORT_MEMORY = 4;

// Of `rows` rows, `stride` apart, and `width` channels: `back` before the first row, from that behind the last one.
template <class S, class T, class Width>
HD void scan_back(const T* v, S* to, const S* from, int64_t rows, int64_t stride, Width width, S a) {
  S back[WIDTH];
  std::copy_n(from, WIDTH, back);
  for (int64_t t = rows - 1; t >= 0; --t)
    for (int e = 0; e < width; ++e) back[e] = a * (widen(v[t * stride + e]) + back[e]);
  std::copy_n(back, WIDTH, to);
}

// The rows' output, from `behind` and from `ahead`, which goes on to the next rows.
template <class S, class T, class Width>
HD void scan_both(const T* v, T* out, S* ahead, const S* behind, int64_t rows, int64_t stride, Width width, S a) {
  S forth[CHUNK * WIDTH], state[WIDTH];
  std::copy_n(ahead, WIDTH, state);
  for (int64_t t = 0; t < rows; ++t)
    for (int e = 0; e < width; ++e) forth[t * WIDTH + e] = state[e] = widen(v[t * stride + e]) + a * state[e];
  std::copy_n(state, WIDTH, ahead);
  std::copy_n(behind, WIDTH, state);
  for (int64_t t = rows - 1; t >= 0; --t)
    for (int e = 0; e < width; ++e) {
      narrow(acc_t<T>(forth[t * WIDTH + e] + state[e]), out[t * stride + e]);
      state[e] = a * (widen(v[t * stride + e]) + state[e]);
    }
}

// Some channels of one video. reach: rows beyond which a^|i-j| is 0. states: for each channel, rounded up to WIDTH,
// `ahead`, and `back` behind each chunk. Where the reach is short, that is scanned from the rows within it, which the
// next chunk finds in the cache; else in a first pass over all rows, from the last to the first.
template <class S, class T>
CLONES void scan(
    const T* v, T* out, S* states, int64_t rows, int64_t stride, int64_t channels, S a, int64_t reach) {
  const int64_t chunks = (rows + CHUNK - 1) / CHUNK, padded = (channels + WIDTH - 1) / WIDTH * WIDTH;
  const bool near = reach <= 2 * CHUNK;
  S *const ahead = states, *const behind = states + padded;
  std::fill_n(ahead, padded, S{});
  std::fill_n(behind + (chunks - 1) * padded, padded, S{});
  const auto by_tile = [&](int64_t c, auto&& of) {
    const int64_t first = c * CHUNK, count = std::min<int64_t>(CHUNK, rows - first);
    for (int64_t e = 0; e < channels; e += WIDTH) {
      const int64_t at = first * stride + e;
      S* const back = behind + c * padded + e;
      if (channels - e >= WIDTH)
        of(at, e, back, count, std::integral_constant<int, WIDTH>{});
      else
        of(at, e, back, count, int(channels - e));
    }
  };
  if (!near)
    for (int64_t c = chunks - 1; c > 0; --c)
      by_tile(c, [&](int64_t at, int64_t, S* back, int64_t count, auto width) {
        scan_back(v + at, back - padded, back, count, stride, width, a);
      });
  for (int64_t c = 0; c < chunks; ++c)
    by_tile(c, [&](int64_t at, int64_t e, S* back, int64_t count, auto width) {
      const int64_t left = rows - c * CHUNK - count;
      if (near && left > 0) {
        std::fill_n(back, WIDTH, S{});
        scan_back(v + at + count * stride, back, back, std::min(reach, left), stride, width, a);
      }
      scan_both(v + at, out + at, ahead + e, back, count, stride, width, a);
    });
  // NaN and infinity reach every row, as in the product with the matrix: they have come to `ahead` at the end.
  if (near && chunks > 1 && !std::all_of(ahead, ahead + channels, [](S x) { return std::isfinite(x); }))
    scan(v, out, states, rows, stride, channels, a, rows + 2 * CHUNK);
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
      const auto reach = int64_t(std::min(1e15, std::ceil(-std::log(std::numeric_limits<S>::denorm_min()) * scale)));
      torch::stable::parallel_for(0, B * tiles, 1, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<S[]> states(new S[(1 + (T + CHUNK - 1) / CHUNK) * tiles * WIDTH]);
        for (int64_t i = begin, next; i < end; i = next) {  // the tiles of one video together
          const int64_t b = i / tiles, e = i % tiles * WIDTH, offset = b * T * E + e;
          next = std::min(end, (b + 1) * tiles);
          const int64_t channels = std::min(E - e, (next - i) * WIDTH);
          D* to = mutable_data<D>(out) + offset;
          scan<S>(data<D>(x) + offset, to, states.get(), valid[b], E, channels, decay, reach);
          for (int64_t t = valid[b]; t < T; ++t) std::fill_n(to + t * E, channels, D{});
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
