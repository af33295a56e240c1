// Matrix products on AVX512-BF16: one instruction takes a pair of inner columns, first the odd one, then the even one, each
// with a fused multiply-add. DEEPSEEK_EMULATE_AMX puts two of these on FP32 units in its place.
#include "training_pairs.h"

#if defined(__AVX512BF16__) || (defined(__AVX512VNNI__) && defined(DEEPSEEK_EMULATE_AMX))

namespace deepseek {
namespace {

constexpr int kTileRows = 14;  // 28 sums, 2 columns and a broadcast: 31 of 32 registers
constexpr int kAheadRows = 16;

INLINE void add_pairs(__m512& sum, __m512i a, __m512i b) {
#if defined(DEEPSEEK_EMULATE_AMX)  // unlike the instruction, they keep numbers below the least normal one
  const __m512i odd = _mm512_set1_epi32((int)0xffff0000);
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, odd)), _mm512_castsi512_ps(_mm512_and_si512(b, odd)),
                        sum);
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)),
                        sum);
#else
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // spelled out: GCC 12 copies sums around its builtin
#endif
}

// tile [R][kTileColumns] = a strip times a panel
template <int R>
__attribute__((noinline)) void tile_product(const uint32_t* a, const uint32_t* b, int64_t pairs, float* tile) {
  __m512 sum[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    const __m512i v0 = _mm512_loadu_si512(b + k * kTileColumns), v1 = _mm512_loadu_si512(b + k * kTileColumns + 16);
    _mm_prefetch((const char*)(b + (k + kAheadRows) * kTileColumns), _MM_HINT_T0);
    _mm_prefetch((const char*)(b + (k + kAheadRows) * kTileColumns + 16), _MM_HINT_T0);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const __m512i x = _mm512_set1_epi32((int)a[kRowStride * r + k]);
      add_pairs(sum[r][0], x, v0);
      add_pairs(sum[r][1], x, v1);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(tile + r * kTileColumns, sum[r][0]);
    _mm512_storeu_ps(tile + r * kTileColumns + 16, sum[r][1]);
  }
}

void multiply(const void* a, bool, int64_t rows, const void* b, int64_t panel, int64_t depth, int64_t columns,
              float* out, int64_t ld, bool add) {
  alignas(64) float tile[kTileRows * kTileColumns];
  for (int64_t n = 0; n < columns; n += kTileColumns) {
    const uint32_t* right = (const uint32_t*)((const char*)b + n / kTileColumns * panel);
    with_constant<kTileRows / 2>((rows + 1) / 2, [&](auto half) {
      tile_product<2 * decltype(half)::value>((const uint32_t*)a, right, (depth + 1) / 2, tile);
    });
    put_tile(tile, kTileColumns, rows, columns - n < kTileColumns ? columns - n : kTileColumns, out + n, ld, add);
  }
}

#if defined(DEEPSEEK_EMULATE_AMX)
constexpr const char* kName = "avx512_bf16_emulated";
#else
constexpr const char* kName = "avx512_bf16";
#endif
const Products table = products<kTileRows>(kName, multiply);

}  // namespace
const Products* const avx512_bf16_products = &table;
}  // namespace deepseek
#else
namespace deepseek {
const Products* const avx512_bf16_products = nullptr;
}
#endif
