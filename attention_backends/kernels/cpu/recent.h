// Attention of an Attamba layer: keys and values of the step are rotated and stored, and each token attends to the states
// that it sees, to its window, and to the state of token 0. attention_backends/attamba/attend_step.py has the definition.
#pragma once

#include "run.h"

namespace starling {

constexpr int64_t PAGE_ROWS = 16;  // as in chunks.py

// Pages of K and V, 16 rows each: views (pages, 16, heads, size) whose keys are transposed within a page.
template <class T>
struct KvView {
  T *keys, *values;
  int64_t key_strides[4], value_strides[4];

  void write(int64_t page, int64_t row, int64_t head, int64_t size, const T* key, const T* value) const {
    T* to = keys + page * key_strides[0] + row * key_strides[1] + head * key_strides[2];
    for (int64_t d = 0; d < size; ++d) to[d * key_strides[3]] = key[d];
    to = values + page * value_strides[0] + row * value_strides[1] + head * value_strides[2];
    std::memcpy((void*)to, value, size * sizeof(T));
  }
};

template <class T>
KvView<T> kv_view(const at::Tensor& keys, const at::Tensor& values) {
  KvView<T> view{keys.mutable_data_ptr<T>(), values.mutable_data_ptr<T>(), {}, {}};
  for (int i = 0; i < 4; ++i) {
    view.key_strides[i] = keys.stride(i);
    view.value_strides[i] = values.stride(i);
  }
  return view;
}

struct Angles {
  const float *cos, *sin;  // (positions, pairs)
  int64_t pairs;
};

// The factors of a position, for each element of a head: rotated = element * even + its partner in the pair * odd.
struct Rotation {
  std::vector<float> even, odd;

  void set(const Angles& angles, int64_t position) {
    even.resize(2 * angles.pairs);
    odd.resize(2 * angles.pairs);
    for (int64_t pair = 0; pair < angles.pairs; ++pair) {
      const int64_t at = position * angles.pairs + pair;
      even[2 * pair] = even[2 * pair + 1] = angles.cos[at];
      odd[2 * pair] = -angles.sin[at];
      odd[2 * pair + 1] = angles.sin[at];
    }
  }

  // Rotates sixteen elements from `d` on of a head. The pairs are (2 j, 2 j + 1).
  Vec operator()(Vec x, int64_t d) const {
    const Vec partner = __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return x * floats_at(&even[d]) + partner * floats_at(&odd[d]);
  }
};

// The state of token 0 of each piece: (K | V) of all heads.
template <class T>
struct FirstState {
  const T* rows;
  int64_t stride;
  const int64_t* piece;
  const int32_t* table;
  int64_t columns;
  const bool* seen;

  const T* of(int64_t token) const { return rows + table[piece[token] * columns] * stride; }
};

// Heads [first, first + count) of `all`, whose parts have room for `group` heads.
struct Heads {
  int64_t first, count, group, all, size;
};

// Merges both parts (tokens, group, size), those of the states and of the window, in which every token has a key, and
// the state of token 0 into out (tokens, all heads, size). The log-sum-exps are (tokens, count).
template <class T>
void merge_parts(const Heads& heads, const T* query, const FirstState<T>& first, const float* parts, const float* lses,
                 int64_t tokens, float scale, T* out) {
  const int64_t size = heads.size;
  const float *of_window = parts + tokens * heads.group * size, *window_lses = lses + tokens * heads.group;
  at::parallel_for(0, tokens * heads.count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) {
      const int64_t token = cell / heads.count, index = cell % heads.count, head = heads.first + index;
      const int64_t from = (token * heads.group + index) * size, at = (token * heads.all + head) * size;
      const T* value = nullptr;
      float score = NO_KEY;
      if (first.seen[token]) {
        const T* key = first.of(token) + head * size;
        value = key + heads.all * size;
        Vec total = {};
        for (int64_t d = 0; d < size; d += LANES) total += floats_at(query + at + d) * floats_at(key + d);
        score = sum(total) * scale;
      }
      const float peak = std::max(std::max(lses[cell], window_lses[cell]), score);
      const Vec weights = exp(Vec{lses[cell] - peak, window_lses[cell] - peak, score - peak});
      const float factor = 1.0f / (weights[0] + weights[1] + weights[2]);
      const float of_states = weights[0] * factor, of_recent = weights[1] * factor, of_first = weights[2] * factor;
      for (int64_t d = 0; d < size; d += LANES) {
        Vec merged = floats_at(parts + from + d) * of_states + floats_at(of_window + from + d) * of_recent;
        if (value) merged += floats_at(value + d) * of_first;
        store_as(out + at + d, merged);
      }
    }
  });
}

}  // namespace starling
