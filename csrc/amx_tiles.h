// The tiles of AMX, or with DEEPSEEK_EMULATE_AMX their emulation in plain C++.
#pragma once
#include <cstdint>
#if defined(DEEPSEEK_EMULATE_AMX)
#include "amx_emulated.h"
#endif

namespace deepseek {
namespace {

// All eight tiles are 16 rows of 64 bytes.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void configure_tiles() {
  const Config config;
  asm volatile("" ::: "memory");  // GCC 12 takes the next line for a read of eight bytes and drops the rest of `config`
  _tile_loadconfig(&config);
}

}  // namespace
}  // namespace deepseek
