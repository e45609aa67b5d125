// How fast this machine's threads read memory when asked ahead: what a decode step is measured against.

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

using Words = uint64_t __attribute__((vector_size(64)));

// Read `bytes`, an equal share a thread, once; return what must not be optimised away.
extern "C" __attribute__((visibility("default"))) uint64_t read_memory(const char* from, int64_t bytes, int threads) {
  std::vector<uint64_t> found(threads);
  std::vector<std::thread> readers;
  for (int thread = 0; thread < threads; ++thread)
    readers.emplace_back([=, &found] {
      const char* end = from + bytes / threads * (thread + 1);
      Words all[4] = {};
      for (const char* at = from + bytes / threads * thread; at + 256 <= end; at += 256)
        for (int line = 0; line < 4; ++line) {
          __builtin_prefetch(at + 3072 + 64 * line);
          Words words;
          std::memcpy(&words, at + 64 * line, sizeof words);
          all[line] |= words;
        }
      const Words any = all[0] | all[1] | all[2] | all[3];
      for (int lane = 0; lane < 8; ++lane) found[thread] |= any[lane];
    });
  for (std::thread& reader : readers) reader.join();
  uint64_t any = 0;
  for (uint64_t word : found) any |= word;
  return any;
}
