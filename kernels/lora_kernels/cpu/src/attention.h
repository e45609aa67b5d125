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

// Semantics:
//     out[i, h] = sum over positions j <= position[i]:  softmax_j(q[i, h] . k[j, h / group] / sqrt(head_dim)) * v[j, h / group]
// Shape:
//     q, out: [rows, heads * head_dim], float32, rows apart by a stride
//     keys:   [blocks, kv_heads, head_dim, block_size]    lanes are positions: scores need no folding
//     values: [blocks, kv_heads, block_size, head_dim]    lanes are dimensions
// Order: positions are taken in tiles of KEYS and in parts of PART, both cut at multiples of their size, whatever the
//     batch and the chunk; a part is summed by itself, parts are joined in ascending order. So a part may be computed
//     by any thread, and a token attends alike whether it came in a prompt or one at a time.
// Cost, for each tile of rows and KV head: 4 * head_dim * context bytes in bf16, widened once for all its rows and the
//     heads that share them; 4 * head_dim * heads * context FLOPs a row.
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
    for (int i = 0; i < queries; ++i) {
      float* s = state + size_t(i) * state_size();
      std::fill(s, s + state_size(), 0.0f);
      s[0] = -std::numeric_limits<float>::infinity();
    }
    const int context = batch.positions[tile.first + tile.rows - 1] + 1;
    const int end = std::min(context, (part + 1) * PART);
    for (int start = part * PART; start < end; start += KEYS)
      keys(tile, kv_head, start, end, layer, batch, gathered, state);
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
  // The next tile of positions from `start` on. They are the sequence's own: nothing past `end` is read, whatever lies
  // there.
  void keys(const RowTile& tile, int kv_head, int start, int end, const Layer& layer, const Batch& batch,
            const float* q, float* state) {
    const int count = std::min(KEYS, end - start);
    float* k = keys_.at_least(size_t(dim_) * KEYS);
    float* v = values_.at_least(size_t(KEYS) * width_);
    const int columns = (count + COLUMNS - 1) / COLUMNS * COLUMNS;
    const auto at = [&](int position) {
      const int32_t block = batch.block_tables[tile.sequence * batch.max_blocks + position / block_size_];
      return (int64_t(block) * kv_heads_ + kv_head) * dim_ * block_size_;
    };
    for (int lane = 0; lane < columns; lane += LANES) {
      const int here = std::clamp(count - lane, 0, LANES);
      if (here == 0) {
        for (int d = 0; d < dim_; ++d) store(k + d * KEYS + lane, Floats{});
        continue;
      }
      const int position = start + lane, offset = position % block_size_;
      const T* from = static_cast<const T*>(layer.keys) + at(position) + offset;
      for (int d = 0; d < dim_; ++d, from += block_size_) store(k + d * KEYS + lane, load_some(from, here));
      from = static_cast<const T*>(layer.values) + at(position) + offset * dim_;
      for (int i = 0; i < here; ++i, from += dim_)
        for (int d = 0; d < width_; d += LANES) store(v + (lane + i) * width_ + d, load_some(from + d, dim_ - d));
      if (position + KEYS < end) ask_for(layer, at(position + KEYS), offset);
    }

    const int queries = tile.rows * group_;
    float* scores = scores_.at_least(size_t(queries) * KEYS);
    for (int c = 0; c < columns; c += COLUMNS)
      multiply(queries, q, dim_, Strided<float>{k + c, KEYS}, dim_, scores + c, KEYS, false);
    for (int i = 0; i < queries; ++i) {
      const int visible = std::min(count, batch.positions[tile.first + i / group_] - start + 1);
      weigh(scores + i * KEYS, columns, visible, state + size_t(i) * state_size());
    }
    for (int c = 0; c < width_; c += COLUMNS)
      multiply(queries, scores, KEYS, Strided<float>{v + c, size_t(width_)}, count, state + 2 + c, state_size(), true);
  }

  // Ask memory for LANES positions of the tile after this one: blocks lie anywhere, and no hardware guesses where.
  void ask_for(const Layer& layer, int64_t head, int offset) const {
    constexpr int LINE = 64 / sizeof(T);
    const T* keys = static_cast<const T*>(layer.keys) + head + offset;
    const T* values = static_cast<const T*>(layer.values) + head + offset * dim_;
    for (int d = 0; d < dim_; d += std::max(1, LINE / block_size_)) __builtin_prefetch(keys + d * block_size_);
    for (int i = 0; i < LANES * dim_; i += LINE) __builtin_prefetch(values + i);
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

  const int kv_heads_, group_, dim_, width_, block_size_;
  const float scale_;
  Buffer queries_, keys_, values_, scores_;
};

}  // namespace multilora
