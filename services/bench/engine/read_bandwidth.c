// Reads memory once, as fast as this machine lets it be read: the floor of a decode step is its weights' bytes at this
// rate. Threads take a MiB after another, as those of a step take panels, so that one whose core is busy reads less; each
// asks for the lines AHEAD_BYTES on before it needs them, which the hardware's own prefetcher does not do far enough: 2 to
// 4 KiB were best where this was tried.
#include <stddef.h>
#include <stdint.h>

enum { LINE_BYTES = 64, AHEAD_BYTES = 3072, LINES = 4, TAKEN_GROUPS = (1 << 20) / (LINES * LINE_BYTES) };

typedef uint64_t line_t __attribute__((vector_size(LINE_BYTES)));

// The sum of all words, so that no read can be left out. size: a multiple of LINES lines; data: aligned to a line.
uint64_t read_all(const char *data, size_t size, int threads) {
    uint64_t total = 0;
    size_t groups = size / (LINES * LINE_BYTES);
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        line_t sums[LINES] = {{0}};
#pragma omp for schedule(dynamic, TAKEN_GROUPS)
        for (size_t group = 0; group < groups; group++) {
            const char *here = data + group * LINES * LINE_BYTES;
            for (int line = 0; line < LINES; line++) {
                __builtin_prefetch(here + AHEAD_BYTES + line * LINE_BYTES);
                sums[line] += *(const line_t *)(here + line * LINE_BYTES);
            }
        }
        for (int line = 0; line < LINES; line++)
            for (int word = 0; word < LINE_BYTES / 8; word++) total += sums[line][word];
    }
    return total;
}
