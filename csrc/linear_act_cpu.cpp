// linear_act on a processor with tile units (amx.h) or AVX-512 (avx512.h), in float32: linear layers and convolutions
// over time with what surrounds them, forward and backward. Three products make it up, each of them cut into tasks of
// 256 rows by 512 columns whose sums stay in a core's cache; the factors are packed slab by slab, 128 or 256 deep.
//   y_t = sum_k W_k x_(t + shift_k) + b;   dx_t = sum_k W_k' g_(t - shift_k);   dW_k = sum_t g_t x_(t + shift_k)'
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <memory>

#include "amx.h"
#include "stable.h"

namespace avadclip {
namespace {

#ifdef AVADCLIP_AVX512

constexpr int64_t ROWS = 256, COLUMNS = 512;  // of a task at most
constexpr int64_t PIECE = 256;                // of a row, that stays in the first cache

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
std::unique_ptr<T[], Free> aligned(int64_t count) {
  void* memory = std::aligned_alloc(64, round_up(std::max<int64_t>(count, 1) * sizeof(T), 64));
  STD_TORCH_CHECK(memory != nullptr, "out of memory");
  return std::unique_ptr<T[], Free>(static_cast<T*>(memory));
}

enum class Activation { NONE,
                        RELU,
                        QUICK_GELU };

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::NONE;
  if (name == "relu") return Activation::RELU;
  STD_TORCH_CHECK(name == "quick_gelu", "activation must be none, relu or quick_gelu, got ", name);
  return Activation::QUICK_GELU;
}

// Which rows of a batch count. All: those of `count` videos of `rows` rows. Else: those of one long video, in which the
// rows before ends[b] follow each other.
struct Layout {
  int64_t count, rows;
  std::vector<int64_t> source;  // of every row of the long video, its row in the batch, or -1
  bool ragged = false;

