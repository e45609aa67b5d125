// The one matrix product everything is made of: base weights, B of an adapter, scores and values of attention.

#pragma once

#include <algorithm>
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

// Rows that AMX takes at once: two tiles of sixteen, by two of sixteen columns, in the four of eight tiles that hold sums.
constexpr int TILE_ROWS = 16;
constexpr int TILES_ROWS = 2 * TILE_ROWS;

// How far ahead of itself a product asks memory for packed weights, in bytes.
constexpr int WEIGHTS_AHEAD = 4096;

// Base weights, packed: panels of COLUMNS columns, [columns / 32, in, 32], so that a product reads memory in order.
// bf16 columns c and c + 16 lie side by side: a shift widens sixteen of them, a mask the other sixteen.
struct PairedBFloat16 {
  uint16_t bits;
};

// Where the processor multiplies bf16: inputs 2k and 2k + 1 of a column lie side by side, as its instruction takes them.
struct PairedInputs {
  uint16_t bits;
};

#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_BF16 = true;
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif

// Inputs such an instruction takes: a pair, or a row of a tile. Weights and inputs have zeros up to a multiple of it.
#if defined(__AMX_BF16__)
constexpr int PAIRED_INPUTS = 32;
#else
constexpr int PAIRED_INPUTS = 2;
#endif
inline int whole_inputs(int inputs) { return (inputs + PAIRED_INPUTS - 1) / PAIRED_INPUTS * PAIRED_INPUTS; }

// Inputs that share a scale in a column of eight-bit weights: 36 bytes where bf16 has 64, and GGUF's Q8_0 kept as it is.
// Fewer scales cost tokens: 97 in 100 were float32's with 32 inputs a scale, 95 with 64, 93 with 128 (kernels/README.md).
constexpr int SCALED = 32;

// Base weights in eight bits: [columns / 32, ceil(in / SCALED)] of these. A weight is values * scales, in float32.
struct Int8Block {
  float scales[COLUMNS];
  int8_t values[SCALED][COLUMNS];
};

// Where a weight lies in its panel.
inline size_t place_in_panel(const float*, int input, int column) { return size_t(input) * COLUMNS + column; }
inline size_t place_in_panel(const PairedBFloat16*, int input, int column) {
  return size_t(input) * COLUMNS + (column < COLUMNS / 2 ? 2 * column : 2 * (column - COLUMNS / 2) + 1);
}
inline size_t place_in_panel(const PairedInputs*, int input, int column) {
  return size_t(input / 2) * 2 * COLUMNS + 2 * column + input % 2;
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

// Ask memory for as many bytes, `ahead` bytes past w.
inline void prefetch(const void* w, size_t bytes, int ahead) {
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(w) + ahead + line, 0, 2);
}

// Columns of w on a product's way down its inputs, which come in runs: run() starts one and says how long it is.
template <class W>
struct Strided {
  const W* at;
  size_t stride;

  int run(int left, int) { return left; }
  Floats columns(int i) const { return load_columns(at, i); }
  void ask(int ahead) const { prefetch(at, COLUMNS * sizeof(W), ahead); }
  void next() { at += stride; }
};

struct Int8Columns {
  const Int8Block* block;
  const int8_t* at = nullptr;
  Floats scales[REGISTERS] = {};

  int run(int left, int ahead) {
    if (ahead > 0) prefetch(block, sizeof block->scales, ahead);
    for (int i = 0; i < REGISTERS; ++i) scales[i] = load(block->scales + i * LANES);
    at = block->values[0];
    ++block;
    return left < SCALED ? left : SCALED;
  }
  Floats columns(int i) const { return load(at + i * LANES) * scales[i]; }
  void ask(int ahead) const { prefetch(at, COLUMNS, ahead); }
  void next() { at += COLUMNS; }
};

// A panel of packed weights, from its first input on.
template <class W>
inline Strided<W> walk(const W* panel) {
  return {panel, COLUMNS};
}
inline Int8Columns walk(const Int8Block* panel) { return {panel}; }

// How many a panel of `inputs` holds of what it is made of, and so where a later input lies, a multiple of SCALED.
template <class W>
inline size_t panel_size(const W*, int inputs) {
  return size_t(std::is_same_v<W, PairedInputs> ? whole_inputs(inputs) : inputs) * COLUMNS;
}
inline size_t panel_size(const Int8Block*, int inputs) { return size_t(inputs + SCALED - 1) / SCALED; }

template <class W>
inline const W* past(const W* panel, int inputs) {
  return panel + panel_size(panel, inputs);
}

// One weight of a panel.
template <class W>
inline float weight_at(const W* panel, int input, int column) {
  return widen(panel[place_in_panel(panel, input, column)]);
}
inline float weight_at(const Int8Block* panel, int input, int column) {
  const Int8Block& block = panel[input / SCALED];
  return float(block.values[input % SCALED][column]) * block.scales[column];
}

