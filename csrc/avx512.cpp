// AVX-512 with VNNI. One instruction multiplies sixteen rows by four columns: unsigned bytes (level + 128) by the signed
// bytes of the activations; the surplus, 128 times the block's sum of activations, is where the sums start.
//
// One to seven tokens: codes go from memory through a byte shuffle into the product; memory is the limit. From eight
// on: codes of four blocks are unpacked once into the first cache and met by six tokens at a time.
#include "attention_lanes.h"

#if defined(__AVX512VNNI__)
namespace deepseek {
namespace {

constexpr int kFew = 8;  // below: straight from the codes
constexpr int kTile = 6;  // tokens at a time from the cache: 2 panels x 6 tokens x 2 sums = 24 registers
constexpr int kChunk = 8;  // blocks unpacked at a time: 2 panels x 8 x 1024 bytes
constexpr int64_t kMany = 96;  // tokens whose sums (12 KB) stay in the cache
constexpr int kAhead = 4096;  // bytes that the prefetch runs ahead

inline __m512i level_table() {
  alignas(16) uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = (uint8_t)(kLevels[i] + 128);
  return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)bytes));
}

// sum += w * a. Spelled out because GCC 12 copies every sum before and after its builtin: three times as slow.
inline void add_product(__m512i& sum, __m512i w, __m512i a) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(a)); }

inline __m512i four(const int8_t* q) {
  int32_t v;
  std::memcpy(&v, q, 4);
  return _mm512_set1_epi32(v);
}

inline __m512 scales(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

// Where up to N rows of activations lie, found once for all panels.
template <int64_t N>
struct RowPointers {
  const int8_t* q[N];
  const int32_t* surplus[N];
  float scale[N];
  RowPointers(const Rows& x, const int32_t* row, int64_t first, int64_t count = N) {
    for (int64_t i = 0; i < count; ++i) {
      int64_t r = row ? row[first + i] : first + i;
      q[i] = x.q + r * pitch_of(x.blocks), surplus[i] = x.surplus + r * x.blocks, scale[i] = x.scale[r];
    }
  }
};

// One panel, T tokens, straight from the codes.
template <int BITS, int T>
inline void few(const uint8_t* panel, const Panel& shape, const RowPointers<T>& x, __m512i table, __m512* y) {
  const uint8_t* code = panel + shape.codes;
  const __m512i low = _mm512_set1_epi8(15);
  __m512 acc[T];
  __m512i even[T], odd[T];
  for (int t = 0; t < T; ++t) acc[t] = _mm512_setzero_ps(), even[t] = _mm512_setzero_si512();
  for (int64_t b = 0; b < shape.blocks; ++b) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      __m512i start = _mm512_set1_epi32(x.surplus[t][b]);
      even[t] = BITS == 4 ? start : _mm512_add_epi32(even[t], start);
      odd[t] = _mm512_setzero_si512();
    }
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      __m512i w0, w1;
      if (BITS == 4) {
        __m512i both = _mm512_load_si512(code + 64 * g);
        _mm_prefetch((const char*)code + 64 * g + kAhead, _MM_HINT_T0);
        w0 = _mm512_shuffle_epi8(table, _mm512_and_si512(both, low));
        w1 = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
      } else {
        const __m512i flip = _mm512_set1_epi8((char)128);
        w0 = _mm512_xor_si512(_mm512_load_si512(code + 128 * g), flip);
        w1 = _mm512_xor_si512(_mm512_load_si512(code + 128 * g + 64), flip);
        _mm_prefetch((const char*)code + 128 * g + kAhead, _MM_HINT_T0);
        _mm_prefetch((const char*)code + 128 * g + 64 + kAhead, _MM_HINT_T0);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        add_product(even[t], w0, four(x.q[t] + kBlock * b + 8 * g));
        add_product(odd[t], w1, four(x.q[t] + kBlock * b + 8 * g + 4));
      }
    }
    code += BITS == 4 ? 512 : 1024;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      even[t] = _mm512_add_epi32(even[t], odd[t]);
      if (BITS == 4) acc[t] = _mm512_fmadd_ps(scales(panel + 64 + 16 * b), _mm512_cvtepi32_ps(even[t]), acc[t]);
    }
  }
  __m512 step = _mm512_load_ps(panel);
  for (int t = 0; t < T; ++t)
    y[t] = _mm512_mul_ps(BITS == 4 ? acc[t] : _mm512_cvtepi32_ps(even[t]),
                         _mm512_mul_ps(step, _mm512_set1_ps(x.scale[t])));
}