  Layout(int64_t videos, int64_t length) : count(videos), rows(length) {}
  // Every video has room for room[b] rows, and for a gap: of zeros, as many as a tap may reach.
  Layout(const std::vector<int64_t>& ends, const std::vector<int64_t>& room, int64_t length, int64_t gap)
      : count(1), ragged(true) {
    for (size_t b = 0; b < ends.size(); ++b)
      for (int64_t t = 0; t < room[b] + gap; ++t)
        source.push_back(t < ends[b] ? static_cast<int64_t>(b) * length + t : -1);
    rows = source.size();
  }
  // Where row t of video b lies in the batch; -1: it is none.
  int64_t row(int64_t b, int64_t t) const {
    if (t < 0 || t >= rows) return -1;
    return ragged ? source[t] : b * rows + t;
  }
};

// The rows of one tensor.
struct Videos {
  const Layout& layout;
  const float* data;
  int64_t width;
  const float* zeros;
  int64_t count() const { return layout.count; }
  int64_t rows() const { return layout.rows; }
  const float* row(int64_t b, int64_t t) const {
    const int64_t at = layout.row(b, t);
    return at < 0 ? zeros : data + at * width;
  }
};

// Row i of a task's sums, as 32 numbers of each of its blocks.
struct Sums {
  Block* block;
  int64_t blocks;  // in a row of them
  const float* row(int64_t i, int64_t column) const {
    return block[i / BLOCK * blocks + column / BLOCK][i % BLOCK] + column % BLOCK;
  }
};

// Dropout: what is not kept is 0, and the rest `gain` times as large.
struct Dropout {
  const uint8_t* kept = nullptr;  // booleans, of a type whose loops GCC vectorises; null: all, as they are
  float gain = 1;
  Dropout from(int64_t at) const { return {kept ? kept + at : nullptr, gain}; }
};

// What is done with the sums of a row, and where they go. dot: act(y) is not written, but its product with dot: a number
// for every row and task of columns, (task, row) in `out`.
struct Epilogue {
  const float *bias, *residual, *dot;
  Activation activation;
  Dropout dropout;
  float *y, *out;
};

inline void activate(float* value, int64_t count, Activation activation) {
  if (activation == Activation::RELU)
    for (int64_t i = 0; i < count; ++i) value[i] = value[i] < 0 ? 0.f : value[i];  // NaN stays
  else if (activation == Activation::QUICK_GELU)
    for (int64_t i = 0; i < count; ++i) value[i] *= sigmoid(1.702f * value[i]);
}

inline void drop(float* value, int64_t count, Dropout dropout) {
  for (int64_t i = 0; dropout.kept && i < count; ++i) value[i] *= dropout.kept[i] ? dropout.gain : 0.f;  // NaN stays
}

// `count` sums of a row: the numbers `at`.. of (rows, columns), from `column` on. Returns their part of the product
// with dot. Where the compiler knows count, they stay in registers from here to there.
inline __attribute__((always_inline)) float finish_some(const float* sum, int64_t count, const Epilogue& to, int64_t at,
                                                        int64_t column) {
  float value[BLOCK];
  for (int64_t i = 0; i < count; ++i) value[i] = to.bias ? sum[i] + to.bias[column + i] : sum[i];
  if (to.y) std::copy(value, value + count, to.y + at);
  activate(value, count, to.activation);
  drop(value, count, to.dropout.from(at));
  if (!to.dot) {
    for (int64_t i = 0; i < count; ++i) to.out[at + i] = to.residual ? value[i] + to.residual[at + i] : value[i];
    return 0;
  }
  float product = 0;
#pragma omp simd reduction(+ : product)
  for (int64_t i = 0; i < count; ++i) product += value[i] * to.dot[column + i];
  return product;
}

// A row of a task's sums.
CLONES float finish(const Sums& sums, int64_t row, int64_t columns, const Epilogue& to, int64_t at, int64_t column) {
  float product = 0;
  int64_t c = 0;
  for (; c + BLOCK <= columns; c += BLOCK) product += finish_some(sums.row(row, c), BLOCK, to, at + c, column + c);
  if (c < columns) product += finish_some(sums.row(row, c), columns - c, to, at + c, column + c);
  return product;
}

// Every tap's matrix [outputs, inputs] of a weight (O, I, K), where it lies if there is one.
struct Taps {
  Taps(const Tensor& weight)
      : outputs(weight.size(0)), inputs(weight.size(1)), count(weight.dim() == 3 ? weight.size(2) : 1) {
    data = avadclip::data<float>(weight);
    if (count == 1) return;
    room = aligned<float>(count * outputs * inputs);
    torch::stable::parallel_for(0, outputs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = 0; k < count; ++k)
        for (int64_t i = begin * inputs; i < end * inputs; ++i) room[k * outputs * inputs + i] = data[i * count + k];
    });
    data = room.get();
  }
  const float* row(int64_t tap, int64_t output) const { return data + (tap * outputs + output) * inputs; }

  int64_t outputs, inputs, count;
  const float* data;
  std::unique_ptr<float[], Free> room;
};

// The taps as second factors: [slab][tap][16 columns][step][part] tiles. transposed: from outputs to inputs.
template <class Unit>
std::unique_ptr<char[], Free> pack(const Taps& taps, bool transposed, const float* zeros) {
  constexpr int64_t PARTS = Unit::PARTS, TILE = Unit::TILE, STEPS = Unit::STEPS, SLAB = STEPS * DEPTH;
  constexpr int64_t GROUP = STEPS * PARTS * TILE;  // bytes of a slab's 16 columns
  const int64_t depth = transposed ? taps.outputs : taps.inputs, width = transposed ? taps.inputs : taps.outputs;
  const int64_t groups = round_up(width, BLOCK) / LANES, slabs = divide_up(depth, SLAB);
  auto packed = aligned<char>(slabs * taps.count * groups * GROUP);
  torch::stable::parallel_for(0, slabs * taps.count * groups, 8, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t column = at % groups * LANES, tap = at / groups % taps.count, slab = at / groups / taps.count;
      for (int64_t s = 0; s < STEPS; ++s) {
        const int64_t k = slab * SLAB + s * DEPTH;
        char* to = packed.get() + at * GROUP + s * PARTS * TILE;
        const float* row[DEPTH];
        if (transposed) {
          for (int64_t i = 0; i < DEPTH; ++i) row[i] = k + i < depth ? taps.row(tap, k + i) : zeros;
          Unit::pack_across(row, column, width - column, false, to, TILE);
        } else {
          for (int64_t i = 0; i < LANES; ++i) row[i] = column + i < width ? taps.row(tap, column + i) : zeros;
          Unit::pack_along(row, k, depth - k, true, to, TILE);
        }
      }
    }
  });
  return packed;
}

