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
// lost, so that 16 of a value's 24 bits take part. The terms are rows of one product, and their sums are added after it.
template <class T>
class Factor {
 public:
  // Rows of a product for each of these.
  static constexpr int TERMS = PAIRED<T> ? 2 : 1;

  // x: [rows, width], rows `stride` apart, which stays where it is.
  void take(const float* x, int rows, int width, int stride) {
    x_ = x;
    stride_ = stride;
    if constexpr (PAIRED<T>) {
      stride_ = (whole_inputs(width) + LANES - 1) / LANES * LANES;
      BFloat16* high = terms_.at_least(size_t(2 * rows) * stride_);
      for (int row = 0; row < rows; ++row, x += stride, high += stride_)
        for (int k = 0; k < stride_; k += LANES) {
          const Floats values = load_some(x + k, width - k);
          store(high + k, values);
          store(high + size_t(rows) * stride_ + k, values - load(high + k));
        }
    }
  }

  // y = (add ? y : 0) + x w, for 32 columns of w, `ahead` as multiply takes it.
  template <int ahead, class C>
  void multiply(int rows, C w, int depth, float* y, size_t y_stride, bool add) {
    if constexpr (PAIRED<T>) {
      float* sums = sums_.at_least(size_t(2 * rows) * COLUMNS);
      multilora::multiply<ahead>(2 * rows, terms_.data(), stride_, w, depth, sums, COLUMNS, false);
      for (int row = 0; row < rows; ++row, y += y_stride, sums += COLUMNS)
        for (int i = 0; i < COLUMNS; i += LANES) {
          const Floats both = load(sums + i) + load(sums + rows * COLUMNS + i);
          store(y + i, add ? load(y + i) + both : both);
        }
    } else {
      multilora::multiply<ahead>(rows, x_, stride_, w, depth, y, y_stride, add);
    }
  }

 private:
  const float* x_ = nullptr;
  int stride_ = 0;
  BufferOf<BFloat16> terms_;
  Buffer sums_;
};

// LANES positions of a KV head in the cache, which lie in one block: their keys, whose dimensions are a stride apart, and
// their values. And as many that come after them, for which memory is asked meanwhile.
template <class T>
struct Positions {
  const T *keys, *values, *next_keys, *next_values;
  int stride;
};

// A product's way down the dimensions of keys, COLUMNS positions at a time, where they lie.
template <class T>
class KeysInPlace {
 public:
  static constexpr bool PAIRS = PAIRED<T>;

  explicit KeysInPlace(const Positions<T>* of) {
    for (int i = 0; i < REGISTERS; ++i) at_[i] = of[i].keys, next_[i] = of[i].next_keys, stride_[i] = of[i].stride;
  }

  int run(int left, int) { return left; }
  Floats columns(int i) const { return load(at_[i]); }
  const T* pairs(int i) const { return at_[i]; }
  void ask(int) const {
    for (const T* next : next_) ask_line(next);
  }
  void next() {
    for (int i = 0; i < REGISTERS; ++i) at_[i] += stride_[i], next_[i] += stride_[i];
  }

 private:
  const T *at_[REGISTERS], *next_[REGISTERS];
  int stride_[REGISTERS];
};

// A product's way down positions, for COLUMNS dimensions of their values from `first` on. Of an odd number the last is in
// `last`, in a pair with zeros.
template <class T>
class ValuesInPlace {
 public:
  static constexpr bool PAIRS = PAIRED<T>;

  ValuesInPlace(const Positions<T>* of, int dim, int first, const T* last)
      : of_(of), dim_(dim), first_(first * (PAIRS ? 2 : 1)), last_(last + first_) {}

  int run(int left, int) {
    if (PAIRS && left == 1) {
      at_ = last_;
      return 1;
    }
    at_ = of_->values + first_;
    next_ = of_++->next_values + first_;
    const int here = std::min(left, LANES);
    return PAIRS && here > 1 ? here / 2 * 2 : here;
  }
  Floats columns(int i) const { return load(at_ + i * LANES); }
  const T* pairs(int i) const { return at_ + 2 * i * LANES; }
  void ask(int) const { prefetch(next_, COLUMNS * sizeof(T) * (PAIRS ? 2 : 1), 0); }
  void next() { at_ += dim_, next_ += dim_; }