template <int BITS, int T>
void few_tokens(const uint8_t* w, int64_t count, bool gated, const Rows& x, const int32_t* row, int64_t t, float* out,
                int64_t ld) {
  const Panel shape(x.blocks * kBlock, BITS);
  const RowPointers<T> rows(x, row, t);
  const __m512i table = level_table();
  __m512 y[T], up[T];
  for (int64_t p = 0; p < count; p += gated ? 2 : 1) {
    few<BITS, T>(w + p * shape.bytes, shape, rows, table, y);
    if (gated) few<BITS, T>(w + (p + 1) * shape.bytes, shape, rows, table, up);
    for (int i = 0; i < T; ++i)
      store(out + (t + i) * ld + (gated ? 8 : 16) * p, gated ? silu((f16)y[i]) * (f16)up[i] : (f16)y[i]);
  }
}

// Codes -> bytes.
template <int BITS>
void unpack(const uint8_t* code, int64_t blocks, __m512i table, __m512i* to) {
  const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8((char)128);
  if (BITS == 4)
    for (int64_t i = 0; i < 8 * blocks; ++i) {
      __m512i both = _mm512_load_si512(code + 64 * i);
      to[2 * i] = _mm512_shuffle_epi8(table, _mm512_and_si512(both, low));
      to[2 * i + 1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    }
  else
    for (int64_t i = 0; i < 16 * blocks; ++i) to[i] = _mm512_xor_si512(_mm512_load_si512(code + 64 * i), flip);
}

// What the next chunk of R panels needs from memory, asked for a little at a time while this one is computed: all at once
// would fill the queue of outstanding reads and stop everything.
template <int R>
struct Ahead {
  const char* code[R];
  int64_t lines, each, done = 0;  // cache lines of a panel, and how many of them a block asks for
  void some() {
    int64_t end = done + each < lines ? done + each : lines;
    for (; done < end; ++done)
      for (int r = 0; r < R; ++r) _mm_prefetch(code[r] + 64 * done, _MM_HINT_T1);
  }
};

// R panels x T tokens x `blocks` blocks from the unpacked chunk; acc holds fp32 sums (4 bits) or int32 sums (8 bits).
template <int BITS, int R, int T>
inline void tile(const __m512i* w, const uint8_t* const* scale, const RowPointers<kMany>& x, int64_t t0, int64_t first,
                 int64_t blocks, float* acc, int64_t ld, Ahead<R>& ahead) {
  const int8_t* q[T];
  const int32_t* surplus[T];
  for (int t = 0; t < T; ++t) q[t] = x.q[t0 + t] + kBlock * first, surplus[t] = x.surplus[t0 + t] + first;
  __m512i sum[R][T];
  __m512 f[R][T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      f[r][t] = _mm512_load_ps(acc + t * ld + 16 * r);
      if (BITS == 8) sum[r][t] = _mm512_castps_si512(f[r][t]);
    }
  for (int64_t b = 0; b < blocks; ++b) {
    ahead.some();
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r)
        if (BITS == 4)  // from memory each time: a copy between registers would take a slot of the products
          asm volatile("vpbroadcastd %1, %0" : "=v"(sum[r][t]) : "m"(surplus[t][b]));
        else
          sum[r][t] = _mm512_add_epi32(sum[r][t], _mm512_set1_epi32(surplus[t][b]));
    auto step = [&](int g) __attribute__((always_inline)) {
      __m512i v[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) v[r] = w[(r * kChunk + b) * 16 + g];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        __m512i a = four(q[t] + kBlock * b + 4 * g);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) add_product(sum[r][t], v[r], a);
      }
    };
    for (int g = 0; g < 16; g += 4) step(g), step(g + 1), step(g + 2), step(g + 3);
    if (BITS == 4)
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        __m512 s = scales(scale[r] + 16 * (first + b));
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) f[r][t] = _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(sum[r][t]), f[r][t]);
      }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      _mm512_store_ps(acc + t * ld + 16 * r, BITS == 4 ? f[r][t] : _mm512_castsi512_ps(sum[r][t]));
}

