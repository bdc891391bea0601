// Paged attention with log-sum-exp on a CPU; contract.py defines the contract. This is flash attention (arXiv
// 2205.14135) that reads the pages in place: one pass over the keys in tiles, with a running maximum and sum per query
// row. No row's keys are gathered.
//
// A work item is a tile of the query rows that one KV head serves in one batch row (queries x group), over all keys of
// the batch row. Where there are too few items for the threads, the keys are divided into `shares`. An item then has
// one share of the keys, and the shares' results are merged by log-sum-exp.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <vector>

#include "gemm.h"

namespace starling {
namespace {

constexpr int64_t TILE_ROWS = 192;   // query rows of an item, whose sums and scores stay in the second-level cache
constexpr int64_t TILE_KEYS = 256;   // keys per step
constexpr int64_t EDGE_KEYS = 64;    // keys per step where not all query rows see all of its keys
constexpr int64_t FEW_QUERIES = 8;   // up to so many query rows, a step is bound by memory
constexpr int64_t FETCH = 4096;      // bytes of a page to prefetch; the processor's own prefetching goes on from there
constexpr int64_t ITEMS_A_THREAD = 4;
constexpr int64_t SHORT_SUM = 32;    // terms of a float dot product in one running sum, where query rows are few

struct Strides {
  int64_t page, head, token;  // in elements; for keys, `token` is between keys (PAGES) or dimensions (CPU)
};

struct Call {
  int64_t rows, tokens, heads, kv_heads, key_size, value_size, page, pages;
  const int32_t *block_table, *starts, *lens;
  int64_t columns;
  Strides keys, values;
  int64_t query_strides[2], out_strides[2];
  bool transposed_keys, causal;
  int64_t queries_per_key;
  int64_t window;  // 0 for none
  float scale, softcap, value_scale;
  float* lse;  // (shares, tokens, heads)
};

struct Item {
  int64_t row, kv_head, first, last;  // [first, last) of the row's queries x group
  int64_t share, shares;
};

struct Keys {
  int64_t first, end;
};

Keys visible(const Call& call, int64_t query, int64_t queries, int64_t keys) {
  const int64_t end = call.causal ? std::max<int64_t>(0, keys - (queries - 1 - query) / call.queries_per_key) : keys;
  return {call.window ? std::max<int64_t>(0, end - call.window) : 0, end};
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

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
  Buffer<T> keys;
  std::vector<Span<T>> spans;
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

template <class Q, class T, class Out>
void run_item(const Call& call, const Q* query, const Cache<T>& cache, const Item& item, Out* out,
              const int64_t (&out_strides)[2], Scratch<T>& scratch) {
  const int64_t rows = item.last - item.first, group = call.heads / call.kv_heads;
  const int64_t start = call.starts[item.row], queries = call.starts[item.row + 1] - start, keys = call.lens[item.row];
  auto* packed = scratch.queries.get(rows * call.key_size + 1);
  auto* weights = scratch.weights.get(rows * TILE_KEYS + 1);
  float* scores = scratch.scores.get(rows * TILE_KEYS);
  float* sums = scratch.sums.get(rows * call.value_size);
  float *peaks = scratch.peaks.get(rows), *totals = scratch.totals.get(rows), *decays = scratch.decays.get(rows);
  std::fill(sums, sums + rows * call.value_size, 0.0f);
  std::fill(peaks, peaks + rows, NO_KEY);
  std::fill(totals, totals + rows, 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = start + (item.first + i) / group, head = item.kv_head * group + (item.first + i) % group;
    const Q* from = query + token * call.query_strides[0] + head * call.query_strides[1];
    for (int64_t d = 0; d < call.key_size; ++d) packed[i * call.key_size + d] = static_cast<Operand<T>>(from[d]);
  }
  // Later queries see later keys, so the tile's range goes from the first query's start to the last query's end.
  Keys range{visible(call, item.first / group, queries, keys).first,
             visible(call, (item.last - 1) / group, queries, keys).end};
  const int64_t part = round_up((range.end - range.first + item.shares - 1) / item.shares, TILE_KEYS);
  range = {range.first + item.share * part, std::min(range.end, range.first + (item.share + 1) * part)};
  const auto seen_by = [&](int64_t i) { return visible(call, (item.first + i) / group, queries, keys); };
  // Every row sees all keys of `common`, as seen_by's bounds never fall from row to row. A step within needs no mask.
  const Keys common{seen_by(rows - 1).first, seen_by(0).end};
  for (int64_t base = range.first / LANES * LANES, end; base < range.end; base = end) {
    const bool inside = base >= common.first && base + TILE_KEYS <= common.end;
    end = std::min(base + (inside || rows <= FEW_QUERIES ? TILE_KEYS : EDGE_KEYS), range.end);
    const int64_t first = std::max(base, range.first), count = round_up(end - base, LANES);
    int64_t top = 0, bottom = rows;  // rows that see any key of the step
    while (top < rows && seen_by(top).end <= first) ++top;
    while (bottom > top && seen_by(bottom - 1).first >= end) --bottom;
    const Step step{base, first, end, count, bottom - top};
    score_tile(call, cache, item, step, scratch, packed + top * call.key_size, scores);
    for (int64_t i = top; i < bottom; ++i) {
      Keys seen = seen_by(i);
      seen = {std::max(seen.first, first), std::min(seen.end, end)};
      decays[i] = softmax_step(call, scores + (i - top) * TILE_KEYS, weights + (i - top) * TILE_KEYS, count, seen, base,
                               peaks[i], totals[i]);
    }
    value_tile(call, cache, item, step, scratch, weights + (first - base), sums + top * call.value_size, decays + top);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = start + (item.first + i) / group, head = item.kv_head * group + (item.first + i) % group;
    const float factor = totals[i] == 0 ? 0.0f : call.value_scale / totals[i];  // a NaN total gives NaN
    Out* to = out + item.share * call.tokens * call.heads * call.value_size + token * out_strides[0] +
              head * out_strides[1];
    for (int64_t d = 0; d < call.value_size; ++d) to[d] = static_cast<Out>(sums[i * call.value_size + d] * factor);
    call.lse[(item.share * call.tokens + token) * call.heads + head] =
        totals[i] == 0 ? NO_KEY : peaks[i] + std::log(totals[i]);
  }
}

std::vector<Item> make_items(const Call& call, int64_t threads, int64_t& shares) {
  std::vector<Item> items;
  int64_t longest = 0;
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t rows = (call.starts[row + 1] - call.starts[row]) * (call.heads / call.kv_heads);
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    longest = std::max<int64_t>(longest, rows ? call.lens[row] : 0);
    for (int64_t head = 0; head < call.kv_heads; ++head)
      for (int64_t i = 0; i < tiles; ++i)
        items.push_back({row, head, rows * i / tiles, rows * (i + 1) / tiles, 0, 1});
  }
  const int64_t wanted = items.empty() ? 1 : (threads * ITEMS_A_THREAD + items.size() - 1) / items.size();
  shares = threads == 1 ? 1 : std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, longest / (2 * TILE_KEYS)));
  if (shares == 1) return items;
  std::vector<Item> shared;
  for (Item item : items)
    for (item.shares = shares, item.share = 0; item.share < shares; ++item.share) shared.push_back(item);
  return shared;
}

