// Blocks of fewer bits where the processor multiplies pairs of bf16 and has no tiles: each is unpacked into a room in cache,
// laid out as packed bf16 weights are, and multiplied from there. So sums have the bits of the weights it stands for.

#pragma once

#include "blocks.h"

namespace multilora {

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

// A room holds SCALED inputs of a panel: at each pair of inputs two registers, of sixteen columns each.
constexpr int INPUT_PAIRS = SCALED / 2, PAIR = 2 * COLUMNS, HALF = PAIR / 2, PLACES = INPUT_PAIRS * PAIR;

// Memory is asked for a block that lies `ahead` bytes further, a pair's share at each.
template <class B>
inline void ask_share(const B& block, int pair, int ahead) {
  constexpr int share = sizeof block / INPUT_PAIRS;
  if (ahead > 0) prefetch(reinterpret_cast<const char*>(&block) + pair * share, share, ahead);
}

// Rounds sixteen inputs after sixteen others to bf16.
inline __m512i rounded(Floats first, Floats second) {
  return bits_of<__m512i>(_mm512_cvtne2ps_pbh(bits_of<__m512>(second), bits_of<__m512>(first)));
}

inline void unpack(const Int8Block& block, PairedInputs* to, int ahead) {
  alignas(64) static constexpr uint16_t SIDES[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i sides = _mm512_load_si512(SIDES);
  const Floats scales[] = {load(block.scales), load(block.scales + LANES)};
  for (int pair = 0; pair < INPUT_PAIRS; ++pair) {
    ask_share(block, pair, ahead);
    for (int half = 0; half < 2; ++half, to += HALF) {
      const Floats even = load(block.values[2 * pair] + half * LANES), odd = load(block.values[2 * pair + 1] + half * LANES);
      _mm512_store_si512(to, _mm512_permutexvar_epi16(sides, rounded(even * scales[half], odd * scales[half])));
    }
  }
}

// A weight is value * scale + least, as in GGUF's Q4_0 and Q4_1: 24 bytes where bf16 has 64. A scale has 11 bits, so the
// product is exact and it is all one whether it is rounded before the sum. A byte holds an input of columns c and c + 8.
struct Int4Block {
  float scales[COLUMNS], least[COLUMNS];
  uint8_t values[PLACES / 2];

  void put(int input, int column, int value) { values[byte(input, column)] |= uint8_t(value << shift(column)); }
  float at(int input, int column) const {
    return float(values[byte(input, column)] >> shift(column) & 15) * scales[column] + least[column];
  }

 private:
  static int byte(int input, int column) { return input / 2 * HALF + column / 16 * LANES + column % 8 * 2 + input % 2; }
  static int shift(int column) { return column & 8 ? 4 : 0; }
};

inline void unpack(const Int4Block& block, PairedInputs* to, int ahead) {
  Floats scales[4], least[4];  // of eight columns, each twice
  const __m512i twice = bits_of<__m512i>(NUMBERS / 2);
  for (int eight = 0; eight < 4; ++eight) {
    const __m512i columns = _mm512_add_epi32(twice, _mm512_set1_epi32(eight % 2 * 8));
    const auto spread = [&](const float* from) {
      return bits_of<Floats>(_mm512_permutexvar_ps(columns, bits_of<__m512>(load(from + eight / 2 * LANES))));
    };
    scales[eight] = spread(block.scales);
    least[eight] = spread(block.least);
  }
  const __m512 values = bits_of<__m512>(__builtin_convertvector(NUMBERS, Floats));
  const auto weights = [&](__m512i lowest, int eight) {  // looked up by the lowest four bits
    return bits_of<Floats>(_mm512_permutexvar_ps(lowest, values)) * scales[eight] + least[eight];
  };
  for (int pair = 0; pair < INPUT_PAIRS; ++pair) {
    ask_share(block, pair, ahead);
    for (int half = 0; half < 2; ++half, to += HALF) {
      const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(block.values + pair * HALF + half * LANES));
      const __m512i both = _mm512_cvtepu8_epi32(bytes);
      _mm512_store_si512(to, rounded(weights(both, 2 * half), weights(_mm512_srli_epi32(both, 4), 2 * half + 1)));
    }
  }
}

// bf16 in twelve bits, not a bit of it lost: 25 bytes where it has 32. The exponents of a block's weights lie close
// together, so four bits say which of fifteen in a row a weight has, or that it has the least of all, 0 and what is
// smaller than normal; the few weights that have another are kept beside. A block of more than STRAYS of those is none.
struct TwelveBits {
  static constexpr int EXPONENTS = 15, STRAYS = 15;

  uint8_t base, strays;  // exponents 1 to 15 are base + 1 to base + 15
  uint16_t places[STRAYS], bits[STRAYS];
  alignas(HALF) uint8_t fractions[PLACES];  // with the sign above seven bits of fraction
  uint8_t exponents[PLACES / 2];           // a byte has those of columns c and c + 16