// Into how many tasks of at most ROWS rows a video is cut, alike to a block, so that every thread has as many.
int64_t cuts(const Videos& x) {
  const int64_t blocks = divide_up(x.rows(), BLOCK);
  int64_t tasks = divide_up(x.rows(), ROWS);
  while (tasks < blocks && x.count() * tasks % torch::stable::get_num_threads() != 0) ++tasks;
  return tasks;
}

// out_t = epilogue(sum_k x_(t + shift_k) taps_k) for the rows of `out`; `total` are in the batch.
template <class Unit>
void rows_product(const Videos& x, const Taps& taps, bool transposed, const std::vector<int64_t>& shift, bool high,
                  const Layout& out, int64_t total, const Epilogue& to) {
  constexpr int64_t PARTS = Unit::PARTS, TILE = Unit::TILE, STEPS = Unit::STEPS, SLAB = STEPS * DEPTH;
  constexpr int64_t GROUP = STEPS * PARTS * TILE;  // bytes of a slab's 16 columns
  const int64_t width = transposed ? taps.inputs : taps.outputs, depth = x.width;
  const auto weight = pack<Unit>(taps, transposed, x.zeros);
  const auto [low, top] = std::minmax_element(shift.begin(), shift.end());
  const int64_t before = *low, reach = *top - *low;
  const int64_t groups = round_up(width, BLOCK) / LANES;
  const int64_t row_tasks = cuts(x), column_tasks = divide_up(width, COLUMNS);
  const int64_t blocks = divide_up(x.rows(), BLOCK), rows = divide_up(blocks, std::max<int64_t>(row_tasks, 1)) * BLOCK;
  const int64_t packed_rows = round_up(rows + reach, LANES), stride = packed_rows * Unit::LANE;

  torch::stable::parallel_for(0, x.count() * row_tasks * column_tasks, 1, [&](int64_t begin, int64_t end) {
    const typename Unit::Units units;
    const auto slab = aligned<char>(STEPS * PARTS * stride);
    const auto block = aligned<Block>(rows * COLUMNS / (BLOCK * BLOCK));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / column_tasks / row_tasks, column = task % column_tasks * COLUMNS;
      const int64_t cut = task / column_tasks % row_tasks, first = cut * blocks / row_tasks * BLOCK;
      const int64_t count = std::min((cut + 1) * blocks / row_tasks * BLOCK, x.rows()) - first;
      const int64_t columns = std::min(COLUMNS, width - column);
      const Sums sums{block.get(), divide_up(columns, BLOCK)};
      if (depth == 0) std::fill_n(&block[0][0][0], rows * COLUMNS, 0.f);
      for (int64_t k = 0; k < depth; k += SLAB) {
        for (int64_t r = 0; r < round_up(count, BLOCK) + reach; r += LANES) {
          const float* row[LANES];
          for (int64_t i = 0; i < LANES; ++i) row[i] = x.row(b, first + before + r + i);
          for (int64_t s = 0; s < STEPS; ++s) {
            const int64_t at = k + s * DEPTH;
            Unit::pack_along(row, at, depth - at, false, slab.get() + s * PARTS * stride + r * Unit::LANE, stride);
          }
        }
        for (int64_t tap = 0; tap < taps.count; ++tap) {
          const char* second = weight.get() + (k / SLAB * taps.count + tap) * groups * GROUP;
          for (int64_t r = 0; r < count; r += BLOCK)
            for (int64_t c = 0; c < columns; c += BLOCK)
              Unit::multiply_add({slab.get() + (shift[tap] - before + r) * Unit::LANE, PARTS * stride, stride, TILE},
                                 {second + (column + c) / LANES * GROUP, PARTS * TILE, TILE, GROUP}, STEPS, high,
                                 k == 0 && tap == 0, sums.block[r / BLOCK * sums.blocks + c / BLOCK]);
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = out.row(b, first + r), at = row * width + column;
        if (row < 0) continue;
        const float product = finish(sums, r, columns, to, at, column);
        if (to.dot) to.out[column / COLUMNS * total + row] = product;
      }
    }
  });
}

