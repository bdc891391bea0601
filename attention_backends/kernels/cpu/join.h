// The merge of partial attention into that of the query's tokens, by log-sum-exp, as merge.py does.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "call.h"

namespace starling {

// The numbers of the results that are parts of each of the query's tokens: those of token t are order[i] for
// i from begin[t] to begin[t + 1].
struct Parts {
  std::vector<int64_t> begin, order;
};

inline Parts parts_of_tokens(const Call& call) {
  const int64_t cells = cells_of_share(call);
  Parts parts{std::vector<int64_t>(call.tokens + 1), std::vector<int64_t>(cells)};
  const auto token_of = [&](int64_t i) { return call.is_rerotated ? call.rerotated.tokens[i] : i; };
  for (int64_t i = 0; i < cells; ++i) ++parts.begin[token_of(i) + 1];
  for (int64_t token = 0; token < call.tokens; ++token) parts.begin[token + 1] += parts.begin[token];
  std::vector<int64_t> next(parts.begin.begin(), parts.begin.end() - 1);
  for (int64_t i = 0; i < cells; ++i) parts.order[next[token_of(i)]++] = i;
  return parts;
}

// Merges `shares` times the parts (shares, cells, heads, Dv) with log-sum-exps (shares, cells, heads) into out and lse
// (tokens, heads). With `adds`, out and lse hold a further part.
template <class Out>
void join(const Call& call, int64_t shares, bool adds, const float* parts, const float* lses, Out* out, float* lse) {
  const Parts of_tokens = parts_of_tokens(call);
  at::parallel_for(0, call.tokens * call.heads, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(call.value_size);
    for (int64_t cell = begin; cell < end; ++cell) {
      const int64_t token = cell / call.heads, head = cell % call.heads;
      const int64_t first = of_tokens.begin[token], last = of_tokens.begin[token + 1];
      Out* to = out + token * call.out_strides[0] + head * call.out_strides[1];
      const auto each_part = [&](const auto& work) {
        for (int64_t share = 0; share < shares; ++share)
          for (int64_t i = first; i < last; ++i)
            work((share * cells_of_share(call) + of_tokens.order[i]) * call.heads + head);
      };
      float peak = adds ? lse[cell] : NO_KEY;
      each_part([&](int64_t part) { peak = std::max(peak, lses[part]); });
      const auto weight = [&](float log) { return log == NO_KEY ? 0.0f : std::exp(log - peak); };
      float total = adds ? weight(lse[cell]) : 0.0f;
      for (int64_t d = 0; d < call.value_size; ++d) sums[d] = total == 0 ? 0.0f : total * static_cast<float>(to[d]);
      each_part([&](int64_t part) {
        const float factor = weight(lses[part]);
        if (factor == 0) return;
        total += factor;
        for (int64_t d = 0; d < call.value_size; ++d) sums[d] += factor * parts[part * call.value_size + d];
      });
      for (int64_t d = 0; d < call.value_size; ++d) to[d] = static_cast<Out>(total == 0 ? 0.0f : sums[d] / total);
      lse[cell] = total == 0 ? NO_KEY : peak + std::log(total);
    }
  });
}

}  // namespace starling
