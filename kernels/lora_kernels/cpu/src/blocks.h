// Base weights in blocks of fewer bits: eight, in float32.

#pragma once

#include <algorithm>

#include "packed.h"

namespace multilora {

// Inputs that share a scale in a column of weights of fewer bits. Fewer scales cost tokens: 97 in 100 were float32's with 32
// inputs a scale, 95 with 64, 93 with 128 (kernels/README.md).
constexpr int SCALED = 32;

// [columns / 32, ceil(in / SCALED)] of these, 36 bytes where bf16 has 64. A weight is value * scale, in float32, or where
// products take bf16, rounded to it.
struct Int8Block {
  float scales[COLUMNS];
  int8_t values[SCALED][COLUMNS];

  void put(int input, int column, int value) { values[input][column] = int8_t(value); }
  float at(int input, int column) const { return float(values[input][column]) * scales[column]; }
};

template <class W>
concept Block = requires(const W& block) { block.at(0, 0); };

// A product's way down blocks, in float32.
class BlockColumns {
 public:
  static constexpr bool PAIRS = false;

  explicit BlockColumns(const Int8Block* panel) : next_(panel) {}

  int run(int left, int ahead) {
    if (ahead > 0) prefetch(next_, sizeof next_->scales, ahead);
    for (int i = 0; i < REGISTERS; ++i) scales_[i] = load(next_->scales + i * LANES);
    at_ = next_++->values[0];
    return std::min(left, SCALED);
  }
  Floats columns(int i) const { return load(at_ + i * LANES) * scales_[i]; }
  void ask(int ahead) const { prefetch(at_, COLUMNS, ahead); }
  void next() { at_ += COLUMNS; }

 private:
  const Int8Block* next_;
  const int8_t* at_ = nullptr;
  Floats scales_[REGISTERS] = {};
};

inline BlockColumns walk(const Int8Block* panel, float* = nullptr) { return BlockColumns(panel); }

template <Block B>
inline size_t panel_size(const B*, int inputs) {
  return size_t(inputs + SCALED - 1) / SCALED;
}

// One weight of a panel of blocks, in float32.
template <Block B>
inline float weight_at(const B* panel, int input, int column) {
  return panel[input / SCALED].at(input % SCALED, column);
}

// Blocks of eight bits, of four and of twelve, of weights that stand for T; void where there are none.
template <class T>
struct BlocksOf {
  using Eight = Int8Block;
  using Four = void;
  using Twelve = void;
};

// Whether a quantized file's own blocks are kept, and give what the weights they stand for would give.
template <class T>
constexpr bool KEEPS_BLOCKS = !std::is_void_v<typename BlocksOf<T>::Four>;

// Whether weights may lie in twelve bits.
template <class T>
constexpr bool COMPRESSES = !std::is_void_v<typename BlocksOf<T>::Twelve>;

}  // namespace multilora