// out (O, I, K) = sum over videos and t of g_t x_(t + shift_k)'
template <class Unit>
void weight_product(const Videos& g, const Videos& x, const std::vector<int64_t>& shift, bool high, float* out) {
  constexpr int64_t PARTS = Unit::PARTS, TILE = Unit::TILE, STEPS = Unit::STEPS, SLAB = STEPS * DEPTH;
  constexpr int64_t GROUP = STEPS * PARTS * TILE;  // bytes of a slab's 16 columns
  const int64_t taps = shift.size(), depth = g.count() * g.rows(), outputs = g.width, inputs = x.width;
  // Columns are whole blocks of one tap each.
  const int64_t tap_columns = round_up(inputs, BLOCK), width = taps * tap_columns;
  int64_t rows = std::min(ROWS, round_up(outputs, BLOCK)), columns = std::min(COLUMNS, width);
  if (width == 0 || outputs == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  while (divide_up(outputs, rows) * divide_up(width, columns) < threads && std::max(rows, columns) > 2 * BLOCK)
    (rows >= columns ? rows : columns) = round_up(std::max(rows, columns) / 2, BLOCK);
  const int64_t row_tasks = divide_up(outputs, rows), column_tasks = divide_up(width, columns);
  const int64_t stride = rows * Unit::LANE;

  torch::stable::parallel_for(0, row_tasks * column_tasks, 1, [&](int64_t begin, int64_t end) {
    const typename Unit::Units units;
    const auto first = aligned<char>(STEPS * PARTS * stride), second = aligned<char>(columns / LANES * GROUP);
    const auto block = aligned<Block>(rows * columns / (BLOCK * BLOCK));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task / column_tasks * rows, from = task % column_tasks * columns;
      const int64_t count = std::min(rows, round_up(outputs - o, BLOCK)), some = std::min(columns, width - from);
      const Sums sums{block.get(), some / BLOCK};
      if (depth == 0) std::fill_n(&block[0][0][0], rows * columns, 0.f);
      for (int64_t k = 0; k < depth; k += SLAB) {
        for (int64_t s = 0; s < STEPS; ++s) {
          const float* row[DEPTH];
          for (int64_t i = 0; i < DEPTH; ++i) {
            const int64_t at = k + s * DEPTH + i;
            row[i] = at < depth ? g.row(at / g.rows(), at % g.rows()) : g.zeros;
          }
          for (int64_t r = 0; r < count; r += LANES)
            Unit::pack_across(row, o + r, outputs - o - r, true,
                              first.get() + s * PARTS * stride + r * Unit::LANE, stride);
          for (int64_t c = 0, tap = -1; c < some; c += LANES) {
            if ((from + c) / tap_columns != tap) {
              tap = (from + c) / tap_columns;
              for (int64_t i = 0; i < DEPTH; ++i) {
                const int64_t at = k + s * DEPTH + i;
                row[i] = at < depth ? x.row(at / g.rows(), at % g.rows() + shift[tap]) : x.zeros;
              }
            }
            const int64_t input = (from + c) % tap_columns;
            Unit::pack_across(row, input, inputs - input, false,
                              second.get() + c / LANES * GROUP + s * PARTS * TILE, TILE);
          }
        }
        for (int64_t r = 0; r < count; r += BLOCK)
          for (int64_t c = 0; c < some; c += BLOCK)
            Unit::multiply_add({first.get() + r * Unit::LANE, PARTS * stride, stride, TILE},
                               {second.get() + c / LANES * GROUP, PARTS * TILE, TILE, GROUP}, STEPS, high, k == 0,
                               sums.block[r / BLOCK * sums.blocks + c / BLOCK]);
      }
      for (int64_t c = 0; c < some; c += BLOCK) {
        const int64_t tap = (from + c) / tap_columns, input = (from + c) % tap_columns;
        for (int64_t r = 0; r < std::min(rows, outputs - o); ++r) {
          float* to = out + ((o + r) * inputs + input) * taps + tap;
          for (int64_t i = 0; i < std::min(BLOCK, inputs - input); ++i) to[i * taps] = sums.row(r, c)[i];
        }
      }
    }
  });
}

