// Base weights in eight bits.

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

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)  // tile_blocks.h has what AMX takes

// Registers of columns of two inputs, rounded and laid side by side.
inline void store_pairs(Floats even, Floats odd, PairedInputs* to) {
  alignas(64) static constexpr uint16_t SIDES[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = bits_of<__m512i>(_mm512_cvtne2ps_pbh(bits_of<__m512>(odd), bits_of<__m512>(even)));
  _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(SIDES), both));
}

// The same in bf16: each block is unpacked into a room of SCALED * COLUMNS weights first.
class UnpackedBlocks {
 public:
  static constexpr bool PAIRS = true;

  UnpackedBlocks(const Int8Block* panel, PairedInputs* room) : next_(panel), room_(room) {}

  int run(int left, int ahead) {
    BlockColumns block(next_++);
    block.run(SCALED, ahead);
    for (int input = 0; input < SCALED; input += 2) {
      Floats even[REGISTERS];
      for (int i = 0; i < REGISTERS; ++i) even[i] = block.columns(i);
      block.next();
      if (ahead > 0) block.ask(ahead);
      for (int i = 0; i < REGISTERS; ++i) store_pairs(even[i], block.columns(i), room_ + input * COLUMNS + i * 2 * LANES);
      block.next();
    }
    at = room_;
    return std::min(left, SCALED);
  }
  void ask(int) const {}
  void next() { at += COLUMNS; }

  const PairedInputs* at = nullptr;

 private:
  const Int8Block* next_;
  PairedInputs* room_;
};

inline UnpackedBlocks walk(const Int8Block* panel, PairedInputs* room) { return {panel, room}; }

// A panel in bf16, as products of many rows take it.
inline void widen_panel(const Int8Block* panel, int inputs, PairedInputs* to) {
  for (int k = 0; k < inputs; k += SCALED, to += SCALED * COLUMNS) UnpackedBlocks(panel++, to).run(SCALED, 0);
}

#endif

template <Block B>
inline size_t panel_size(const B*, int inputs) {
  return size_t(inputs + SCALED - 1) / SCALED;
}

// One weight of a panel of blocks, in float32.
template <Block B>
inline float weight_at(const B* panel, int input, int column) {
  return panel[input / SCALED].at(input % SCALED, column);
}

}  // namespace multilora
