// The three ops of an Attamba layer on a CPU: the plan of a step, the mixers, and the attention. Each has its definition
// in torch or numpy in attention_backends/attamba.
#include <torch/library.h>

#include <tuple>

#include "chunks.h"
#include "mix.h"
#include "recent.h"

namespace starling {
namespace {

constexpr int64_t CACHED_FLOATS = 1 << 18;  // 1 MiB, half of the second-level cache of the processors measured

template <class T>
at::Tensor tensor_of(const std::vector<T>& values) {
  at::Tensor tensor = at::empty({static_cast<int64_t>(values.size())}, c10::CppTypeToScalarType<T>::value);
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<T>());
  return tensor;
}

void check_page(int64_t page, int64_t pages) {
  TORCH_CHECK_VALUE(0 <= page && page < pages, "page ", page, ": the cache has ", pages, " pages");
}

void check_index(const char* name, int64_t value, int64_t end) {
  TORCH_CHECK_VALUE(0 <= value && value < end, name, " = ", value, ": not from 0 to ", end - 1);
}

using Plan = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                        at::Tensor, at::Tensor>;

// The arrays of chunks.py's ChunkPlan, in its order.
Plan attamba_plan(const at::Tensor& request, const at::Tensor& position, const at::Tensor& piece,
                  const at::Tensor& block_start, const at::Tensor& anchor, int64_t chunk, int64_t offset,
                  int64_t window) {
  const Tokens tokens{request.const_data_ptr<int64_t>(), position.const_data_ptr<int64_t>(),
                      piece.const_data_ptr<int64_t>(), block_start.const_data_ptr<int64_t>(),
                      anchor.const_data_ptr<int64_t>(), request.size(0)};
  const Cut cut{chunk, offset, window};
  const Chunks chunks = cut_chunks(cut, tokens);
  const Stairs stairs = cut_stairs(cut, tokens);
  at::Tensor seen = at::empty({tokens.count}, at::kBool);
  bool* to = seen.mutable_data_ptr<bool>();
  for (int64_t t = 0; t < tokens.count; ++t) to[t] = sees_token_0(cut, tokens, t);
  return {tensor_of(chunks.request), tensor_of(chunks.start),   tensor_of(chunks.rows),  tensor_of(chunks.tokens),
          tensor_of(chunks.ends),    tensor_of(chunks.end_state), tensor_of(stairs.starts), tensor_of(stairs.piece),
          tensor_of(stairs.states),  seen};
}

// projected (tokens, mixers, inner + width), pages (pages, rows, mixers x width); returns (mixers, tokens, inner).
at::Tensor attamba_mix(const at::Tensor& projected, const at::Tensor& pages, const at::Tensor& block_table,
                       const at::Tensor& chunk_request, const at::Tensor& chunk_start, const at::Tensor& chunk_rows,
                       const at::Tensor& chunk_tokens, const at::Tensor& conv, const at::Tensor& a_log,
                       const at::Tensor& skip, const at::Tensor& norm, int64_t state, double eps) {
  const MixerSizes sizes{conv.size(0), norm.size(1), state, a_log.size(1), conv.size(1)};
  const int64_t tokens = projected.size(0), chunks = chunk_start.size(0);
  TORCH_CHECK_VALUE(projected.stride(1) == 1 && projected.size(1) == sizes.mixers * (sizes.inner + sizes.width()),
                    "projected: ", projected.sizes(), ", not ", sizes.mixers * (sizes.inner + sizes.width()), " columns");
  TORCH_CHECK_VALUE(pages.size(2) == sizes.mixers * sizes.width() && pages.stride(2) == 1 &&
                        pages.stride(1) == pages.size(2),
                    "pages: ", pages.sizes(), ", not rows of ", sizes.mixers * sizes.width(), " values");
  const at::Tensor table = block_table.contiguous();
  at::Tensor out = at::empty({sizes.mixers, tokens, sizes.inner}, projected.options());
  with_dtype(projected, [&](auto example) {
    using T = decltype(example);
    const Mix<T> call{sizes,
                      projected.const_data_ptr<T>(),
                      tokens,
                      projected.stride(0),
                      pages.mutable_data_ptr<T>(),
                      pages.size(1),
                      pages.stride(0),
                      table.size(1),
                      table.const_data_ptr<int32_t>(),
                      chunk_request.const_data_ptr<int64_t>(),
                      chunk_start.const_data_ptr<int64_t>(),
                      chunk_rows.const_data_ptr<int64_t>(),
                      chunk_tokens.const_data_ptr<int64_t>(),
                      conv.const_data_ptr<float>(),
                      a_log.const_data_ptr<float>(),
                      skip.const_data_ptr<float>(),
                      norm.const_data_ptr<float>(),
                      static_cast<float>(eps),
                      out.mutable_data_ptr<T>()};
    TORCH_CHECK_VALUE(call.chunk_tokens[chunks] == tokens, "the chunks have ", call.chunk_tokens[chunks],
                      " tokens, not ", tokens);
    for (int64_t n = 0; n < chunks; ++n) {
      const int64_t last = call.chunk_start[n] + call.chunk_rows[n] - 1;
      check_index("a chunk's request", call.chunk_request[n], table.size(0));
      check_index("a chunk's page", last / call.page_rows, call.columns);
      for (int64_t column = call.chunk_start[n] / call.page_rows; column <= last / call.page_rows; ++column)
        check_page(call.block_table[call.chunk_request[n] * call.columns + column], pages.size(0));
    }
    mix(call, chunks);
  });
  return out;
}

// Returns (tokens, heads x size). Takes, in this order: query, key, value and own (tokens, heads x size), not rotated, of
// which own is added to key and value; position, request and piece (tokens); the angles (positions, size / 2); the cache
// of states with the tables to write to and to read from; the window's, with the lengths of its rows; the fields of
// ChunkPlan from `ends` on.
at::Tensor attamba_attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const at::Tensor& own, const at::Tensor& position, const at::Tensor& request,
                          const at::Tensor& piece, const at::Tensor& cos, const at::Tensor& sin,
                          const at::Tensor& states_keys, const at::Tensor& states_values, const at::Tensor& last_rows,
                          const at::Tensor& states_table, const at::Tensor& states_key_table,
                          const at::Tensor& window_keys, const at::Tensor& window_values,
                          const at::Tensor& window_table, const at::Tensor& window_key_table,
                          const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& ends,
                          const at::Tensor& end_state, const at::Tensor& stair_starts, const at::Tensor& stair_piece,
                          const at::Tensor& stair_states, const at::Tensor& token_0_seen, int64_t chunk_size,
                          int64_t window, double scale) {
  const int64_t tokens = query.size(0), heads = states_keys.size(2), size = states_keys.size(3), page = PAGE_ROWS;
  TORCH_CHECK_VALUE(tokens > 0 && size % LANES == 0 && cos.is_contiguous() && sin.is_contiguous() &&
                        cos.sizes() == sin.sizes() && 2 * cos.size(1) == size,
                    "query: ", query.sizes(), " and angles: ", cos.sizes(), ", for heads of ", size);
  for (const at::Tensor& each : {query, key, value, own})
    TORCH_CHECK_VALUE(each.size(0) == tokens && each.size(1) == heads * size && each.stride(1) == 1,
                      "query, key, value and own: ", each.sizes(), ", not (", tokens, ", ", heads * size, ")");
  for (const at::Tensor& each : {position, request, piece, token_0_seen})
    TORCH_CHECK_VALUE(each.size(0) == tokens && each.is_contiguous(), "one value for each of ", tokens, " tokens, not ",
                      each.size(0));
  const at::Tensor write_states = states_table.contiguous(), read_states = states_key_table.contiguous();
  const at::Tensor write_window = window_table.contiguous(), read_window = window_key_table.contiguous();
  const int64_t *positions = position.const_data_ptr<int64_t>(), *requests = request.const_data_ptr<int64_t>();
  const int64_t* pieces = piece.const_data_ptr<int64_t>();
  const int32_t *to_window = write_window.const_data_ptr<int32_t>(), *to_states = write_states.const_data_ptr<int32_t>();
  const auto page_of = [&](const at::Tensor& table, int64_t row, int64_t column, int64_t pages) {
    check_index("a row of the block table", row, table.size(0));
    check_index("a column of the block table", column, table.size(1));
    const int64_t id = table.const_data_ptr<int32_t>()[row * table.size(1) + column];
    check_page(id, pages);
    return id;
  };
  for (int64_t t = 0; t < tokens; ++t) {
    check_index("a position", positions[t], cos.size(0));
    page_of(write_window, requests[t], positions[t] / page, window_keys.size(0));
    if (token_0_seen.const_data_ptr<bool>()[t]) page_of(read_states, pieces[t], 0, states_keys.size(0));
  }
  at::Tensor out = at::empty({tokens, heads * size}, query.options());
  const auto floats = at::TensorOptions(at::kFloat);
  // So many heads at a time that both parts of their output stay in the second-level cache.
  const int64_t group = std::clamp<int64_t>(CACHED_FLOATS / (2 * tokens * size), 1, heads);
  at::Tensor parts = at::empty({2, tokens, group, size}, floats), lses = at::empty({2, tokens, group}, floats);
  // A staircase is a row of the states' call: its table is that of its piece.
  const int64_t stairs = stair_piece.size(0), columns = read_states.size(1);
  at::Tensor stair_table = at::empty({stairs, columns}, at::kInt);
  for (int64_t s = 0; s < stairs; ++s) {
    const int64_t row = stair_piece.const_data_ptr<int64_t>()[s];
    check_index("a piece", row, read_states.size(0));
    std::memcpy(stair_table.mutable_data_ptr<int32_t>() + s * columns,
                read_states.const_data_ptr<int32_t>() + row * columns, columns * sizeof(int32_t));
  }
  with_dtype(query, [&](auto example) {
    using T = decltype(example);
    at::Tensor rotated = at::empty({3, tokens, heads, size}, query.options());
    T* rotated_query = rotated.mutable_data_ptr<T>();
    T *new_key = rotated_query + tokens * heads * size, *new_value = new_key + tokens * heads * size;
    const KvView<T> to_window_pages = kv_view<T>(window_keys, window_values);
    const Angles angles{cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), cos.size(1)};
    const auto write = [&](const KvView<T>& view, int64_t page_id, int64_t row, int64_t t) {
      for (int64_t h = 0; h < heads; ++h)
        view.write(page_id, row, h, size, new_key + (t * heads + h) * size, new_value + (t * heads + h) * size);
    };
    at::parallel_for(0, tokens, 4, [&](int64_t begin, int64_t end) {
      static thread_local Rotation rotation;
      for (int64_t t = begin; t < end; ++t) {
        const auto row = [&](const at::Tensor& of) { return of.const_data_ptr<T>() + t * of.stride(0); };
        const T *mixed_key = row(key), *mixed_value = row(value), *added = row(own), *asked = row(query);
        rotation.set(angles, positions[t]);
        for (int64_t head = 0; head < heads * size; head += size)
          for (int64_t d = 0; d < size; d += LANES) {
            const int64_t from = head + d, to = t * heads * size + from;
            const Vec x = floats_at(added + from);
            store_as(rotated_query + to, rotation(floats_at(asked + from), d));
            store_as(new_key + to, rotation(floats_at(mixed_key + from) + x, d));
            store_as(new_value + to, floats_at(mixed_value + from) + x);
          }
        write(to_window_pages, to_window[requests[t] * write_window.size(1) + positions[t] / page], positions[t] % page, t);
      }
    });
    const KvView<T> states = kv_view<T>(states_keys, states_values);
    T* last = last_rows.mutable_data_ptr<T>();
    for (int64_t e = 0; e < ends.size(0); ++e) {
      const int64_t t = ends.const_data_ptr<int64_t>()[e], state = end_state.const_data_ptr<int64_t>()[e];
      check_index("an end of a chunk", t, tokens);
      const int64_t column = state < 0 ? 0 : state / page;
      const int64_t id = page_of(write_states, requests[t], column, states_keys.size(0));
      if (state >= 0) {
        write(states, to_states[requests[t] * write_states.size(1) + column], state % page, t);
        continue;
      }
      T* row = last + id * last_rows.stride(0);
      std::memcpy((void*)row, new_key + t * heads * size, heads * size * sizeof(T));
      std::memcpy((void*)(row + heads * size), new_value + t * heads * size, heads * size * sizeof(T));
    }
    const FirstState<T> first{last_rows.const_data_ptr<T>(), last_rows.stride(0), pieces,
                              read_states.const_data_ptr<int32_t>(), columns, token_0_seen.const_data_ptr<bool>()};
    for (int64_t head = 0; head < heads; head += group) {
      const int64_t count = std::min(group, heads - head);
      const at::Tensor of_heads = rotated[0].narrow(1, head, count), part = parts[0].narrow(1, 0, count);
      float *part_data = parts.mutable_data_ptr<float>(), *lse_data = lses.mutable_data_ptr<float>();
      const auto attend_to = [&](int64_t index, const at::Tensor& all_keys, const at::Tensor& all_values,
                                 const at::Tensor& table, const at::Tensor& starts, const at::Tensor& lens,
                                 int64_t queries_per_key, int64_t window_size) {
        const at::Tensor keys = all_keys.narrow(2, head, count), values = all_values.narrow(2, head, count);
        Call call = make_call(of_heads, keys, values, table, starts, lens, part, scale, 0, 1, true);
        call.causal = true;
        call.queries_per_key = queries_per_key;
        call.window = window_size;
        check_values(call);
        run<T, T, float>(call, false, of_heads.const_data_ptr<T>(),
                         Cache<T>{keys.const_data_ptr<T>(), values.const_data_ptr<T>()},
                         part_data + index * tokens * group * size, lse_data + index * tokens * group);
      };
      attend_to(0, states_keys, states_values, stair_table, stair_starts, stair_states, chunk_size, 0);
      attend_to(1, window_keys, window_values, read_window, query_start_loc, seq_lens, 1, window);
      merge_parts(Heads{head, count, group, heads, size}, rotated_query, first, part_data, lse_data, tokens,
                  static_cast<float>(scale), out.mutable_data_ptr<T>());
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(starling_kernels, library) {
  library.def(
      "attamba_plan(Tensor request, Tensor position, Tensor piece, Tensor block_start, Tensor anchor, int chunk, "
      "int offset, int window) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.impl("attamba_plan", c10::DispatchKey::CPU, &attamba_plan);
  library.def(
      "attamba_mix(Tensor projected, Tensor(a!) pages, Tensor block_table, Tensor chunk_request, Tensor chunk_start, "
      "Tensor chunk_rows, Tensor chunk_tokens, Tensor conv, Tensor a_log, Tensor skip, Tensor norm, int state, "
      "float eps) -> Tensor");
  library.impl("attamba_mix", c10::DispatchKey::CPU, &attamba_mix);
  library.def(
      "attamba_attend(Tensor query, Tensor key, Tensor value, Tensor own, Tensor position, Tensor request, "
      "Tensor piece, Tensor cos, Tensor sin, Tensor(a!) states_keys, Tensor(b!) states_values, Tensor(c!) last_rows, "
      "Tensor states_table, Tensor states_key_table, Tensor(d!) window_keys, Tensor(e!) window_values, "
      "Tensor window_table, Tensor window_key_table, Tensor query_start_loc, Tensor seq_lens, Tensor ends, "
      "Tensor end_state, Tensor stair_starts, Tensor stair_piece, Tensor stair_states, Tensor token_0_seen, "
      "int chunk_size, int window, float scale) -> Tensor");
  library.impl("attamba_attend", c10::DispatchKey::CPU, &attamba_attend);
}

}  // namespace starling
