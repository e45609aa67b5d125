// Blocks of fewer bits where AMX multiplies them: a tile of sixteen columns by 32 inputs is unpacked, and multiplied by a
// tile of pairs of inputs of up to sixteen rows.

#pragma once

#include "blocks.h"
#include "tiles.h"

namespace multilora {

// A block that stands for bf16 weights, and is unpacked into tiles of them.
template <class W>
concept TileBlock = Block<W> && requires { &W::unpack; };

// A product's way down such blocks, each unpacked into a room of COLUMNS * SCALED weights.
template <class B>
struct TilesOfBlocks;

#if defined(__AMX_BF16__)

// As Int8Block, a column's inputs side by side: GGUF's Q8_0.
struct Int8Tiles {
  float scales[COLUMNS];
  int8_t values[COLUMNS][SCALED];

  void put(int input, int column, int value) { values[column][input] = int8_t(value); }
  float at(int input, int column) const { return float(values[column][input]) * scales[column]; }

  // [COLUMNS, SCALED], memory being asked for what lies `ahead` bytes further.
  void unpack(BFloat16* to, int ahead) const {
    constexpr int part = sizeof *this / COLUMNS;
    for (int column = 0; column < COLUMNS; ++column, to += SCALED) {
      if (ahead > 0) prefetch(reinterpret_cast<const char*>(this) + column * part, part, ahead);
      const Floats scale = splat(scales[column]);
      const Floats low = load(values[column]) * scale, high = load(values[column] + LANES) * scale;
      _mm512_store_si512(to, bits_of<__m512i>(_mm512_cvtne2ps_pbh(bits_of<__m512>(high), bits_of<__m512>(low))));
    }
  }
};

// A weight is value * scale + least, as in GGUF's Q4_0 and Q4_1: 24 bytes where bf16 has 64. A scale has 11 bits, so the
// product is exact and it is all one whether it is rounded before the sum. A word holds an input of four columns, the first
// in its lowest bits: the sixteen weights that a column's values may be are computed once, and an instruction looks up 32.
struct Int4Tiles {
  float scales[COLUMNS], least[COLUMNS];
  uint16_t values[COLUMNS / 4][SCALED];

  void put(int input, int column, int value) { values[column / 4][input] |= uint16_t(value << column % 4 * 4); }
  float at(int input, int column) const {
    return float(values[column / 4][input] >> column % 4 * 4 & 15) * scales[column] + least[column];
  }

  void unpack(BFloat16* to, int ahead) const {
    constexpr int part = sizeof *this / (COLUMNS / 4);
    for (int four = 0; four < COLUMNS / 4; ++four, to += 4 * SCALED) {
      if (ahead > 0) prefetch(reinterpret_cast<const char*>(this) + four * part, part, ahead);
      const __m512i words = _mm512_load_si512(values[four]);
      look_up(words, 4 * four, to);
      look_up(_mm512_srli_epi16(words, 8), 4 * four + 2, to + 2 * SCALED);
    }
  }

 private:
  Floats choices(int column) const {
    return __builtin_convertvector(NUMBERS, Floats) * splat(scales[column]) + splat(least[column]);
  }
  // Two columns, by the lowest bits of words; the table holds the choices of the one, then of the other.
  void look_up(__m512i words, int column, BFloat16* to) const {
    const __m512bh table = _mm512_cvtne2ps_pbh(bits_of<__m512>(choices(column + 1)), bits_of<__m512>(choices(column)));
    const __m512i fifteen = _mm512_set1_epi16(15), sixteen = _mm512_set1_epi16(16);
    const __m512i first = _mm512_and_si512(words, fifteen);
    const __m512i second = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(words, 4), fifteen), sixteen);
    _mm512_store_si512(to, _mm512_permutexvar_epi16(first, bits_of<__m512i>(table)));
    _mm512_store_si512(to + SCALED, _mm512_permutexvar_epi16(second, bits_of<__m512i>(table)));
  }
};

template <class B>
struct TilesOfBlocks {
  static constexpr bool PAIRS = true;

  const B* block;
  BFloat16* room;

  const BFloat16* take(int ahead) {
    (block++)->unpack(room, ahead);
    return room;
  }
};

template <TileBlock B>
inline TilesOfBlocks<B> walk(const B* panel, PairedInputs* room) {
  return {panel, reinterpret_cast<BFloat16*>(room)};
}

// Sixteen registers of sixteen words, rows for columns.
template <int half, int... lane>
inline void exchange(Words& low, Words& high, std::integer_sequence<int, lane...>) {
  const Words to_low = __builtin_shufflevector(low, high, (lane & half ? LANES + lane - half : lane)...);
  high = __builtin_shufflevector(low, high, (lane & half ? LANES + lane : lane + half)...);
  low = to_low;
}
template <int half = LANES / 2>
inline void transpose(Words (&words)[LANES]) {
  for (int i = 0; i < LANES; ++i)
    if (!(i & half)) exchange<half>(words[i], words[i + half], std::make_integer_sequence<int, LANES>());
  if constexpr (half > 1) transpose<half / 2>(words);
}