// Merges the shares' outs and log-sum-exps, as merge.py does. On return, the first share of `lse` is the result's.
template <class Out>
void join_shares(const Call& call, int64_t shares, const float* parts, Out* out) {
  const int64_t cells = call.tokens * call.heads;
  at::parallel_for(0, cells, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> weights(shares);
    for (int64_t cell = begin; cell < end; ++cell) {
      float peak = NO_KEY, total = 0;
      for (int64_t s = 0; s < shares; ++s) peak = std::max(peak, call.lse[s * cells + cell]);
      for (int64_t s = 0; s < shares; ++s)
        total += weights[s] = call.lse[s * cells + cell] == NO_KEY ? 0.0f : std::exp(call.lse[s * cells + cell] - peak);
      Out* to = out + cell / call.heads * call.out_strides[0] + cell % call.heads * call.out_strides[1];
      for (int64_t d = 0; d < call.value_size; ++d) {
        float joined = 0;
        for (int64_t s = 0; s < shares; ++s)
          if (weights[s] != 0) joined += weights[s] * parts[(s * cells + cell) * call.value_size + d];
        to[d] = static_cast<Out>(total == 0 ? 0.0f : joined / total);
      }
      call.lse[cell] = total == 0 ? NO_KEY : peak + std::log(total);
    }
  });
}

template <class Work>
void spread(const std::vector<Item>& items, int64_t threads, const Work& work) {
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < items.size(); i = next++) work(items[i]);
  });
}

template <class Q, class T>
at::Tensor run(Call& call, const at::Tensor& query, const Cache<T>& cache, at::Tensor& out) {
  const int64_t threads = at::get_num_threads();
  int64_t shares = 1;
  const std::vector<Item> items = make_items(call, threads, shares);
  at::Tensor lse = at::empty({shares, call.tokens, call.heads}, query.options().dtype(at::kFloat));
  call.lse = lse.mutable_data_ptr<float>();
  const Q* from = query.const_data_ptr<Q>();
  Q* to = out.mutable_data_ptr<Q>();
  if (shares == 1) {
    spread(items, threads, [&](const Item& item) {
      static thread_local Scratch<T> scratch;
      run_item<Q, T, Q>(call, from, cache, item, to, call.out_strides, scratch);
    });
    return lse[0];
  }
  at::Tensor parts = at::empty({shares, call.tokens, call.heads, call.value_size}, lse.options());
  float* part = parts.mutable_data_ptr<float>();
  const int64_t strides[2] = {call.heads * call.value_size, call.value_size};
  spread(items, threads, [&](const Item& item) {
    static thread_local Scratch<T> scratch;
    run_item<Q, T, float>(call, from, cache, item, part, strides, scratch);
  });
  join_shares(call, shares, part, to);
  return lse[0].clone();
}

