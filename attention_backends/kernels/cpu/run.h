// A call of paged attention: its operands from tensors, the checks of their values, and its items over the threads.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <vector>

#include "attend.h"
#include "join.h"

namespace starling {

template <class Work>
void spread(const std::vector<Item>& items, int64_t threads, const Work& work) {
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < items.size(); i = next++) work(items[i]);
  });
}

// Writes out and lse (tokens, heads). With `adds`, they hold attention to other keys, which is merged.
template <class Q, class T, class Out>
void run(const Call& call, bool adds, const Q* query, const Cache<T>& cache, Out* out, float* lse) {
  const int64_t threads = at::get_num_threads();
  int64_t shares = 1;
  const std::vector<Item> items = make_items(call, threads, shares);
  const auto run_items = [&](const auto& target) {
    spread(items, threads, [&](const Item& item) {
      static thread_local Scratch<T> scratch;
      run_item(call, query, cache, item, target, scratch);
    });
  };
  if (shares == 1 && !call.is_rerotated)
    return run_items(Target<Out>{out, {call.out_strides[0], call.out_strides[1]}, lse});
  const auto cells = shares * cells_of_share(call) * call.heads;
  at::Tensor parts = at::empty({cells, call.value_size}, at::kFloat), lses = at::empty({cells}, at::kFloat);
  run_items(Target<float>{parts.mutable_data_ptr<float>(), {call.heads * call.value_size, call.value_size},
                          lses.mutable_data_ptr<float>()});
  join(call, shares, adds, parts.const_data_ptr<float>(), lses.const_data_ptr<float>(), out, lse);
}

// Refuses values that would make the op read outside of the operands.
inline void check_values(const Call& call) {
  TORCH_CHECK_VALUE(call.starts[0] == 0 && call.starts[call.rows] == call.row_tokens, "query_start_loc goes from ",
                    call.starts[0], " to ", call.starts[call.rows], ", not from 0 to the ", call.row_tokens,
                    " query tokens of the rows");
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
  for (int64_t i = 0; call.is_rerotated && i < call.row_tokens; ++i) {
    const int64_t token = call.rerotated.tokens[i], rotate_by = call.rerotated.rotate_by[i];
    TORCH_CHECK_VALUE(0 <= token && token < call.tokens, "tokens[", i, "] = ", token, ": the query has ", call.tokens,
                      " tokens");
    TORCH_CHECK_VALUE(0 <= rotate_by && rotate_by < call.rerotated.positions, "rotate_by[", i, "] = ", rotate_by, ": the angles have ",
                      call.rerotated.positions, " positions");
  }
}

// The operands of a call. The caches are views (pages, page size, KV heads, size), in which the stride of the last
// dimension, or of the tokens for transposed keys, is 1.
inline Call make_call(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& block_table,
               const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& out, double scale,
               double softcap, double value_scale, bool transposed_keys) {
  Call call{};
  call.rows = seq_lens.size(0);
  call.tokens = call.row_tokens = query.size(0);
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
  call.queries_per_key = 1;
  call.scale = static_cast<float>(scale);
  call.softcap = static_cast<float>(softcap);
  call.value_scale = static_cast<float>(value_scale);
  return call;
}

}  // namespace starling
