// One step of a Llama-family decoder with adapters, as one call: rows of (token, position, sequence, slot) to logits.
//
// Every thread runs the same program, phase by phase; the phases of a layer:
//
//     rows      x += down's output of the layer before;  h = norm(x)
//     shrink    s = h A of every row's own adapter, for q, k and v              (only when a row has an adapter)
//     panels    q, k, v = h W, 32 columns at a time
//     expand    q, k, v += s B                                                  (as shrink)
//     rows      rotate q and k;  k, v into the cache
//     tiles     attention
//     shrink, panels, expand        o
//     rows      x += o;  h = norm(x)
//     shrink, panels, expand        gate, up
//     rows      silu(gate) * up
//     shrink, panels, expand        down
//
// Activations are float32, weights and cache as stored; a value is rounded on its way into the cache, and, where the
// processor multiplies bf16, as the input of a base weight.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "memory.h"
#include "multiply.h"
#include "team.h"

namespace multilora {
namespace {

constexpr int PAGE_ROWS = 16;  // rank rows in a page of the slot pool, as in layout.py

// More rows than a product takes at once read the weights again each time, so these are taken this many inputs at a
// time, while memory is asked for the next as many: 128 are 16 KiB of float32, half of a first-level cache. Products of
// bf16 are done so soon that to leave and fetch their sums costs more than a second-level cache does: 768 are 48 KiB, and
// a prompt takes a tenth less than with 128.
template <class Weight>
constexpr int INPUTS = std::is_same_v<Weight, PairedInputs> ? 768 : 128;

// From more products than this on, bf16 weights are widened once into such a block instead of in registers each time:
// where the two cross in AVX2, at 18 rows.
constexpr int PRODUCTS_UNWIDENED = 6;

// Rows that go through all panels before the next rows do: 96 of 576 to 1,536 inputs in float32, or 192 in bf16, stay in a
// second-level cache, where 512 do not; a multiple of every ROWS. Tiles are done so soon that to read the weights again
// costs more.
template <class Weight>
constexpr int PROJECT_ROWS = !std::is_same_v<Weight, PairedInputs> ? 96 : PAIRED_INPUTS > 2 ? 512 : 192;

// Rows and ranks whose dot products are computed together: as many sums as hide the latency of one.
#if defined(__AVX512F__)
constexpr int DOT_ROWS = 4;
#else
constexpr int DOT_ROWS = 2;
#endif
constexpr int DOT_RANKS = 4;

// An item of a shrink: at most this many rows of one slot, and half pages of its ranks, so that a lone adapter occupies
// several threads.
constexpr int SHRINK_ROWS = 32;
constexpr int SHRINK_RANKS = 8;

// An item of an expand: columns of one segment. A page of B is read in sixteen streams, a line of each at a time; each
// is asked for four lines ahead of itself.
constexpr int EXPAND_COLUMNS = 8 * COLUMNS;
constexpr int B_AHEAD = 256;

int padded(int64_t columns) { return int((columns + COLUMNS - 1) / COLUMNS * COLUMNS); }

// Base weights as they lie packed in their own dtype, which is also how adapters and cache are stored.
template <class T>
struct Packed;
template <>
struct Packed<float> {
  using Weight = float;
};
template <>
struct Packed<BFloat16> {
#if defined(__AVX512BF16__)
  using Weight = PairedInputs;
#else
  using Weight = PairedBFloat16;
#endif
};

// Rows [first, first + rows) of the batch, of one slot.
struct Segment {
  int first, rows, slot;
};

// y[i, j] = scale * sum over k:  x[i, k] * a[j, k],  for R rows and DOT_RANKS ranks; lane k % LANES sums ascending k.
template <int R, class T>
inline void dot(const float* x, size_t x_stride, const T* a, int depth, float scale, float* y, size_t y_stride) {
  Floats sums[R][DOT_RANKS] = {};
  int k = 0;
  for (; k + LANES <= depth; k += LANES) {
    Floats ranks[DOT_RANKS];
    for (int j = 0; j < DOT_RANKS; ++j) {
      const T* from = a + size_t(j) * depth + k;
      ranks[j] = load(from);
      ask_line(from + size_t(DOT_RANKS) * depth);  // the same inputs of the next ranks
    }
    for (int r = 0; r < R; ++r) {
      const Floats values = load(x + r * x_stride + k);
      for (int j = 0; j < DOT_RANKS; ++j) sums[r][j] += values * ranks[j];
    }
  }
  if (k < depth)
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < DOT_RANKS; ++j)
        sums[r][j] += load_some(x + r * x_stride + k, depth - k) * load_some(a + size_t(j) * depth + k, depth - k);
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < DOT_RANKS; ++j) y[r * y_stride + j] = sum(sums[r][j]) * scale;
}

