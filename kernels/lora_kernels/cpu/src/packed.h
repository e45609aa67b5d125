// Base weights as they are packed, and a product's way through them.

#pragma once

#include <type_traits>

#include "asking.h"
#include "vector.h"

namespace multilora {

// Columns a product computes at once: bf16 weights of one input are then one cache line.
constexpr int COLUMNS = 32;
constexpr int REGISTERS = COLUMNS / LANES;  // that hold a row's sums

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

// Columns of w on a product's way down its inputs, which come in runs: run() starts one and says how long it is. Where
// inputs come in pairs, pairs(i) is where a product finds register i of them.
template <class W>
struct Strided {
  static constexpr bool PAIRS = std::is_same_v<W, PairedInputs>;

  const W* at;
  size_t stride;

  int run(int left, int) { return left; }
  Floats columns(int i) const { return load_columns(at, i); }
  const W* pairs(int i) const { return at + 2 * i * LANES; }
  void ask(int ahead) const { prefetch(at, COLUMNS * sizeof(W), ahead); }
  void next() { at += stride; }
};

// A panel of packed weights, from its first input on.
template <class W>
inline Strided<W> walk(const W* panel, void* = nullptr) {
  return {panel, COLUMNS};
}

// How many a panel of `inputs` holds of what it is made of, and so where a later input lies.
template <class W>
inline size_t panel_size(const W*, int inputs) {
  return size_t(std::is_same_v<W, PairedInputs> ? whole_inputs(inputs) : inputs) * COLUMNS;
}

template <class W>
inline const W* past(const W* panel, int inputs) {
  return panel + panel_size(panel, inputs);
}

// One weight of a panel.
template <class W>
inline float weight_at(const W* panel, int input, int column) {
  return widen(panel[place_in_panel(panel, input, column)]);
}

// A panel's columns in float32: [inputs, 32].
template <class W>
inline void widen_panel(const W* panel, int inputs, float* to) {
  auto w = walk(panel);
  for (int k = 0; k < inputs;)
    for (const int end = k + w.run(inputs - k, 0); k < end; ++k, w.next(), to += COLUMNS)
      for (int i = 0; i < REGISTERS; ++i) store(to + i * LANES, w.columns(i));
}

}  // namespace multilora
