// The items of a call: their attention, by flash attention (arXiv 2205.14135) over pages that are read in place.
#pragma once

#include <optional>

#include "call.h"
#include "tiles.h"

namespace starling {

constexpr int64_t TILE_ROWS = 192;   // query rows of an item, whose sums and scores stay in the second-level cache
constexpr int64_t WINDOW_ROWS = 48;  // the least query rows of an item with a sliding window
constexpr int64_t TILE_KEYS = 256;   // keys per step
constexpr int64_t EDGE_KEYS = 64;    // keys per step where not all query rows see all of its keys
constexpr int64_t FEW_QUERIES = 8;   // up to so many query rows, a step is bound by memory
constexpr int64_t FETCH = 4096;      // bytes of a page to prefetch; the processor's own prefetching goes on from there
constexpr int64_t ITEMS_A_THREAD = 4;
constexpr int64_t SHORT_SUM = 32;    // terms of a float dot product in one running sum, where query rows are few

// Where an item writes: out (shares, cells, heads, Dv) and lse (shares, cells, heads), or for one share the
// op's own out and lse.
template <class Out>
struct Target {
  Out* out;
  int64_t strides[2];  // of tokens and heads
  float* lse;
};

// Turns scores[0, count), those of the keys from `base` on, into weights exp(score - peak), 0 for keys not in `seen`.
// Updates peak and total. Returns the factor by which sums under the old peak must be multiplied.
template <class A>
float softmax_step(const Call& call, float* scores, A* weights, int64_t count, Keys seen, int64_t base, float& peak,
                   float& total) {
  const int64_t first = seen.first - base, end = seen.end - base;
  const bool masked = first > 0 || end < count;
  IntVec lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  Vec peaks = splat(NO_KEY);
  for (int64_t i = 0; i < count; i += LANES) {
    Vec score = floats_at(scores + i) * call.scale;
    if (call.softcap > 0) score = tanh(score / call.softcap) * call.softcap;
    if (masked) {
      const IntVec key = lane + static_cast<int32_t>(i);
      score = (key >= static_cast<int32_t>(std::max<int64_t>(first, 0))) &
                      (key < static_cast<int32_t>(std::min(end, count)))
                  ? score
                  : splat(NO_KEY);
    }
    store(scores + i, score);
    peaks = larger(peaks, score);
  }
  const float before = peak;
  peak = std::max(before, largest(peaks));
  const float shift = peak == NO_KEY ? 0.0f : peak;
  Vec sums = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const Vec weight = exp(floats_at(scores + i) - shift);
    sums += weight;
    if constexpr (std::is_same_v<A, float>) {
      store(weights + i, weight);
    } else {
#if defined(__AVX512BF16__)
      const __m256bh narrow = _mm512_cvtneps_pbh((__m512)weight);
      std::memcpy(weights + i, &narrow, sizeof(narrow));
#endif
    }
  }
  const float decay = before == NO_KEY ? 0.0f : std::exp(before - shift);
  total = total * decay + sum(sums);
  return decay;
}

template <class T>
struct Cache {
  const T *keys, *values;
};

// The keys' dimensions as the rows of B. With few query rows, float sums are cut into short spans, which round as
// little as the sums of a dot product by lanes.
template <class T>
void dimension_spans(const T* keys, int64_t stride, int64_t size, int64_t rows, std::vector<Span<T>>& spans) {
  const bool cut = std::is_same_v<Operand<T>, float> && rows <= FEW_QUERIES;
  spans.clear();
  for (int64_t d = 0, width; d < size; d += width) {
    width = cut ? std::min(SHORT_SUM, size - d) : size;
    spans.push_back({keys + d * stride, width});
  }
}

// Keys [first, end) for `rows` query rows. Scores are computed for [base, base + count), which is aligned to vectors.
struct Step {
  int64_t base, first, end, count, rows;
  bool tiled;  // by tile registers
};

template <class T>
void fetch(const T* from, int64_t elements) {
  const char* at = reinterpret_cast<const char*>(from);
  const char* end = at + std::min<int64_t>(elements * sizeof(T), FETCH);
  for (; at < end; at += 64) __builtin_prefetch(at, 0, 2);
}

