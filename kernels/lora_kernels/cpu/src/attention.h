// Causal attention over the paged KV cache, softmax taken on the way.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "memory.h"
#include "multiply.h"

namespace multilora {

// Rows [first, first + rows) of the batch, of one sequence.
struct RowTile {
  int first, rows, sequence;
};

// Where the processor multiplies bf16, keys and values of it lie in the cache as its products take them: dimensions 2i and
// 2i + 1 of a key side by side, positions 2i and 2i + 1 of a value.
template <class T>
constexpr bool PAIRED = MULTIPLIES_BF16 && std::is_same_v<T, BFloat16>;

// One position's key and value of a KV head, `dim` values each, to their place at `offset` of a block of `size` positions.
template <class T>
inline void put(const T* key, const T* value, int dim, int offset, int size, T* keys, T* values) {
  if constexpr (PAIRED<T>) {
    for (int d = 0; d < dim; d += 2) std::memcpy(keys + (size_t(d / 2) * size + offset) * 2, key + d, 2 * sizeof(T));
    values += size_t(offset / 2) * dim * 2 + offset % 2;
    for (int d = 0; d < dim; ++d) values[2 * d] = value[d];
  } else {
    for (int d = 0; d < dim; ++d) keys[size_t(d) * size + offset] = key[d];
    std::memcpy(values + size_t(offset) * dim, value, dim * sizeof(T));
  }
}

// Rows that multiply what is cached: in float32 or, where products take bf16, in two terms of it, the second what the first
// lost, so that 16 of a value's 24 bits take part.
template <class T>
class Factor {
 public:
  // x: [rows, width], rows `stride` apart, which stays where it is.
  void take(const float* x, int rows, int width, int stride) {
    x_ = x;
    stride_ = stride;
    if constexpr (PAIRED<T>) {
      stride_ = (whole_inputs(width) + LANES - 1) / LANES * LANES;
      size_ = size_t(rows) * stride_;
      BFloat16* high = terms_.at_least(2 * size_);
      for (int row = 0; row < rows; ++row, x += stride, high += stride_)
        for (int k = 0; k < stride_; k += LANES) {
          const Floats values = load_some(x + k, width - k);
          store(high + k, values);
          store(high + size_ + k, values - load(high + k));
        }
    }
  }

  // y = (add ? y : 0) + x w, for 32 columns of w, of which `panel` are a product's own type.
  void multiply(int rows, const float* panel, int depth, float* y, size_t y_stride, bool add) const {
    if constexpr (PAIRED<T>) {
      const auto w = walk(reinterpret_cast<const PairedInputs*>(panel));
      multilora::multiply(rows, terms_.data(), stride_, w, depth, y, y_stride, add);
      multilora::multiply(rows, terms_.data() + size_, stride_, w, depth, y, y_stride, true);
    } else {
      multilora::multiply(rows, x_, stride_, walk(panel), depth, y, y_stride, add);
    }
  }

 private:
  const float* x_ = nullptr;
  int stride_ = 0;
  size_t size_ = 0;
  BufferOf<BFloat16> terms_;
};

// Semantics:
//     out[i, h] = sum over positions j <= position[i]:  softmax_j(q[i, h] . k[j, h / group] / sqrt(head_dim)) * v[j, h / group]
// Shape:
//     q, out: [rows, heads * head_dim], float32, rows apart by a stride
//     keys:   [blocks, kv_heads, head_dim, block_size]    lanes are positions: scores need no folding
//     values: [blocks, kv_heads, block_size, head_dim]    lanes are dimensions; both in pairs where PAIRED
// Order: positions are taken in tiles of KEYS and in parts of PART, both cut at multiples of their size, whatever the
//     batch and the chunk; a part is summed by itself, parts are joined in ascending order. So a part may be computed
//     by any thread, and a token attends alike whether it came in a prompt or one at a time.
// Cost, for each tile of rows and KV head: 4 * head_dim * context bytes in bf16, gathered (and widened, where not PAIRED)
//     once for all its rows and the heads that share them; 4 * head_dim * heads * context FLOPs a row.
template <class T>
class Attention {
 public:
  // 64 widened keys of 64 dimensions are 16 KiB, as many values as much: they stay in cache for a tile's rows.
  static constexpr int KEYS = 64;
  // Long enough that joining costs nothing, short enough that one sequence of 4k gives eight parts to share out.
  static constexpr int PART = 512;
  // Queries that share a widened tile of keys: at 32, widening is a tenth of the work.
  static constexpr int QUERIES = 32;