// Linears that share their input, of `depth` values.
struct Group {
  const Linear* linears;
  int count, depth;
};

class Engine {
 public:
  virtual ~Engine() = default;
  virtual void step(const Batch& batch) = 0;
};

// T: how adapters and cache are stored, and base weights that are in no blocks.
template <class T>
class Decoder final : public Engine {
 public:
  using Weight = typename Packed<T>::Weight;
  using Four = typename BlocksOf<T>::Four;
  using Eight = typename BlocksOf<T>::Eight;
  using Twelve = typename BlocksOf<T>::Twelve;
  // What a product takes of its input.
  using Input = std::conditional_t<std::is_same_v<Weight, PairedInputs>, BFloat16, float>;
  static constexpr bool ROUNDS = !std::is_same_v<Input, float>;
  // Weights as products of many rows take them.
  using Wide = std::conditional_t<ROUNDS, PairedInputs, float>;

  Decoder(const Model& model, int threads)
      : model_(model),
        layers_(model.decoder, model.decoder + model.layers),
        q_width_(padded(model.heads * model.head_dim)),
        kv_width_(padded(model.kv_heads * model.head_dim)),
        inner_(padded(model.inner)),
        x_(padded(model.hidden)),
        h_(padded(model.hidden)),
        y_(padded(model.hidden)),
        qkv_(q_width_ + 2 * kv_width_),
        attended_(q_width_),
        gate_up_(2 * inner_),
        rounded_(std::max({padded(model.hidden), q_width_, inner_})),
        team_(threads) {
    for (int thread = 0; thread < threads; ++thread) scratch_.push_back(std::make_unique<Scratch>(model));
  }

  void step(const Batch& batch) override {
    prepare(batch);
    team_.run([&](int thread) { program(batch, *scratch_[thread]); });
  }

 private:
  // What a thread needs for itself.
  struct Scratch {
    explicit Scratch(const Model& model) : attention(model) {}
    Attention<T> attention;
    Buffer state, part;
    BufferOf<T> narrowed, paired;
    alignas(64) Wide widened[INPUTS<Weight> * COLUMNS];
    alignas(64) T tail[PAGE_ROWS * COLUMNS];
  };

  void prepare(const Batch& batch) {
    const size_t rows = batch.rows;
    for (Rows* of : {&x_, &h_, &y_, &qkv_, &attended_, &gate_up_}) of->at_least(rows);
    if constexpr (ROUNDS) rounded_.at_least(rows);
    shrunk_.at_least(3 * rows * rank_columns());
    segments_.clear();
    tiles_.clear();
    pages_ = 1;
    int context = 0;
    const int most = scratch_[0]->attention.tile_rows();
    for (int row = 0; row < batch.rows; ++row) {
      const int slot = batch.slots[row], sequence = batch.sequences[row];
      if (slot >= 0) {
        if (segments_.empty() || segments_.back().slot != slot || segments_.back().rows == SHRINK_ROWS ||
            segments_.back().first + segments_.back().rows != row)
          segments_.push_back({row, 0, slot});
        ++segments_.back().rows;
        pages_ = std::max(pages_, (layers_[0].linears[Q].ranks[slot] + PAGE_ROWS - 1) / PAGE_ROWS);
      }
      if (tiles_.empty() || tiles_.back().sequence != sequence || tiles_.back().rows == most)
        tiles_.push_back({row, 0, sequence});
      ++tiles_.back().rows;
      context = std::max(context, batch.positions[row] + 1);
    }
    // With few tiles the parts of a long context are shared out; else a tile's parts are one thread's work.
    const int items = int(tiles_.size() * model_.kv_heads);
    parts_ = items < 4 * team_.size() ? Attention<T>::parts(context) : 1;
    if (parts_ > 1) partial_.at_least(size_t(items) * parts_ * tile_state());
  }

