// Matrix products on AMX tiles of BF16: one instruction multiplies sixteen rows by sixteen columns over 32 inner columns,
// with one sum for the even and one for the odd of them, and adds both to the result. Four tiles of sums, two of either
// factor. DEEPSEEK_EMULATE_AMX compiles the same code on emulated tiles.
#include "training_pairs.h"

#if defined(__AVX512VNNI__) && (defined(__AMX_BF16__) || defined(DEEPSEEK_EMULATE_AMX))
#include "amx_tiles.h"

namespace deepseek {
namespace {

constexpr int64_t kTileRows = 32;
constexpr int64_t kLeft = 4 * kRowStride, kRight = 4 * kTileColumns;  // bytes between rows of tiles

// Sums of R x C tiles in `out`, whose rows are `ld` bytes apart.
template <int R, int C>
void tiles(const uint32_t* a, const uint32_t* b, int64_t steps, float* out, int64_t ld, bool add) {
  float* low = out + 4 * ld;
  if (add) {
    _tile_loadd(0, out, ld);
    if (C == 2) _tile_loadd(1, out + 16, ld);
    if (R == 2) _tile_loadd(2, low, ld);
    if (R == 2 && C == 2) _tile_loadd(3, low + 16, ld);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += 16, b += 16 * kTileColumns) {
    _tile_loadd(6, b, kRight);
    _tile_loadd(4, a, kLeft);
    _tile_dpbf16ps(0, 4, 6);
    if (C == 2) {
      _tile_loadd(7, b + 16, kRight);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (R == 2) {
      _tile_loadd(5, a + 16 * kRowStride, kLeft);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (R == 2 && C == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, ld);
  if (C == 2) _tile_stored(1, out + 16, ld);
  if (R == 2) _tile_stored(2, low, ld);
  if (R == 2 && C == 2) _tile_stored(3, low + 16, ld);
}

void multiply(const void* left, bool, int64_t rows, const void* right, int64_t panel, int64_t depth, int64_t columns,
              float* out, int64_t ld, bool add) {
  alignas(64) float tile[kTileRows * kTileColumns];
  const auto* a = (const uint32_t*)left;
  const int64_t steps = pairs_of(depth) / 16;
  asm volatile("" ::: "memory");  // GCC 12 does not know that tile loads read memory
  configure_tiles();
  for (int64_t n = 0; n < columns; n += kTileColumns) {
    const auto* b = (const uint32_t*)((const char*)right + n / kTileColumns * panel);
    const int64_t wide = columns - n < kTileColumns ? columns - n : kTileColumns;
    if (rows == kTileRows && wide == kTileColumns) {
      tiles<2, 2>(a, b, steps, out + n, 4 * ld, add);
      continue;
    }
    if (add)  // the order of a sum is that of whole tiles
      for (int64_t r = 0; r < rows; ++r) std::memcpy(tile + r * kTileColumns, out + r * ld + n, 4 * wide);
    const auto part = rows > 16 ? (wide > 16 ? tiles<2, 2> : tiles<2, 1>) : (wide > 16 ? tiles<1, 2> : tiles<1, 1>);
    part(a, b, steps, tile, kRight, add);
    put_tile(tile, kTileColumns, rows, wide, out + n, ld, false);
  }
  _tile_release();
}

#if defined(DEEPSEEK_EMULATE_AMX)
constexpr const char* kName = "amx_bf16_emulated";
#else
constexpr const char* kName = "amx_bf16";
#endif
const Products table = products<kTileRows>(kName, multiply);

}  // namespace
const Products* const amx_bf16_products = &table;
}  // namespace deepseek
#else
namespace deepseek {
const Products* const amx_bf16_products = nullptr;
}
#endif