template <int BITS, int R>
inline void tiles(const __m512i* w, const uint8_t* const* scale, const RowPointers<kMany>& x, int64_t tokens,
                  int64_t first, int64_t blocks, float* acc, Ahead<R>& ahead) {
  int64_t t = 0;
  auto some = [&](auto n) {
    constexpr int T = decltype(n)::value;
    tile<BITS, R, T>(w, scale, x, t, first, blocks, acc + t * 16 * R, 16 * R, ahead);
  };
  for (; t + kTile <= tokens; t += kTile) some(std::integral_constant<int, kTile>{});
  with_constant<kTile - 1>(tokens - t, some);
}

// R panels times up to kMany tokens.
template <int BITS, int R>
void many_tokens(const uint8_t* w, bool gated, const Panel& shape, const RowPointers<kMany>& x, int64_t tokens,
                 float* out, int64_t ld, __m512i table) {
  alignas(64) __m512i chunk[R * kChunk * 16];
  alignas(64) float acc[kMany * 16 * R];
  const uint8_t* scale[R];
  for (int r = 0; r < R; ++r) scale[r] = w + r * shape.bytes + 64;
  std::memset(acc, 0, sizeof(float) * tokens * 16 * R);
  constexpr int64_t kBytes = BITS == 4 ? 512 : 1024;  // of a block
  const int64_t step = tokens < 32 ? 4 : kChunk;  // few tokens leave no room in time for long reads
  for (int64_t b = 0; b < shape.blocks; b += step) {
    int64_t blocks = shape.blocks - b < step ? shape.blocks - b : step;
    Ahead<R> ahead{{}, kBytes / 64 * blocks, (kBytes / 64 * kTile + tokens - 1) / tokens + 1};
    for (int r = 0; r < R; ++r) {
      const uint8_t* code = w + r * shape.bytes + shape.codes + kBytes * b;
      ahead.code[r] = (const char*)(b + step < shape.blocks ? code + kBytes * step : w + (R + r) * shape.bytes + 64);
      unpack<BITS>(code, blocks, table, chunk + r * kChunk * 16);
    }
    tiles<BITS, R>(chunk, scale, x, tokens, b, blocks, acc, ahead);
  }
  put_panels<BITS, R>(acc, w, shape, x.scale, tokens, gated, out, ld);
}

template <int BITS>
void any_panels(const uint8_t* w, int64_t count, bool gated, const Rows& x, const int32_t* row, int64_t tokens,
                float* out, int64_t ld) {
  if (tokens >= kFew) {
    const Panel shape(x.blocks * kBlock, BITS);
    const __m512i table = level_table();
    for (int64_t t = 0; t < tokens; t += kMany, out += kMany * ld) {
      const int64_t n = tokens - t < kMany ? tokens - t : kMany;
      const RowPointers<kMany> rows(x, row, t, n);
      int64_t p = 0;
      for (; p + 2 <= count; p += 2)
        many_tokens<BITS, 2>(w + p * shape.bytes, gated, shape, rows, n, out + (gated ? 8 : 16) * p, ld, table);
      if (p < count) many_tokens<BITS, 1>(w + p * shape.bytes, false, shape, rows, n, out + 16 * p, ld, table);
    }
    return;
  }
  with_constant<kFew - 1>(tokens,
                          [&](auto n) { few_tokens<BITS, decltype(n)::value>(w, count, gated, x, row, 0, out, ld); });
}

void panels(const uint8_t* w, int64_t count, int bits, bool gated, const Rows& x, const int32_t* row, int64_t tokens,
            float* out, int64_t ld) {
  (bits == 4 ? any_panels<4> : any_panels<8>)(w, count, gated, x, row, tokens, out, ld);
}

const Kernels table = {"avx512_vnni",       quantize_weights, quantize,     panels,          dense_rows<uint16_t>,
                       dense_rows<float>, rms_norm,         weighted_sum, attention_block, attention_join};

}  // namespace
const Kernels* const avx512_kernels = &table;
}  // namespace deepseek
#else
namespace deepseek {
const Kernels* const avx512_kernels = nullptr;
}
#endif
