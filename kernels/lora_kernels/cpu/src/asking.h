// How memory is asked for what comes next, while something else is computed.

#pragma once

#include <cstddef>

namespace multilora {

// How far ahead of itself a product asks memory for packed weights, in bytes, and into which cache, as the compiler numbers
// them: 3 is the first level, 2 the second, which a Xeon with AMX is some 5 % faster with.
#if defined(__AMX_BF16__)
constexpr int WEIGHTS_AHEAD = 4096;
constexpr int INTO_CACHE = 2;
#else
constexpr int WEIGHTS_AHEAD = 3072;
constexpr int INTO_CACHE = 3;
#endif

// Ask memory for a line, into a cache as the compiler numbers them. GCC takes a function that only prefetches for one without
// effect and leaves out its calls, so there is a statement that it may not.
template <int cache = 3>
inline void ask_line(const void* at) {
  __builtin_prefetch(at, 0, cache);
  asm volatile("");
}

// Ask memory for as many bytes, `ahead` bytes past w.
inline void prefetch(const void* w, size_t bytes, int ahead) {
  for (size_t line = 0; line < bytes; line += 64) ask_line<INTO_CACHE>(static_cast<const char*>(w) + ahead + line);
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
    ask_line(next);
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

}  // namespace multilora