  struct Room {
    uint16_t weights[PLACES];
  };

  // Become what is in a room; false where twelve bits are too few.
  bool hold(const Room& room) {
    int counts[256] = {}, within = 0, most = 0;
    for (const uint16_t weight : room.weights) ++counts[weight >> 7 & 255];
    *this = {};
    for (int last = 1; last < 256; ++last) {
      within += counts[last] - (last > EXPONENTS ? counts[last - EXPONENTS] : 0);
      if (within > most) most = within, base = uint8_t(std::max(0, last - EXPONENTS));
    }
    if (PLACES - counts[0] - most > STRAYS) return false;
    for (int place = 0; place < PLACES; ++place) {
      const uint16_t weight = room.weights[place];
      const int exponent = weight >> 7 & 255, four = exponent == 0 ? 0 : exponent - base;
      fractions[place] = uint8_t((weight >> 8 & 0x80) | (weight & 0x7f));
      if (exponent != 0 && (four < 1 || four > EXPONENTS)) {
        places[strays] = uint16_t(place);
        bits[strays++] = weight;
      } else {
        exponents[byte(place)] |= uint8_t(four << shift(place));
      }
    }
    return true;
  }

  float at(int input, int column) const {
    const int place = int(place_in_panel(static_cast<const PairedInputs*>(nullptr), input, column));
    for (int stray = 0; stray < strays; ++stray)
      if (places[stray] == place) return widen(PairedInputs{bits[stray]});
    const int four = exponents[byte(place)] >> shift(place) & 15;
    const int fraction = fractions[place], exponent = four == 0 ? 0 : base + four;
    return widen(PairedInputs{uint16_t((fraction & 0x80) << 8 | exponent << 7 | (fraction & 0x7f))});
  }

 private:
  static int byte(int place) { return place / PAIR * HALF + place % HALF; }
  static int shift(int place) { return place & HALF ? 4 : 0; }
};

inline void unpack(const TwelveBits& block, PairedInputs* to, int ahead) {
  // looked up by the lowest five bits, so that every exponent is there twice
  const __m512i four = bits_of<__m512i>((NUMBERS * 0x20002 + 0x10000) & 0x000f000f);
  const __m512i known = _mm512_add_epi16(four, _mm512_set1_epi16(block.base));
  const __m512i exponents = _mm512_maskz_slli_epi16(_mm512_test_epi16_mask(four, four), known, 7);
  const auto weights = [&](const uint8_t* fractions, __m512i lowest) {
    const __m512i spread = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(fractions)));
    const __m512i exponent = _mm512_permutexvar_epi16(lowest, exponents);
    return _mm512_ternarylogic_epi32(spread, _mm512_set1_epi16(int16_t(0x807f)), exponent, 0xEA);  // (a & b) | c
  };
  PairedInputs* const room = to;
  for (int pair = 0; pair < INPUT_PAIRS; ++pair, to += PAIR) {
    ask_share(block, pair, ahead);
    const auto* bytes = reinterpret_cast<const __m256i*>(block.exponents + pair * HALF);
    const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes));
    _mm512_store_si512(to, weights(block.fractions + pair * PAIR, both));
    _mm512_store_si512(to + HALF, weights(block.fractions + pair * PAIR + HALF, _mm512_srli_epi16(both, 4)));
  }
  for (int stray = 0; stray < block.strays; ++stray) room[block.places[stray]].bits = block.bits[stray];
}

// A product's way down blocks, each unpacked into a room first.
template <class B>
class Unpacked {
 public:
  static constexpr bool PAIRS = true;

  Unpacked(const B* panel, PairedInputs* room) : next_(panel), room_(room) {}

  int run(int left, int ahead) {
    unpack(*next_++, room_, ahead);
    at_ = room_;
    return std::min(left, SCALED);
  }
  const PairedInputs* pairs(int i) const { return at_ + 2 * i * LANES; }
  void ask(int) const {}
  void next() { at_ += COLUMNS; }

 private:
  const B* next_;
  PairedInputs* room_;
  const PairedInputs* at_ = nullptr;
};

template <Block B>
inline Unpacked<B> walk(const B* panel, PairedInputs* room) {
  return {panel, room};
}

// A panel in bf16, as products of many rows take it.
template <Block B>
inline void widen_panel(const B* panel, int inputs, PairedInputs* to) {
  for (int k = 0; k < inputs; k += SCALED, to += SCALED * COLUMNS) unpack(*panel++, to, 0);
}

template <>
struct BlocksOf<BFloat16> {
  using Eight = Int8Block;
  using Four = Int4Block;
  using Twelve = TwelveBits;
};

#endif

}  // namespace multilora
