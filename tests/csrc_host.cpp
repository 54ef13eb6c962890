// Runs the device code of csrc/*.cuh on the CPU, a block of threads being a loop, against plain loops in float64.
// Built and run by test_csrc.py, also under the sanitizers. Prints what fails; exit status 1 then.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "distance_graph.cuh"
#include "lengths.cuh"
#include "mil_loss.cuh"
#include "topk_mean.cuh"
#include "uniform_pool.cuh"

using namespace avadclip;

static int failures = 0;
static std::mt19937 generator(0);

#define CHECK(condition, ...)                                                       \
  if (!(condition)) {                                                               \
    std::printf("line %d: %s: ", __LINE__, #condition);                             \
    std::printf(__VA_ARGS__);                                                       \
    std::printf("\n");                                                              \
    ++failures;                                                                     \
  }

static double normal() { return std::normal_distribution<double>()(generator); }
static int below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(generator); }

template <class T>
static T stored(double x) {
  T out;
  narrow(acc_t<T>(x), out);
  return out;
}

// The k largest, NaN first, ties to the lowest index; in rising order of the index.
static std::vector<int> expected_top(const std::vector<double>& x, int k) {
  std::vector<int> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return std::isnan(x[a]) ? !std::isnan(x[b]) : x[a] > x[b];
  });
  order.resize(k);
  std::sort(order.begin(), order.end());
  return order;
}

template <class T>
static void test_topk() {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::nan("");
  for (int round = 0; round < 60; ++round) {
    const int n = 1 + below(round % 3 ? 70 : 900), stride = 1 + below(3), threads = 32 << below(4);
    const int k = top_count(n, 1 + below(20)), slots = k + below(3);
    std::vector<T> column(n * stride, stored<T>(nan));
    std::vector<double> x(n);
    for (int t = 0; t < n; ++t) {
      const int kind = below(24);
      x[t] = round % 2 ? below(4) - 2 : normal();  // few values: many ties
      if (kind == 0) x[t] = inf;
      if (kind == 1) x[t] = -inf;
      if (kind == 2) x[t] = round % 4 ? -0.0 : nan;
      column[t * stride] = stored<T>(x[t]);
      x[t] = widen(column[t * stride]);
    }
    const auto expected = expected_top(x, k);
    double mean = 0;
    for (int t : expected) mean += x[t] / k;
    const Emulated team{threads};
    std::vector<key_t_of<T>> room(n);
    for (bool keep : {false, true}) {
      std::vector<int32_t> index(slots, 7);
      T out{};
      topk_column(team, Keys<T>{column.data(), stride, keep ? room.data() : nullptr}, n, k, slots, &out, index.data());
      for (int i = 0; i < slots; ++i)
        CHECK(index[i] == (i < k ? expected[i] : -1), "n %d k %d threads %d i %d", n, k, threads, i);
      const double got = widen(out), eps = sizeof(T) == 2 ? 1e-2 : 1e-6;
      CHECK((std::isnan(mean) && std::isnan(got)) || got == mean || std::abs(got - mean) <= eps * (1 + std::abs(mean)),
            "mean %g, expected %g", got, mean);
      std::vector<T> slope(n * stride, stored<T>(0));
      topk_column_backward(team, index.data(), slots, stored<T>(k), n, slope.data(), stride);
      for (int t = 0; t < n; ++t) {
        const bool chosen = std::binary_search(expected.begin(), expected.end(), t);
        CHECK(widen(slope[t * stride]) == (chosen ? 1 : 0), "slope at %d of %d", t, n);
      }
    }
  }
}

static void test_keys() {
  std::vector<float> x = {-INFINITY, -1e30f, -1.f, -1e-45f, 0.f, 1e-45f, 1.f, 1e30f, INFINITY, NAN};
  for (size_t i = 0; i + 1 < x.size(); ++i) CHECK(key_of(x[i]) < key_of(x[i + 1]), "at %zu", i);
  for (float v : x) CHECK(std::isnan(v) ? std::isnan(value_of(key_of(v))) : value_of(key_of(v)) == v, "of %g", v);
  CHECK(key_of(-0.f) == key_of(0.f), "zeros");
  for (double v : {-1e-320, -2.5, 0., 1e300}) CHECK(value_of(key_of(v)) == v, "of %g", v);
}