// x [rows, depth] as its product with such blocks takes it: by sixteen rows, [ceil(depth / 32) * 16, rows] pairs.
inline void pair_rows(const BFloat16* x, size_t x_stride, int rows, int depth, BFloat16* to) {
  const int pairs = whole_inputs(depth) / 2;
  for (; rows > 0; rows -= TILE_ROWS, x += TILE_ROWS * x_stride) {
    const int here = std::min(rows, TILE_ROWS);
    for (int pair = 0; pair < pairs; pair += LANES) {
      Words words[LANES] = {};
      for (int row = 0; row < here; ++row) std::memcpy(&words[row], x + row * x_stride + 2 * pair, sizeof words[row]);
      transpose(words);
      for (int i = 0; i < LANES; ++i, to += 2 * here) std::memcpy(to, &words[i], here * sizeof(uint32_t));
    }
  }
}

// As multiply, of paired rows. A row of sums is of one column, so that tiles are transposed at the end. What an instruction
// sums, and in which order, does not depend on which of its tiles w is: the bits are those of multiply_tiles.
template <bool both, int ahead, class B, class A>
inline void multiply_paired(int rows, const BFloat16* x, TilesOfBlocks<B> w, int depth, float* y, size_t y_stride,
                            A& asking) {
  constexpr int w_bytes = SCALED * sizeof *x;
  const int above = both ? TILE_ROWS : rows, below = rows - above;
  const size_t x_bytes = above * sizeof(uint32_t), below_bytes = below * sizeof(uint32_t);
  const BFloat16* x_below = x + size_t(above) * whole_inputs(depth);
  zero_sums<both>();
  for (int k = 0; k < depth; k += SCALED) {
    const BFloat16* from = w.take(ahead);
    asking.go_far(SCALED);
    asm volatile("" ::: "memory");  // the intrinsics do not tell that they read
    _tile_loadd(4, x + size_t(k) * above, x_bytes);
    _tile_loadd(6, from, w_bytes);
    _tile_dpbf16ps(0, 6, 4);
    _tile_loadd(7, from + TILE_ROWS * SCALED, w_bytes);
    _tile_dpbf16ps(1, 7, 4);
    if constexpr (both) {
      _tile_loadd(5, x_below + size_t(k) * below, below_bytes);
      _tile_dpbf16ps(2, 6, 5);
      _tile_dpbf16ps(3, 7, 5);
    }
  }
  if (rows == 1) {
    _tile_stored(0, y, sizeof *y);
    _tile_stored(1, y + TILE_ROWS, sizeof *y);
    return;
  }
  Words sums[4][LANES];
  _tile_stored(0, sums[0], sizeof sums[0][0]);
  _tile_stored(1, sums[1], sizeof sums[0][0]);
  if constexpr (both) {
    _tile_stored(2, sums[2], sizeof sums[0][0]);
    _tile_stored(3, sums[3], sizeof sums[0][0]);
  }
  asm volatile("" ::: "memory");
  for (int tile = 0; tile < (both ? 4 : 2); ++tile) {
    transpose(sums[tile]);
    for (int row = 0; row < (tile < 2 ? above : below); ++row)
      std::memcpy(y + (tile / 2 * TILE_ROWS + row) * y_stride + tile % 2 * LANES, &sums[tile][row], sizeof sums[0][0]);
  }
}

template <int ahead, class B, class A>
inline void multiply_some(int rows, const BFloat16* x, size_t, TilesOfBlocks<B> w, int depth, float* y,
                          size_t y_stride, bool, A& asking) {
  shape_tiles(rows, true);
  if (rows > TILE_ROWS) multiply_paired<true, ahead>(rows, x, w, depth, y, y_stride, asking);
  else multiply_paired<false, ahead>(rows, x, w, depth, y, y_stride, asking);
}

// A panel of such blocks as products of more rows than TILES_ROWS read it.
template <TileBlock B>
inline void widen_panel(const B* panel, int inputs, PairedInputs* to) {
  alignas(64) BFloat16 room[COLUMNS * SCALED];
  for (int k = 0; k < inputs; k += SCALED, ++panel) {
    panel->unpack(room, 0);
    for (int half = 0; half < 2; ++half) {
      Words words[LANES];
      std::memcpy(words, room + half * TILE_ROWS * SCALED, sizeof words);
      transpose(words);
      for (int i = 0; i < LANES; ++i)
        std::memcpy(to + (k + 2 * i) * COLUMNS + half * 2 * LANES, &words[i], sizeof words[i]);
    }
  }
}

template <>
struct BlocksOf<BFloat16> {
  using Eight = Int8Tiles;
  using Four = Int4Tiles;
  using Twelve = void;
};

#endif

}  // namespace multilora
