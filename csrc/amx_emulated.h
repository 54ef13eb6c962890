// The tile units' instructions in AVX-512, to the bit as Intel's manual defines them, for tests: so a processor without
// units, and the sanitizers, which cannot see into units, run all that surrounds them. Included by amx.h alone.
#pragma once

#include <cstring>

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace avadclip {

struct alignas(64) EmulatedTile {
  uint32_t row[16][16];
};
inline thread_local EmulatedTile emulated_tile[8];

inline void _tile_zero(int tile) { emulated_tile[tile] = {}; }
inline void _tile_loadd(int tile, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(emulated_tile[tile].row[i], (const char*)from + i * stride, 64);
}
inline void _tile_stored(int tile, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy((char*)to + i * stride, emulated_tile[tile].row[i], 64);
}

// Only numbers of tiles, all of which are there, are touched from here on: unchecked, tests take a fifth of the time.
#define UNCHECKED __attribute__((no_sanitize("address", "undefined")))

TILES UNCHECKED inline __m512 evens_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
TILES UNCHECKED inline __m512 odds_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_srli_epi32(pairs, 16), 16));
}

// sum[m][n] += sum_k a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1]: both sums fused, from 0, and then added.
TILES UNCHECKED inline void _tile_dpbf16ps(int sum, int a, int b) {
  EmulatedTile* const tile = emulated_tile;
  for (int m = 0; m < 16; ++m) {
    __m512 evens = _mm512_setzero_ps(), odds = _mm512_setzero_ps();
    for (int k = 0; k < 16; ++k) {
      const __m512i first = _mm512_set1_epi32(tile[a].row[m][k]);
      const __m512i second = _mm512_load_si512(tile[b].row[k]);
      evens = _mm512_fmadd_ps(evens_of(first), evens_of(second), evens);
      odds = _mm512_fmadd_ps(odds_of(first), odds_of(second), odds);
    }
    float* to = reinterpret_cast<float*>(tile[sum].row[m]);
    _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), _mm512_add_ps(evens, odds)));
  }
}

}  // namespace avadclip