// Every finite number of 16 bits, and numbers between two: they go to the nearer, from the middle to the even one.
static void test_half() {
  const auto narrowed = [](double x) {
    f16 out;
    narrow(float(x), out);
    return int(out.bits);
  };
  for (int sign : {0, 0x8000})
    for (int bits = 0; bits < 0x7c00; ++bits) {
      const int exponent = bits >> 10, fraction = bits & 1023;
      const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
      const double x = sign ? -size : size, ulp = std::ldexp(sign ? -1 : 1, std::max(exponent, 1) - 25);
      CHECK(widen(f16{uint16_t(sign | bits)}) == x && narrowed(x) == (sign | bits), "at %x", sign | bits);
      const int next = sign | (bits + 1);  // infinity after the largest
      CHECK(narrowed(x + ulp * 0.499) == (sign | bits) && narrowed(x + ulp * 0.501) == next, "beside %x", sign | bits);
      CHECK(narrowed(x + ulp / 2) == (bits % 2 ? next : sign | bits), "between %x and %x", sign | bits, next);
    }
  for (float x : {INFINITY, -INFINITY, NAN, 1e30f, -1e-30f, 65520.f}) {
    const float got = widen(f16{uint16_t(narrowed(x))}), expected = std::abs(x) < 1 ? 0 : std::copysign(INFINITY, x);
    CHECK(std::isnan(x) ? std::isnan(got) : got == expected, "%g of %g", got, x);
  }
}

// Every finite bfloat16 and the floats beside the middle of two, and what is no number whatever its bits are.
static void test_bfloat16() {
  const auto narrowed = [](uint32_t bits) {
    bf16 out;
    narrow(bits_as<float>(bits), out);
    return uint32_t(out.bits);
  };
  for (uint32_t sign : {0u, 0x8000u})
    for (uint32_t bits = sign; bits < (sign | 0x7f80); ++bits) {
      const uint32_t x = bits << 16, middle = x | 0x8000;
      CHECK(narrowed(x) == bits && bits_as<uint32_t>(widen(bf16{uint16_t(bits)})) == x, "at %x", bits);
      CHECK(narrowed(middle - 1) == bits && narrowed(middle + 1) == bits + 1, "beside the middle after %x", bits);
      CHECK(narrowed(middle) == bits + bits % 2, "in the middle after %x", bits);
    }
  CHECK(narrowed(0x7f800000) == 0x7f80 && narrowed(0xff800000) == 0xff80, "infinities");
  for (uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu})
    CHECK((narrowed(bits) & 0x7fff) > 0x7f80, "%x is no number", bits);
}

static void test_exponential() {
  double worst = 0;
  for (double x = -87; x < 88.7; x += 0.00123) {
    const double right = std::exp(double(float(x)));
    worst = std::max(worst, std::abs(exponential(float(x)) - right) / right);
  }
  CHECK(worst < 1.5e-7, "relative error %g", worst);
  CHECK(exponential(-200.f) == 0 && std::isinf(exponential(89.f)) && std::isnan(exponential(NAN)), "at the ends");
  CHECK(exponential(88.5f) < INFINITY && exponential(-100.f) > 0, "near the ends");
}

static void test_mil() {
  for (int round = 0; round < 20; ++round) {
    const int n = 1 + below(300), rows = n + below(5), k = top_count(n, 16), threads = 32 << below(4);
    const double target = round % 2, scale = 0.25;
    std::vector<float> logits(rows), slope(rows, 9), room(n);
    for (auto& x : logits) x = float(normal() * 3);
    std::vector<double> p(n);
    for (int t = 0; t < n; ++t) p[t] = sigmoid(logits[t]);
    const auto top = expected_top(p, k);
    double mean = 0;
    for (int t = 0; t < n; ++t) p[t] = 1 / (1 + std::exp(-double(logits[t])));
    for (int t : top) mean += p[t] / k;
    const double loss = -(target ? std::log(mean) : std::log(1 - mean));
    const double d = (target ? -1 / mean : 1 / (1 - mean)) * scale / k;
    for (bool keep : {false, true}) {
      const float got = mil_video(Emulated{threads}, logits.data(), n, k, rows, float(target), float(scale),
                                  keep ? room.data() : slope.data(), slope.data());
      CHECK(std::abs(got - loss) < 2e-6 * (1 + loss), "loss %g, expected %g", got, loss);
      for (int t = 0; t < rows; ++t) {
        const double right = std::binary_search(top.begin(), top.end(), t) ? d * p[t] * (1 - p[t]) : 0;
        // 1 - p is exact to an eps of 1, not of itself, in any float32 sigmoid's backward pass.
        CHECK(std::abs(slope[t] - right) <= 1e-5 * std::abs(right) + 4e-7 * std::abs(d), "slope %g, expected %g",
              slope[t], right);
      }
    }
  }
}

