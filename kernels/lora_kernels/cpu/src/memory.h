// Memory of the backend's own, aligned to cache lines; and what Python hands over, as plain structs.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace multilora {

// An array that grows and never shrinks; what it held is lost as it grows.
template <class T>
class BufferOf {
 public:
  BufferOf() = default;
  BufferOf(const BufferOf&) = delete;
  BufferOf& operator=(const BufferOf&) = delete;
  ~BufferOf() { std::free(data_); }

  T* at_least(size_t count) {
    if (count > count_) {
      std::free(data_);
      count_ = 0;
      data_ = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
      if (data_ == nullptr) throw std::bad_alloc();
      count_ = count;
    }
    return data_;
  }

  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// Rows of activations.
template <class T>
class RowsOf {
  static constexpr int LINE = 64 / sizeof(T);

 public:
  // Rows lie an odd number of cache lines apart, so that columns of many rows do not share a few sets of a cache.
  explicit RowsOf(int width) : stride_((width + LINE - 1) / LINE * LINE | LINE) {}

  void at_least(size_t rows) { values_.at_least(rows * stride_); }
  T* operator[](size_t row) const { return values_.data() + row * stride_; }
  int stride() const { return stride_; }

 private:
  const int stride_;
  BufferOf<T> values_;
};

using Buffer = BufferOf<float>;
using Rows = RowsOf<float>;

// The structs below are read from Python: structs.py repeats them field by field.
extern "C" {

// How base weights lie in memory.
enum Storage : int64_t { AS_STORED, EIGHT_BITS, FOUR_BITS, TWELVE_BITS };

// One linear of one layer: its base weights, packed, and every adapter's A and B in the slot pool.
struct Linear {
  const void* weight;     // [ceil(out / 32), in, 32], packed as packed.h says, or in blocks as blocks.h does
  const void* a;          // [pages * 16, in]
  const void* b;          // [pages * 16, out]
  const int32_t* ranks;   // [slots]; 0 where the slot's adapter lacks this linear in this layer
  const float* scales;    // [slots]
  const int32_t* pages;   // [slots, max_pages]
  int64_t out;
  Storage storage;
};

enum { Q, K, V, O, GATE, UP, DOWN, LINEARS };

struct Layer {
  const float* input_norm;           // [hidden]
  const float* post_attention_norm;  // [hidden]
  void* keys;                        // [blocks, kv_heads, head_dim, block_size]
  void* values;                      // [blocks, kv_heads, block_size, head_dim]
  Linear linears[LINEARS];
};

struct Model {
  int64_t vocab, hidden, inner, heads, kv_heads, head_dim, layers;
  int64_t block_size;   // a multiple of 16
  int64_t max_pages;    // of 16 ranks an adapter may own in a linear
  float eps;
  const float* cosines;    // [positions, head_dim / 2]
  const float* sines;      // [positions, head_dim / 2]
  const void* embedding;   // [vocab, hidden]; null: the head's packed weights serve
  const float* norm;       // [hidden]
  Linear head;
  const Layer* decoder;
};

// One step. Rows of a sequence lie side by side with ascending positions; rows of one slot as well.
struct Batch {
  int64_t rows, sampled, max_blocks;
  const int32_t* tokens;         // [rows]
  const int32_t* positions;      // [rows]
  const int32_t* slots;          // [rows]; -1: the base model alone
  const int32_t* sequences;      // [rows], into block_tables
  const int32_t* block_tables;   // [sequences, max_blocks]
  const int32_t* sampled_rows;   // [sampled], whose logits are wanted
  float* logits;                 // [sampled, vocab rounded up to 32]
  int32_t* best;                 // [sampled], the first of the largest logits
  uint8_t* finite;               // [sampled], 0 where a logit is NaN or infinite
};
}

}  // namespace multilora
