// The matrix product of gemm.h by the tile registers of Intel's AMX: 16 rows by 32 bf16, multiplied as pairs.
//
// The rows of B are packed as pairs first. A tile of B is 32 of its rows and 16 of its columns, which is 1 KiB.
#pragma once

#include "gemm.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define STARLING_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace starling {

constexpr int64_t TILE_DEPTH = 32;      // rows of B in a tile
constexpr int64_t MIN_ROWS_TILED = 16;  // with fewer rows of A, a tile is mostly empty
constexpr int64_t SPARE_ROWS = 32;      // rows behind the last of A and of c that are read, or written, as well

#if defined(STARLING_TILES)

// Whether Linux lets this process use the tile registers.
inline bool has_tiles() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
}

// The tile registers are this thread's in its scope.
struct TileScope {
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TileScope() { _tile_release(); }
};

// Packs `depth` rows of B, a multiple of 32, of which null rows are zeros. Tile (column block, depth block) is at
// tiles[(column block * depth / 32 + depth block) * 512].
inline void pack_tiles(const at::BFloat16* const* rows, int64_t depth, int64_t columns, at::BFloat16* tiles) {
  const int64_t blocks = depth / TILE_DEPTH;
  const auto load = [](const at::BFloat16* row, int64_t column) {
    return row ? _mm512_cvtepu16_epi32(load_raw<__m256i>(row + column)) : _mm512_setzero_si512();
  };
  for (int64_t k = 0; k < depth; k += 2)
    for (int64_t column = 0; column < columns; column += LANES) {
      const __m512i pairs = _mm512_or_si512(load(rows[k], column), _mm512_slli_epi32(load(rows[k + 1], column), 16));
      at::BFloat16* tile = tiles + (column / LANES * blocks + k / TILE_DEPTH) * TILE_DEPTH * LANES;
      std::memcpy((void*)(tile + k % TILE_DEPTH * LANES), &pairs, sizeof(pairs));
    }
}

// The product of 32 rows of A, or of 16, and of two blocks of columns, or of one, to 16 rows of c each.
template <bool TWO_ROWS, bool TWO_COLUMNS>
inline void multiply_tile(const at::BFloat16* a, int64_t a_stride, const at::BFloat16* tiles, int64_t blocks, float* c,
                          int64_t c_stride) {
  const int64_t a_bytes = a_stride * 2, c_bytes = c_stride * 4, tile = TILE_DEPTH * LANES;
  asm volatile("" ::: "memory");  // loads of tiles don't tell the compiler that they read memory
  _tile_zero(0);
  if constexpr (TWO_COLUMNS) _tile_zero(1);
  if constexpr (TWO_ROWS) _tile_zero(2);
  if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_zero(3);
  for (int64_t k = 0; k < blocks; ++k) {
    _tile_loadd(4, a + k * TILE_DEPTH, a_bytes);
    _tile_loadd(6, tiles + k * tile, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (TWO_COLUMNS) {
      _tile_loadd(7, tiles + (blocks + k) * tile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (TWO_ROWS) {
      _tile_loadd(5, a + 16 * a_stride + k * TILE_DEPTH, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (TWO_COLUMNS) _tile_stored(1, c + LANES, c_bytes);
  if constexpr (TWO_ROWS) _tile_stored(2, c + 16 * c_stride, c_bytes);
  if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, c + 16 * c_stride + LANES, c_bytes);
  asm volatile("" ::: "memory");
}

inline void multiply_tile(bool two_rows, bool two_columns, const at::BFloat16* a, int64_t a_stride,
                          const at::BFloat16* tiles, int64_t blocks, float* c, int64_t c_stride) {
  if (two_rows && two_columns) return multiply_tile<true, true>(a, a_stride, tiles, blocks, c, c_stride);
  if (two_rows) return multiply_tile<true, false>(a, a_stride, tiles, blocks, c, c_stride);
  if (two_columns) return multiply_tile<false, true>(a, a_stride, tiles, blocks, c, c_stride);
  multiply_tile<false, false>(a, a_stride, tiles, blocks, c, c_stride);
}

// c = a x b for `rows` rows and packed b of `blocks` by `columns` tiles. Writes up to SPARE_ROWS rows of c more.
inline void multiply_tiles(const at::BFloat16* a, int64_t a_stride, const at::BFloat16* tiles, int64_t blocks,
                           int64_t columns, int64_t rows, float* c, int64_t c_stride) {
  for (int64_t column = 0; column < columns; column += 2)
    for (int64_t row = 0; row < rows; row += 32)
      multiply_tile(row + 16 < rows, column + 1 < columns, a + row * a_stride, a_stride,
                    tiles + column * blocks * TILE_DEPTH * LANES, blocks, c + row * c_stride + column * LANES, c_stride);
}

// sums = decays[row] * sums + a x b, of which only `rows` rows are written.
inline void add_tiles(const at::BFloat16* a, int64_t a_stride, const at::BFloat16* tiles, int64_t blocks, int64_t columns,
                      int64_t rows, float* sums, int64_t stride, const float* decays) {
  alignas(64) float part[32 * 2 * LANES];
  for (int64_t column = 0; column < columns; column += 2)
    for (int64_t row = 0; row < rows; row += 32) {
      multiply_tile(row + 16 < rows, column + 1 < columns, a + row * a_stride, a_stride,
                    tiles + column * blocks * TILE_DEPTH * LANES, blocks, part, 2 * LANES);
      for (int64_t r = row; r < std::min(rows, row + 32); ++r)
        for (int64_t lane = 0; lane < std::min<int64_t>(2, columns - column) * LANES; lane += LANES) {
          float* to = sums + r * stride + column * LANES + lane;
          store(to, floats_at(to) * decays[r] + floats_at(part + (r - row) * 2 * LANES + lane));
        }
    }
}

#else

inline bool has_tiles() { return false; }

#endif

}  // namespace starling