// Every row that is no number shows it, chosen or not.
static void test_mil_of_no_numbers() {
  const int n = 40;
  std::vector<float> logits(n, NAN), slope(n + 1), room(n);
  const float loss = mil_video(Emulated{32}, logits.data(), n, 3, n + 1, 1.f, 1.f, room.data(), slope.data());
  const auto shown = std::count_if(slope.begin(), slope.end(), [](float x) { return std::isnan(x); });
  CHECK(std::isnan(loss) && shown == n && slope[n] == 0, "%d rows of %d, loss %g", int(shown), n, loss);
}

// log(1 - p) of hundreds of scores close to 1: their sum must not be rounded to float32.
static void test_mil_of_a_long_video() {
  const int n = 12000, k = top_count(n, 16);
  std::vector<float> logits(n), slope(n), room(n);
  std::vector<double> p(n);
  for (int round = 0; round < 4; ++round) {
    for (auto& x : logits) x = float(normal() * 2 + round);
    for (int t = 0; t < n; ++t) p[t] = 1 / (1 + std::exp(-double(logits[t])));
    std::sort(p.rbegin(), p.rend());
    double mean = 0;
    for (int t = 0; t < k; ++t) mean += p[t] / k;
    const double loss = -std::log(1 - mean);
    const double got = mil_video(Emulated{256}, logits.data(), n, k, n, 0.f, 1.f, room.data(), slope.data());
    CHECK(std::abs(got - loss) < 4e-7 * loss, "loss %.9g, expected %.9g", got, loss);
  }
}

static void test_align() {
  for (int C : {1, 2, 7, 40}) {
    std::vector<double> s(C), y(C), alpha(C), slope(C), alpha_slope(C), unused(C);
    for (int c = 0; c < C; ++c) s[c] = normal() * 2, y[c] = below(2), alpha[c] = 0.25 + 0.1 * normal();
    y[0] = 1;
    const auto loss = [&] {
      return align_loss(Serial{}, s.data(), y.data(), alpha.data(), C, unused.data(), unused.data());
    };
    const double value = align_loss(Emulated{64}, s.data(), y.data(), alpha.data(), C, slope.data(), alpha_slope.data());
    CHECK(std::abs(value - loss()) < 1e-12, "one thread and many: %g", value - loss());
    for (int c = 0; c < C; ++c)
      for (auto [x, d] : {std::pair(&s[c], slope[c]), std::pair(&alpha[c], alpha_slope[c])}) {
        const double kept = *x, h = 1e-5;
        *x = kept + h;
        double difference = loss();
        *x = kept - h;
        difference = (difference - loss()) / (2 * h);
        *x = kept;
        CHECK(std::abs(difference - d) < 1e-8, "class %d of %d: %g, expected %g", c, C, d, difference);
      }
  }
}

template <class T, int WIDTH>
static void test_distance(int rows, int n, int E, double scale) {
  const Decay a{float(std::exp(-1 / scale)), float(std::exp(-SEGMENT / scale)), float(std::exp(-TILE_ROWS / scale))};
  std::vector<Vector<T, WIDTH>> room(rows * E / WIDTH), result(rows * E / WIDTH);  // aligned as on the device
  T *v = room.data()->at, *out = result.data()->at;
  for (int i = 0; i < rows * E; ++i) v[i] = stored<T>(i / E < n ? normal() : NAN);
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  std::vector<float> forth(tiles * E), back(tiles * E);
  const Emulated team{TILE_THREADS};
  Joins<WIDTH> joins;
  for (int pass = tiles > 1 ? 0 : 1; pass < 2; ++pass) {
    for (int64_t s = 0; s < tiles; ++s)
      for (int channel = 0; channel < E; channel += LANES * WIDTH) {
        const int lanes = std::min(LANES, (E - channel) / WIDTH);
        float *f = &forth[s * E + channel], *b = &back[s * E + channel];
        PerThread<Segment<T, WIDTH>, Emulated> own(team);
        join_segments<T, WIDTH>(team, own, joins, v + channel, E, s * TILE_ROWS, n, lanes, a, pass ? f : nullptr,
                                pass ? b : nullptr, pass ? nullptr : f, pass ? nullptr : b);
        if (pass) write_tile<T, WIDTH>(team, own, joins, out + channel, E, s * TILE_ROWS, n, rows, lanes, a);
      }
    if (!pass)
      for (int e = 0; e < E; ++e) join_tiles(&forth[e], &back[e], tiles, E, a);
  }
  double worst = 0, largest = 0;
  for (int e = 0; e < E; e += std::max(1, E / 5))
    for (int i = 0; i < rows; ++i) {
      double sum = 0;
      for (int j = 0; j < n && i < n; ++j) sum += std::exp(-std::abs(i - j) / scale) * double(widen(v[j * E + e]));
      worst = std::max(worst, std::abs(sum - double(widen(out[i * E + e]))));
      largest = std::max(largest, std::abs(sum));
    }
  const double eps = sizeof(T) == 4 ? 2e-6 : 8e-3;
  CHECK(worst <= eps * largest, "rows %d n %d E %d scale %g: error %g of %g", rows, n, E, scale, worst, largest);
}

