// The matrix product of both halves of attention: a few rows of A in registers, times B as the cache stores it.
//
//   queries (rows, D) x keys (D, tokens of a page)     and     weights (rows, tokens) x values (tokens, Dv)
//
// B is read once for up to six rows of A. B is widened, or two of its rows are paired for bf16 dot products, between
// load and use, so B is never packed.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vector.h"

namespace starling {

#if defined(__AVX512BF16__)
constexpr bool BF16_DOT = true;
#else
constexpr bool BF16_DOT = false;
#endif

// The element type of A: bf16 where the processor multiplies pairs of bf16, else float.
template <class T>
using Operand = std::conditional_t<std::is_same_v<T, at::BFloat16> && BF16_DOT, at::BFloat16, float>;

// `rows` consecutive rows of B from `data` on, which are the product's `b_stride` elements apart.
template <class T>
struct Span {
  const T* data;
  int64_t rows;
};

template <class T>
struct Product {
  const Operand<T>* a;
  int64_t a_stride;
  const Span<T>* spans;  // of B, in the order of A's columns
  int spans_count;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  const float* decay;  // c = decay[row] * c + a x b; null for c = a x b
};

#if defined(__AVX512F__)
constexpr int MAX_ROWS = 6, VECTORS = 4, WIDE_VECTORS = 8;  // 24 accumulators in 32 registers
#else
constexpr int MAX_ROWS = 6, VECTORS = 1, WIDE_VECTORS = 2;  // a Vec takes two or four of 16 registers
#endif
constexpr int FEW_ROWS = 3;          // rows of a block in a wide panel
constexpr int WIDE_PANEL_ROWS = 8;

// Adds the block's part of a x b over one span to acc. a points at the block's first row, b at its first column.
template <int ROWS, int VECS, class T>
inline void accumulate(const float* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t count,
                       Vec (&acc)[ROWS][VECS]) {
  for (int64_t k = 0; k < count; ++k, b += b_stride, ++a) {
    Vec right[VECS];
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) right[v] = floats_at(b + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Vec left = splat(a[r * a_stride]);
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v) acc[r][v] += left * right[v];
    }
  }
}

#if defined(__AVX512BF16__)
inline __m512bh splat_pair(const at::BFloat16* pair, bool both) {
  uint32_t bits = 0;
  std::memcpy(&bits, pair, both ? 4 : 2);
  return (__m512bh)_mm512_set1_epi32(static_cast<int>(bits));
}

// Multiplies rows k and k + 1 of B as pairs. Two vectors are interleaved within 128-bit lanes (two instructions), which
// changes the order of columns. `ordered` restores it once, in the sums.
template <int ROWS, int VECS, bool BOTH>
inline void dot_pairs(const at::BFloat16* a, int64_t a_stride, const at::BFloat16* b, int64_t b_stride,
                      Vec (&acc)[ROWS][VECS]) {
  __m512bh right[VECS];
  if constexpr (VECS == 1) {
    const __m512i first = _mm512_cvtepu16_epi32(load_raw<__m256i>(b));
    const __m512i second = BOTH ? _mm512_cvtepu16_epi32(load_raw<__m256i>(b + b_stride)) : _mm512_setzero_si512();
    right[0] = (__m512bh)_mm512_or_si512(first, _mm512_slli_epi32(second, 16));
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < VECS; v += 2) {
      const __m512i first = load_raw<__m512i>(b + v * LANES);
      const __m512i second = BOTH ? load_raw<__m512i>(b + b_stride + v * LANES) : _mm512_setzero_si512();
      right[v] = (__m512bh)_mm512_unpacklo_epi16(first, second);
      right[v + 1] = (__m512bh)_mm512_unpackhi_epi16(first, second);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    const __m512bh left = splat_pair(a + r * a_stride, BOTH);
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) acc[r][v] = (Vec)_mm512_dpbf16_ps((__m512)acc[r][v], left, right[v]);
  }
}

