// Single numbers of BF16, at any address. Unnamed, so that each instruction set has its own.
#pragma once
#include <cstdint>
#include <cstring>

namespace deepseek {
namespace {

// To the nearest, ties to even.
inline void put_bf16(uint8_t* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t half = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  std::memcpy(p, &half, 2);
}

inline float get_bf16(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = (uint32_t)half << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

}  // namespace
}  // namespace deepseek