  explicit Attention(const Model& model)
      : kv_heads_(model.kv_heads),
        group_(model.heads / model.kv_heads),
        dim_(model.head_dim),
        width_((model.head_dim + COLUMNS - 1) / COLUMNS * COLUMNS),
        key_rows_(PAIRED<T> ? whole_inputs(model.head_dim) / 2 : model.head_dim),
        block_size_(model.block_size),
        scale_(1.0f / std::sqrt(float(model.head_dim))) {}

  // Rows of a sequence that are attended to together.
  int tile_rows() const { return std::max(1, QUERIES / group_); }

  // Floats of a query's sums over a part: the largest score, the sum of weights, the weighted values.
  int state_size() const { return 2 + width_; }

  // The sums of all queries of a tile and KV head over one part, as [rows * group, state_size()].
  void part(const RowTile& tile, int kv_head, int part, const Layer& layer, const Batch& batch, const Rows& q,
            float* state) {
    const int queries = tile.rows * group_;
    float* gathered = queries_.at_least(size_t(queries) * dim_);
    for (int i = 0; i < queries; ++i) {
      const float* from = q[tile.first + i / group_] + (kv_head * group_ + i % group_) * dim_;
      for (int d = 0; d < dim_; ++d) gathered[i * dim_ + d] = from[d] * scale_;
    }
    q_.take(gathered, queries, dim_, dim_);
    for (int i = 0; i < queries; ++i) {
      float* s = state + size_t(i) * state_size();
      std::fill(s, s + state_size(), 0.0f);
      s[0] = -std::numeric_limits<float>::infinity();
    }
    const int context = batch.positions[tile.first + tile.rows - 1] + 1;
    const int end = std::min(context, (part + 1) * PART);
    for (int start = part * PART; start < end; start += KEYS)
      keys(tile, kv_head, start, end, layer, batch, state);
  }

  // Ask memory for a sequence's first tile of positions of a KV head.
  void ask_first(const RowTile& tile, int kv_head, const Layer& layer, const Batch& batch) const {
    const int end = std::min(KEYS, batch.positions[tile.first + tile.rows - 1] + 1);
    for (int position = 0; position < end; position += LANES)
      ask_for(layer, block_of(tile, kv_head, batch, position), position % block_size_);
  }

  // Join a later part's sums to those of the parts before it.
  __attribute__((noinline)) void join(float* total, const float* part) const {
    const float most = total[0] > part[0] ? total[0] : part[0];
    const float a = exponential(splat(total[0] - most))[0], b = exponential(splat(part[0] - most))[0];
    total[0] = most;
    for (int i = 1; i < state_size(); ++i) {
      total[i] *= a;
      total[i] += part[i] * b;
    }
  }

  void finish(const float* state, float* out) const {
    for (int d = 0; d < dim_; ++d) out[d] = state[2 + d] / state[1];
  }

  static int parts(int context) { return (context + PART - 1) / PART; }

 private:
  // What keys and values are gathered by: values of T, to be widened, or pairs, moved as they are.
  using Word = std::conditional_t<PAIRED<T>, float, T>;
  static constexpr int PAIR = PAIRED<T> ? 2 : 1;
  static constexpr int VALUE_ROWS = KEYS / PAIR;

  // The next tile of positions from `start` on. They are the sequence's own: nothing past `end` is read, whatever lies
  // there.
  void keys(const RowTile& tile, int kv_head, int start, int end, const Layer& layer, const Batch& batch, float* state) {
    const int count = std::min(KEYS, end - start), columns = (count + COLUMNS - 1) / COLUMNS * COLUMNS;
    float* k = keys_.at_least(size_t(key_rows_) * KEYS);
    float* v = values_.at_least(size_t(VALUE_ROWS) * width_);
    const auto block = [&](int position) { return block_of(tile, kv_head, batch, position); };
    for (int lane = 0; lane < columns; lane += LANES) {
      const int position = start + lane, offset = position % block_size_, here = std::clamp(count - lane, 0, LANES);
      const int64_t from = here == 0 ? 0 : block(position);
      gather_keys(static_cast<const Word*>(layer.keys) + from + offset, here, k + panel_place(lane, key_rows_));
      gather_values(static_cast<const Word*>(layer.values) + from + offset / PAIR * dim_, here, v + lane / PAIR * COLUMNS);
      if (position + KEYS < end) ask_for(layer, block(position + KEYS), offset);
    }

    const int queries = tile.rows * group_;
    float* scores = scores_.at_least(size_t(queries) * KEYS);
    for (int c = 0; c < columns; c += COLUMNS)
      q_.multiply(queries, k + panel_place(c, key_rows_), dim_, scores + c, KEYS, false);
    for (int i = 0; i < queries; ++i) {
      const int visible = std::min(count, batch.positions[tile.first + i / group_] - start + 1);
      weigh(scores + i * KEYS, columns, visible, state + size_t(i) * state_size());
    }
    weights_.take(scores, queries, columns, KEYS);
    for (int c = 0; c < width_; c += COLUMNS)
      weights_.multiply(queries, v + panel_place(c, VALUE_ROWS), count, state + 2 + c, state_size(), true);
  }

