// The one matrix product everything is made of: base weights, B of an adapter, scores and values of attention.

#pragma once

#include <type_traits>

#include "vector.h"

namespace multilora {

// Columns a product computes at once: bf16 weights of one input are then one cache line.
constexpr int COLUMNS = 32;
constexpr int REGISTERS = COLUMNS / LANES;  // that hold a row's sums

// Rows that share what was loaded of w: as many as leave registers for w and a value of x beside the sums, 24 of 32 in
// AVX-512, 12 of 16 in AVX2.
#if defined(__AVX512F__)
constexpr int ROWS = 12;
#elif defined(__AVX__)
constexpr int ROWS = 3;
#else
constexpr int ROWS = 1;
#endif

// How far ahead of itself a product asks memory for packed weights, in bytes.
constexpr int WEIGHTS_AHEAD = 3072;

// Base weights, packed: panels of COLUMNS columns, [columns / 32, in, 32], so that a product reads memory in order.
// bf16 columns c and c + 16 lie side by side: a shift widens sixteen of them, a mask the other sixteen.
struct PairedBFloat16 {
  uint16_t bits;
};

// Where the processor multiplies bf16: inputs 2k and 2k + 1 of a column lie side by side, as its instruction takes them.
struct PairedInputs {
  uint16_t bits;
};

// Where a weight lies in its panel, and how many a panel of `depth` inputs holds of them.
inline size_t place_in_panel(const float*, int input, int column) { return size_t(input) * COLUMNS + column; }
inline size_t place_in_panel(const PairedBFloat16*, int input, int column) {
  return size_t(input) * COLUMNS + (column < COLUMNS / 2 ? 2 * column : 2 * (column - COLUMNS / 2) + 1);
}
inline size_t place_in_panel(const PairedInputs*, int input, int column) {
  return size_t(input / 2) * 2 * COLUMNS + 2 * column + input % 2;
}

template <class W>
inline size_t panel_size(const W*, int depth) {
  return size_t(depth + depth % (std::is_same_v<W, PairedInputs> ? 2 : 1)) * COLUMNS;
}

inline float widen(PairedBFloat16 value) { return widen(BFloat16{value.bits}); }
inline float widen(PairedInputs value) { return widen(BFloat16{value.bits}); }

// Register i of the columns that lie at `from`.
template <class T>
inline Floats load_columns(const T* from, int i) {
  return load(from + i * LANES);
}
inline Floats load_columns(const PairedBFloat16* from, int i) {
  Words pairs;
  std::memcpy(&pairs, from + 2 * (i % (REGISTERS / 2)) * LANES, sizeof pairs);
  return bits_of<Floats>(i < REGISTERS / 2 ? pairs << 16 : pairs & 0xffff0000u);
}

// Ask memory for as many bytes as a row of w has, `ahead` bytes past it.
template <class W>
inline void prefetch(const W* w, int ahead) {
  for (size_t line = 0; line < COLUMNS * sizeof(W); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(w) + ahead + line);
}

// Memory to ask for while a product runs, evenly over its inputs: memory is then kept busy for as long as the arithmetic
// lasts. A line may be asked for again and again, which costs an instruction and no wait.
struct Ask {
  const void* from;
  size_t bytes;
};

// An Ask on its way: so many bytes further at each input.
struct Asking {
  const char* next;
  size_t step;