// What the backward pass makes of a row of gradients before it multiplies: g = dL/dy of out = act(y), and its share of
// the gradients of bias and dot; each may be null. kept: y, or for relu out itself. With dot, *grad is <act(y), dot>'s.
CLONES void row_slopes(const float* grad, const float* kept, const float* dot, Dropout dropout, int64_t width,
                       Activation activation, float* g, double* d_bias, double* d_dot) {
  float slope[PIECE], value[PIECE];
  for (int64_t at = 0; at < width; at += PIECE) {
    const int64_t count = std::min(PIECE, width - at);
    for (int64_t i = 0; i < count; ++i) slope[i] = dot ? *grad * dot[at + i] : grad[at + i];
    drop(slope, count, dropout.from(at));
    if (activation == Activation::RELU)
      for (int64_t i = 0; i < count; ++i) slope[i] = kept[at + i] <= 0 ? 0.f : slope[i];
    else if (activation == Activation::QUICK_GELU)
      for (int64_t i = 0; i < count; ++i) {
        const float s = sigmoid(1.702f * kept[at + i]);
        slope[i] *= s + s * (1 - s) * 1.702f * kept[at + i];  // in this order nothing overflows
      }
    if (g) std::copy(slope, slope + count, g + at);
    if (d_bias)
      for (int64_t i = 0; i < count; ++i) d_bias[at + i] += slope[i];
    if (d_dot) {
      std::copy(kept + at, kept + at + count, value);
      activate(value, count, activation);
      for (int64_t i = 0; i < count; ++i) d_dot[at + i] += *grad * value[i];
    }
  }
}

// The same of all rows that count, in blocks whose sums are added up in their order.
void slopes(const float* grad, const float* kept, const float* dot, Dropout dropout, const Layout& layout,
            int64_t width, Activation activation, float* g, float* d_bias, float* d_dot) {
  const int64_t rows = layout.count * layout.rows, blocks = divide_up(rows, ROWS);
  std::vector<double> bias(d_bias ? blocks * width : 0), dots(d_dot ? blocks * width : 0);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin * ROWS; r < std::min(rows, end * ROWS); ++r) {
      const int64_t row = layout.row(r / layout.rows, r % layout.rows), at = row * width, sums = r / ROWS * width;
      if (row < 0) continue;
      row_slopes(grad + (dot ? row : at), kept ? kept + at : nullptr, dot, dropout.from(at), width, activation,
                 g ? g + at : nullptr, d_bias ? &bias[sums] : nullptr, d_dot ? &dots[sums] : nullptr);
    }
  });
  const auto add_up = [&](const std::vector<double>& parts, float* out) {
    for (int64_t i = 0; out && i < width; ++i) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += parts[block * width + i];
      out[i] = sum;
    }
  };
  add_up(bias, d_bias);
  add_up(dots, d_dot);
}

void check_available(bool amx) {
  STD_TORCH_CHECK(amx ? Amx::available() : Avx512::available(), "this processor has no ",
                  amx ? "tile units (AMX)" : "AVX-512");
}

struct Layer {
  int64_t B, T, I, O, K;
  std::vector<int64_t> shift;
};

