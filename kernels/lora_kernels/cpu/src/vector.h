// A register of floats at a time, in the compiler's own vectors: AVX-512, AVX2 and plain code are one source.
//
// A sum in this backend belongs to one lane from its first term to its last, or is folded in one fixed order; so its
// bits depend on its own terms alone, never on how many rows, columns or threads are at work beside it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace multilora {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // SSE, NEON
#endif

using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Bytes = int8_t __attribute__((vector_size(LANES)));
using HalfWords = uint16_t __attribute__((vector_size(2 * LANES)));

// The upper half of a float32: a stored value, widened before anything is computed with it.
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &value, sizeof to);
  return to;
}

inline Floats splat(float value) { return value - Floats{}; }

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline Floats load(const BFloat16* from) {
#if defined(__AVX512F__)  // two instructions, where GCC 12 makes five of what stands below
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return bits_of<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
#elif defined(__AVX2__)
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return bits_of<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
#endif
  HalfWords halves;
  std::memcpy(&halves, from, sizeof halves);
  return bits_of<Floats>(__builtin_convertvector(halves, Words) << 16);
}

inline Floats load(const int8_t* from) {
#if defined(__AVX512F__)
  return bits_of<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
#elif defined(__AVX2__)
  return bits_of<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#endif
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Floats);
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return bits_of<float>(uint32_t(value.bits) << 16); }

inline void narrow(float value, float& to) { to = value; }

// Rounds to nearest, ties to even; a NaN stays one.
inline void narrow(float value, BFloat16& to) {
  const uint32_t bits = bits_of<uint32_t>(value);
  const bool nan = value != value;
  to.bits = uint16_t(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A register of them.
inline void store(BFloat16* to, Floats values) {
#if defined(__AVX512BF16__)  // a value too small for an exponent becomes 0, as in the products of these
  const HalfWords halves = bits_of<HalfWords>(_mm512_cvtneps_pbh(values));
#else
  const Words bits = bits_of<Words>(values);
  const Words rounded = values == values ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
  const HalfWords halves = __builtin_convertvector(rounded >> 16, HalfWords);
#endif
  std::memcpy(to, &halves, sizeof halves);
}

// `count` values, rounded to what is stored.
template <class T>
inline void narrow(const float* from, int count, T* to) {
  int i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  for (; i < count; ++i) narrow(from[i], to[i]);
}

// The first `count` values of a register's; the others are 0 and are not read.
template <class T>
inline Floats load_some(const T* from, int count) {
  if (count >= LANES) return load(from);
  T values[LANES] = {};
  if (count > 0) std::memcpy(values, from, count * sizeof(T));
  return load(values);
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

template <int... lane>
constexpr Ints numbered(std::integer_sequence<int, lane...>) {
  return Ints{lane...};
}
// 0, 1, 2 …
constexpr Ints NUMBERS = numbered(std::make_integer_sequence<int, LANES>());

// All lanes in one: the upper half folded onto the lower, and so on down to one lane.
template <int half = LANES / 2, class Fold, int... lane>
inline float fold(Floats v, Fold both, std::integer_sequence<int, lane...> all) {
  v = both(v, __builtin_shufflevector(v, v, (lane ^ half)...));
  if constexpr (half == 1) return v[0];
  else return fold<half / 2>(v, both, all);
}
template <class Fold>
inline float fold(Floats v, Fold both) {
  return fold(v, both, std::make_integer_sequence<int, LANES>());
}
inline float sum(Floats v) {
  return fold(v, [](Floats a, Floats b) { return a + b; });
}
inline float largest(Floats v) { return fold(v, larger); }

// e^x to about one unit in the last place: 0 below -87, finite at most (e^88), NaN of NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor polynomial, whose first term left out is below 2^-27. Adding
// 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum, from where it goes into the exponent.
inline Floats exponential(Floats x) {
  const Floats clamped = x > 88.0f ? splat(88.0f) : x < -87.0f ? splat(-87.0f) : x;
  const Floats shifted = clamped * 1.44269504f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Floats power = bits_of<Floats>((bits_of<Words>(shifted) << 23) + (127u << 23));
  return x < -87.0f ? Floats{} : p * power;
}

}  // namespace multilora
