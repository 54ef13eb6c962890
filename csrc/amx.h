// Products of float32 matrices on a processor's tile units (AMX), which multiply bfloat16 and add in float32. A float32
// is the sum of three bfloat16, and of the nine products of two such sums six matter:
//   a = a0 + a1 + a2,  |a_i| <= 2^-8i |a|;   ab = a0 b0 + (a0 b1 + a1 b0) + (a0 b2 + a1 b1 + a2 b0) + O(2^-24 ab)
// The units work at 16 times the rate of float32's own instructions: 2.7 times as fast at best, as exact as those. The
// first three products are "high" precision: 16 bits of every number, 5.3 times as fast at best.
#pragma once

#include "avx512.h"

#ifdef AVADCLIP_AVX512
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16")))
#ifdef AVADCLIP_EMULATED_TILES
#include "amx_emulated.h"
#endif

namespace avadclip {

struct Amx {
  static constexpr int64_t PARTS = 3;                        // bfloat16 a float32
  static constexpr int64_t LANE = DEPTH * sizeof(uint16_t);  // bytes, in pairs
  static constexpr int64_t TILE = LANES * LANE;              // bytes
  static constexpr int64_t STEPS = 4;  // tiles deep is a slab, of which 32 rows, 24 KB, stay in the first cache

  // Whether this processor has them, and the system lets this process use them.
  static bool available() {
    static const bool known = [] {
      unsigned a, b, c, d;
      const bool bfloat16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
      if (!Avx512::available() || !bfloat16) return false;
#ifdef AVADCLIP_EMULATED_TILES
      return true;
#endif
      const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 24 & d >> 22 & 1;
      if (!tiles) return false;
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
  TILES static void split(__m512 x, __m512 y, __m512i part[PARTS]) {
    for (int i = 0; i < PARTS; ++i) {
      part[i] = (__m512i)_mm512_cvtne2ps_pbh(y, x);
      if (i == PARTS - 1) break;
      const __m256i low = _mm512_castsi512_si256(part[i]), high = _mm512_extracti64x4_epi64(part[i], 1);
      x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16)));
      y = _mm512_sub_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
    }
  }

  // A tile of each part, `stride` bytes apart, from numbers that are summed over along a row: lane i is 32 numbers of
  // row[i], of which `count` are there. turned: pairs by lanes, as the second factor has it.
  TILES static void pack_along(const float* const row[LANES], int64_t at, int64_t count, bool turned, char* to,
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
  TILES static void pack_across(const float* const row[DEPTH], int64_t at, int64_t count, bool turned, char* to,
                                int64_t stride) {
    const __m512i interleave =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                         3, 18, 2, 17, 1, 16, 0);
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

  TILES static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  TILES static void store_block(Block block) {
    constexpr int64_t stride = BLOCK * sizeof(float);
    _tile_stored(0, &block[0][0], stride);
    _tile_stored(1, &block[0][LANES], stride);
    _tile_stored(2, &block[LANES][0], stride);
    _tile_stored(3, &block[LANES][LANES], stride);
  }

  TILES static void load_first(Packed a, int64_t step, int part) {
    _tile_loadd(4, a.at(step, part), 64);
    _tile_loadd(5, a.at(step, part) + a.half, 64);
  }
  TILES static void load_second(Packed b, int64_t step, int part) {
    _tile_loadd(6, b.at(step, part), 64);
    _tile_loadd(7, b.at(step, part) + b.half, 64);
  }
  TILES static void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  // The units' block += a b over `steps` tiles of depth. Every load but the first two serves four products.
  TILES static void accumulate(Packed a, Packed b, int64_t steps, bool high) {
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
  TILES static void multiply_add(Packed a, Packed b, int64_t steps, bool high, bool first, Block block) {
    clear();
    accumulate(a, b, steps, high);
    if (first) return store_block(block);
    alignas(64) Block more;
    store_block(more);
    for (int64_t i = 0; i < BLOCK; ++i)
      for (int64_t j = 0; j < BLOCK; j += LANES)
        _mm512_store_ps(&block[i][j], _mm512_add_ps(_mm512_load_ps(&block[i][j]), _mm512_load_ps(&more[i][j])));
  }
};

}  // namespace avadclip
#endif