// Computes the scores of a step. Slots past the row's last key may be computed with, but their scores are not used.
template <class T>
void score_tile(const Call& call, const Cache<T>& cache, const Item& item, const Step& step, Scratch<T>& scratch,
                const Operand<T>* queries, float* scores) {
  const int32_t* table = call.block_table + item.row * call.columns;
  const T* keys = cache.keys + item.kv_head * call.keys.head;
  std::vector<Span<T>>& spans = scratch.spans;
  Product<T> product{queries, call.key_size, nullptr, 0, 0, nullptr, TILE_KEYS, nullptr};
  const auto multiply_by = [&](const T* from, int64_t stride, int64_t to, int64_t width) {
    dimension_spans(from, stride, call.key_size, step.rows, spans);
    product.spans = spans.data();
    product.spans_count = static_cast<int>(spans.size());
    product.b_stride = stride;
    product.c = scores + to;
    multiply(product, step.rows, width);
  };
  if (!call.transposed_keys) {
    T* packed = scratch.keys.get(call.key_size * TILE_KEYS);
    if (step.first > step.base || step.end < step.base + step.count)
      std::memset((void*)packed, 0, call.key_size * TILE_KEYS * sizeof(T));
    for (int64_t key = step.first; key < step.end; ++key) {
      const T* from = keys + table[key / call.page] * call.keys.page + key % call.page * call.keys.token;
      for (int64_t d = 0; d < call.key_size; ++d) packed[d * TILE_KEYS + key - step.base] = from[d];
    }
    return multiply_by(packed, TILE_KEYS, 0, step.count);
  }
  const bool few = step.rows <= FEW_QUERIES;
#if defined(STARLING_TILES)
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    if (step.tiled) {
      T* tiles = scratch.tiles.get(TILE_KEYS * std::max(call.key_size, call.value_size));
      std::vector<const T*>& dimensions = scratch.rows;
      dimensions.resize(call.key_size);
      for (int64_t key = step.base, width; key < step.base + step.count; key += width) {
        const int64_t at = key % call.page;
        width = std::min(call.page - at, step.base + step.count - key);
        const T* from = keys + table[key / call.page] * call.keys.page + at;
        for (int64_t d = 0; d < call.key_size; ++d) dimensions[d] = from + d * call.keys.token;
        pack_tiles(dimensions.data(), call.key_size, width, tiles + (key - step.base) * call.key_size);
      }
      return multiply_tiles(queries, call.key_size, tiles, call.key_size / TILE_DEPTH, step.count / LANES, step.rows,
                            scores, TILE_KEYS);
    }
  }
#endif
  for (int64_t key = step.base, width; key < step.base + step.count; key += width) {
    const int64_t page = key / call.page, at = key % call.page;
    width = std::min(call.page - at, step.base + step.count - key);
    if (few) {
      if ((page + 1) * call.page < call.lens[item.row])
        fetch(keys + table[page + 1] * call.keys.page, call.page * call.key_size);
      fetch(cache.values + item.kv_head * call.values.head + table[page] * call.values.page + at * call.values.token,
            width * call.values.token);
    }
    multiply_by(keys + table[page] * call.keys.page + at, call.keys.token, key - step.base, width);
  }
}

// Computes sums = decay * sums + weights x values over the keys of a step.
template <class T>
void value_tile(const Call& call, const Cache<T>& cache, const Item& item, const Step& step, Scratch<T>& scratch,
                const Operand<T>* weights, float* sums, const float* decays) {
  const int32_t* table = call.block_table + item.row * call.columns;
  const T* values = cache.values + item.kv_head * call.values.head;
#if defined(STARLING_TILES)
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    if (step.tiled) {
      // The weights of keys before `first`, which share a vector with it, are 0, and the values of these keys are not
      // read.
      const int64_t before = step.first - step.base, depth = round_up(step.end - step.base, TILE_DEPTH);
      std::vector<const T*>& rows = scratch.rows;
      rows.assign(depth, nullptr);
      for (int64_t key = step.first; key < step.end; ++key)
        rows[key - step.base] = values + table[key / call.page] * call.values.page + key % call.page * call.values.token;
      T* tiles = scratch.tiles.get(TILE_KEYS * std::max(call.key_size, call.value_size));
      pack_tiles(rows.data(), depth, call.value_size, tiles);
      return add_tiles(weights - before, TILE_KEYS, tiles, depth / TILE_DEPTH, call.value_size / LANES, step.rows, sums,
                       call.value_size, decays);
    }
  }
