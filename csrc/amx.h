// Products of float32 matrices on a processor's tile units (AMX), which multiply bfloat16 and add in float32. A float32
// is the sum of three bfloat16, and of the nine products of two such sums six matter:
//   a = a0 + a1 + a2,  |a_i| <= 2^-8i |a|;   ab = a0 b0 + (a0 b1 + a1 b0) + (a0 b2 + a1 b1 + a2 b0) + O(2^-24 ab)
// The units work at 16 times the rate of float32's own instructions: 2.7 times as fast at best, as exact as those. The
// first three products are "high" precision: 16 bits of every number, 5.3 times as fast at best.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)
#define AVADCLIP_AMX 1
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16")))
#ifdef AVADCLIP_EMULATED_TILES
#include "amx_emulated.h"
#endif

namespace avadclip::amx {

constexpr int64_t LANES = 16;       // rows or columns of a tile
constexpr int64_t DEPTH = 32;       // bfloat16 a lane, in pairs
constexpr int64_t TILE = 1024;      // bytes
constexpr int64_t PARTS = 3;        // bfloat16 a float32
constexpr int64_t BLOCK = 2 * LANES;  // the product's rows and columns that the units hold at once

// Whether this processor has them, and the system lets this process use them.
inline bool available() {
  static const bool known = [] {
    unsigned a, b, c, d, a1;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = d >> 24 & d >> 22 & 1, avx512 = b >> 16 & b >> 30 & b >> 31 & 1;
#ifdef AVADCLIP_EMULATED_TILES
    return avx512 && __get_cpuid_count(7, 1, &a1, &b, &c, &d) && a1 >> 5 & 1;
#endif
    if (!tiles || !avx512 || !__get_cpuid_count(7, 1, &a1, &b, &c, &d) || !(a1 >> 5 & 1)) return false;
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return known;
}

// The units are a thread's own while this lives.
struct Units {
#ifdef AVADCLIP_EMULATED_TILES
  Units() {}
#else
  TILES Units() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));  // the intrinsic lets GCC 12 drop what was written
  }
  TILES ~Units() { _tile_release(); }
#endif
  Units(const Units&) = delete;
};

// 32 floats -> their three parts: x's below y's.
TILES inline void split(__m512 x, __m512 y, __m512i part[PARTS]) {
  for (int i = 0; i < PARTS; ++i) {
    part[i] = (__m512i)_mm512_cvtne2ps_pbh(y, x);
    if (i == PARTS - 1) break;
    const __m256i low = _mm512_castsi512_si256(part[i]), high = _mm512_extracti64x4_epi64(part[i], 1);
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16)));
    y = _mm512_sub_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
  }
}

// A 16 x 16 matrix of pairs, rows to columns.
TILES inline void turn(__m512i r[16]) {
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
TILES inline __m512 load(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(count >= 16 ? 0xffff : count <= 0 ? 0
                                                                 : (1u << count) - 1,
                               from);
}

// A tile of each part, `stride` bytes apart, from numbers that are summed over along a row: lane i is 32 numbers of
// row[i], of which `count` are there. turned: pairs by lanes, as the second factor has it.
TILES inline void pack_along(const float* const row[LANES], int64_t at, int64_t count, bool turned, char* to,
                             int64_t stride) {
  __m512i tile[PARTS][LANES];
  for (int i = 0; i < LANES; ++i) {
    __m512i part[PARTS];
    split(load(row[i] + at, count), load(row[i] + at + 16, count - 16), part);
    for (int p = 0; p < PARTS; ++p) tile[p][i] = part[p];
  }
  for (int p = 0; p < PARTS; ++p) {
    if (turned) turn(tile[p]);
    for (int i = 0; i < LANES; ++i) _mm512_store_si512(to + p * stride + i * 64, tile[p][i]);
  }
}

// The same from numbers that are summed over across 32 rows: lane i is column at + i, of which `count` are there.
// turned: lanes by pairs, as the first factor has it.
TILES inline void pack_across(const float* const row[DEPTH], int64_t at, int64_t count, bool turned, char* to,
                              int64_t stride) {
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                       18, 2, 17, 1, 16, 0);
  __m512i tile[PARTS][LANES];
  for (int i = 0; i < LANES; ++i) {
    __m512i part[PARTS];
    split(load(row[2 * i] + at, count), load(row[2 * i + 1] + at, count), part);
    for (int p = 0; p < PARTS; ++p) tile[p][i] = _mm512_permutexvar_epi16(interleave, part[p]);
  }
  for (int p = 0; p < PARTS; ++p) {
    if (turned) turn(tile[p]);
    for (int i = 0; i < LANES; ++i) _mm512_store_si512(to + p * stride + i * 64, tile[p][i]);
  }
}

// Packed tiles: of two neighbouring groups of 16 lanes, `half` bytes apart, and for each the three parts.
struct Packed {
  const char* data;
  int64_t step, part, half;
  const char* at(int64_t s, int p) const { return data + s * step + p * part; }
};

using Block = float[BLOCK][BLOCK];

TILES inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
TILES inline void store_block(Block block) {
  constexpr int64_t stride = BLOCK * sizeof(float);
  _tile_stored(0, &block[0][0], stride);
  _tile_stored(1, &block[0][LANES], stride);
  _tile_stored(2, &block[LANES][0], stride);
  _tile_stored(3, &block[LANES][LANES], stride);
}

TILES inline void load_first(Packed a, int64_t step, int part) {
  _tile_loadd(4, a.at(step, part), 64);
  _tile_loadd(5, a.at(step, part) + a.half, 64);
}
TILES inline void load_second(Packed b, int64_t step, int part) {
  _tile_loadd(6, b.at(step, part), 64);
  _tile_loadd(7, b.at(step, part) + b.half, 64);
}
TILES inline void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// The units' block += a b over `steps` tiles of depth. Every load but the first two serves four products.
TILES inline void accumulate(Packed a, Packed b, int64_t steps, bool high) {
  for (int64_t s = 0; s < steps; ++s) {
    load_second(b, s, 0);
    if (!high) {
      load_first(a, s, 2);
      multiply();
    }
    load_first(a, s, 1);
    multiply();
    if (!high) {
      load_second(b, s, 1);
      multiply();
      load_second(b, s, 2);
      load_first(a, s, 0);
      multiply();
      load_second(b, s, 0);
    } else {
      load_first(a, s, 0);
    }
    multiply();
    load_second(b, s, 1);
    multiply();
  }
}

// block = a b, or more of it. The units begin anew with every call: what they have added up is short, and so exact,
// and long sums are sums of these.
TILES inline void multiply_add(Packed a, Packed b, int64_t steps, bool high, bool first, Block block) {
  clear();
  accumulate(a, b, steps, high);
  if (first) return store_block(block);
  alignas(64) Block more;
  store_block(more);
  for (int64_t i = 0; i < BLOCK; ++i)
    for (int64_t j = 0; j < BLOCK; j += LANES)
      _mm512_store_ps(&block[i][j], _mm512_add_ps(_mm512_load_ps(&block[i][j]), _mm512_load_ps(&more[i][j])));
}

}  // namespace avadclip::amx
#endif
