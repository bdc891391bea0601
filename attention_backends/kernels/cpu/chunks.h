// The plan of an Attamba layer for a step: its chunks, the states that they make, and the staircases of states that the
// tokens see. attention_backends/attamba/chunks.py has the definitions, and the same plan in numpy.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

namespace starling {

struct Tokens {
  const int64_t *request, *position, *piece, *block_start, *anchor;
  int64_t count;
};

struct Cut {
  int64_t chunk, offset, window;  // P, tokens by which chunks end earlier, L
};

inline int64_t chunk_start(const Cut& cut, int64_t position) {
  if (position == 0) return 0;
  return std::max<int64_t>(1, (position + cut.offset) / cut.chunk * cut.chunk - cut.offset);
}

inline int64_t states_seen(const Cut& cut, const Tokens& tokens, int64_t t) {
  const int64_t start = tokens.block_start[t];
  const int64_t before_window = std::max(start, tokens.position[t] - cut.window + cut.offset);
  return tokens.anchor[t] / cut.chunk + before_window / cut.chunk - start / cut.chunk;
}

inline bool sees_token_0(const Cut& cut, const Tokens& tokens, int64_t t) {
  if (cut.offset == cut.chunk - 1) return false;
  return tokens.block_start[t] > 0 ? tokens.anchor[t] > 0 : tokens.position[t] > cut.window;
}

struct Chunks {
  std::vector<int64_t> request, start, rows, tokens, ends, end_state;
};

inline Chunks cut_chunks(const Cut& cut, const Tokens& tokens) {
  Chunks chunks;
  for (int64_t t = 0; t < tokens.count; ++t) {
    const int64_t position = tokens.position[t], start = chunk_start(cut, position);
    if (t == 0 || chunks.request.back() != tokens.request[t] || chunks.start.back() != start) {
      chunks.request.push_back(tokens.request[t]);
      chunks.start.push_back(start);
      chunks.rows.push_back(0);
      chunks.tokens.push_back(t);
    }
    chunks.rows.back() = position - start + 1;
    const bool is_boundary = (position + 1 + cut.offset) % cut.chunk == 0;
    if (is_boundary || position == 0) {
      chunks.ends.push_back(t);
      chunks.end_state.push_back(is_boundary ? position / cut.chunk : -1);
    }
  }
  chunks.tokens.push_back(tokens.count);
  return chunks;
}

struct Stairs {
  std::vector<int32_t> starts, states;
  std::vector<int64_t> piece;
};

// A run is a sequence of tokens of one piece that see equally many states, of at most P tokens if they see any. Runs
// are joined where a run of P tokens follows one that sees one state fewer.
inline Stairs cut_stairs(const Cut& cut, const Tokens& tokens) {
  Stairs stairs;
  int64_t previous = 0;  // states seen by the run before
  for (int64_t t = 0, end; t < tokens.count; t = end) {
    const int64_t piece = tokens.piece[t], states = states_seen(cut, tokens, t);
    const int64_t longest = states > 0 ? std::min(tokens.count, t + cut.chunk) : tokens.count;
    for (end = t + 1; end < longest && tokens.piece[end] == piece && states_seen(cut, tokens, end) == states;) ++end;
    const bool joins = t > 0 && end - t == cut.chunk && stairs.piece.back() == piece && states == previous + 1;
    if (!joins) {
      stairs.starts.push_back(static_cast<int32_t>(t));
      stairs.piece.push_back(piece);
      stairs.states.push_back(0);
    }
    stairs.states.back() = static_cast<int32_t>(previous = states);
  }
  stairs.starts.push_back(static_cast<int32_t>(tokens.count));
  return stairs;
}

}  // namespace starling