#endif
  scratch.spans.clear();
  for (int64_t key = step.first, width; key < step.end; key += width) {
    const int64_t at = key % call.page;
    width = std::min(call.page - at, step.end - key);
    scratch.spans.push_back({values + table[key / call.page] * call.values.page + at * call.values.token, width});
  }
  multiply(Product<T>{weights, TILE_KEYS, scratch.spans.data(), static_cast<int>(scratch.spans.size()),
                      call.values.token, sums, call.value_size, decays},
           step.rows, call.value_size);
}

// Rotates a head of query token `token` of the rows back into `to`, which has `call.key_size` elements.
template <class Q, class A>
void rotate_back(const Call& call, int64_t token, const Q* from, A* to) {
  const RotateBy& rerotated = call.rerotated;
  const float *cos = rerotated.cos + rerotated.rotate_by[token] * rerotated.pairs, *sin = rerotated.sin + (cos - rerotated.cos);
  const int64_t apart = rerotated.is_neox_style ? rerotated.pairs : 1, step = rerotated.is_neox_style ? 1 : 2;
  for (int64_t pair = 0; pair < rerotated.pairs; ++pair) {
    const float first = from[pair * step], second = from[pair * step + apart];
    to[pair * step] = static_cast<A>(first * cos[pair] + second * sin[pair]);
    to[pair * step + apart] = static_cast<A>(second * cos[pair] - first * sin[pair]);
  }
  for (int64_t d = 2 * rerotated.pairs; d < call.key_size; ++d) to[d] = static_cast<A>(from[d]);
}

// Whether products of many rows are computed by tile registers.
template <class T>
bool takes_tiles(const Call& call) {
  return std::is_same_v<T, at::BFloat16> && call.transposed_keys && call.key_size % TILE_DEPTH == 0 && has_tiles();
}

