// The two Mamba-2 mixers of an Attamba layer within each chunk: convolution, scan, gate and norm of the step's tokens.
// attention_backends/attamba/mix.py has the definition. The scan is the quadratic form of state space duality (arXiv
// 2405.21060, section 6) over the at most P rows of a chunk: for one more token it reads the chunk's rows once, which
// is less than a running state of inner x state values.
#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "call.h"

namespace starling {

struct MixerSizes {
  int64_t mixers, inner, state, heads, taps;

  int64_t channels() const { return inner + 2 * state; }  // u, B and C, which the convolution mixes
  int64_t width() const { return channels() + heads; }    // and dt
};

template <class T>
struct Mix {
  MixerSizes sizes;
  const T* projected;  // (tokens, mixers, gate | u B C | dt)
  int64_t tokens, token_stride;
  T* pages;  // (pages, page rows, mixers x width): u B C dt of the tokens of open chunks
  int64_t page_rows, page_stride, columns;
  const int32_t* block_table;
  const int64_t *chunk_request, *chunk_start, *chunk_rows, *chunk_tokens;
  const float *conv, *a_log, *skip, *norm;  // (mixers, taps, channels), (mixers, heads) twice, (mixers, inner)
  float eps;
  T* out;  // (mixers, tokens, inner)

  T* row(int64_t chunk, int64_t index) const {
    const int64_t position = chunk_start[chunk] + index;
    const int64_t page = block_table[chunk_request[chunk] * columns + position / page_rows];
    return pages + page * page_stride + position % page_rows * sizes.mixers * sizes.width();
  }
};

template <class T>
struct MixScratch {
  Buffer<float> mixed, dt, decay, remains, weights, y;
  std::vector<const T*> rows;
};

// mixed (rows, stride) = SiLU of the causal convolution by TAPS taps of 16 channels from c on.
template <int TAPS, class T>
void convolve_lanes(const std::vector<const T*>& rows, const float* taps, int64_t channels, int64_t c, int64_t from,
                    float* mixed, int64_t stride) {
  const int64_t lanes = channels - c, count = static_cast<int64_t>(rows.size());
  Vec weights[TAPS], recent[TAPS] = {};  // of the row itself, the row before, and so on
#pragma GCC unroll 16
  for (int back = 0; back < TAPS; ++back) weights[back] = some_floats_at(taps + (TAPS - 1 - back) * channels + c, lanes);
  for (int64_t j = std::max<int64_t>(0, from + 1 - TAPS); j < count; ++j) {
#pragma GCC unroll 16
    for (int back = TAPS - 1; back > 0; --back) recent[back] = recent[back - 1];
    recent[0] = some_floats_at(rows[j] + c, lanes);
    if (j < from) continue;
    Vec total = recent[0] * weights[0];
#pragma GCC unroll 16
    for (int back = 1; back < TAPS; ++back) total += recent[back] * weights[back];
    store(mixed + j * stride + c, silu(total));
  }
}

// Convolves all channels. C is needed of the step's tokens only, from row `before` on.
template <class T>
void convolve(const Mix<T>& call, int64_t mixer, const std::vector<const T*>& rows, int64_t before, float* mixed,
              int64_t stride) {
  const MixerSizes& sizes = call.sizes;
  const float* taps = call.conv + mixer * sizes.taps * sizes.channels();
  for (int64_t c = 0; c < sizes.channels(); c += LANES) {
    const int64_t from = c < sizes.inner + sizes.state ? 0 : before;
    const auto with = [&]<int TAPS>() { convolve_lanes<TAPS>(rows, taps, sizes.channels(), c, from, mixed, stride); };
    switch (sizes.taps) {
      case 1: with.template operator()<1>(); break;
      case 2: with.template operator()<2>(); break;
      case 3: with.template operator()<3>(); break;
      case 4: with.template operator()<4>(); break;
      default: TORCH_CHECK_VALUE(false, "a convolution of ", sizes.taps, " taps, not of 1 to 4");
    }
  }
}

// dt and exp(dt A) of each row and head, (rows, stride).
template <class T>
void make_decays(const Mix<T>& call, int64_t mixer, const std::vector<const T*>& rows, float* dt, float* decay,
                 int64_t stride) {
  const MixerSizes& sizes = call.sizes;
  for (int64_t h = 0; h < sizes.heads; h += LANES) {
    const int64_t lanes = sizes.heads - h;
    const Vec rate = exp(some_floats_at(call.a_log + mixer * sizes.heads + h, lanes));
    for (size_t j = 0; j < rows.size(); ++j) {
      const Vec step = softplus(some_floats_at(rows[j] + sizes.channels() + h, lanes));
      store(dt + j * stride + h, step);
      store(decay + j * stride + h, exp(-step * rate));
    }
  }
}

inline float dot(const float* a, const float* b, int64_t size) {
  Vec total = {};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) total += floats_at(a + i) * floats_at(b + i);
  float rest = 0;
  for (; i < size; ++i) rest += a[i] * b[i];
  return sum(total) + rest;
}

// y[0, size) = skip * rows[last] + the sum of weights[j * weight_stride] * rows[j] up to `last`, of rows `stride` apart.
inline void weighted_sum(const float* rows, int64_t stride, const float* weights, int64_t weight_stride, int64_t last,
                         float skip, int64_t size, float* y) {
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) {
    Vec total = floats_at(rows + last * stride + d) * skip;
    for (int64_t j = 0; j <= last; ++j) total += floats_at(rows + j * stride + d) * weights[j * weight_stride];
    store(y + d, total);
  }
  for (; d < size; ++d) {
    y[d] = skip * rows[last * stride + d];
    for (int64_t j = 0; j <= last; ++j) y[d] += weights[j * weight_stride] * rows[j * stride + d];
  }
}

