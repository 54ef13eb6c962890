// similarity_graph on the CPU: a video at a time, so that its T x T blocks stay in the cache of the core that makes
// them. Matrix products are torch's, on the valid rows only.
//   s_ij = <x_i, x_j> / d_ij,  d_ij = |x_i||x_j| + 1e-20;   w_ij = s_ij > threshold ? exp(s_ij) : 1;   A = w / sum_j w
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <memory>

#include "stable.h"

namespace avadclip {
namespace {

constexpr double EPS = 1e-20;
constexpr int TILE = 32;  // of a transposed read

// A matrix over memory that somebody else owns. Row-major, rows `stride` apart.
template <class A>
struct Matrix {
  A* data;
  int64_t rows, columns, stride;
  A* row(int64_t i) const { return data + i * stride; }

  Tensor tensor(bool transposed = false) const {
    const int64_t sizes[] = {transposed ? columns : rows, transposed ? rows : columns};
    const int64_t strides[] = {transposed ? 1 : stride, transposed ? stride : 1};
    return torch::stable::from_blob(
        data, {sizes, 2}, {strides, 2}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
        sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
  }
};

// out = a b
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                          torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference that was handed out
}

template <class A>
std::unique_ptr<A[]> scratch(int64_t count) {
  return std::unique_ptr<A[]>(new A[count]);
}

template <class T>
CLONES void widen_rows(const T* from, int64_t count, acc_t<T>* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}
template <class T>
CLONES void narrow_rows(const acc_t<T>* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

// Rows 0..n of (T, width) at `from` in the accumulator type: where they lie, if they are of that type.
template <class T>
Matrix<acc_t<T>> widened(const T* from, int64_t n, int64_t width, acc_t<T>* room) {
  if constexpr (std::is_same_v<T, acc_t<T>>) return {const_cast<T*>(from), n, width, width};
  widen_rows(from, n * width, room);
  return {room, n, width, width};
}

template <class A>
CLONES void row_norms(Matrix<A> x, A* norm) {
  for (int64_t i = 0; i < x.rows; ++i) {
    const A* row = x.row(i);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < x.columns; ++d) sum += row[d] * row[d];
    norm[i] = std::sqrt(sum);
  }
}

// Products <x_i, x_j> become cosines in place; the weights of row i are written and add up to 1.
template <class A>
CLONES void cosines_and_weights(Matrix<A> cosine, Matrix<A> weight, const A* norm, A threshold) {
  const int64_t n = cosine.rows;
  for (int64_t i = 0; i < n; ++i) {
    A* s = cosine.row(i);
    A* w = weight.row(i);
    A sum = 0;
    for (int64_t j = 0; j < n; ++j) s[j] /= norm[i] * norm[j] + A(EPS);
    for (int64_t j = 0; j < n; ++j) w[j] = s[j] <= threshold ? A(1) : exponential(s[j]);  // NaN stays
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += w[j];
    const A share = A(1) / std::max(sum, A(1));
    for (int64_t j = 0; j < n; ++j) w[j] *= share;
  }
}

// g = dL/dA becomes dL/ds: A_ij (g_ij - sum_k g_ik A_ik) on edges above the threshold, 0 elsewhere.
template <class A>
CLONES void softmax_backward(Matrix<A> g, Matrix<A> weight, Matrix<A> cosine, A threshold) {
  const int64_t n = g.rows;
  for (int64_t i = 0; i < n; ++i) {
    A *slope = g.row(i), *w = weight.row(i), *s = cosine.row(i);
    A dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < n; ++j) dot += slope[j] * w[j];
    for (int64_t j = 0; j < n; ++j) slope[j] = s[j] <= threshold ? A(0) : w[j] * (slope[j] - dot);
  }
}

// h_ij = (g_ij + g_ji) / d_ij, and pull_i = sum_j h_ij s_ij |x_j| / |x_i|:   dL/dx_i = sum_j h_ij x_j - pull_i x_i
template <class A>
CLONES void cosine_backward(Matrix<A> g, Matrix<A> cosine, Matrix<A> h, const A* norm, A* pull) {
  const int64_t n = g.rows;
  for (int64_t i0 = 0; i0 < n; i0 += TILE)
    for (int64_t j0 = 0; j0 < n; j0 += TILE) {
      const int64_t i1 = std::min(n, i0 + TILE), j1 = std::min(n, j0 + TILE);
      A turned[TILE][TILE];
      for (int64_t j = j0; j < j1; ++j)
        for (int64_t i = i0; i < i1; ++i) turned[i - i0][j - j0] = g.row(j)[i];
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j)
          h.row(i)[j] = (g.row(i)[j] + turned[i - i0][j - j0]) / (norm[i] * norm[j] + A(EPS));
    }
  for (int64_t i = 0; i < n; ++i) {
    const A *slope = h.row(i), *s = cosine.row(i);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += slope[j] * s[j] * norm[j];
    pull[i] = norm[i] == 0 ? A(0) : sum / norm[i];
  }
}

