// Vectors of sixteen floats: loads of every cache dtype as float, exp and tanh. They use GCC's vector extensions, which
// compile for every processor, and intrinsics only for what the extensions can't express.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace starling {

using Vec = float __attribute__((vector_size(64)));
using IntVec = int32_t __attribute__((vector_size(64)));
using UintVec = uint32_t __attribute__((vector_size(64)));

constexpr int LANES = 16;
constexpr float NO_KEY = -std::numeric_limits<float>::infinity();

// Calls `work` with an element of the tensor's dtype.
template <class Work>
void with_dtype(const at::Tensor& tensor, const Work& work) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return work(float{});
    case at::kBFloat16: return work(at::BFloat16{});
    case at::kHalf: return work(at::Half{});
    default: TORCH_CHECK_VALUE(false, "a tensor of ", tensor.scalar_type(), ", not float32, bfloat16 or float16");
  }
}

template <class V, class T>
inline V load_raw(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

inline Vec splat(float value) { return Vec{} + value; }

inline Vec floats_at(const float* from) { return load_raw<Vec>(from); }

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(Vec)); }

inline Vec floats_at(const at::BFloat16* from) {
  using Bits = uint16_t __attribute__((vector_size(32)));
  return (Vec)(__builtin_convertvector(load_raw<Bits>(from), UintVec) << 16);
}

#if defined(__AVX512F__)
inline Vec floats_at(const at::Half* from) { return (Vec)_mm512_cvtph_ps(load_raw<__m256i>(from)); }

// An e5m2 number is the upper byte of a half.
inline Vec floats_at(const at::Float8_e5m2* from) {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  using Bits = uint16_t __attribute__((vector_size(32)));
  return (Vec)_mm512_cvtph_ps((__m256i)(__builtin_convertvector(load_raw<Bytes>(from), Bits) << 8));
}

// The exponent and mantissa of an e4m3 number, shifted up seven bits into a half's, are 2^-8 of its value, subnormals
// included. Its only NaN reads as 480; writing to a cache never makes it.
inline Vec floats_at(const at::Float8_e4m3fn* from) {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  using Bits = uint16_t __attribute__((vector_size(32)));
  Bits bits = __builtin_convertvector(load_raw<Bytes>(from), Bits);
  bits = ((bits & 0x80) << 8) | ((bits & 0x7f) << 7);
  return (Vec)_mm512_cvtph_ps((__m256i)bits) * 256.0f;
}
#else
template <class T>
inline Vec floats_at(const T* from) {
  Vec value;
  for (int lane = 0; lane < LANES; ++lane) value[lane] = static_cast<float>(from[lane]);
  return value;
}
#endif

// Stores sixteen floats as T, rounded to nearest.
template <class T>
inline void store_as(T* to, Vec value) {
  if constexpr (std::is_same_v<T, float>) return store(to, value);
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy((void*)to, &narrow, sizeof(narrow));
    return;
  }
#endif
  for (int lane = 0; lane < LANES; ++lane) to[lane] = static_cast<T>(value[lane]);
}

// The first `count` of sixteen elements as floats; the others are 0, and are not read.
template <class T>
inline Vec some_floats_at(const T* from, int64_t count) {
  if (count >= LANES) return floats_at(from);
  Vec value = {};
  for (int64_t lane = 0; lane < count; ++lane) value[lane] = static_cast<float>(from[lane]);
  return value;
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

#if defined(__AVX512F__)
inline float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }

// The sum of the first eight.
inline float lower_sum(Vec v) { return _mm512_mask_reduce_add_ps(0x00ff, (__m512)v); }

inline float largest(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
#else
inline float sum(Vec v) {
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += v[lane];
  return total;
}

inline float lower_sum(Vec v) {
  float total = 0;
  for (int lane = 0; lane < LANES / 2; ++lane) total += v[lane];
  return total;
}

inline float largest(Vec v) {
  float peak = v[0];
  for (int lane = 1; lane < LANES; ++lane) peak = v[lane] > peak ? v[lane] : peak;
  return peak;
}
#endif

// exp to about one ulp: 0 for x below -87, -inf included, and NaN for NaN. The polynomial is that of Cephes' expf.
inline Vec exp(Vec x) {
  const Vec inside = (x > 88.0f) ? splat(88.0f) : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const Vec shifted = inside * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  const Vec r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec bits = (IntVec)p + (((IntVec)shifted - (IntVec)magic) << 23);
  const Vec value = x < -87.0f ? Vec{} : (Vec)bits;
  return x == x ? value : x;
}

// 1 / x to about two ulp for x from 1 up; 0 for infinity, and NaN for NaN.
inline Vec inverse(Vec x) {
#if defined(__AVX512F__)
  const Vec rough = (Vec)_mm512_rcp14_ps((__m512)x);
  const Vec better = rough * (2.0f - x * rough);
  return x < 1e37f ? better : rough;
#else
  return 1.0f / x;
#endif
}

inline Vec silu(Vec x) { return x * inverse(1.0f + exp(-x)); }

// log(1 + exp(x)). With z = exp(-|x|), log(1 + z) = 2 atanh(z / (2 + z)), whose series has an error of 1e-9 for z <= 1.
inline Vec softplus(Vec x) {
  const Vec z = exp(x < 0.0f ? x : -x), ratio = z * inverse(2.0f + z), square = ratio * ratio;
  Vec p = splat(1.0f / 15);
  for (int term = 13; term > 0; term -= 2) p = p * square + 1.0f / term;
  return (x > 0.0f ? x : Vec{}) + 2.0f * ratio * p;
}

// tanh to about one ulp, as Cephes' tanhf: a polynomial near 0, exp elsewhere.
inline Vec tanh(Vec x) {
  const Vec square = x * x;
  Vec p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  const Vec near = p * square * x + x;
  const Vec size = x < 0.0f ? -x : x;
  const Vec far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

}  // namespace starling