  void program(const Batch& batch, Scratch& mine) {
    const int rows = int(batch.rows);
    const int hidden = int(model_.hidden), attended = int(model_.heads * model_.head_dim), inner = int(model_.inner);
    for (const Layer& layer : layers_) {
      const bool first = &layer == &layers_.front();
      team_.each(rows, team_.share(rows), [&](int row) {
        if (first) embed(batch.tokens[row], x_[row]);
        else residual(row);
        norm(row, layer.input_norm, row);
      });
      const Linear* of = layer.linears;
      const Group qkv{of + Q, 3, hidden}, o{of + O, 1, attended}, gate_up{of + GATE, 2, hidden}, down{of + DOWN, 1, inner};
      const Group next = &layer == &layers_.back() ? Group{} : Group{(&layer + 1)->linears + Q, 3, hidden};
      linears(batch, mine, qkv, o, h_, qkv_);
      team_.each(rows, team_.share(rows), [&](int row) {
        cache(mine, batch, layer, row);
        round_end(row, attended);
      });
      attend(batch, layer, mine);
      linears(batch, mine, o, gate_up, attended_, y_);
      team_.each(rows, team_.share(rows), [&](int row) {
        residual(row);
        norm(row, layer.post_attention_norm, row);
      });
      linears(batch, mine, gate_up, down, h_, gate_up_);
      team_.each(rows, team_.share(rows), [&](int row) {
        activate(gate_up_[row]);
        round(row, gate_up_[row], 0, inner);
        round_end(row, inner);
      });
      linears(batch, mine, down, next, gate_up_, y_);
    }
    const int sampled = int(batch.sampled), vocab = padded(model_.vocab);
    team_.each(sampled, 1, [&](int index) {
      residual(batch.sampled_rows[index]);
      norm(batch.sampled_rows[index], model_.norm, index);
    });
    project(mine, {&model_.head, 1, hidden}, nullptr, sampled, h_, batch.logits, vocab);
    team_.each(sampled, 1, [&](int index) {
      choose(batch.logits + size_t(index) * vocab, batch.best[index], batch.finite[index]);
    });
    release_tiles();
  }

  // ---- Rows

  // The row of a tied embedding is a column of the packed head.
  void embed(int token, float* x) const {
    const int hidden = int(model_.hidden);
    if (model_.embedding != nullptr) {
      const T* from = static_cast<const T*>(model_.embedding) + size_t(token) * hidden;
      for (int k = 0; k < hidden; ++k) x[k] = widen(from[k]);
    } else {
      with_panel(model_.head, token / COLUMNS, hidden, [&](const auto* panel) {
        for (int k = 0; k < hidden; ++k) {
          Input stored;
          narrow(weight_at(panel, k, token % COLUMNS), stored);
          x[k] = widen(stored);
        }
      });
    }
  }

  void residual(int row) {
    float* x = x_[row];
    const float* y = y_[row];
    for (int k = 0; k < model_.hidden; ++k) x[k] += y[k];
  }

  // Values [first, first + width) of a row that base weights will multiply, as a product takes them.
  void round(int row, const float* x, int first, int width) {
    if constexpr (ROUNDS) narrow(x, width, rounded_[row] + first);
  }
  // Zeros from the end of a row's values to where products take them.
  void round_end(int row, int width) {
    if constexpr (ROUNDS) std::fill(rounded_[row] + width, rounded_[row] + whole_inputs(width), Input{});
  }

  const RowsOf<Input>& inputs(const Rows& x) const {
    if constexpr (ROUNDS) return rounded_;
    else return x;
  }

  // h[to] = x[row] / rms(x[row]) * weight
  void norm(int row, const float* weight, int to) {
    const int hidden = int(model_.hidden);
    const float* x = x_[row];
    float* h = h_[to];
    Floats squares{};
    for (int k = 0; k < hidden; k += LANES) {
      const Floats values = load_some(x + k, hidden - k);
      squares += values * values;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / float(hidden) + model_.eps);
    for (int k = 0; k < hidden; ++k) h[k] = x[k] * scale * weight[k];
    round(to, h, 0, hidden);
    round_end(to, hidden);
  }

  // Rotate q in place and k on its way into the cache, in the halves-apart layout.
  void cache(Scratch& mine, const Batch& batch, const Layer& layer, int row) {
    float* qkv = qkv_[row];
    const int dim = int(model_.head_dim), half = dim / 2, position = batch.positions[row];
    const int size = int(model_.block_size), offset = position % size;
    const float* cosine = model_.cosines + size_t(position) * half;
    const float* sine = model_.sines + size_t(position) * half;
    const auto rotate = [&](float* head) {
      for (int i = 0; i < half; ++i) {
        const float low = head[i], high = head[i + half];
        head[i] = low * cosine[i] - high * sine[i];
        head[i + half] = high * cosine[i] + low * sine[i];
      }
    };
    for (int head = 0; head < model_.heads; ++head) rotate(qkv + head * dim);
    const int64_t block = batch.block_tables[batch.sequences[row] * batch.max_blocks + position / size];
    for (int head = 0; head < model_.kv_heads; ++head) {
      float* k = qkv + q_width_ + head * dim;
      const float* v = qkv + q_width_ + kv_width_ + head * dim;
      rotate(k);
      T* keys = static_cast<T*>(layer.keys) + (block * model_.kv_heads + head) * dim * size;
      T* values = static_cast<T*>(layer.values) + (block * model_.kv_heads + head) * dim * size;
      T* narrowed = mine.narrowed.at_least(2 * dim);
      narrow(k, dim, narrowed);
      narrow(v, dim, narrowed + dim);
      put(narrowed, narrowed + dim, dim, offset, size, keys, values);
    }
  }

