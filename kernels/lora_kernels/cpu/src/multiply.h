// The one matrix product everything is made of: base weights, B of an adapter, scores and values of attention.

#pragma once

#include <algorithm>

#include "packed.h"
#include "paired_blocks.h"
#include "tile_blocks.h"
#include "tiles.h"
#include "vector.h"

namespace multilora {

// Rows that share what was loaded of w: as many as leave registers for w and a value of x beside the sums, 24 of 32 in
// AVX-512, 12 of 16 in AVX2.
#if defined(__AVX512F__)
constexpr int ROWS = 12;
#elif defined(__AVX__)
constexpr int ROWS = 3;
#else
constexpr int ROWS = 1;
#endif

// sums[r] += x[r, k] * w[k], k ascending
template <int R, int ahead, class C, class A>
inline void add_products(Floats (&sums)[R][REGISTERS], const float* x, size_t x_stride, C w, int depth, A& asking) {
  for (int k = 0; k < depth;)
    for (const int end = k + w.run(depth - k, ahead); k < end; ++k, w.next()) {
      if constexpr (ahead > 0) w.ask(ahead);
      asking.go();
      if constexpr (R < REGISTERS) {  // of x's values and w's columns the fewer wait in registers for the others
        Floats values[R];
        for (int r = 0; r < R; ++r) values[r] = splat(x[r * x_stride + k]);
        for (int i = 0; i < REGISTERS; ++i) {
          const Floats columns = w.columns(i);
          for (int r = 0; r < R; ++r) sums[r][i] += values[r] * columns;
        }
      } else {
        Floats columns[REGISTERS];
        for (int i = 0; i < REGISTERS; ++i) columns[i] = w.columns(i);
        for (int r = 0; r < R; ++r) {
          const Floats value = splat(x[r * x_stride + k]);
          for (int i = 0; i < REGISTERS; ++i) sums[r][i] += value * columns[i];
        }
      }
    }
}

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
// The same of bf16, two inputs at a time: a sum takes the odd one's product, then the even one's. Where depth is odd, x
// and w hold a zero past it.
template <int R, int ahead, class C, class A>
inline void add_products(Floats (&sums)[R][REGISTERS], const BFloat16* x, size_t x_stride, C w, int depth, A& asking) {
  for (int k = 0; k < depth;)
    for (const int end = k + w.run(depth - k, ahead); k < end; k += 2) {
      __m512bh columns[REGISTERS];
      for (int i = 0; i < REGISTERS; ++i) std::memcpy(&columns[i], w.pairs(i), sizeof columns[i]);
      for (int input = 0; input < 2; ++input, w.next()) {
        if constexpr (ahead > 0) w.ask(ahead);
        asking.go();
      }
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, x + r * x_stride + k, sizeof pair);
        const __m512bh values = bits_of<__m512bh>(_mm512_set1_epi32(pair));
        for (int i = 0; i < REGISTERS; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], values, columns[i]);
      }
    }
}
#endif

template <int R, int ahead, class X, class C, class A>
inline void multiply_rows(const X* x, size_t x_stride, C w, int depth, float* y, size_t y_stride, bool add, A& asking) {
  Floats sums[R][REGISTERS];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < REGISTERS; ++i) sums[r][i] = add ? load(y + r * y_stride + i * LANES) : Floats{};
  add_products<R, ahead>(sums, x, x_stride, w, depth, asking);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < REGISTERS; ++i) store(y + r * y_stride + i * LANES, sums[r][i]);
}

template <int R, int ahead, class X, class C, class A>
inline void multiply_rest(int rows, const X* x, size_t x_stride, C w, int depth, float* y, size_t y_stride, bool add,
                          A& asking) {
  if (rows == R) return multiply_rows<R, ahead>(x, x_stride, w, depth, y, y_stride, add, asking);
  if constexpr (R > 1) multiply_rest<R - 1, ahead>(rows, x, x_stride, w, depth, y, y_stride, add, asking);
}

// The most rows of a product that are computed at once, by what it walks; and so many of them, or fewer.
template <class C>
constexpr int rows_at_once() {
#if defined(__AMX_BF16__)
  if constexpr (C::PAIRS) return TILES_ROWS;
#endif
  return ROWS;
}
template <int ahead, class X, class C, class A>
inline void multiply_some(int rows, const X* x, size_t x_stride, C w, int depth, float* y, size_t y_stride, bool add,
                          A& asking) {
  multiply_rest<ROWS, ahead>(rows, x, x_stride, w, depth, y, y_stride, add, asking);
}

// How often w is walked: by as many rows each time, as a few alone would wait for their own sums.
template <class C>
constexpr int times(int rows) {
  return (rows + rows_at_once<C>() - 1) / rows_at_once<C>();
}

// Semantics:
//     y[i, c] = (add ? y[i, c] : 0) + sum over k, ascending:  x[i, k] * w[k, c]        for 32 columns c
//     (of paired inputs by their instruction's pairs, on AMX by its 32)
// Shape:
//     x: [rows, depth], rows x_stride apart      float32; bf16 where w is of paired inputs, as pair_rows says where it
//                                                is blocks in tiles, to which nothing is added and rows are few
//     w: [depth, 32], as it is walked            float32, bf16, packed bf16, or eight bits
//     y: [rows, 32], rows y_stride apart         float32
//     ahead: bytes past a row of w at which memory is asked for what comes next; 0 where w is in cache
// Cost: 64 * rows * depth FLOPs; w is read once for every ROWS rows, from cache after the first.
template <int ahead = 0, class X, class C, class A = Silence>
void multiply(int rows, const X* x, size_t x_stride, C w, int depth, float* y, size_t y_stride, bool add, A asking = {}) {
  for (int left = times<C>(rows); left > 0; --left) {
    const int here = (rows + left - 1) / left;
    multiply_some<ahead>(here, x, x_stride, w, depth, y, y_stride, add, asking);
    rows -= here, x += here * x_stride, y += here * y_stride;
  }
}

// The same, asking memory for something else meanwhile.
template <int ahead = 0, class X, class C>
void multiply(int rows, const X* x, size_t x_stride, C w, int depth, float* y, size_t y_stride, bool add, Ask ask) {
  const Asking asking{static_cast<const char*>(ask.from), ask.bytes / (size_t(depth) * times<C>(rows))};
  multiply<ahead>(rows, x, x_stride, w, depth, y, y_stride, add, asking);
}

}  // namespace multilora