 private:
  const Positions<T>* of_;
  int dim_, first_;
  const T *last_, *at_ = nullptr, *next_ = nullptr;
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
//     once for all its rows and the heads that share them, or where these are few, read where they lie;
//     4 * head_dim * heads * context FLOPs a row, twice that where they are two terms.
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

  // A tile and a KV head of it, whose first positions come next; or none.
  struct Next {
    const RowTile* tile;
    int kv_head;
  };

  // The sums of all queries of a tile and KV head over one part, as [rows * group, state_size()].
  void part(const RowTile& tile, int kv_head, int part, const Layer& layer, const Batch& batch, const Rows& q,
            float* state, Next next) {
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
      keys(tile, kv_head, start, end, layer, batch, state, next);
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
  // What keys and values are moved by: values of T, to be widened, or pairs, as they are.
  using Word = std::conditional_t<PAIRED<T>, float, T>;
  static constexpr int PAIR = PAIRED<T> ? 2 : 1;
  static constexpr int VALUE_ROWS = KEYS / PAIR;
  static constexpr int GROUPS = KEYS / LANES;

  // The next tile of positions from `start` on. They are the sequence's own: nothing past `end` is read, whatever lies
  // there. For few rows they are multiplied where they lie, for more they are gathered (and widened) once.
  void keys(const RowTile& tile, int kv_head, int start, int end, const Layer& layer, const Batch& batch, float* state,
            Next next) {
    const int count = std::min(KEYS, end - start), columns = (count + COLUMNS - 1) / COLUMNS * COLUMNS;
    const int queries = tile.rows * group_, context = batch.positions[tile.first + tile.rows - 1] + 1;
    const auto place = [&](int lane) { return place_of(layer, tile, kv_head, batch, start + lane); };
    const auto upcoming = [&](int lane) {
      if (start + KEYS + lane < context) return place(KEYS + lane);
      const bool follows = next.tile != nullptr && lane <= batch.positions[next.tile->first + next.tile->rows - 1];
      return follows ? place_of(layer, *next.tile, next.kv_head, batch, lane) : place(lane);
    };
    if constexpr (!(PAIRED<T> && PAIRED_INPUTS > 2))  // tiles take what was gathered
      if (queries * Factor<T>::TERMS <= 2 * ROWS && dim_ % COLUMNS == 0) {
        Positions<T> positions[GROUPS];
        find(positions, count, place, upcoming);
        return attend(
            tile, start, count, columns, batch, state,
            [&](int c, float* scores) {
              q_.template multiply<1>(queries, KeysInPlace<T>(positions + c / LANES), dim_, scores, KEYS, false);
            },
            [&](int c, float* sums) {
              const ValuesInPlace<T> values(positions, dim_, c, of_cache(last_.data()));
              weights_.template multiply<1>(queries, values, count, sums, state_size(), true);
            });
      }
    float* k = keys_.at_least(size_t(key_rows_) * KEYS);
    float* v = values_.at_least(size_t(VALUE_ROWS) * width_);
    for (int lane = 0; lane < columns; lane += LANES) {
      const int here = std::clamp(count - lane, 0, LANES);
      const Place at = place(here > 0 ? lane : 0);
      gather_keys(at.keys, here, k + panel_place(lane, key_rows_));
      gather_values(at.values, here, v + lane / PAIR * COLUMNS);
      if (here > 0) ask_for(upcoming(lane));
    }
    attend(
        tile, start, count, columns, batch, state,
        [&](int c, float* scores) {
          q_.template multiply<0>(queries, gathered(k + panel_place(c, key_rows_)), dim_, scores, KEYS, false);
        },
        [&](int c, float* sums) {
          weights_.template multiply<0>(queries, gathered(v + panel_place(c, VALUE_ROWS)), count, sums, state_size(), true);
        });
  }

  // times_keys(c, scores) and times_values(c, sums) multiply queries and weights, for COLUMNS positions or dimensions.
  template <class TimesKeys, class TimesValues>
  void attend(const RowTile& tile, int start, int count, int columns, const Batch& batch, float* state,
              TimesKeys&& times_keys, TimesValues&& times_values) {
    const int queries = tile.rows * group_;
    float* scores = scores_.at_least(size_t(queries) * KEYS);
    for (int c = 0; c < columns; c += COLUMNS) times_keys(c, scores + c);
    for (int i = 0; i < queries; ++i) {
      const int visible = std::min(count, batch.positions[tile.first + i / group_] - start + 1);
      weigh(scores + i * KEYS, columns, visible, state + size_t(i) * state_size());
    }
    weights_.take(scores, queries, columns, KEYS);
    for (int c = 0; c < width_; c += COLUMNS) times_values(c, state + 2 + c);
  }

  // Where a tile's `count` positions lie, by its lanes, and those that memory is asked for. Of a block that is not full the
  // keys are copied, and of an odd number of positions the last value: what lies beside them is not the sequence's.
  template <class At, class Upcoming>
  void find(Positions<T>* positions, int count, At&& place, Upcoming&& upcoming) {
    for (int group = 0; group < GROUPS; ++group) {
      const int lane = group * LANES, here = count - lane;
      if (here <= 0) {  // columns that are computed and not looked at
        positions[group] = positions[0];
        continue;
      }
      const Place at = place(lane), next = upcoming(lane);
      positions[group] = {of_cache(at.keys), of_cache(at.values), of_cache(next.keys), of_cache(next.values), block_size_};
      if (here >= LANES) continue;
      Word* copy = some_keys_.at_least(size_t(dim_) / PAIR * LANES);
      positions[group].keys = of_cache(copy);
      positions[group].stride = LANES;
      for (int row = 0; row < dim_ / PAIR; ++row, copy += LANES) {
        std::fill(copy + here, copy + LANES, Word{});
        std::copy(at.keys + row * block_size_, at.keys + row * block_size_ + here, copy);
      }
    }
    if constexpr (PAIRED<T>) {
      Word* pair = last_.at_least(dim_);
      if (count % 2 != 0)
        for (int d = 0; d < dim_; d += LANES) store(pair + d, first_of_pairs(load(place(count - 1).values + d)));
    }
  }

  // Where a position's key and value lie in a block of its own.
  struct Place {
    const Word *keys, *values;
  };
  Place place_of(const Layer& layer, const RowTile& tile, int kv_head, const Batch& batch, int position) const {
    const int64_t block = batch.block_tables[tile.sequence * batch.max_blocks + position / block_size_];
    const int64_t from = (block * kv_heads_ + kv_head) * dim_ * block_size_ / PAIR;
    const int offset = position % block_size_;
    return {static_cast<const Word*>(layer.keys) + from + offset,
            static_cast<const Word*>(layer.values) + from + offset / PAIR * dim_};
  }
  static const T* of_cache(const Word* words) { return reinterpret_cast<const T*>(words); }

  static auto gathered(const float* panel) {
    if constexpr (PAIRED<T>) return walk(reinterpret_cast<const PairedInputs*>(panel));
    else return walk(panel);
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
        if (left < PAIR) words = first_of_pairs(words);
        store(to + panel_place(d, VALUE_ROWS) + row * COLUMNS, words);
      }
    }
  }

  static Floats first_of_pairs(Floats words) { return bits_of<Floats>(bits_of<Words>(words) & 0xffffu); }

  // Ask memory for LANES positions: blocks lie anywhere, and no hardware guesses where.
  void ask_for(const Place& place) const {
    constexpr int LINE = 64 / sizeof(Word);
    for (int row = 0; row < dim_ / PAIR; row += std::max(1, LINE / block_size_))
      ask_line(place.keys + row * block_size_);
    for (int i = 0; i < LANES / PAIR * dim_; i += LINE) ask_line(place.values + i);
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
  BufferOf<Word> some_keys_, last_;
};

}  // namespace multilora