// Which rows are read of x and written of out, and those of out that see any of x: the rest know only the bias.
// lengths: where x ends; needed: where out may end.
struct Ends {
  std::vector<int64_t> x, out, seeing, room;
  int64_t gap = 0;
  bool all = true;

  Ends(const Layer& l, const std::optional<Tensor>& lengths, const std::optional<Tensor>& needed)
      : x(l.B, l.T), out(l.B, l.T), all(!lengths && !needed) {
    const auto [low, top] = std::minmax_element(l.shift.begin(), l.shift.end());
    gap = std::max(-*low, *top);
    if (lengths) x = read_lengths(*lengths, l.B, l.T);
    if (needed) out = read_lengths(*needed, l.B, l.T, "needed");
    for (int64_t b = 0; b < l.B; ++b) {
      x[b] = std::min(x[b], out[b] + *top);
      seeing.push_back(std::min(out[b], x[b] - *low));
      room.push_back(std::max(x[b], seeing[b]));
    }
  }
  Layout layout(const Layer& l, const std::vector<int64_t>& ends) const {
    if (!all) return Layout(ends, room, l.T, gap);
    return l.K == 1 ? Layout(1, l.B * l.T) : Layout(l.B, l.T);  // without taps, rows know nothing of videos
  }
};

// What the product makes of a row of zeros, in the first row of blocks: zeros, or no numbers where weights are none.
CLONES void sum_zeros(const float* weight, int64_t outputs, int64_t depth, Block* block) {
  for (int64_t o = 0; o < outputs; ++o) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < depth; ++i) sum += 0 * weight[o * depth + i];
    block[o / BLOCK][0][o % BLOCK] = sum;
  }
}

// The rows that see nothing of x.
void finish_unseen(const Ends& ends, const Layer& l, const float* weight, const Epilogue& to) {
  if (ends.seeing == ends.out) return;
  const int64_t blocks = divide_up(l.O, BLOCK);
  const auto block = aligned<Block>(blocks);
  sum_zeros(weight, l.O, l.I * l.K, block.get());
  torch::stable::parallel_for(0, l.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t row = b * l.T + ends.seeing[b]; row < b * l.T + ends.out[b]; ++row)
        for (int64_t column = 0; column < l.O; column += COLUMNS) {
          const Sums sums{block.get() + column / BLOCK, blocks};
          const float product = finish(sums, 0, std::min(COLUMNS, l.O - column), to, row * l.O + column, column);
          if (to.dot) to.out[column / COLUMNS * l.B * l.T + row] = product;
        }
  });
}

// Zeros in the rows (B, T, width) from ends[b] on.
void clear_from(const std::vector<int64_t>& ends, const Layer& l, int64_t width, float* out) {
  torch::stable::parallel_for(0, l.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      std::fill(out + (b * l.T + ends[b]) * width, out + (b + 1) * l.T * width, 0.f);
  });
}

// x (B, T, I), weight (O, I) or (O, I, K)
Layer layer_of(const Tensor& x, const Tensor& weight, int64_t dilation, bool causal) {
  check_dims("x", x, "[B, T, I]", 3);
  STD_TORCH_CHECK(weight.dim() == 2 || weight.dim() == 3, "weight must have shape [O, I] or [O, I, K], got ",
                  shape_of(weight.sizes()));
  Layer l{x.size(0), x.size(1), x.size(2), weight.size(0), weight.dim() == 3 ? weight.size(2) : 1, {}};
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32, got ", x.scalar_type());
  if (weight.dim() == 3)
    check("weight", weight, {l.O, l.I, l.K}, ScalarType::Float, x);
  else
    check("weight", weight, {l.O, l.I}, ScalarType::Float, x);
  STD_TORCH_CHECK(dilation >= 1 && l.K >= 1, "dilation and taps must be positive");
  dilation = std::min(dilation, l.T);  // a tap further away than the video is long sees nothing, however far
  for (int64_t k = 0; k < l.K; ++k) l.shift.push_back((k - (causal ? l.K - 1 : l.K / 2)) * dilation);
  return l;
}

