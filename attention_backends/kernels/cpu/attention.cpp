// Paged attention with log-sum-exp on a CPU; contract.py defines the contract, dispatch.py that of re-rotated queries. This is
// flash attention (arXiv 2205.14135) that reads the pages in place: one pass over the keys in tiles, with a running
// maximum and sum per query row. No row's keys are gathered.
//
// A work item is a tile of the query rows that one KV head serves in one batch row (queries x group), over all keys of
// the batch row. Where there are too few items for the threads, the keys are divided into `shares`. An item then has
// one share of the keys, and the shares' results are merged by log-sum-exp. So are those of a query token that is a
// query token of several rows, re-rotated for each. Where rows compute some heads only, a query token is a token of one row
// for each head, and nothing is merged.
#include <torch/library.h>

#include <optional>

#include "run.h"

namespace starling {
namespace {

// Calls `run` with the dtypes of query, caches and out: out is float32 where it `adds`.
template <class Q>
void by_dtypes(const Call& call, bool adds, const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
               at::Tensor& out, at::Tensor& lse) {
  const auto with = [&](auto example) {
    using T = decltype(example);
    const Cache<T> cache{keys.const_data_ptr<T>(), values.const_data_ptr<T>()};
    const Q* from = query.const_data_ptr<Q>();
    float* to_lse = lse.mutable_data_ptr<float>();
    if (adds) return run(call, adds, from, cache, out.mutable_data_ptr<float>(), to_lse);
    run(call, adds, from, cache, out.mutable_data_ptr<Q>(), to_lse);
  };
  if (keys.scalar_type() == at::kFloat8_e4m3fn) return with(at::Float8_e4m3fn{});
  if (keys.scalar_type() == at::kFloat8_e5m2) return with(at::Float8_e5m2{});
  with(Q{});
}

// Checks a call's values, and runs it.
void run_checked(const Call& call, bool adds, const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                 at::Tensor& out, at::Tensor& lse) {
  check_values(call);
  switch (query.scalar_type()) {
    case at::kFloat: return by_dtypes<float>(call, adds, query, keys, values, out, lse);
    case at::kBFloat16: return by_dtypes<at::BFloat16>(call, adds, query, keys, values, out, lse);
    case at::kHalf: return by_dtypes<at::Half>(call, adds, query, keys, values, out, lse);
    default: TORCH_CHECK_VALUE(false, "query is ", query.scalar_type(), ", not float32, bfloat16 or float16");
  }
}

// Takes operands that contract.py and paged_op.py have checked.
at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                           const at::Tensor& block_table, const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                           const std::optional<at::Tensor>& row_heads, at::Tensor& out, double scale, bool causal,
                           int64_t queries_per_key, int64_t window, double softcap, double value_scale,
                           bool transposed_keys) {
  Call call = make_call(query, keys, values, block_table, query_start_loc, seq_lens, out, scale, softcap, value_scale,
                        transposed_keys);
  call.causal = causal;
  call.queries_per_key = queries_per_key;
  call.window = window;
  if (row_heads) {
    call.row_heads = row_heads->const_data_ptr<bool>();
    call.row_tokens = call.starts[call.rows];
    TORCH_CHECK_VALUE(call.tokens ? call.row_tokens % call.tokens == 0 : call.row_tokens == 0, "query_start_loc ends at ",
                      call.row_tokens, ", which is no multiple of the ", call.tokens, " query tokens");
  }
  at::Tensor lse = at::empty({call.tokens, call.heads}, query.options().dtype(at::kFloat));
  run_checked(call, false, query, keys, values, out, lse);
  return lse;
}

// Takes operands that dispatch.py and paged_op.py have checked. Where lse is given, out is float32, and both hold
// attention to other keys, which is merged.
void rerotated_attention(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                      const at::Tensor& block_table, const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                      const at::Tensor& tokens, const at::Tensor& rotate_by, const at::Tensor& cos, const at::Tensor& sin,
                      bool is_neox_style, at::Tensor& out, std::optional<at::Tensor> lse, double scale, double softcap,
                      double value_scale, bool transposed_keys) {
  TORCH_CHECK_VALUE(rotate_by.sizes() == tokens.sizes() && tokens.is_contiguous() && rotate_by.is_contiguous(),
                    "tokens and rotate_by: one number for each query token of the rows");
  TORCH_CHECK_VALUE(cos.dim() == 2 && cos.sizes() == sin.sizes() && cos.is_contiguous() && sin.is_contiguous() &&
                        2 * cos.size(1) <= query.size(2),
                    "cos and sin: (positions, pairs), contiguous, and at most as many pairs as a head has");
  TORCH_CHECK_VALUE(!lse || (lse->is_contiguous() && lse->numel() == query.size(0) * query.size(1)),
                    "lse: (tokens, heads), contiguous");
  TORCH_CHECK_VALUE(out.stride(2) == 1, "out: the innermost dimension is contiguous");
  Call call = make_call(query, keys, values, block_table, query_start_loc, seq_lens, out, scale, softcap, value_scale,
                        transposed_keys);
  call.row_tokens = tokens.size(0);
  call.is_rerotated = true;
  call.rerotated = {tokens.const_data_ptr<int64_t>(), rotate_by.const_data_ptr<int64_t>(), cos.const_data_ptr<float>(),
                 sin.const_data_ptr<float>(), cos.size(0), cos.size(1), is_neox_style};
  at::Tensor to = lse ? *lse : at::empty({call.tokens, call.heads}, query.options().dtype(at::kFloat));
  run_checked(call, lse.has_value(), query, keys, values, out, to);
}

}  // namespace

TORCH_LIBRARY(starling_kernels, library) {
  library.def(
      "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor block_table, Tensor query_start_loc, "
      "Tensor seq_lens, Tensor? row_heads, Tensor(a!) out, float scale, bool causal, int queries_per_key, int window, "
      "float softcap, float value_scale, bool transposed_keys) -> Tensor");
  library.impl("paged_attention", c10::DispatchKey::CPU, &paged_attention);
  library.def(
      "rerotated_attention(Tensor query, Tensor keys, Tensor values, Tensor block_table, Tensor query_start_loc, "
      "Tensor seq_lens, Tensor tokens, Tensor rotate_by, Tensor cos, Tensor sin, bool is_neox_style, Tensor(a!) out, "
      "Tensor(b!)? lse, float scale, float softcap, float value_scale, bool transposed_keys) -> ()");
  library.impl("rerotated_attention", c10::DispatchKey::CPU, &rerotated_attention);
}

}  // namespace starling
