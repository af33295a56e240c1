// AMX: one instruction multiplies sixteen tokens by sixteen rows over a block of 64 columns. A block of an unpacked panel
// is a tile as it lies; signed levels meet signed activations, so there is no surplus here. Sums are exact integers,
// so the bits are those of every other table. Below sixteen tokens the tiles would be mostly empty: AVX-512 does those.
//
// DEEPSEEK_EMULATE_AMX compiles the same code on emulated tiles, for machines without them (tests/native).
#include "attention_lanes.h"

#if defined(__AVX512VNNI__) && (defined(__AMX_INT8__) || defined(DEEPSEEK_EMULATE_AMX))
#include <stdlib.h>
#include "amx_tiles.h"

namespace deepseek {
namespace {

constexpr int64_t kTokens = 16;  // of a tile
constexpr int64_t kMany = 96;  // tokens whose sums stay in the cache
constexpr int64_t kChunk = 4;  // blocks unpacked at a time
constexpr int64_t kFew = 16;
constexpr int kAhead = 2048;

template <int BITS>
void unpack(const uint8_t* code, int64_t blocks, __m512i* to) {
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)kLevels));
  if (BITS == 4)
    for (int64_t i = 0; i < 8 * blocks; ++i) {
      __m512i both = _mm512_load_si512(code + 64 * i);
      _mm_prefetch((const char*)code + 64 * i + kAhead, _MM_HINT_T0);
      to[2 * i] = _mm512_shuffle_epi8(table, _mm512_and_si512(both, low));
      to[2 * i + 1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    }
  else
    std::memcpy(to, code, 1024 * blocks);
}

// Sums of one tile of tokens and panels into acc: FP32 by fused multiply-add with the scale, or int32.
template <int BITS>
inline void drain(const int32_t* c, const uint8_t* scale, float* acc, int64_t ld) {
  __m512 s = _mm512_setzero_ps();
  if (BITS == 4) s = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)scale)));
  for (int64_t t = 0; t < kTokens; ++t) {
    __m512i sum = _mm512_load_si512(c + 16 * t);
    __m512 old = _mm512_load_ps(acc + t * ld);
    _mm512_store_ps(acc + t * ld, BITS == 4 ? _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(sum), old)
                                            : _mm512_castsi512_ps(_mm512_add_epi32(sum, _mm512_castps_si512(old))));
  }
}

// Two panels (or one) times up to kMany tokens; q: rows of `width` bytes, padded with rows of zeros to whole tiles.
template <int BITS, int R>
void many_tokens(const uint8_t* w, bool gated, const Panel& shape, const int8_t* q, const float* scale, int64_t tokens,
                 float* out, int64_t ld) {
  alignas(64) __m512i chunk[R * kChunk * 16];
  alignas(64) float acc[kMany * 16 * R];
  alignas(64) int32_t c[4][256];
  const int64_t width = shape.blocks * kBlock;
  std::memset(acc, 0, sizeof(acc));
  for (int64_t b0 = 0; b0 < shape.blocks; b0 += kChunk) {
    const int64_t blocks = shape.blocks - b0 < kChunk ? shape.blocks - b0 : kChunk;
    for (int r = 0; r < R; ++r)
      unpack<BITS>(w + r * shape.bytes + shape.codes + (BITS == 4 ? 512 : 1024) * b0, blocks, chunk + r * kChunk * 16);
    asm volatile("" ::: "memory");  // GCC 12 does not know that tile loads read memory
    for (int64_t t = 0; t < tokens; t += 2 * kTokens) {
      const bool second = t + kTokens < tokens;
      for (int64_t b = 0; b < blocks; ++b) {
        const int8_t* a = q + t * width + (b0 + b) * kBlock;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(4, a, width);
        _tile_loadd(6, chunk + b * 16, 64);
        _tile_dpbssd(0, 4, 6);
        if (R == 2) {
          _tile_loadd(7, chunk + (kChunk + b) * 16, 64);
          _tile_dpbssd(1, 4, 7);
        }
        if (second) {
          _tile_loadd(5, a + kTokens * width, width);
          _tile_dpbssd(2, 5, 6);
          if (R == 2) _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, c[0], 64);
        _tile_stored(1, c[1], 64);
        _tile_stored(2, c[2], 64);
        _tile_stored(3, c[3], 64);
        for (int half = 0; half <= second; ++half)
          for (int r = 0; r < R; ++r)
            drain<BITS>(c[2 * half + r], w + r * shape.bytes + 64 + 16 * (b0 + b),
                        acc + ((t + half * kTokens) * R + r) * 16, 16 * R);
      }
    }
  }
  put_panels<BITS, R>(acc, w, shape, scale, tokens, gated, out, ld);
}

template <int BITS>
void all_panels(const uint8_t* w, int64_t count, bool gated, const Rows& x, const int32_t* row, int64_t tokens,
                float* out, int64_t ld) {
  const Panel shape(x.blocks * kBlock, BITS);
  const int64_t width = shape.blocks * kBlock;
  int8_t* q = static_cast<int8_t*>(aligned_alloc(64, kMany * width));
  if (!q) __builtin_trap();
  float scale[kMany];
  configure_tiles();
  for (int64_t t0 = 0; t0 < tokens; t0 += kMany) {
    const int64_t n = tokens - t0 < kMany ? tokens - t0 : kMany, whole = (n + kTokens - 1) / kTokens * kTokens;
    for (int64_t t = 0; t < n; ++t) {
      const int64_t r = row ? row[t0 + t] : t0 + t;
      std::memcpy(q + t * width, x.q + r * pitch_of(x.blocks), width);
      scale[t] = x.scale[r];
    }
    std::memset(q + n * width, 0, (whole - n) * width);
    int64_t p = 0;
    for (; p + 2 <= count; p += 2)
      many_tokens<BITS, 2>(w + p * shape.bytes, gated, shape, q, scale, n, out + t0 * ld + (gated ? 8 : 16) * p, ld);
    if (p < count) many_tokens<BITS, 1>(w + p * shape.bytes, false, shape, q, scale, n, out + t0 * ld + 16 * p, ld);
  }
  _tile_release();
  free(q);
}

void panels(const uint8_t* w, int64_t count, int bits, bool gated, const Rows& x, const int32_t* row, int64_t tokens,
            float* out, int64_t ld) {
  if (tokens < kFew) return avx512_kernels->panels(w, count, bits, gated, x, row, tokens, out, ld);
  (bits == 4 ? all_panels<4> : all_panels<8>)(w, count, gated, x, row, tokens, out, ld);
}

#if defined(DEEPSEEK_EMULATE_AMX)
constexpr const char* kName = "amx_emulated";
#else
constexpr const char* kName = "amx";
#endif
const Kernels table = {
    kName,    quantize_weights, quantize,        panels,        dense_rows<uint16_t>, dense_rows<float>,
    rms_norm, weighted_sum,     attention_block, attention_join};

}  // namespace
const Kernels* const amx_kernels = &table;
}  // namespace deepseek
#else
namespace deepseek {
const Kernels* const amx_kernels = nullptr;
}
#endif
