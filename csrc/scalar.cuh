// Scalars that host and device code share: 16-bit floats, keys in sorting order, exp and sigmoid. Torch-free.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define HD __host__ __device__ __forceinline__
#else
#define HD inline __attribute__((always_inline))
#endif

// One vectorised function per processor generation, chosen by the loader: a wheel then needs no -march. (GCC's alone,
// from 12 on: Clang has no clones of templates, older ones no generations.)
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__CUDACC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(AVADCLIP_ONE_TARGET)
#define CLONES __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace avadclip {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What statistics are kept in: float32, or float64 where the input came so.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

template <class To, class From>
HD To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

HD float widen(float x) { return x; }
HD double widen(double x) { return x; }
HD float widen(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
HD float widen(f16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // In bits, as GCC 11 has no such type. Exponent and fraction at float32's place are 2^-112 of the number.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  const bool finite = rest < 0x0f800000;
  return bits_as<float>(sign | (finite ? bits_as<uint32_t>(bits_as<float>(rest) * 0x1p112f) : rest | 0x7f800000));
#endif
}

// Rounds to nearest even.
HD void narrow(float x, float& out) { out = x; }
HD void narrow(double x, double& out) { out = x; }
HD void narrow(float x, bf16& out) {
  const uint32_t b = bits_as<uint32_t>(x);
  const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  out.bits = uint16_t(x == x ? rounded : 0x7fc0);
}
HD void narrow(float x, f16& out) {
#ifdef __CUDA_ARCH__
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t b = bits_as<uint32_t>(x), size = b & 0x7fffffff;
  const uint32_t below_normal = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000;  // 0.5's ulp is 2^-24
  const uint32_t normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  const uint32_t infinite = size > 0x7f800000 ? 0x7e00 : 0x7c00;  // or NaN
  const uint32_t rounded = size < 0x38800000 ? below_normal : size < 0x47800000 ? normal : infinite;
  out.bits = uint16_t((b >> 16 & 0x8000) | rounded);
#endif
}

// Keys are unsigned integers in the order of the floats: NaN is the largest, -0 equals 0.
HD uint32_t key_of(float x) {
  const uint32_t b = bits_as<uint32_t>(x == 0 ? 0.f : x);
  const uint32_t ordered = b >> 31 ? ~b : b | 0x80000000u;
  return x == x ? ordered : 0xffffffffu;
}
HD uint64_t key_of(double x) {
  const uint64_t b = bits_as<uint64_t>(x == 0 ? 0. : x);
  const uint64_t ordered = b >> 63 ? ~b : b | (1ull << 63);
  return x == x ? ordered : ~0ull;
}
HD float value_of(uint32_t key) {
  return bits_as<float>(key == 0xffffffffu ? 0x7fc00000u : key >> 31 ? key & 0x7fffffffu : ~key);
}
HD double value_of(uint64_t key) {
  return bits_as<double>(key == ~0ull ? 0x7ff8ull << 48 : key >> 63 ? key & ~(1ull << 63) : ~key);
}
template <class T>
using key_t_of = decltype(key_of(acc_t<T>{}));

// exp to 1 ulp. On the host written out, because the loops it stands in must vectorise.
HD double exponential(double x) { return exp(x); }
HD float exponential(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  x = x > 89.f ? 89.f : x < -104.f ? -104.f : x;               // NaN passes both
  const float shifted = x * 1.44269504f + 12582912.f;           // 1.5 * 2^23: the sum's low bits hold round(x / ln 2)
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;                                   // Cephes' polynomial for expf on [-ln2/2, ln2/2]
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  // 2^n as a product of two, so that neither factor leaves the range where the result does not.
  const int32_t whole = int32_t(bits_as<uint32_t>(shifted) - 0x4b400000u);
  const int32_t half = whole >> 1;
  return p * bits_as<float>(uint32_t(half + 127) << 23) * bits_as<float>(uint32_t(whole - half + 127) << 23);
#endif
}
template <class A>
HD A sigmoid(A x) {
  return A(1) / (A(1) + exponential(-x));
}

}  // namespace avadclip