const float* optional_data(const std::optional<Tensor>& x) { return x ? data<float>(*x) : nullptr; }
std::optional<Tensor> dense_if_any(const std::optional<Tensor>& x) {
  return x ? std::optional(dense(*x)) : std::nullopt;
}

// mask: what is kept of the layer's results
Dropout dropout_of(const std::optional<Tensor>& mask, double gain) {
  return {mask ? data<uint8_t>(*mask) : nullptr, static_cast<float>(gain)};
}

// out (B, T, O), with dot (B, T); y: what the activation was applied to, or empty without save_y. lengths: rows of x
// that count. needed: rows of the results that do; the rest are 0.
std::tuple<Tensor, Tensor> linear_act_tiles(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                            const std::string& activation, const std::optional<Tensor>& residual,
                                            int64_t dilation, bool causal, const std::optional<Tensor>& lengths,
                                            const std::optional<Tensor>& needed, const std::optional<Tensor>& dot,
                                            bool save_y, const std::optional<Tensor>& mask, double gain, bool amx,
                                            bool high) {
  check_available(amx);
  Layer l = layer_of(x, weight, dilation, causal);
  if (bias) check("bias", *bias, {l.O}, ScalarType::Float, x);
  if (residual) check("residual", *residual, {l.B, l.T, l.O}, ScalarType::Float, x);
  if (dot) check("dot", *dot, {l.O}, ScalarType::Float, x);
  if (mask) check("mask", *mask, {l.B, l.T, l.O}, ScalarType::Bool, x);
  STD_TORCH_CHECK(!dot || !(residual || mask), "residual and mask must be none where dot is given");
  const Tensor from = dense(x), w = dense(weight);
  const std::optional<Tensor> b = dense_if_any(bias), r = dense_if_any(residual), d = dense_if_any(dot),
                              m = dense_if_any(mask);
  const int64_t rows = l.B * l.T, column_tasks = divide_up(l.O, COLUMNS);
  Tensor out = dot ? empty(x, {l.B, l.T}, ScalarType::Float) : empty(x, {l.B, l.T, l.O}, ScalarType::Float);
  const auto parts = aligned<float>(dot ? column_tasks * rows : 0);
  if (dot) std::fill_n(parts.get(), column_tasks * rows, 0.f);
  Tensor y = save_y ? empty(x, {l.B, l.T, l.O}, ScalarType::Float) : empty(x, {0}, ScalarType::Float);
  const std::vector<float> zeros(std::max(l.I, l.O));
  const Ends ends(l, lengths, needed);
  const Layout read = ends.layout(l, ends.x), written = ends.layout(l, ends.seeing);
  const Videos videos{read, data<float>(from), l.I, zeros.data()};
  const Epilogue to{optional_data(b), optional_data(r), optional_data(d), activation_of(activation),
                    dropout_of(m, gain), save_y ? mutable_data<float>(y) : nullptr,
                    dot ? parts.get() : mutable_data<float>(out)};
  (amx ? rows_product<Amx> : rows_product<Avx512>)(videos, Taps(w), false, l.shift, high, written, rows, to);
  finish_unseen(ends, l, data<float>(w), to);
  for (int64_t row = 0; dot && row < rows; ++row) {
    float sum = 0;
    for (int64_t task = 0; task < column_tasks; ++task) sum += parts[task * rows + row];
    mutable_data<float>(out)[row] = sum;
  }
  if (!dot) clear_from(ends.out, l, l.O, mutable_data<float>(out));
  if (save_y) clear_from(ends.out, l, l.O, mutable_data<float>(y));
  return {out, y};
}

