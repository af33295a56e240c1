// The tile instructions that amx.cpp and training_amx.cpp use, in plain C++, for tests on machines without AMX. Eight tiles of 16 rows of 64
// bytes per thread; a tile that is used before it is configured is a failed test.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

struct EmulatedTiles {
  bool configured = false;
  alignas(64) int8_t byte[8][16][64];
};

inline EmulatedTiles& emulated() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

inline auto& emulated_tile(int i) {
  if (!emulated().configured) abort();
  return emulated().byte[i];
}

inline void emulated_loadconfig(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  for (int i = 0; i < 8; ++i)
    if (bytes[0] != 1 || bytes[16 + 2 * i] != 64 || bytes[48 + i] != 16) abort();
  memset(emulated().byte, 0, sizeof(emulated().byte));
  emulated().configured = true;
}

inline void emulated_load(int i, const void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(emulated_tile(i)[r], static_cast<const char*>(p) + r * stride, 64);
}

inline void emulated_store(int i, void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(p) + r * stride, emulated_tile(i)[r], 64);
}

// c[m][n] += sum over k, j of a[m][4 k + j] * b[k][4 n + j]
inline void emulated_dpbssd(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      memcpy(&sum, emulated_tile(c)[m] + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 4; ++j) sum += emulated_tile(a)[m][4 * k + j] * emulated_tile(b)[k][4 * n + j];
      memcpy(emulated_tile(c)[m] + 4 * n, &sum, 4);
    }
}

// c[m][n] += the sum of the even columns' products + the sum of the odd ones', each a chain of fused multiply-adds; unlike
// the instruction, it keeps numbers below the least normal one.
inline void emulated_dpbf16ps(int c, int a, int b) {
  auto number = [](const int8_t* from) {
    uint16_t half;
    memcpy(&half, from, 2);
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  };
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float old, sum[2] = {0.0f, 0.0f};
      memcpy(&old, emulated_tile(c)[m] + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 2; ++j)
          sum[j] = __builtin_fmaf(number(emulated_tile(a)[m] + 4 * k + 2 * j),
                                  number(emulated_tile(b)[k] + 4 * n + 2 * j), sum[j]);
      old += sum[0] + sum[1];
      memcpy(emulated_tile(c)[m] + 4 * n, &old, 4);
    }
}

}  // namespace

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_release() (emulated().configured = false)
#define _tile_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_zero(i) memset(emulated_tile(i), 0, 1024)
#define _tile_dpbssd emulated_dpbssd
#define _tile_dpbf16ps emulated_dpbf16ps