  // gate = silu(gate) * up
  void activate(float* gate) const {
    for (int k = 0; k < inner_; k += LANES) {
      const Floats g = load(gate + k);
      store(gate + k, g / (exponential(-g) + 1.0f) * load(gate + inner_ + k));
    }
  }

  // The first of the largest logits; infinity and NaN show in their product with 0.
  void choose(const float* logits, int32_t& best, uint8_t& finite) const {
    const int vocab = int(model_.vocab);
    Floats most = splat(-std::numeric_limits<float>::infinity()), zeros{};
    Ints ids{}, lanes = NUMBERS;
    int c = 0;
    for (; c + LANES <= vocab; c += LANES, lanes += LANES) {
      const Floats values = load(logits + c);
      const Ints better = values > most;
      most = better ? values : most;
      ids = better ? lanes : ids;
      zeros += values * 0.0f;
    }
    float value = most[0], zero = sum(zeros);
    best = ids[0];
    for (int lane = 1; lane < LANES; ++lane)
      if (most[lane] > value || (most[lane] == value && ids[lane] < best)) value = most[lane], best = ids[lane];
    for (; c < vocab; ++c) {
      if (logits[c] > value) value = logits[c], best = c;
      zero += logits[c] * 0.0f;
    }
    finite = zero == 0.0f;
  }

  // ---- Attention

  int tile_state() const {
    const Attention<T>& attention = scratch_[0]->attention;
    return attention.tile_rows() * int(model_.heads / model_.kv_heads) * attention.state_size();
  }

  void attend(const Batch& batch, const Layer& layer, Scratch& mine) {
    const int kv_heads = int(model_.kv_heads), items = int(tiles_.size()) * kv_heads;
    const auto parts_of = [&](const RowTile& tile) {
      return Attention<T>::parts(batch.positions[tile.first + tile.rows - 1] + 1);
    };
    if (parts_ > 1)
      team_.each(items * parts_, 1, [&](int item) {
        const RowTile& tile = tiles_[item / parts_ / kv_heads];
        if (item % parts_ < parts_of(tile))
          mine.attention.part(tile, item / parts_ % kv_heads, item % parts_, layer, batch, qkv_,
                              partial_.data() + size_t(item) * tile_state(), {});
      });
    team_.each_knowing(items, [&](int item, int after) {
      const RowTile& tile = tiles_[item / kv_heads];
      const int kv_head = item % kv_heads, group = int(model_.heads / model_.kv_heads), queries = tile.rows * group;
      const int size = mine.attention.state_size();
      float* total = mine.state.at_least(tile_state());
      float* computed = mine.part.at_least(tile_state());
      typename Attention<T>::Next next{};
      if (after < items) next = {&tiles_[after / kv_heads], after % kv_heads};
      for (int part = 0; part < parts_of(tile); ++part) {
        const float* sums = computed;
        if (parts_ > 1) sums = partial_.data() + (size_t(item) * parts_ + part) * tile_state();
        else mine.attention.part(tile, kv_head, part, layer, batch, qkv_, computed, next);
        if (part == 0) std::copy(sums, sums + queries * size, total);
        else
          for (int i = 0; i < queries; ++i) mine.attention.join(total + i * size, sums + i * size);
      }
      for (int i = 0; i < queries; ++i) {
        const int row = tile.first + i / group, dim = int(model_.head_dim), first = (kv_head * group + i % group) * dim;
        mine.attention.finish(total + i * size, attended_[row] + first);
        round(row, attended_[row] + first, first, dim);
      }
    });
  }

  // ---- Linears

  int rank_columns() const { return int(model_.max_pages) * PAGE_ROWS; }

  // A group, each linear with its adapters; the outputs lie side by side in y. While weights are multiplied, memory is
  // asked for what its expand and the shrink of the group after it will read.
  void linears(const Batch& batch, Scratch& mine, const Group& group, const Group& after, const Rows& x, const Rows& y) {
    const int rows = int(batch.rows);
    if (segments_.empty()) return project(mine, group, nullptr, rows, x, y[0], y.stride());
    shrink(group, x, rows);
    project(mine, group, &after, rows, x, y[0], y.stride());
    expand(mine, group, rows, y);
  }