// A panel's columns in float32: [inputs, 32].
template <class W>
inline void widen_panel(const W* panel, int inputs, float* to) {
  auto w = walk(panel);
  for (int k = 0; k < inputs;)
    for (const int end = k + w.run(inputs - k, 0); k < end; ++k, w.next(), to += COLUMNS)
      for (int i = 0; i < REGISTERS; ++i) store(to + i * LANES, w.columns(i));
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
  void go_far(int inputs) {
    prefetch(next, inputs * step, 0);
    next += inputs * step;
  }
};
// Asks one after another, ranges(0), ranges(1) …, each over ASKED inputs.
constexpr int ASKED = 128;
template <class Ranges>
struct AskingInTurn {
  Ranges ranges;
  int range = 0, left = 0;
  Asking now{};

  void go() { of(1).go(); }
  void go_far(int inputs) { of(inputs).go_far(inputs); }
  Asking& of(int inputs) {
    if (left == 0) {
      const Ask ask = ranges(range++);
      now = {static_cast<const char*>(ask.from), ask.bytes / ASKED};
      left = ASKED;
    }
    left -= inputs;
    return now;
  }
};
// Nothing to ask for.
struct Silence {
  void go() {}
  void go_far(int) {}
};

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
template <int R, int ahead, class A>
inline void add_products(Floats (&sums)[R][REGISTERS], const BFloat16* x, size_t x_stride, Strided<PairedInputs> w,
                         int depth, A& asking) {
  for (int k = 0; k < depth; k += 2) {
    __m512bh columns[REGISTERS];
    for (int i = 0; i < REGISTERS; ++i) std::memcpy(&columns[i], w.at + 2 * i * LANES, sizeof columns[i]);
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
constexpr int rows_at_once(const C&) {
  return ROWS;
}
template <int ahead, class X, class C, class A>
inline void multiply_some(int rows, const X* x, size_t x_stride, C w, int depth, float* y, size_t y_stride, bool add,
                          A& asking) {
  multiply_rest<ROWS, ahead>(rows, x, x_stride, w, depth, y, y_stride, add, asking);
}

#if defined(__AMX_BF16__)
constexpr int rows_at_once(const Strided<PairedInputs>&) { return TILES_ROWS; }

// What the eight tiles are: sums of the first sixteen rows (0, 1) and of the others (2, 3), x of either (4, 5), w (6, 7).
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16];

  explicit TileShapes(int of_x)
      : rows{uint8_t(std::min(of_x, TILE_ROWS)), rows[0], uint8_t(std::max(of_x - TILE_ROWS, 1)), rows[2],
             rows[0],  rows[2], TILE_ROWS, TILE_ROWS} {}
};

// The same on AMX: 32 inputs an instruction, whose sums it takes in an order of its own, the same for every row of a tile
// and however many there are.
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
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (both) {
      _tile_zero(2);
      _tile_zero(3);
    }
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

// Rows of x that a thread's tiles are shaped for; 0 before they are. To shape them takes as long as a small product.
inline thread_local int tiles_shaped_for = 0;

inline void shape_tiles(int rows) {
  if (rows == tiles_shaped_for) return;
  const TileShapes shapes(rows);
  _tile_loadconfig(&shapes);
  tiles_shaped_for = rows;
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
  shape_tiles(rows);
  if (rows > TILE_ROWS) multiply_tiles<true, ahead>(x, x_stride, w, depth, y, y_stride, add, asking);
  else multiply_tiles<false, ahead>(x, x_stride, w, depth, y, y_stride, add, asking);
}
#else
inline void release_tiles() {}
#endif

// Semantics:
//     y[i, c] = (add ? y[i, c] : 0) + sum over k, ascending:  x[i, k] * w[k, c]        for 32 columns c
// Shape:
//     x: [rows, depth], rows x_stride apart      float32; bf16 where w is of paired inputs
//     w: [depth, 32], as it is walked            float32, bf16, packed bf16, or eight bits
//     y: [rows, 32], rows y_stride apart         float32
//     ahead: bytes past a row of w at which memory is asked for what comes next; 0 where w is in cache
// Cost: 64 * rows * depth FLOPs; w is read once for every ROWS rows, from cache after the first.
template <int ahead = 0, class X, class C, class A = Silence>
void multiply(int rows, const X* x, size_t x_stride, C w, int depth, float* y, size_t y_stride, bool add, A asking = {}) {
  constexpr int most = rows_at_once(C{});
  for (; rows > 0; rows -= most, x += most * x_stride, y += most * y_stride)
    multiply_some<ahead>(std::min(rows, most), x, x_stride, w, depth, y, y_stride, add, asking);
}

// The same, asking memory for something else meanwhile.
template <int ahead = 0, class X, class C>
void multiply(int rows, const X* x, size_t x_stride, C w, int depth, float* y, size_t y_stride, bool add, Ask ask) {
  const int times = (rows + rows_at_once(w) - 1) / rows_at_once(w);
  const Asking asking{static_cast<const char*>(ask.from), ask.bytes / (size_t(depth) * times)};
  multiply<ahead>(rows, x, x_stride, w, depth, y, y_stride, add, asking);
}

}  // namespace multilora
