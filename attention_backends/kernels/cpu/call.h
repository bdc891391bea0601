// The operands of a call of the op, the items that it is divided into, and scratch memory.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "gemm.h"

namespace starling {

struct Strides {
  int64_t page, head, token;  // in elements; for keys, `token` is between keys (PAGES) or dimensions (CPU)
};

// How query tokens are re-rotated; dispatch.py has the definition. The rows' query token i is the query's token tokens[i],
// rotated back by rotate_by[i] positions. cos and sin are (positions, pairs).
struct RotateBy {
  const int64_t *tokens, *rotate_by;
  const float *cos, *sin;
  int64_t positions, pairs;
  bool is_neox_style;
};

struct Call {
  int64_t rows, heads, kv_heads, key_size, value_size, page, pages;
  int64_t tokens;      // of the query
  int64_t row_tokens;  // of the rows; as many, but with `rerotated` and `row_heads`
  const int32_t *block_table, *starts, *lens;
  const bool* row_heads;  // (rows, KV heads): the heads that a row computes; null: all of them
  int64_t columns;
  Strides keys, values;
  int64_t query_strides[2], out_strides[2];
  bool transposed_keys, causal;
  int64_t queries_per_key;
  int64_t window;  // 0 for none
  float scale, softcap, value_scale;
  bool is_rerotated;
  RotateBy rerotated;
};

// How many results of each head a share of the keys has: one for each query token, or, re-rotated, for each token of the rows.
inline int64_t cells_of_share(const Call& call) { return call.is_rerotated ? call.row_tokens : call.tokens; }

struct Item {
  int64_t row, kv_head, first, last;  // [first, last) of the row's queries x group
  int64_t share, shares;
};

struct Keys {
  int64_t first, end;
};

inline Keys visible(const Call& call, int64_t query, int64_t queries, int64_t keys) {
  const int64_t end = call.causal ? std::max<int64_t>(0, keys - (queries - 1 - query) / call.queries_per_key) : keys;
  return {call.window ? std::max<int64_t>(0, end - call.window) : 0, end};
}

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Scratch memory that grows and never shrinks; there is one buffer per thread and purpose.
template <class T>
class Buffer {
 public:
  T* get(int64_t count) {
    if (count > size_) {
      data_.reset(static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T), 64))));
      TORCH_CHECK(data_, "no memory for ", count, " elements");
      size_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

template <class T>
struct Scratch {
  Buffer<Operand<T>> queries, weights;
  Buffer<float> scores, sums, peaks, totals, decays;
  Buffer<T> keys, tiles;
  std::vector<const T*> rows;  // of a matrix that is packed as tiles
  std::vector<Span<T>> spans;
  std::vector<Keys> seen;  // by query row
};

}  // namespace starling