// out = RMSNorm(y * SiLU(gate)) of one token.
template <class T>
void gate_and_norm(const Mix<T>& call, int64_t mixer, int64_t token, float* y) {
  const int64_t inner = call.sizes.inner;
  const T* gate = call.projected + token * call.token_stride + mixer * (inner + call.sizes.width());
  const float* norm = call.norm + mixer * inner;
  T* out = call.out + (mixer * call.tokens + token) * inner;
  Vec squares = {};
  for (int64_t d = 0; d < inner; d += LANES) {
    const Vec gated = some_floats_at(y + d, inner - d) * silu(some_floats_at(gate + d, inner - d));
    squares += gated * gated;
    store(y + d, gated);
  }
  const float factor = 1.0f / std::sqrt(sum(squares) / inner + call.eps);
  int64_t d = 0;
  for (; d + LANES <= inner; d += LANES) store_as(out + d, floats_at(y + d) * floats_at(norm + d) * factor);
  for (; d < inner; ++d) out[d] = static_cast<T>(y[d] * norm[d] * factor);
}

// The values of a mixer's row of the j-th token that a chunk has in the step.
template <class T>
const T* new_row(const Mix<T>& call, int64_t chunk, int64_t j, int64_t mixer) {
  return call.projected + (call.chunk_tokens[chunk] + j) * call.token_stride +
         mixer * (call.sizes.inner + call.sizes.width()) + call.sizes.inner;
}

// Stores the rows of the step's tokens of one chunk in the cache.
template <class T>
void store_rows(const Mix<T>& call, int64_t chunk) {
  const int64_t width = call.sizes.width(), tokens = call.chunk_tokens[chunk + 1] - call.chunk_tokens[chunk];
  const int64_t before = call.chunk_rows[chunk] - tokens;
  for (int64_t j = 0; j < tokens; ++j)
    for (int64_t mixer = 0; mixer < call.sizes.mixers; ++mixer)
      std::memcpy((void*)(call.row(chunk, before + j) + mixer * width), new_row(call, chunk, j, mixer),
                  width * sizeof(T));
}

// Computes one mixer for the step's tokens of one chunk.
template <class T>
void mix_chunk(const Mix<T>& call, int64_t chunk, int64_t mixer, MixScratch<T>& scratch) {
  const MixerSizes& sizes = call.sizes;
  const int64_t first = call.chunk_tokens[chunk], count = call.chunk_rows[chunk];
  const int64_t before = count - (call.chunk_tokens[chunk + 1] - first);
  std::vector<const T*>& rows = scratch.rows;
  rows.resize(count);
  for (int64_t j = 0; j < count; ++j)
    rows[j] = j < before ? call.row(chunk, j) + mixer * sizes.width() : new_row(call, chunk, j - before, mixer);
  const int64_t stride = round_up(sizes.channels(), LANES), heads = round_up(sizes.heads, LANES);
  float* mixed = scratch.mixed.get(count * stride);
  float *dt = scratch.dt.get(count * heads), *decay = scratch.decay.get(count * heads);
  float *remains = scratch.remains.get(count * heads), *weights = scratch.weights.get(count * heads);
  float* y = scratch.y.get(round_up(sizes.inner, LANES));
  convolve(call, mixer, rows, before, mixed, stride);
  make_decays(call, mixer, rows, dt, decay, heads);
  const int64_t head_size = sizes.inner / sizes.heads;
  for (int64_t q = 0; q < count; ++q) {
    // remains: what is left of dt of each row and head at row q. A product of decays rounds less than a long sum.
    for (int64_t i = 0; i < q * heads; i += LANES)
      store(remains + i, floats_at(remains + i) * floats_at(decay + q * heads + i % heads));
    for (int64_t h = 0; h < heads; h += LANES) store(remains + q * heads + h, floats_at(dt + q * heads + h));
    if (q < before) continue;
    const float* c = mixed + q * stride + sizes.inner + sizes.state;
    for (int64_t j = 0; j <= q; ++j) {
      const float score = dot(c, mixed + j * stride + sizes.inner, sizes.state);
      for (int64_t h = 0; h < heads; h += LANES)
        store(weights + j * heads + h, floats_at(remains + j * heads + h) * score);
    }
    for (int64_t h = 0; h < sizes.heads; ++h)
      weighted_sum(mixed + h * head_size, stride, weights + h, heads, q, call.skip[mixer * sizes.heads + h], head_size,
                   y + h * head_size);
    gate_and_norm(call, mixer, first + q - before, y);
  }
}

// All rows are stored first: a chunk can begin in a page of another request's that this step fills, as vLLM's prefix
// cache hits pages that are only scheduled to be filled.
template <class T>
void mix(const Mix<T>& call, int64_t chunks) {
  at::parallel_for(0, chunks, 64, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) store_rows(call, chunk);
  });
  at::parallel_for(0, chunks * call.sizes.mixers, 4, [&](int64_t begin, int64_t end) {
    static thread_local MixScratch<T> scratch;
    for (int64_t i = begin; i < end; ++i) mix_chunk(call, i / call.sizes.mixers, i % call.sizes.mixers, scratch);
  });
}

}  // namespace starling
