// The losses of one video, and their gradients with respect to its pooled scores. Torch-free; host and device.
#pragma once

#include "topk_mean.cuh"

namespace avadclip {

template <class A>
struct LossAndSlope {
  A loss, slope;
};

// max(log p, -100), whose slope is 0 where it is clamped.
template <class A>
HD LossAndSlope<A> clamped_log(A p) {
  const A value = log(p);
  if (value < A(-100)) return {A(-100), A(0)};
  return {value, A(1) / p};
}

// Binary cross-entropy of p against target, and d/dp. rest: 1 - p, which a p that is close to 1 no longer knows well.
template <class A>
HD LossAndSlope<A> binary_cross_entropy(A p, A rest, A target) {
  const auto yes = clamped_log(p), no = clamped_log(rest);
  return {-(target * yes.loss + (A(1) - target) * no.loss), (A(1) - target) * no.slope - target * yes.slope};
}

template <class A>
HD LossAndSlope<A> binary_cross_entropy(A p, A target) {
  return binary_cross_entropy(p, A(1) - p, target);
}

//   y = labels / sum(labels),   ce = -sum y log_softmax(s),   q = sum y softmax(s),   focal = (sum y alpha)(1 - q)^2 ce
// Returns (ce + focal) / 2. slope_c = d/ds_c, alpha_slope_c = d/dalpha_c. s, labels, alpha: C values.
template <class Team, class A>
HD A align_loss(const Team& team, const A* s, const A* labels, const A* alpha, int C, A* slope, A* alpha_slope) {
  const auto over_classes = [&](auto term) {
    return team.sum([&](int rank) {
      A sum = 0;
      for (int c = rank; c < C; c += team.size()) sum += term(c);
      return sum;
    });
  };
  A highest = s[0];
  for (int c = 1; c < C; ++c) highest = s[c] > highest || s[c] != s[c] ? s[c] : highest;  // NaN stays
  const A log_total = log(over_classes([&](int c) { return exp(s[c] - highest); }));
  const A label_total = over_classes([&](int c) { return labels[c]; });
  const auto log_p = [&](int c) { return s[c] - highest - log_total; };
  const auto y = [&](int c) { return labels[c] / label_total; };
  const A ce = -over_classes([&](int c) { return y(c) * log_p(c); });
  const A q = over_classes([&](int c) { return y(c) * exp(log_p(c)); });
  const A weight = over_classes([&](int c) { return y(c) * alpha[c]; });
  const A whole = over_classes([&](int c) { return y(c); });
  const A miss = A(1) - q;
  const A nought = ce - ce;  // NaN where the loss is infinite: it has no slope then
  team.each([&](int rank) {
    for (int c = rank; c < C; c += team.size()) {
      const A p = exp(log_p(c));
      const A ce_slope = whole * p - y(c), q_slope = p * (y(c) - q);
      slope[c] = (ce_slope * (A(1) + weight * miss * miss) - A(2) * weight * miss * ce * q_slope) / A(2) + nought;
      alpha_slope[c] = y(c) * miss * miss * ce / A(2);
    }
  });
  return (ce + weight * miss * miss * ce) / A(2);
}

// mil_loss of one video: d loss / d logit_t, times `scale`, into slope_t for t < rows; returns the loss.
// probability: n values, in shared memory where they fit, else slope itself.
template <class Team, class T>
HD float mil_video(const Team& team, const T* logits, int n, int k, int rows, float target, float scale,
                   float* probability, float* slope) {
  read_aligned(team, logits, n, [&](int64_t t, T x) { probability[t] = sigmoid(widen(x)); });
  const Keys<float> key{probability, 1, nullptr};
  const auto top = key.select(team, n, k);
  // In float64: where p is 0.98, log(1 - p) has fifty times the error of p.
  const double mean = team.sum([&](int rank) {
    double sum = 0;
    for (int t = rank; t < n; t += team.size()) sum += top.has(key(t), t) ? double(probability[t]) : 0.;
    return sum;
  }) / k;
  const auto bce = binary_cross_entropy(float(mean), float(1 - mean), target);
  const float share = bce.slope * scale / float(k);
  write_aligned(team, slope, rows, [&](int64_t t) {
    if (t >= n) return 0.f;
    const float p = probability[t];
    return (top.has(key(int(t)), int(t)) ? share : 0.f) * p * (1.f - p);  // a NaN shows, chosen or not
  });
  return bce.loss;
}

// The keys of one video's logits (n, C), a column after the other: stored[c * n + t].
template <class Team, class T>
HD void store_columns(const Team& team, const T* logits, int n, int C, uint32_t* stored) {
  read_aligned(team, logits, int64_t(n) * C, [&](int64_t i, T x) {
    stored[int(i) % C * n + int(i) / C] = key_of(widen(x));  // what fits in shared memory is fewer than 2^31
  });
}

// mil_align_loss's gradient of one video's logits (rows, C): share_c at what was selected of column c, zero elsewhere.
template <class Team, class KeysOf>
HD void align_slopes(const Team& team, KeysOf keys_of, const Selection<uint32_t>* selected, const float* share, int n,
                     int64_t rows, int C, float* slope) {
  write_aligned(team, slope, rows * C, [&](int64_t i) {
    const int64_t t = i / C;
    const int c = int(i - t * C);
    return t < n && selected[c].has(keys_of(c)(int(t)), int(t)) ? share[c] : 0.f;
  });
}

}  // namespace avadclip
