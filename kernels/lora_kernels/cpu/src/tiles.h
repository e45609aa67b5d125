// Products of bf16 on AMX: eight tiles of sixteen rows by 64 bytes, of which an instruction multiplies two into a third.

#pragma once

#include <algorithm>

#include "packed.h"

namespace multilora {

#if defined(__AMX_BF16__)

// Rows that AMX takes at once: two tiles of sixteen, by two of sixteen columns, in the four of eight tiles that hold sums.
constexpr int TILE_ROWS = 16;
constexpr int TILES_ROWS = 2 * TILE_ROWS;

// What the eight tiles are: sums of the first sixteen rows (0, 1) and of the others (2, 3), x of either (4, 5), w (6, 7).
// Sums and x are as many rows, or where w comes first in a product, as many columns.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes(int of_x, bool w_first) {
    for (int tile = 0; tile < 8; ++tile) {
      const int below = tile < 4 ? tile / 2 : tile % 2;
      const int of_tile = tile > 5 ? TILE_ROWS : below ? std::max(of_x - TILE_ROWS, 1) : std::min(of_x, TILE_ROWS);
      rows[tile] = uint8_t(w_first ? TILE_ROWS : of_tile);
      bytes[tile] = uint16_t(w_first ? of_tile * sizeof(float) : 64);
    }
  }
};

template <bool both>
inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (both) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

// As multiply. An instruction sums 32 inputs in an order of its own, the same for every row of a tile and however many
// there are.
template <bool both, int ahead, class A>
inline void multiply_tiles(const BFloat16* x, size_t x_stride, Strided<PairedInputs> w, int depth, float* y,
                           size_t y_stride, bool add, A& asking) {
  const size_t x_bytes = x_stride * sizeof *x, y_bytes = y_stride * sizeof *y, w_bytes = 2 * COLUMNS * sizeof *w.at;
  const BFloat16* x_below = x + TILE_ROWS * x_stride;
  float* y_below = y + TILE_ROWS * y_stride;
  if (add) {
    _tile_loadd(0, y, y_bytes);
    _tile_loadd(1, y + TILE_ROWS, y_bytes);
    if constexpr (both) {
      _tile_loadd(2, y_below, y_bytes);
      _tile_loadd(3, y_below + TILE_ROWS, y_bytes);
    }
  } else {
    zero_sums<both>();
  }
  for (int k = 0; k < depth; k += PAIRED_INPUTS) {
    const PairedInputs* from = w.at;
    w.at += PAIRED_INPUTS * COLUMNS;
    if constexpr (ahead > 0) prefetch(from, PAIRED_INPUTS * COLUMNS * sizeof *from, ahead);
    asking.go_far(PAIRED_INPUTS);
    _tile_loadd(4, x + k, x_bytes);
    _tile_loadd(6, from, w_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, from + COLUMNS, w_bytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (both) {
      _tile_loadd(5, x_below + k, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, y, y_bytes);
  _tile_stored(1, y + TILE_ROWS, y_bytes);
  if constexpr (both) {
    _tile_stored(2, y_below, y_bytes);
    _tile_stored(3, y_below + TILE_ROWS, y_bytes);
  }
}

// Rows of x that a thread's tiles are shaped for, negative where w comes first; 0 before they are. To shape them takes as
// long as a small product.
inline thread_local int tiles_shaped_for = 0;

inline void shape_tiles(int rows, bool w_first) {
  const int wanted = w_first ? -rows : rows;
  if (wanted == tiles_shaped_for) return;
  const TileShapes shapes(rows, w_first);
  _tile_loadconfig(&shapes);
  tiles_shaped_for = wanted;
}

// A thread's tiles are state that the kernel saves at every switch until they are let go.
inline void release_tiles() {
  _tile_release();
  tiles_shaped_for = 0;
}

template <int ahead, class A>
inline void multiply_some(int rows, const BFloat16* x, size_t x_stride, Strided<PairedInputs> w, int depth, float* y,
                          size_t y_stride, bool add, A& asking) {
  asm volatile("" ::: "memory");  // the intrinsics do not tell that they read
  shape_tiles(rows, false);
  if (rows > TILE_ROWS) multiply_tiles<true, ahead>(x, x_stride, w, depth, y, y_stride, add, asking);
  else multiply_tiles<false, ahead>(x, x_stride, w, depth, y, y_stride, add, asking);
}

#else
inline void release_tiles() {}
#endif

}  // namespace multilora