  // A rank's row in A or B of a linear, `width` values of an adapter in the pool.
  const T* rank_row(const void* pool, int64_t width, const Linear& linear, int slot, int rank) const {
    const int page = linear.pages[int64_t(slot) * model_.max_pages + rank / PAGE_ROWS];
    return static_cast<const T*>(pool) + (int64_t(page) * PAGE_ROWS + rank % PAGE_ROWS) * width;
  }

  // s[slice, i, j] = scale * (x[i] . A[j]), for every row's own adapter and its ranks. An item is a segment and a linear;
  // where those are few, some of its half pages.
  void shrink(const Group& group, const Rows& x, int rows) {
    const int columns = rank_columns(), pairs = int(segments_.size()) * group.count;
    const int parts = std::clamp(4 * team_.size() / pairs, 1, columns / SHRINK_RANKS);
    team_.each(pairs * parts, 1, [&](int item) {
      const int index = item / parts % group.count;
      const Segment& segment = segments_[item / parts / group.count];
      const Linear& linear = group.linears[index];
      float* s = shrunk_.data() + (size_t(index) * rows + segment.first) * columns;
      for (int rank = item % parts * SHRINK_RANKS; rank < linear.ranks[segment.slot]; rank += parts * SHRINK_RANKS)
        shrink_ranks(linear, segment, rank, group.depth, x, s + rank);
    });
  }

  // Up to SHRINK_RANKS of an adapter's ranks, from `rank` on.
  void shrink_ranks(const Linear& linear, const Segment& segment, int rank, int depth, const Rows& x, float* s) const {
    const int columns = rank_columns(), end = std::min(SHRINK_RANKS, int(linear.ranks[segment.slot]) - rank);
    const T* a = rank_row(linear.a, depth, linear, segment.slot, rank);
    const float scale = linear.scales[segment.slot];
    for (int j = 0; j < end; j += DOT_RANKS, a += size_t(DOT_RANKS) * depth) {
      int row = 0;
      for (; row + DOT_ROWS <= segment.rows; row += DOT_ROWS)
        dot<DOT_ROWS>(x[segment.first + row], x.stride(), a, depth, scale, s + size_t(row) * columns + j, columns);
      for (; row < segment.rows; ++row)
        dot<1>(x[segment.first + row], x.stride(), a, depth, scale, s + size_t(row) * columns + j, columns);
    }
  }

  // use(panel), of the type that the linear's weights are stored as.
  template <class Use>
  static void with_panel(const Linear& linear, int panel, int depth, Use&& use) {
    const auto found = [&]<class W>(const W* panels) { use(panels + size_t(panel) * panel_size(panels, depth)); };
    if constexpr (KEEPS_BLOCKS<T>)
      if (linear.storage == FOUR_BITS) return found(static_cast<const Four*>(linear.weight));
    if constexpr (COMPRESSES<T>)
      if (linear.storage == TWELVE_BITS) return found(static_cast<const Twelve*>(linear.weight));
    if (linear.storage == EIGHT_BITS) return found(static_cast<const Eight*>(linear.weight));
    found(static_cast<const Weight*>(linear.weight));
  }

  // y = x W, a panel of 32 columns by PROJECT_ROWS rows an item; `after`: where adapters are at work, the next group.
  void project(Scratch& mine, const Group& group, const Group* after, int rows, const Rows& of, float* y, int y_stride) {
    constexpr int most = PROJECT_ROWS<Weight>;
    const int depth = group.depth;
    const RowsOf<Input>& x = inputs(of);
    int starts[4] = {};
    for (int index = 0; index < group.count; ++index)
      starts[index + 1] = starts[index] + padded(group.linears[index].out) / COLUMNS;
    const int panels = starts[group.count], grain = std::max(1, panels / (16 * team_.size()));
    if constexpr (TileBlock<Four>) {
      const auto in_blocks = [](const Linear& linear) { return linear.storage != AS_STORED; };
      if (rows <= rows_at_once<TilesOfBlocks<Four>>() &&
          std::any_of(group.linears, group.linears + group.count, in_blocks))
        pair_rows(x[0], x.stride(), rows, depth, mine.paired.at_least(size_t(rows) * whole_inputs(depth)));
    }
    team_.each(panels * ((rows + most - 1) / most), grain, [&](int item) {
      const int first = item / panels * most, here = std::min(most, rows - first);
      const int place = item % panels;
      int index = 0;
      while (place >= starts[index + 1]) ++index;
      const Linear& linear = group.linears[index];
      float* out = y + size_t(first) * y_stride + size_t(place) * COLUMNS;
      with_panel(linear, place - starts[index], depth, [&](const auto* weight) {
        constexpr bool in_tiles = TileBlock<std::remove_cvref_t<decltype(*weight)>>;
        const auto columns = walk(weight, mine.widened);
        const Input* from = x[first];
        if ((in_tiles ? rows : here) > rows_at_once<std::remove_cv_t<decltype(columns)>>())
          return multiply_parts(mine.widened, here, from, x.stride(), weight, depth, out, y_stride);
        if constexpr (in_tiles) from = mine.paired.data();
        if (!after) multiply<WEIGHTS_AHEAD>(here, from, x.stride(), columns, depth, out, y_stride, false);
        else multiply_asking(group, *after, place, panels, here, from, x.stride(), columns, out, y_stride);
      });
    });
  }