template <class T, int WIDTH>
static void test_pool(int n, int rows, int D) {
  std::vector<Vector<T, WIDTH>> video(n * D / WIDTH), pooled(rows * D / WIDTH), slope(n * D / WIDTH);
  T *x = video.data()->at, *y = pooled.data()->at, *g = slope.data()->at;
  for (int i = 0; i < n * D; ++i) x[i] = stored<T>(normal());
  const Emulated team{64};
  std::vector<double> right(n * D);
  for (int r = 0; r < rows; ++r) {
    const Range range = pool_range(r, n, rows);
    CHECK(range.begin >= 0 && range.count >= 1 && range.end() <= n, "row %d of %d, n %d", r, rows, n);
    pool_row<T, WIDTH>(team, x, range, D, y + r * D);
    for (int d = 0; d < D; ++d) {
      double mean = 0;
      for (int64_t t = range.begin; t < range.end(); ++t) {
        mean += double(widen(x[t * D + d])) / range.count;
        right[t * D + d] += 1.0 / range.count;
      }
      CHECK(std::abs(mean - widen(y[r * D + d])) < (sizeof(T) == 4 ? 1e-6 : 2e-2), "row %d of %d, n %d", r, rows, n);
    }
  }
  for (int i = 0; i < rows * D; ++i) y[i] = stored<T>(1);
  for (int t = 0; t < n; ++t) pool_row_backward<T, WIDTH>(team, y, t, n, rows, D, g + t * D);
  for (int i = 0; i < n * D; ++i)
    CHECK(std::abs(widen(g[i]) - right[i]) <= (sizeof(T) == 4 ? 1e-5 : 2e-2) * (1 + right[i]), "gradient, n %d", n);
}

// Ranges of thousands of rows, and rows in thousands of ranges, all numbers of one sign: no digit is lost on the way.
static void test_long_pool() {
  const int n = 20000;
  std::vector<float> x(n), y(n), slope(1);
  double mean = 0, sum = 0;
  for (auto& value : x) mean += double(value = 1 + float(std::abs(normal()))) / n;
  pool_row<float, 1>(Emulated{32}, x.data(), pool_range(0, n, 1), 1, y.data());
  CHECK(std::abs(y[0] - mean) <= 1.2e-7 * mean, "mean %.9g, expected %.9g", y[0], mean);
  for (float value : x) sum += value;
  pool_row_backward<float, 1>(Emulated{32}, x.data(), 0, 1, n, 1, slope.data());
  CHECK(std::abs(slope[0] - sum) <= 1.2e-7 * sum, "gradient %.9g, expected %.9g", slope[0], sum);
}

// Arrays that start anywhere: every element is visited once, and nothing else is written.
template <class T>
static void test_vectors() {
  for (int start = 0; start < 16 / int(sizeof(T)); ++start)
    for (int n : {0, 1, 3, 7, 8, 9, 31, 64, 100}) {
      std::vector<Vector16<T>> room(16 + n / 2), result(room);
      T *x = room.data()->at + start, *out = result.data()->at;
      for (int i = 0; i < n; ++i) x[i] = stored<T>(i + 1);
      std::fill_n(out, start + n + 8, stored<T>(-1));
      for (int threads : {1, 32}) {
        std::vector<int> visits(n);
        read_aligned(Emulated{threads}, x, n, [&](int64_t i, T value) { visits[i] += int(widen(value)); });
        for (int i = 0; i < n; ++i) CHECK(visits[i] == i + 1, "start %d n %d at %d: %d", start, n, i, visits[i]);
        write_aligned(Emulated{threads}, out + start, n, [&](int64_t i) { return x[i]; });
        for (int i = -start; i < n + 8; ++i)
          CHECK(widen(out[start + i]) == (i < 0 || i >= n ? -1 : i + 1), "start %d n %d at %d", start, n, i);
      }
    }
}

