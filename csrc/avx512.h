// Products of float32 matrices by a processor's AVX-512 instructions, and what these share with its tile units (amx.h).
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)
#define AVADCLIP_AVX512 1
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

namespace avadclip {

constexpr int64_t LANES = 16;         // rows or columns of a tile
constexpr int64_t DEPTH = 32;         // numbers of a lane, which are summed over
constexpr int64_t BLOCK = 2 * LANES;  // the product's rows and columns that are summed up at once

// Packed tiles of two neighbouring groups of 16 lanes, `half` bytes apart, and for each the parts of its numbers.
struct Packed {
  const char* data;
  int64_t step, part, half;
  const char* at(int64_t s, int p) const { return data + s * step + p * part; }
};

using Block = float[BLOCK][BLOCK];

// A 16 x 16 matrix of 32 bits, rows to columns.
AVX512 inline void turn(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {  // r[4g + i]: column i of each 4 x 4 block, of rows 4g..4g+3
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The first `count` of 16 floats; the rest are 0.
AVX512 inline __m512 load(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(count >= 16 ? 0xffff : count <= 0 ? 0
                                                                 : (1u << count) - 1,
                               from);
}

// Tiles as they are. First factor: 16 lanes of 32 numbers; second factor, turned: 32 times a number of 16 lanes.
struct Avx512 {
  static constexpr int64_t PARTS = 1;                     // of a number
  static constexpr int64_t LANE = DEPTH * sizeof(float);  // bytes
  static constexpr int64_t TILE = LANES * LANE;           // bytes
  static constexpr int64_t STEPS = 8;                     // tiles deep is a slab
  static constexpr int64_t STRIP = 8;                     // rows whose sums, 32 columns wide, fill half the registers

  struct Units {  // nothing to hold
    Units() {}
  };

  static bool available() {
    static const bool known = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl");
    return known;
  }

  // A tile from numbers that are summed over along a row: lane i is 32 numbers of row[i], of which `count` are there.
  AVX512 static void pack_along(const float* const row[LANES], int64_t at, int64_t count, bool turned, char* to,
                                int64_t) {
    for (int half = 0; half < 2; ++half) {
      __m512i r[LANES];
      for (int i = 0; i < LANES; ++i) r[i] = (__m512i)load(row[i] + at + half * 16, count - half * 16);
      if (turned) turn(r);
      for (int i = 0; i < LANES; ++i)
        _mm512_store_si512(to + (turned ? (half * 16 + i) * 64 : i * LANE + half * 64), r[i]);
    }
  }

  // The same from numbers that are summed over across 32 rows: lane i is column at + i, of which `count` are there.
  // turned: lanes by numbers, as the first factor has it.
  AVX512 static void pack_across(const float* const row[DEPTH], int64_t at, int64_t count, bool turned, char* to,
                                 int64_t) {
    for (int half = 0; half < 2; ++half) {
      __m512i r[LANES];
      for (int i = 0; i < LANES; ++i) {
        r[i] = (__m512i)load(row[half * 16 + i] + at, count);
        _mm_prefetch(row[half * 16 + i] + at + 2 * LANES, _MM_HINT_T1);  // for the call after the next
      }
      if (turned) turn(r);
      for (int i = 0; i < LANES; ++i)
        _mm512_store_si512(to + (turned ? i * LANE + half * 64 : (half * 16 + i) * 64), r[i]);
    }
  }

  // block = a b, or more of it. Sums begin anew with every call: long sums are sums of short ones.
  AVX512 static void multiply_add(Packed a, Packed b, int64_t steps, bool, bool first, Block block) {
    for (int64_t strip = 0; strip < BLOCK; strip += STRIP) {
      const int64_t from = strip / LANES * a.half + strip % LANES * LANE;
      __m512 sum[STRIP][2] = {};
      for (int64_t s = 0; s < steps; ++s) {
        const float* x = reinterpret_cast<const float*>(a.at(s, 0) + from);
        const float* y = reinterpret_cast<const float*>(b.at(s, 0));
        const float* z = reinterpret_cast<const float*>(b.at(s, 0) + b.half);
#pragma GCC unroll 4
        for (int k = 0; k < DEPTH; ++k) {
          const __m512 left = _mm512_load_ps(y + k * LANES), right = _mm512_load_ps(z + k * LANES);
#pragma GCC unroll 8
          for (int i = 0; i < STRIP; ++i) {
            const __m512 all = _mm512_set1_ps(x[i * DEPTH + k]);
            sum[i][0] = _mm512_fmadd_ps(all, left, sum[i][0]);
            sum[i][1] = _mm512_fmadd_ps(all, right, sum[i][1]);
          }
        }
      }
      for (int i = 0; i < STRIP; ++i)
        for (int j = 0; j < 2; ++j) {
          float* to = &block[strip + i][j * LANES];
          _mm512_store_ps(to, first ? sum[i][j] : _mm512_add_ps(_mm512_load_ps(to), sum[i][j]));
        }
    }
  }
};

}  // namespace avadclip
#endif