template <class A>
CLONES void subtract_scaled(Matrix<A> out, Matrix<A> x, const A* factor) {
  for (int64_t i = 0; i < out.rows; ++i)
    for (int64_t d = 0; d < out.columns; ++d) out.row(i)[d] -= factor[i] * x.row(i)[d];
}
template <class A>
CLONES void add(Matrix<A> out, Matrix<A> x) {
  for (int64_t i = 0; i < out.rows; ++i)
    for (int64_t j = 0; j < out.columns; ++j) out.row(i)[j] += x.row(i)[j];
}

// Zeros rows and columns >= n of a (T, T) block.
template <class A>
void zero_outside(A* block, int64_t n, int64_t T) {
  for (int64_t i = 0; i < n; ++i) std::fill(block + i * T + n, block + (i + 1) * T, A(0));
  std::fill(block + n * T, block + T * T, A(0));
}

// out (T, width) = a b on the first rows, zeros below. `room`: where the product lies before it is narrowed.
template <class T>
void product_rows(const Tensor& a, const Tensor& b, int64_t n, int64_t rows, int64_t width, T* out, acc_t<T>* room) {
  if constexpr (std::is_same_v<T, acc_t<T>>) room = out;
  multiply(a, b, Matrix<acc_t<T>>{room, n, width, width}.tensor());
  if constexpr (!std::is_same_v<T, acc_t<T>>) narrow_rows(room, n * width, out);
  std::fill(out + n * width, out + rows * width, T{});
}

struct Sizes {
  int64_t B, T, D, E;
};
Sizes sizes_of(const Tensor& features, const Tensor& values) {
  check_dims("features", features, "[B, T, D]", 3);
  check_dims("values", values, "[B, T, E]", 3);
  const Sizes z{features.size(0), features.size(1), features.size(2), values.size(2)};
  check("values", values, {z.B, z.T, z.E}, features.scalar_type(), features);
  return z;
}

// weights (B, T, T) as similarity_graph returns them beside values of such a dtype.
void check_mix(const Tensor& weights, const Tensor& values) {
  check_dims("values", values, "[B, T, E]", 3);
  const int64_t B = values.size(0), T = values.size(1);
  check("weights", weights, {B, T, T}, accumulator(values.scalar_type()), values);
}

// features (B, T, D), values (B, T, E) -> out (B, T, E), weights A (B, T, T), cosines (B, T, T)
std::tuple<Tensor, Tensor, Tensor> similarity_graph(
    const Tensor& features, const Tensor& values, const Tensor& lengths, double threshold) {
  const Sizes z = sizes_of(features, values);
  const auto valid = read_lengths(lengths, z.B, z.T);
  const ScalarType kept = accumulator(features.scalar_type());
  const Tensor x = dense(features), v = dense(values);
  Tensor out = torch::stable::empty_like(v);
  Tensor weights = empty(features, {z.B, z.T, z.T}, kept), cosines = empty(features, {z.B, z.T, z.T}, kept);
  by_dtype(features.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using A = acc_t<S>;
    torch::stable::parallel_for(0, z.B, 1, [&](int64_t begin, int64_t end) {
      const auto norm = scratch<A>(z.T), x_room = scratch<A>(z.T * z.D), v_room = scratch<A>(z.T * z.E),
                 out_room = scratch<A>(z.T * z.E);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t n = valid[b], square = b * z.T * z.T;
        const auto xb = widened(data<S>(x) + b * z.T * z.D, n, z.D, x_room.get());
        const auto vb = widened(data<S>(v) + b * z.T * z.E, n, z.E, v_room.get());
        const Matrix<A> cosine{mutable_data<A>(cosines) + square, n, n, z.T};
        const Matrix<A> weight{mutable_data<A>(weights) + square, n, n, z.T};
        row_norms(xb, norm.get());
        multiply(xb.tensor(), xb.tensor(true), cosine.tensor());
        cosines_and_weights(cosine, weight, norm.get(), A(threshold));
        zero_outside(cosine.data, n, z.T);
        zero_outside(weight.data, n, z.T);
        product_rows(weight.tensor(), vb.tensor(), n, z.T, z.E, mutable_data<S>(out) + b * z.T * z.E, out_room.get());
      }
    });
  });
  return {out, weights, cosines};
}

