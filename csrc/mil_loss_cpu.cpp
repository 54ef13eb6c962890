// mil_loss and mil_align_loss on the CPU: one pass makes a video's loss and its gradients.
#include <algorithm>
#include <limits>

#include "mil_loss.cuh"
#include "stable.h"

namespace avadclip {
namespace {

// slope_t = sigmoid(logit_t), then d loss / d logit_t, for t < n. Returns the loss. `scale` multiplies the slopes.
template <class T>
CLONES double video_mil(
    const T* logits, int n, int k, double target, double scale, key_t_of<T>* keys, acc_t<T>* slope) {
  using A = acc_t<T>;
  for (int t = 0; t < n; ++t) slope[t] = sigmoid(widen(logits[t]));
  for (int t = 0; t < n; ++t) keys[t] = key_of(slope[t]);
  const auto top = select_top(Serial{}, [&](int t) { return keys[t]; }, n, k);
  double sum = 0;
  for (int t = 0; t < n; ++t) sum += top.has(keys[t], t) ? double(slope[t]) : 0.;
  const auto bce = binary_cross_entropy<A>(A(sum / k), A(target));
  const A share = A(bce.slope * scale / k);
  for (int t = 0; t < n; ++t) slope[t] = (top.has(keys[t], t) ? share : A(0)) * slope[t] * (A(1) - slope[t]);
  return bce.loss;
}

std::tuple<Tensor, Tensor> mil_loss(
    const Tensor& logits, const Tensor& labels, const Tensor& lengths, int64_t divisor) {
  check_dims("logits", logits, "[B, T]", 2);
  check_dims("labels", labels, "[B, C]", 2);
  check_divisor(divisor);
  const int64_t B = logits.size(0), T = logits.size(1), C = labels.size(1);
  const ScalarType kept = accumulator(logits.scalar_type());
  check("labels", labels, {B, C}, kept, logits);
  STD_TORCH_CHECK(C > 0, "labels must have a class, the first being normal");
  STD_TORCH_CHECK(T < std::numeric_limits<int32_t>::max(), "T must be below 2^31, got ", T);
  const auto valid = read_lengths(lengths, B, T);
  const Tensor x = dense(logits), y = dense(labels);
  Tensor loss = empty(logits, {}, kept), slope = empty(logits, {B, T}, kept);
  by_dtype(logits.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using A = acc_t<S>;
    std::vector<double> losses(B);
    torch::stable::parallel_for(0, B, 4, [&](int64_t begin, int64_t end) {
      std::vector<key_t_of<S>> keys(T);
      for (int64_t b = begin; b < end; ++b) {
        const int n = int(valid[b]);
        A* out = mutable_data<A>(slope) + b * T;
        const double target = 1 - data<A>(y)[b * C];
        losses[b] = video_mil(data<S>(x) + b * T, n, top_count(n, divisor), target, 1. / B, keys.data(), out);
        std::fill(out + n, out + T, A(0));
      }
    });
    double total = 0;
    for (double one : losses) total += one;
    *mutable_data<A>(loss) = A(total / B);
  });
  return {loss, slope};
}

template <class T>
CLONES auto column_select(const T* column, int64_t stride, int n, int k, key_t_of<T>* keys, double* mean) {
  for (int t = 0; t < n; ++t) keys[t] = key_of(widen(column[t * stride]));
  const auto top = select_top(Serial{}, [&](int t) { return keys[t]; }, n, k);
  double sum = 0;
  for (int t = 0; t < n; ++t) sum += top.has(keys[t], t) ? double(value_of(keys[t])) : 0.;
  *mean = sum / k;
  return top;
}

template <class A, class Key>
CLONES void column_slope(const Key* keys, Selection<Key> top, int n, A share, int64_t stride, A* slope) {
  for (int t = 0; t < n; ++t) slope[t * stride] = top.has(keys[t], t) ? share : A(0);
}

std::tuple<Tensor, Tensor, Tensor> mil_align_loss(
    const Tensor& logits, const Tensor& labels, const Tensor& lengths, const Tensor& alpha, int64_t divisor) {
  check_dims("logits", logits, "[B, T, C]", 3);
  check_divisor(divisor);
  const int64_t B = logits.size(0), T = logits.size(1), C = logits.size(2);
  const ScalarType kept = accumulator(logits.scalar_type());
  check("labels", labels, {B, C}, kept, logits);
  check("alpha", alpha, {C}, kept, logits);
  STD_TORCH_CHECK(C > 0, "logits must have a class");
  STD_TORCH_CHECK(T < std::numeric_limits<int32_t>::max(), "T must be below 2^31, got ", T);
  const auto valid = read_lengths(lengths, B, T);
  const Tensor x = dense(logits), y = dense(labels), a = dense(alpha);
  Tensor loss = empty(logits, {}, kept), slope = empty(logits, {B, T, C}, kept), alpha_slope = empty(alpha, {C}, kept);
  by_dtype(logits.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using A = acc_t<S>;
    std::vector<double> losses(B), alpha_slopes(B * C), alphas(data<A>(a), data<A>(a) + C);
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      std::vector<key_t_of<S>> keys(C * T);
      std::vector<Selection<key_t_of<S>>> tops(C);
      std::vector<double> pooled(C), target(C), pooled_slope(C);
      for (int64_t b = begin; b < end; ++b) {
        const int n = int(valid[b]), k = top_count(n, divisor);
        for (int64_t c = 0; c < C; ++c) {
          tops[c] = column_select(data<S>(x) + b * T * C + c, C, n, k, keys.data() + c * T, &pooled[c]);
          target[c] = data<A>(y)[b * C + c];
        }
        losses[b] = align_loss(Serial{}, pooled.data(), target.data(), alphas.data(), int(C), pooled_slope.data(),
                               alpha_slopes.data() + b * C);
        A* out = mutable_data<A>(slope) + b * T * C;
        for (int64_t c = 0; c < C; ++c)
          column_slope(keys.data() + c * T, tops[c], n, A(pooled_slope[c] / k / B), C, out + c);
        std::fill(out + n * C, out + T * C, A(0));
      }
    });
    double total = 0;
    std::vector<double> alpha_total(C);
    for (int64_t b = 0; b < B; ++b) {
      total += losses[b];
      for (int64_t c = 0; c < C; ++c) alpha_total[c] += alpha_slopes[b * C + c];
    }
    *mutable_data<A>(loss) = A(total / B);
    for (int64_t c = 0; c < C; ++c) mutable_data<A>(alpha_slope)[c] = A(alpha_total[c] / B);
  });
  return {loss, slope, alpha_slope};
}