// grad (B, T, O), with dot (B, T) -> dL/dx, dL/dweight, dL/dbias, dL/ddot, each empty where it is not needed
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_act_tiles_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const std::string& activation, int64_t dilation,
    bool causal, const std::optional<Tensor>& lengths, const std::optional<Tensor>& needed,
    const std::optional<Tensor>& dot, const Tensor& kept, std::vector<bool> needs, const std::optional<Tensor>& mask,
    double gain, bool amx, bool high) {
  check_available(amx);
  Layer l = layer_of(x, weight, dilation, causal);
  if (dot) {
    check("grad", grad, {l.B, l.T}, ScalarType::Float, x);
    check("dot", *dot, {l.O}, ScalarType::Float, x);
  } else {
    check("grad", grad, {l.B, l.T, l.O}, ScalarType::Float, x);
  }
  STD_TORCH_CHECK(needs.size() == 4, "needs must be four flags, of x, weight, bias and dot");
  STD_TORCH_CHECK(dot || !needs[3], "needs must not have dot's flag where there is none");
  if (mask) check("mask", *mask, {l.B, l.T, l.O}, ScalarType::Bool, x);
  const Activation act = activation_of(activation);
  if (act != Activation::NONE || dot) check("kept", kept, {l.B, l.T, l.O}, ScalarType::Float, x);
  const Tensor from = dense(x), w = dense(weight), given = dense(grad), y = dense(kept);
  Tensor dx = empty(x, {0}, ScalarType::Float), dw = empty(x, {0}, ScalarType::Float);
  Tensor db = empty(x, {0}, ScalarType::Float), d_dot = empty(x, {0}, ScalarType::Float);
  const std::optional<Tensor> d = dense_if_any(dot), m = dense_if_any(mask);
  const std::vector<float> zeros(std::max(l.I, l.O));
  const Ends ends(l, lengths, needed);
  const Layout read = ends.layout(l, ends.x), seeing = ends.layout(l, ends.seeing);

  const int64_t rows = l.B * l.T;
  const float* g = data<float>(given);
  std::unique_ptr<float[], Free> room;
  if (needs[2]) db = empty(x, {l.O}, ScalarType::Float);
  if (needs[3]) d_dot = empty(x, {l.O}, ScalarType::Float);
  const bool curved = act != Activation::NONE || dot, changes = curved || mask;
  if (changes) room = aligned<float>(rows * l.O);
  if (changes || needs[2])
    slopes(g, curved ? data<float>(y) : nullptr, optional_data(d), dropout_of(m, gain),
           Layout(ends.out, ends.out, l.T, 0), l.O, act, room.get(), needs[2] ? mutable_data<float>(db) : nullptr,
           needs[3] ? mutable_data<float>(d_dot) : nullptr);
  if (changes) g = room.get();
  const Videos seen{read, data<float>(from), l.I, zeros.data()};
  const Videos slopes{seeing, g, l.O, zeros.data()};
  if (needs[1]) {
    dw = torch::stable::empty_like(w);
    (amx ? weight_product<Amx> : weight_product<Avx512>)(slopes, seen, l.shift, high, mutable_data<float>(dw));
  }
  if (needs[0]) {
    dx = empty(x, {l.B, l.T, l.I}, ScalarType::Float);
    std::vector<int64_t> back;
    for (int64_t s : l.shift) back.push_back(-s);
    const auto product = amx ? rows_product<Amx> : rows_product<Avx512>;
    product(slopes, Taps(w), true, back, high, read, rows,
            {nullptr, nullptr, nullptr, Activation::NONE, {}, nullptr, mutable_data<float>(dx)});
    clear_from(ends.x, l, l.I, mutable_data<float>(dx));
  }
  return {dx, dw, db, d_dot};
}

bool has_amx() { return Amx::available(); }
bool has_avx512() { return Avx512::available(); }

#else

bool has_amx() { return false; }
bool has_avx512() { return false; }

#endif

}  // namespace

#ifdef AVADCLIP_AVX512
STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CPU, m) {
  m.impl("linear_act_tiles", TORCH_BOX(&linear_act_tiles));
  m.impl("linear_act_tiles_backward", TORCH_BOX(&linear_act_tiles_backward));
}
#endif
STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CompositeExplicitAutograd, m) {
  m.impl("has_amx", TORCH_BOX(&has_amx));
  m.impl("has_avx512", TORCH_BOX(&has_avx512));
}

}  // namespace avadclip