// grad_weights: what later products by the same weights add, or none.
std::tuple<Tensor, Tensor> similarity_graph_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_weights, const Tensor& features, const Tensor& values,
    const Tensor& weights, const Tensor& cosines, const Tensor& lengths, double threshold) {
  const Sizes z = sizes_of(features, values);
  check("grad", grad_out, {z.B, z.T, z.E}, values.scalar_type(), values);
  const ScalarType kept = accumulator(features.scalar_type());
  for (const Tensor& x : {grad_weights.value_or(weights), weights, cosines})
    check("weights and cosines", x, {z.B, z.T, z.T}, kept, features);
  const auto valid = read_lengths(lengths, z.B, z.T);
  const Tensor x = dense(features), v = dense(values), g = dense(grad_out), w = dense(weights), s = dense(cosines);
  const std::optional<Tensor> more = grad_weights ? std::optional(dense(*grad_weights)) : std::nullopt;
  Tensor grad_x = torch::stable::empty_like(x), grad_v = torch::stable::empty_like(v);
  by_dtype(features.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using A = acc_t<S>;
    torch::stable::parallel_for(0, z.B, 1, [&](int64_t begin, int64_t end) {
      const auto norm = scratch<A>(z.T), pull = scratch<A>(z.T), slope_room = scratch<A>(z.T * z.T),
                 h_room = scratch<A>(z.T * z.T), x_room = scratch<A>(z.T * z.D), v_room = scratch<A>(z.T * z.E),
                 g_room = scratch<A>(z.T * z.E), out_room = scratch<A>(z.T * std::max(z.D, z.E));
      for (int64_t b = begin; b < end; ++b) {
        const int64_t n = valid[b], square = b * z.T * z.T;
        const auto xb = widened(data<S>(x) + b * z.T * z.D, n, z.D, x_room.get());
        const auto vb = widened(data<S>(v) + b * z.T * z.E, n, z.E, v_room.get());
        const auto gb = widened(data<S>(g) + b * z.T * z.E, n, z.E, g_room.get());
        const Matrix<A> weight{const_cast<A*>(data<A>(w)) + square, n, n, z.T};
        const Matrix<A> cosine{const_cast<A*>(data<A>(s)) + square, n, n, z.T};
        const Matrix<A> slope{slope_room.get(), n, n, n}, h{h_room.get(), n, n, n};

        product_rows(weight.tensor(true), gb.tensor(), n, z.T, z.E, mutable_data<S>(grad_v) + b * z.T * z.E,
                     out_room.get());
        multiply(gb.tensor(), vb.tensor(true), slope.tensor());
        if (more) add(slope, Matrix<A>{const_cast<A*>(data<A>(*more)) + square, n, n, z.T});
        softmax_backward(slope, weight, cosine, A(threshold));
        row_norms(xb, norm.get());
        cosine_backward(slope, cosine, h, norm.get(), pull.get());
        const Matrix<A> grad{out_room.get(), n, z.D, z.D};
        multiply(h.tensor(), xb.tensor(), grad.tensor());
        subtract_scaled(grad, xb, pull.get());
        S* to = mutable_data<S>(grad_x) + b * z.T * z.D;
        narrow_rows(grad.data, n * z.D, to);
        std::fill(to + n * z.D, to + z.T * z.D, S{});
      }
    });
  });
  return {grad_x, grad_v};
}

// out = weights values, once more by the same graph.
Tensor similarity_mix(const Tensor& weights, const Tensor& values, const Tensor& lengths) {
  check_mix(weights, values);
  const int64_t B = values.size(0), T = values.size(1), E = values.size(2);
  const auto valid = read_lengths(lengths, B, T);
  const Tensor w = dense(weights), v = dense(values);
  Tensor out = torch::stable::empty_like(v);
  by_dtype(values.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using A = acc_t<S>;
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      const auto v_room = scratch<A>(T * E), out_room = scratch<A>(T * E);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t n = valid[b];
        const Matrix<A> weight{const_cast<A*>(data<A>(w)) + b * T * T, n, n, T};
        const auto vb = widened(data<S>(v) + b * T * E, n, E, v_room.get());
        product_rows(weight.tensor(), vb.tensor(), n, T, E, mutable_data<S>(out) + b * T * E, out_room.get());
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> similarity_mix_backward(
    const Tensor& grad_out, const Tensor& weights, const Tensor& values, const Tensor& lengths) {
  check_mix(weights, values);
  check("grad", grad_out, {values.size(0), values.size(1), values.size(2)}, values.scalar_type(), values);
  const int64_t B = values.size(0), T = values.size(1), E = values.size(2);
  const auto valid = read_lengths(lengths, B, T);
  const Tensor w = dense(weights), v = dense(values), g = dense(grad_out);
  Tensor grad_w = torch::stable::empty_like(w), grad_v = torch::stable::empty_like(v);
  by_dtype(values.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using A = acc_t<S>;
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      const auto v_room = scratch<A>(T * E), g_room = scratch<A>(T * E), out_room = scratch<A>(T * E);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t n = valid[b];
        const Matrix<A> weight{const_cast<A*>(data<A>(w)) + b * T * T, n, n, T};
        const Matrix<A> slope{mutable_data<A>(grad_w) + b * T * T, n, n, T};
        const auto vb = widened(data<S>(v) + b * T * E, n, E, v_room.get());
        const auto gb = widened(data<S>(g) + b * T * E, n, E, g_room.get());
        product_rows(weight.tensor(true), gb.tensor(), n, T, E, mutable_data<S>(grad_v) + b * T * E, out_room.get());
        multiply(gb.tensor(), vb.tensor(true), slope.tensor());
        zero_outside(slope.data, n, T);
      }
    });
  });
  return {grad_w, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CPU, m) {
  m.impl("similarity_graph", TORCH_BOX(&similarity_graph));
  m.impl("similarity_graph_backward", TORCH_BOX(&similarity_graph_backward));
  m.impl("similarity_mix", TORCH_BOX(&similarity_mix));
  m.impl("similarity_mix_backward", TORCH_BOX(&similarity_mix_backward));
}

}  // namespace avadclip