  // As multiply, and memory is asked for one range after another of what adapters will need.
  template <class C>
  void multiply_asking(const Group& group, const Group& after, int panel, int panels, int rows, const Input* x,
                       int x_stride, const C& columns, float* y, int y_stride) const {
    const int blocks = (group.depth + ASKED - 1) / ASKED;
    const auto ranges = [&](int block) { return adapters_of(group, after, panel * blocks + block, panels * blocks); };
    multiply<WEIGHTS_AHEAD>(rows, x, x_stride, columns, group.depth, y, y_stride, false, AskingInTurn{ranges});
  }

  // Part `part` of `parts` of the bytes of B of a group's adapters and A of the group's after it, page by page.
  Ask adapters_of(const Group& group, const Group& after, int part, int parts) const {
    const int segments = int(segments_.size()), linears = group.count + after.count;
    const int pieces = std::max(1, parts / (segments * linears * pages_));  // of a page
    const int range = part / pieces, page = range / segments / linears, index = range / segments % linears;
    const Ask nothing{&group, 0};  // of an address that is mapped
    if (page >= pages_) return nothing;
    const int slot = segments_[range % segments].slot;
    const bool own = index < group.count;
    const Linear& linear = own ? group.linears[index] : after.linears[index - group.count];
    const int ranks = std::min(PAGE_ROWS, linear.ranks[slot] - page * PAGE_ROWS);
    if (ranks <= 0) return nothing;
    const int64_t width = own ? linear.out : after.depth;
    const size_t bytes = size_t(ranks * width) * sizeof(T) / pieces;
    const T* rows = rank_row(own ? linear.b : linear.a, width, linear, slot, page * PAGE_ROWS);
    return {reinterpret_cast<const char*>(rows) + part % pieces * bytes, bytes};
  }

  // As multiply, in the same order: sums wait in y from one part of the inputs to the next.
  template <class W>
  static void multiply_parts(Wide* widened, int rows, const Input* x, int x_stride, const W* weight, int depth, float* y,
                             int y_stride) {
    constexpr bool widens = !std::is_same_v<W, Wide>;
    constexpr int most = INPUTS<Weight>, unwidened = ROUNDS ? 0 : PRODUCTS_UNWIDENED * ROWS;
    for (int start = 0; start < depth; start += most, x += most) {
      const int here = std::min(most, depth - start);
      const W* part = weight;
      weight = past(weight, here);
      const Ask next{weight, (weight - part) * sizeof(W)};
      if constexpr (widens)
        if (rows > unwidened) {
          widen_panel(part, here, widened);
          multiply(rows, x, x_stride, walk<Wide>(widened), here, y, y_stride, start > 0, next);
          continue;
        }
      multiply(rows, x, x_stride, walk(part, widened), here, y, y_stride, start > 0, next);
    }
  }

  // y += s B for every row's own adapter, over its ranks in ascending order; EXPAND_COLUMNS of a segment an item.
  void expand(Scratch& mine, const Group& group, int rows, const Rows& y) {
    int starts[4] = {};
    for (int index = 0; index < group.count; ++index)
      starts[index + 1] = starts[index] + (padded(group.linears[index].out) + EXPAND_COLUMNS - 1) / EXPAND_COLUMNS;
    const int items = int(segments_.size()) * starts[group.count];
    team_.each(items, team_.share(items), [&](int item) {
      const Segment& segment = segments_[item / starts[group.count]];
      int index = 0, offset = 0;
      for (item %= starts[group.count]; item >= starts[index + 1]; ++index) offset += padded(group.linears[index].out);
      const Linear& linear = group.linears[index];
      const int first = (item - starts[index]) * EXPAND_COLUMNS, end = std::min(first + EXPAND_COLUMNS, int(linear.out));
      const int rank = linear.ranks[segment.slot], columns = rank_columns();
      for (int j = 0; j < rank; j += PAGE_ROWS) {
        const int here = std::min(PAGE_ROWS, rank - j);
        const float* s = shrunk_.data() + (size_t(index) * rows + segment.first) * columns + j;
        const T* b = rank_row(linear.b, linear.out, linear, segment.slot, j);
        for (int column = first; column < end; column += COLUMNS) {
          float* out = y[segment.first] + offset + column;
          if (column + COLUMNS <= linear.out) {
            const Strided<T> of_linear{b + column, size_t(linear.out)};
            multiply<B_AHEAD>(segment.rows, s, columns, of_linear, here, out, y.stride(), true);
          } else {  // the linear ends within this panel
            std::memset(mine.tail, 0, sizeof mine.tail);
            for (int r = 0; r < here; ++r)
              std::memcpy(mine.tail + r * COLUMNS, b + r * linear.out + column, (end - column) * sizeof(T));
            multiply(segment.rows, s, columns, walk<T>(mine.tail), here, out, y.stride(), true);
          }
        }
      }
    });
  }