template <int ROWS, int VECS>
inline void accumulate(const at::BFloat16* a, int64_t a_stride, const at::BFloat16* b, int64_t b_stride, int64_t count,
                       Vec (&acc)[ROWS][VECS]) {
  for (; count >= 2; count -= 2, b += 2 * b_stride, a += 2) {
    dot_pairs<ROWS, VECS, true>(a, a_stride, b, b_stride, acc);
  }
  if (count) dot_pairs<ROWS, VECS, false>(a, a_stride, b, b_stride, acc);
}

template <int ROWS, int VECS>
inline void ordered(Vec (&acc)[ROWS][VECS]) {
  if constexpr (VECS > 1) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < VECS; v += 2) {
        const __m512 even = (__m512)acc[r][v], odd = (__m512)acc[r][v + 1];
        acc[r][v] = (Vec)_mm512_permutex2var_ps(even, low, odd);
        acc[r][v + 1] = (Vec)_mm512_permutex2var_ps(even, high, odd);
      }
  }
}
#endif

template <int ROWS, int VECS, class T>
inline void block(const Product<T>& of, int64_t row, int64_t column) {
  Vec acc[ROWS][VECS] = {};
  const Operand<T>* a = of.a + row * of.a_stride;
  for (int i = 0; i < of.spans_count; a += of.spans[i++].rows) {
    const Span<T>& span = of.spans[i];
    if constexpr (ROWS < MAX_ROWS) {  // a sum per span, then over spans, rounds less; full blocks lack registers
      Vec part[ROWS][VECS] = {};
      accumulate<ROWS, VECS>(a, of.a_stride, span.data + column, of.b_stride, span.rows, part);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < VECS; ++v) acc[r][v] += part[r][v];
    } else {
      accumulate<ROWS, VECS>(a, of.a_stride, span.data + column, of.b_stride, span.rows, acc);
    }
  }
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, at::BFloat16>) ordered(acc);
#endif
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    float* c = of.c + (row + r) * of.c_stride + column;
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) {
      if (of.decay) acc[r][v] += floats_at(c + v * LANES) * of.decay[row + r];
      store(c + v * LANES, acc[r][v]);
    }
  }
}

// Computes one panel, VECS vectors of columns by all rows, in blocks of nearly equal height.
template <int VECS, class T>
inline void panel(const Product<T>& of, int64_t rows, int64_t column) {
  constexpr int HIGHEST = VECS > WIDE_VECTORS ? 1 : VECS > VECTORS ? FEW_ROWS : MAX_ROWS;
  const int64_t blocks = (rows + HIGHEST - 1) / HIGHEST;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t row = rows * i / blocks;
    switch (rows * (i + 1) / blocks - row) {
      case 1: block<1, VECS>(of, row, column); break;
      case 2: if constexpr (HIGHEST > 1) block<2, VECS>(of, row, column); break;
      case 3: if constexpr (HIGHEST > 1) block<3, VECS>(of, row, column); break;
      case 4: if constexpr (HIGHEST > 3) block<4, VECS>(of, row, column); break;
      case 5: if constexpr (HIGHEST > 3) block<5, VECS>(of, row, column); break;
      case 6: if constexpr (HIGHEST > 3) block<6, VECS>(of, row, column); break;
    }
  }
}

// Computes rows x columns of c, where columns is a multiple of 16.
template <class T>
inline void multiply(const Product<T>& of, int64_t rows, int64_t columns) {
  int64_t column = 0;
  // With few rows the product is bound by memory. Wide panels read it in order, as the processor's prefetching needs.
  if (rows == 1)
    for (; column + 2 * WIDE_VECTORS * LANES <= columns; column += 2 * WIDE_VECTORS * LANES)
      panel<2 * WIDE_VECTORS>(of, rows, column);
  if (rows <= WIDE_PANEL_ROWS)
    for (; column + WIDE_VECTORS * LANES <= columns; column += WIDE_VECTORS * LANES)
      panel<WIDE_VECTORS>(of, rows, column);
  for (; column + VECTORS * LANES <= columns; column += VECTORS * LANES) panel<VECTORS>(of, rows, column);
  if constexpr (VECTORS > 2)
    for (; column + 2 * LANES <= columns; column += 2 * LANES) panel<2>(of, rows, column);
  for (; column < columns; column += LANES) panel<1>(of, rows, column);
}

}  // namespace starling