  void go() {
    __builtin_prefetch(next);
    next += step;
  }
};
// Nothing to ask for.
struct Silence {
  void go() {}
};

// sums[r] += x[r, k] * w[k], k ascending
template <int R, int ahead, class W, class A>
inline void add_products(Floats (&sums)[R][REGISTERS], const float* x, size_t x_stride, const W* w, size_t w_stride,
                         int depth, A& asking) {
  for (int k = 0; k < depth; ++k, w += w_stride) {
    if constexpr (ahead > 0) prefetch(w, ahead);
    asking.go();
    if constexpr (R < REGISTERS) {  // of x's values and w's columns the fewer wait in registers for the others
      Floats values[R];
      for (int r = 0; r < R; ++r) values[r] = splat(x[r * x_stride + k]);
      for (int i = 0; i < REGISTERS; ++i) {
        const Floats columns = load_columns(w, i);
        for (int r = 0; r < R; ++r) sums[r][i] += values[r] * columns;
      }
    } else {
      Floats columns[REGISTERS];
      for (int i = 0; i < REGISTERS; ++i) columns[i] = load_columns(w, i);
      for (int r = 0; r < R; ++r) {
        const Floats value = splat(x[r * x_stride + k]);
        for (int i = 0; i < REGISTERS; ++i) sums[r][i] += value * columns[i];
      }
    }
  }
}

#if defined(__AVX512BF16__)
// The same of bf16, two inputs at a time: a sum takes the odd one's product, then the even one's. Where depth is odd, x
// and w hold a zero past it.
template <int R, int ahead, class A>
inline void add_products(Floats (&sums)[R][REGISTERS], const BFloat16* x, size_t x_stride, const PairedInputs* w, size_t,
                         int depth, A& asking) {
  for (int k = 0; k < depth; k += 2, w += 2 * COLUMNS) {
    if constexpr (ahead > 0) prefetch(w, ahead), prefetch(w + COLUMNS, ahead);
    asking.go(), asking.go();
    __m512bh columns[REGISTERS];
    for (int i = 0; i < REGISTERS; ++i) std::memcpy(&columns[i], w + 2 * i * LANES, sizeof columns[i]);
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * x_stride + k, sizeof pair);
      const __m512bh values = bits_of<__m512bh>(_mm512_set1_epi32(pair));
      for (int i = 0; i < REGISTERS; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], values, columns[i]);
    }
  }
}
#endif

template <int R, int ahead, class X, class W, class A>
inline void multiply_rows(const X* x, size_t x_stride, const W* w, size_t w_stride, int depth, float* y,
                          size_t y_stride, bool add, A& asking) {
  Floats sums[R][REGISTERS];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < REGISTERS; ++i) sums[r][i] = add ? load(y + r * y_stride + i * LANES) : Floats{};
  add_products<R, ahead>(sums, x, x_stride, w, w_stride, depth, asking);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < REGISTERS; ++i) store(y + r * y_stride + i * LANES, sums[r][i]);
}

template <int R, int ahead, class X, class W, class A>
inline void multiply_rest(int rows, const X* x, size_t x_stride, const W* w, size_t w_stride, int depth, float* y,
                          size_t y_stride, bool add, A& asking) {
  if (rows == R) return multiply_rows<R, ahead>(x, x_stride, w, w_stride, depth, y, y_stride, add, asking);
  if constexpr (R > 1) multiply_rest<R - 1, ahead>(rows, x, x_stride, w, w_stride, depth, y, y_stride, add, asking);
}

// Semantics:
//     y[i, c] = (add ? y[i, c] : 0) + sum over k, ascending:  x[i, k] * w[k, c]        for 32 columns c
// Shape:
//     x: [rows, depth], rows x_stride apart      float32; bf16 where w is of paired inputs
//     w: [depth, 32], rows w_stride apart        float32, bf16, or packed bf16
//     y: [rows, 32], rows y_stride apart         float32
//     ahead: bytes past a row of w at which memory is asked for what comes next; 0 where w is in cache
// Cost: 64 * rows * depth FLOPs; w is read once for every ROWS rows, from cache after the first.
template <int ahead = 0, class X, class W, class A = Silence>
void multiply(int rows, const X* x, size_t x_stride, const W* w, size_t w_stride, int depth, float* y,
              size_t y_stride, bool add, A asking = {}) {
  for (; rows > 0; rows -= ROWS, x += ROWS * x_stride, y += ROWS * y_stride)
    multiply_rest<ROWS, ahead>(rows < ROWS ? rows : ROWS, x, x_stride, w, w_stride, depth, y, y_stride, add, asking);
}

// The same, asking memory for something else meanwhile.
template <int ahead = 0, class X, class W>
void multiply(int rows, const X* x, size_t x_stride, const W* w, size_t w_stride, int depth, float* y,
              size_t y_stride, bool add, Ask ask) {
  const int times = (rows + ROWS - 1) / ROWS;
  const Asking asking{static_cast<const char*>(ask.from), ask.bytes / (size_t(depth) * times)};
  multiply<ahead>(rows, x, x_stride, w, w_stride, depth, y, y_stride, add, asking);
}

}  // namespace multilora