// Slopes were made in the forward pass; what is left is the chain rule's last factor.
Tensor scaled(const Tensor& slope, const Tensor& grad) {
  check("grad", grad, {}, slope.scalar_type(), slope);
  const Tensor x = dense(slope);
  Tensor out = torch::stable::empty_like(x);
  by_dtype(slope.scalar_type(), [&](auto type) {
    using S = decltype(type);
    const auto factor = widen(*data<S>(grad));
    const S* from = data<S>(x);
    S* to = mutable_data<S>(out);
    torch::stable::parallel_for(0, x.numel(), 1 << 15, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) narrow(factor * widen(from[i]), to[i]);
    });
  });
  return out;
}

Tensor mil_loss_backward(const Tensor& grad, const Tensor& slope) { return scaled(slope, grad); }

std::tuple<Tensor, Tensor> mil_align_loss_backward(
    const Tensor& grad, const Tensor& slope, const Tensor& alpha_slope) {
  return {scaled(slope, grad), scaled(alpha_slope, grad)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CPU, m) {
  m.impl("mil_loss", TORCH_BOX(&mil_loss));
  m.impl("mil_loss_backward", TORCH_BOX(&mil_loss_backward));
  m.impl("mil_align_loss", TORCH_BOX(&mil_align_loss));
  m.impl("mil_align_loss_backward", TORCH_BOX(&mil_align_loss_backward));
}

}  // namespace avadclip