// Refuses values that would make the op read outside of the operands.
void check_values(const Call& call) {
  TORCH_CHECK_VALUE(call.starts[0] == 0 && call.starts[call.rows] == call.tokens, "query_start_loc goes from ",
                    call.starts[0], " to ", call.starts[call.rows], ", not from 0 to the ", call.tokens,
                    " query tokens");
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t keys = call.lens[row], used = (keys + call.page - 1) / call.page;
    TORCH_CHECK_VALUE(call.starts[row] <= call.starts[row + 1], "query_start_loc falls at row ", row);
    TORCH_CHECK_VALUE(keys >= 0 && used <= call.columns, "seq_lens[", row, "] = ", keys,
                      ": block_table has room for 0 to ", call.columns * call.page);
    for (int64_t i = 0; i < used; ++i) {
      const int64_t page = call.block_table[row * call.columns + i];
      TORCH_CHECK_VALUE(0 <= page && page < call.pages, "block_table[", row, ", ", i, "] = ", page, ": the cache has ",
                        call.pages, " pages");
    }
  }
}

template <class Q>
at::Tensor by_cache_dtype(Call& call, const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                          at::Tensor& out) {
  const auto with = [&](auto example) {
    using T = decltype(example);
    return run<Q, T>(call, query, Cache<T>{keys.const_data_ptr<T>(), values.const_data_ptr<T>()}, out);
  };
  if (keys.scalar_type() == at::kFloat8_e4m3fn) return with(at::Float8_e4m3fn{});
  if (keys.scalar_type() == at::kFloat8_e5m2) return with(at::Float8_e5m2{});
  return with(Q{});
}

// Takes operands that contract.py and attention.py have checked. The caches are views (pages, page size, KV heads,
// size), in which the stride of the last dimension, or of the tokens for transposed keys, is 1.
at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                           const at::Tensor& block_table, const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                           at::Tensor& out, double scale, bool causal, int64_t queries_per_key, int64_t window,
                           double softcap, double value_scale, bool transposed_keys) {
  Call call{};
  call.rows = seq_lens.size(0);
  call.tokens = query.size(0);
  call.heads = query.size(1);
  call.kv_heads = keys.size(2);
  call.key_size = keys.size(3);
  call.value_size = values.size(3);
  call.page = keys.size(1);
  call.pages = keys.size(0);
  call.block_table = block_table.const_data_ptr<int32_t>();
  call.starts = query_start_loc.const_data_ptr<int32_t>();
  call.lens = seq_lens.const_data_ptr<int32_t>();
  call.columns = block_table.size(1);
  call.keys = {keys.stride(0), keys.stride(2), keys.stride(transposed_keys ? 3 : 1)};
  call.values = {values.stride(0), values.stride(2), values.stride(1)};
  for (int i = 0; i < 2; ++i) {
    call.query_strides[i] = query.stride(i);
    call.out_strides[i] = out.stride(i);
  }
  call.transposed_keys = transposed_keys;
  call.causal = causal;
  call.queries_per_key = queries_per_key;
  call.window = window;
  call.scale = static_cast<float>(scale);
  call.softcap = static_cast<float>(softcap);
  call.value_scale = static_cast<float>(value_scale);
  check_values(call);
  switch (query.scalar_type()) {
    case at::kFloat: return by_cache_dtype<float>(call, query, keys, values, out);
    case at::kBFloat16: return by_cache_dtype<at::BFloat16>(call, query, keys, values, out);
    case at::kHalf: return by_cache_dtype<at::Half>(call, query, keys, values, out);
    default: TORCH_CHECK_VALUE(false, "query is ", query.scalar_type(), ", not float32, bfloat16 or float16");
  }
}

}  // namespace

TORCH_LIBRARY(starling_kernels, library) {
  library.def(
      "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor block_table, Tensor query_start_loc, "
      "Tensor seq_lens, Tensor(a!) out, float scale, bool causal, int queries_per_key, int window, float softcap, "
      "float value_scale, bool transposed_keys) -> Tensor");
  library.impl("paged_attention", c10::DispatchKey::CPU, &paged_attention);
}

}  // namespace starling