// A video's logits in columns, and the gradient back in rows.
template <class T>
static void test_columns() {
  for (int C : {1, 2, 7, 16})
    for (int n : {1, 5, 33}) {
      const int rows = n + 3;
      std::vector<T> logits(rows * C);
      for (auto& x : logits) x = stored<T>(normal());
      std::vector<uint32_t> keys(n * C);
      std::vector<Selection<uint32_t>> selected(C);
      std::vector<float> share(C), slope(rows * C, 9);
      store_columns(Emulated{64}, logits.data(), n, C, keys.data());
      for (bool keep : {false, true}) {
        const auto keys_of = [&](int c) {
          return Keys<T>{logits.data() + c, C, keep ? keys.data() + int64_t(c) * n : nullptr};
        };
        for (int c = 0; c < C; ++c) selected[c] = keys_of(c).select(Emulated{32}, n, top_count(n, 16)), share[c] = c + 1;
        align_slopes(Emulated{64}, keys_of, selected.data(), share.data(), n, rows, C, slope.data());
        for (int c = 0; c < C; ++c) {
          std::vector<double> x(n);
          for (int t = 0; t < n; ++t) x[t] = widen(logits[t * C + c]);
          const auto top = expected_top(x, top_count(n, 16));
          for (int t = 0; t < rows; ++t)
            CHECK(slope[t * C + c] == (std::binary_search(top.begin(), top.end(), t) ? c + 1 : 0), "C %d n %d", C, n);
        }
      }
    }
}

// Whatever lengths and indices a caller hands over, device code stays inside of its memory.
static void test_hostile_numbers() {
  const int64_t rows = 5, extremes[] = {INT64_MIN, -1, 0, 3, 6, INT64_MAX};
  const int32_t narrow_extremes[] = {INT32_MIN, -1, 0, 3, 6, INT32_MAX}, held[] = {1, 1, 1, 3, 5, 5};
  for (const Lengths& lengths : {Lengths{extremes, true, rows}, Lengths{narrow_extremes, false, rows}})
    for (int b = 0; b < 6; ++b) {
      CHECK(lengths[b] == held[b], "length %d", int(lengths[b]));
      CHECK(lengths.before(Emulated{4}, b) == std::accumulate(held, held + b, 0), "before %d", b);
      const Video video = packed_video(Emulated{4}, lengths, b);
      CHECK(video.first >= 0 && video.n >= 1 && video.first + video.n <= rows, "video %d", b);
      CHECK(b > 3 || (video.n == std::min(held[b], 5 - b) && video.first == b), "video %d", b);
    }
  const int32_t index[] = {-1, 5, 2, INT32_MAX, INT32_MIN, 0};
  std::vector<float> slope(rows);
  topk_column_backward(Emulated{32}, index, 6, 1.f, rows, slope.data(), 1);
  CHECK((slope == std::vector<float>{0.5, 0, 0.5, 0, 0}), "of six indices two are rows");
}

int main() {
  test_keys();
  test_half();
  test_bfloat16();
  test_exponential();
  test_topk<float>();
  test_topk<double>();
  test_topk<bf16>();
  test_topk<f16>();
  test_mil();
  test_mil_of_no_numbers();
  test_mil_of_a_long_video();
  test_align();
  for (double scale : {2.718281828, 0.5, 40.0, 1e6})
    for (int rows : {1, 7, 8, 255, 256, 257, 700}) {
      test_distance<float, 4>(rows, rows, 36, scale);
      test_distance<float, 1>(rows, std::max(1, rows - 9), 11, scale);
      test_distance<bf16, 8>(rows, std::max(1, rows / 2), 72, scale);
      test_distance<f16, 1>(rows, rows, 3, scale);
    }
  for (int n : {1, 5, 15, 16, 17, 100, 255, 256, 257, 1000})
    for (int rows : {1, 7, 16, 256}) {
      test_pool<float, 4>(n, rows, 12);
      test_pool<float, 1>(n, rows, 3);
      test_pool<bf16, 8>(n, rows, 8);
    }
  test_long_pool();
  test_hostile_numbers();
  test_vectors<float>();
  test_vectors<bf16>();
  test_columns<float>();
  test_columns<bf16>();
  test_columns<f16>();
  std::printf(failures ? "%d failures\n" : "all hold\n", failures);
  return failures != 0;
}