  const Model model_;
  const std::vector<Layer> layers_;
  const int q_width_, kv_width_, inner_;
  Rows x_, h_, y_, qkv_, attended_, gate_up_;
  RowsOf<Input> rounded_;  // of the input of the linears that come next, where products take bf16
  int parts_ = 1;
  int pages_ = 1;  // of q in the first layer, the most an adapter of this step has: what is asked for of each linear
  std::vector<Segment> segments_;
  std::vector<RowTile> tiles_;
  Buffer shrunk_, partial_;
  std::vector<std::unique_ptr<Scratch>> scratch_;
  Team team_;  // last, so that its threads end before what they use
};

// [out, in] to panels [ceil(out / 32), in, 32], the columns past `out` zero.
template <class Weight, class T>
void pack(const T* from, int64_t out, int64_t in, Weight* to) {
  for (int64_t first = 0; first < out; first += COLUMNS, to += panel_size(to, int(in))) {
    std::memset(static_cast<void*>(to), 0, panel_size(to, int(in)) * sizeof(Weight));
    for (int column = 0; column < std::min<int64_t>(COLUMNS, out - first); ++column) {
      const T* row = from + (first + column) * in;
      for (int k = 0; k < in; ++k) std::memcpy(to + place_in_panel(to, k, column), row + k, sizeof(T));
    }
  }
}

// A weight [out, in] in blocks: put(block, input, column, row of the weight, input of the weight) fills what is not padding.
template <class Block, class Put>
void pack_blocks(int64_t out, int64_t in, Block* to, Put&& put) {
  for (int64_t first = 0; first < out; first += COLUMNS)
    for (int64_t start = 0; start < in; start += SCALED, ++to) {
      std::memset(static_cast<void*>(to), 0, sizeof *to);
      for (int column = 0; column < std::min<int64_t>(COLUMNS, out - first); ++column)
        put(*to, column, first + column, start, int(std::min<int64_t>(SCALED, in - start)));
    }
}

// Of weights as they are: the largest of SCALED inputs becomes 127, the others round to nearest, ties to even. A NaN or
// infinity makes all that share its scale NaN.
template <class T>
void quantise(const T* from, int64_t out, int64_t in, void* to) {
  using Block = typename BlocksOf<T>::Eight;
  pack_blocks(out, in, static_cast<Block*>(to), [&](Block& block, int column, int64_t row, int64_t start, int inputs) {
    float values[SCALED], most = 0;
    for (int k = 0; k < inputs; ++k) {
      values[k] = widen(from[row * in + start + k]);
      const float size = std::abs(values[k]);
      most = most >= size || most != most ? most : size;
    }
    const float scale = most / 127;
    block.scales[column] = scale < std::numeric_limits<float>::infinity() ? scale : std::nanf("");
    if (!(block.scales[column] > 0)) return;
    for (int k = 0; k < inputs; ++k)
      block.put(k, column, int(std::clamp(std::nearbyint(values[k] / scale), -127.0f, 127.0f)));
  });
}

// Of values that came with scales, and where there are four bits with least values: [out, in] and [out, in / SCALED].
template <class T>
void keep(const int8_t* values, const float* scales, const float* least, int64_t out, int64_t in, void* to) {
  const auto pack = [&]<class B>(B* blocks) {
    pack_blocks(out, in, blocks, [&](B& block, int column, int64_t row, int64_t start, int inputs) {
      const int64_t group = (row * in + start) / SCALED;
      block.scales[column] = scales[group];
      if constexpr (requires { block.least; }) block.least[column] = least[group];
      for (int k = 0; k < inputs; ++k) block.put(k, column, values[row * in + start + k]);
    });
  };
  if constexpr (KEEPS_BLOCKS<T>)
    if (least != nullptr) return pack(static_cast<typename BlocksOf<T>::Four*>(to));
  pack(static_cast<typename BlocksOf<T>::Eight*>(to));
}