template <class Q, class T, class Out>
void run_item(const Call& call, const Q* query, const Cache<T>& cache, const Item& item,
              const Target<Out>& target, Scratch<T>& scratch) {
  const int64_t rows = item.last - item.first, group = call.heads / call.kv_heads;
  const int64_t start = call.starts[item.row], queries = call.starts[item.row + 1] - start, keys = call.lens[item.row];
  auto* packed = scratch.queries.get((rows + SPARE_ROWS) * call.key_size);
  auto* weights = scratch.weights.get((rows + SPARE_ROWS) * TILE_KEYS);
  float* scores = scratch.scores.get((rows + SPARE_ROWS) * TILE_KEYS);
  float* sums = scratch.sums.get(rows * call.value_size);
  float *peaks = scratch.peaks.get(rows), *totals = scratch.totals.get(rows), *decays = scratch.decays.get(rows);
  std::fill(sums, sums + rows * call.value_size, 0.0f);
  std::fill(peaks, peaks + rows, NO_KEY);
  std::fill(totals, totals + rows, 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = start + (item.first + i) / group, head = item.kv_head * group + (item.first + i) % group;
    const int64_t source = call.is_rerotated ? call.rerotated.tokens[token] : token % call.tokens;
    const Q* from = query + source * call.query_strides[0] + head * call.query_strides[1];
    Operand<T>* to = packed + i * call.key_size;
    if (call.is_rerotated)
      rotate_back(call, token, from, to);
    else if constexpr (std::is_same_v<Q, Operand<T>>)
      std::memcpy((void*)to, from, call.key_size * sizeof(Q));
    else
      for (int64_t d = 0; d < call.key_size; ++d) to[d] = static_cast<Operand<T>>(from[d]);
  }
  // Later queries see later keys, so the tile's range goes from the first query's start to the last query's end.
  Keys range{visible(call, item.first / group, queries, keys).first,
             visible(call, (item.last - 1) / group, queries, keys).end};
  const int64_t part = round_up((range.end - range.first + item.shares - 1) / item.shares, TILE_KEYS);
  range = {range.first + item.share * part, std::min(range.end, range.first + (item.share + 1) * part)};
  std::vector<Keys>& seen_keys = scratch.seen;
  seen_keys.resize(rows);
  for (int64_t i = 0; i < rows; ++i) seen_keys[i] = visible(call, (item.first + i) / group, queries, keys);
  const auto seen_by = [&](int64_t i) { return seen_keys[i]; };
#if defined(STARLING_TILES)
  const bool tiled = takes_tiles<T>(call) && rows >= MIN_ROWS_TILED;
  std::optional<TileScope> tile_registers;
  if (tiled) tile_registers.emplace();
#else
  constexpr bool tiled = false;
#endif
  // Every row sees all keys of `common`, as seen_by's bounds never fall from row to row. A step within needs no mask.
  const Keys common{seen_by(rows - 1).first, seen_by(0).end};
  for (int64_t base = range.first / LANES * LANES, end; base < range.end; base = end) {
    const bool inside = base >= common.first && base + TILE_KEYS <= common.end;
    const bool whole = inside || rows <= FEW_QUERIES || range.end - base <= 2 * EDGE_KEYS;
    end = std::min(base + (whole ? TILE_KEYS : EDGE_KEYS), range.end);
    const int64_t first = std::max(base, range.first), count = round_up(end - base, LANES);
    int64_t top = 0, bottom = rows;  // rows that see any key of the step
    while (top < rows && seen_by(top).end <= first) ++top;
    while (bottom > top && seen_by(bottom - 1).first >= end) --bottom;
    const Step step{base, first, end, count, bottom - top, tiled && bottom - top >= MIN_ROWS_TILED};
    score_tile(call, cache, item, step, scratch, packed + top * call.key_size, scores);
    for (int64_t i = top; i < bottom; ++i) {
      Keys seen = seen_by(i);
      seen = {std::max(seen.first, first), std::min(seen.end, end)};
      decays[i] = softmax_step(call, scores + (i - top) * TILE_KEYS, weights + (i - top) * TILE_KEYS, count, seen, base,
                               peaks[i], totals[i]);
      if (step.tiled)
        for (int64_t j = count; j % TILE_DEPTH; ++j) weights[(i - top) * TILE_KEYS + j] = 0;
    }
    value_tile(call, cache, item, step, scratch, weights + (first - base), sums + top * call.value_size, decays + top);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = start + (item.first + i) / group, head = item.kv_head * group + (item.first + i) % group;
    const float factor = totals[i] == 0 ? 0.0f : call.value_scale / totals[i];  // a NaN total gives NaN
    const int64_t part = item.share * cells_of_share(call) + (call.is_rerotated ? token : token % call.tokens);
    Out* to = target.out + part * target.strides[0] + head * target.strides[1];
    for (int64_t d = 0; d < call.value_size; ++d) to[d] = static_cast<Out>(sums[i * call.value_size + d] * factor);
    target.lse[part * call.heads + head] = totals[i] == 0 ? NO_KEY : peaks[i] + std::log(totals[i]);
  }
}

// A tile sees the keys of all windows of its rows, most of which are masked for each row where windows are short.
inline int64_t tile_rows(const Call& call) {
  if (!call.window) return TILE_ROWS;
  return std::clamp<int64_t>(round_up(call.window, LANES) * (call.heads / call.kv_heads), WINDOW_ROWS, TILE_ROWS);
}

inline std::vector<Item> make_items(const Call& call, int64_t threads, int64_t& shares) {
  std::vector<Item> items;
  int64_t longest = 0;
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t rows = (call.starts[row + 1] - call.starts[row]) * (call.heads / call.kv_heads);
    const int64_t queries = call.starts[row + 1] - call.starts[row], highest = tile_rows(call);
    const int64_t tiles = (rows + highest - 1) / highest;
    const int64_t keys = call.window ? std::min<int64_t>(call.lens[row], call.window + queries) : call.lens[row];
    longest = std::max<int64_t>(longest, rows ? keys : 0);
    for (int64_t head = 0; head < call.kv_heads; ++head) {
      if (call.row_heads && !call.row_heads[row * call.kv_heads + head]) continue;
      for (int64_t i = 0; i < tiles; ++i)
        items.push_back({row, head, rows * i / tiles, rows * (i + 1) / tiles, 0, 1});
    }
  }
  const int64_t wanted = items.empty() ? 1 : (threads * ITEMS_A_THREAD + items.size() - 1) / items.size();
  shares = threads == 1 ? 1 : std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, longest / (2 * TILE_KEYS)));
  if (shares == 1) return items;
  std::vector<Item> shared;
  for (Item item : items)
    for (item.shares = shares, item.share = 0; item.share < shares; ++item.share) shared.push_back(item);
  return shared;
}

}  // namespace starling