  // Where a position's block begins, of a KV head, in words.
  int64_t block_of(const RowTile& tile, int kv_head, const Batch& batch, int position) const {
    const int32_t block = batch.block_tables[tile.sequence * batch.max_blocks + position / block_size_];
    return (int64_t(block) * kv_heads_ + kv_head) * dim_ * block_size_ / PAIR;
  }

  // Where a column lies among panels of so many rows.
  static size_t panel_place(int column, int rows) { return size_t(column / COLUMNS * rows) * COLUMNS + column % COLUMNS; }

  // LANES positions of a block to columns of a panel; zeros past the first `here`.
  void gather_keys(const Word* from, int here, float* to) const {
    int row = 0;
    for (; row < dim_ / PAIR; ++row) store(to + row * COLUMNS, load_some(from + row * block_size_, here));
    for (; row < key_rows_; ++row) store(to + row * COLUMNS, Floats{});
  }

  // The first `here` of LANES positions of a block to rows of all panels. The others are zeros where a product reads them.
  void gather_values(const Word* from, int here, float* to) const {
    for (int row = 0; row < LANES / PAIR; ++row) {
      const int left = here - row * PAIR;
      if (left <= 0 && !PAIRED<T>) return;
      for (int d = 0; d < width_; d += LANES) {
        Floats words = left <= 0 ? Floats{} : load_some(from + row * dim_ + d, dim_ - d);
        if (left < PAIR) words = bits_of<Floats>(bits_of<Words>(words) & 0xffffu);  // a pair of which one is there
        store(to + panel_place(d, VALUE_ROWS) + row * COLUMNS, words);
      }
    }
  }

  // Ask memory for LANES positions of the tile after this one: blocks lie anywhere, and no hardware guesses where.
  void ask_for(const Layer& layer, int64_t block, int offset) const {
    constexpr int LINE = 64 / sizeof(Word);
    const Word* keys = static_cast<const Word*>(layer.keys) + block + offset;
    const Word* values = static_cast<const Word*>(layer.values) + block + offset / PAIR * dim_;
    for (int row = 0; row < dim_ / PAIR; row += std::max(1, LINE / block_size_))
      __builtin_prefetch(keys + row * block_size_);
    for (int i = 0; i < LANES / PAIR * dim_; i += LINE) __builtin_prefetch(values + i);
  }

  // Scores of one query to weights, 0 from `visible` on; its sums so far are brought to the new largest score.
  void weigh(float* scores, int columns, int visible, float* state) const {
    if (visible <= 0) {
      std::fill(scores, scores + columns, 0.0f);
      return;
    }
    Floats most = splat(state[0]);
    for (int c = 0; c < columns; c += LANES) {
      Floats s = load(scores + c);
      if (visible - c < LANES) {
        s = NUMBERS < visible - c ? s : splat(-std::numeric_limits<float>::infinity());
        store(scores + c, s);
      }
      most = larger(most, s);
    }
    const float largest_score = largest(most);
    const Floats kept = exponential(splat(state[0] - largest_score));
    Floats total{};
    for (int c = 0; c < columns; c += LANES) {
      const Floats weight = exponential(load(scores + c) - largest_score);
      store(scores + c, weight);
      total += weight;
    }
    state[0] = largest_score;
    state[1] = state[1] * kept[0] + sum(total);
    for (int d = 0; d < width_; d += LANES) store(state + 2 + d, load(state + 2 + d) * kept);
  }

  const int kv_heads_, group_, dim_, width_, key_rows_, block_size_;
  const float scale_;
  Factor<T> q_, weights_;
  Buffer queries_, keys_, values_, scores_;
};

}  // namespace multilora