// Of bf16 as it is; false where that is not possible.
template <class T>
bool compress(const T* from, int64_t out, int64_t in, void* to) {
  if constexpr (COMPRESSES<T>) {
    using Block = typename BlocksOf<T>::Twelve;
    auto* blocks = static_cast<Block*>(to);
    std::vector<typename Block::Room> rooms(panel_size(blocks, int(in)));
    for (int64_t first = 0; first < out; first += COLUMNS) {
      pack(from + first * in, std::min<int64_t>(COLUMNS, out - first), in, reinterpret_cast<PairedInputs*>(rooms.data()));
      for (const auto& room : rooms)
        if (!blocks++->hold(room)) return false;
    }
    return true;
  }
  return false;
}

template <class T>
size_t panel_bytes(int64_t in, int64_t storage) {
  const auto bytes = [&]<class W>(const W* panel) { return panel_size(panel, int(in)) * sizeof(W); };
  if constexpr (KEEPS_BLOCKS<T>)
    if (storage == FOUR_BITS) return bytes(static_cast<const typename BlocksOf<T>::Four*>(nullptr));
  if constexpr (COMPRESSES<T>)
    if (storage == TWELVE_BITS) return bytes(static_cast<const typename BlocksOf<T>::Twelve*>(nullptr));
  if (storage == EIGHT_BITS) return bytes(static_cast<const typename BlocksOf<T>::Eight*>(nullptr));
  return bytes(static_cast<const typename Packed<T>::Weight*>(nullptr));
}

}  // namespace
}  // namespace multilora

// ---- What Python calls. `bf16`: how adapters and cache are stored, and what base weights stand for; else float32.

#define EXPORT extern "C" __attribute__((visibility("default")))

// Null when there is no memory or no thread to be had.
EXPORT void* multilora_open(const multilora::Model* model, int threads, int bf16) try {
  using namespace multilora;
  if (bf16) return static_cast<Engine*>(new Decoder<BFloat16>(*model, threads));
  return static_cast<Engine*>(new Decoder<float>(*model, threads));
} catch (...) {
  return nullptr;
}

// 0, or 1 when there is no memory for so many rows. Every index in `batch` has been checked by the caller.
EXPORT int multilora_step(void* engine, const multilora::Batch* batch) try {
  static_cast<multilora::Engine*>(engine)->step(*batch);
  return 0;
} catch (...) {
  return 1;
}

EXPORT void multilora_close(void* engine) { delete static_cast<multilora::Engine*>(engine); }

// Whether multilora_keep is for this library and dtype; where it is not, files' blocks are packed as the weights they are.
EXPORT int multilora_keeps_blocks(int bf16) {
  using namespace multilora;
  return bf16 ? KEEPS_BLOCKS<BFloat16> : KEEPS_BLOCKS<float>;
}

// The bytes of a linear's packed weights.
EXPORT int64_t multilora_packed_bytes(int64_t out, int64_t in, int bf16, int64_t storage) {
  using namespace multilora;
  return padded(out) / COLUMNS * int64_t(bf16 ? panel_bytes<BFloat16>(in, storage) : panel_bytes<float>(in, storage));
}

EXPORT void multilora_pack(const void* from, int64_t out, int64_t in, void* to, int bf16) {
  using namespace multilora;
  if (bf16) pack(static_cast<const BFloat16*>(from), out, in, static_cast<Packed<BFloat16>::Weight*>(to));
  else pack(static_cast<const float*>(from), out, in, static_cast<float*>(to));
}

// bf16 weights in fewer bits, none of them lost; 0, and nothing packed, where the library or the weights do not allow it.
EXPORT int multilora_compress(const void* from, int64_t out, int64_t in, void* to) try {
  using namespace multilora;
  return compress(static_cast<const BFloat16*>(from), out, in, to);
} catch (...) {
  return 0;
}

EXPORT void multilora_quantise(const void* from, int64_t out, int64_t in, void* to, int bf16) {
  using namespace multilora;
  if (bf16) quantise(static_cast<const BFloat16*>(from), out, in, to);
  else quantise(static_cast<const float*>(from), out, in, to);
}

EXPORT void multilora_keep(const int8_t* values, const float* scales, const float* least, int64_t out, int64_t in,
                           void* to, int bf16) {
  using namespace multilora;
  if (bf16) keep<BFloat16>(values, scales, least, out, in, to);
  else keep<float>(values, scales, least, out, in, to);
}
