// The op of LoRA on a CPU: rows of a batch, each with its own adapter or none (attention_backends/kernels/cpu/lora_op.py).
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "vector.h"

namespace starling {
namespace {

constexpr int64_t FEW_ROWS = 8;  // up to here a row is multiplied by itself: a matrix product's call takes longer

// The sum of x[i] * y[i].
template <class T>
float dot(const T* x, const T* y, int64_t count) {
  Vec total = {};
  for (int64_t i = 0; i < count; i += LANES)
    total += some_floats_at(x + i, count - i) * some_floats_at(y + i, count - i);
  return sum(total);
}

// The matrices of a slice, of all slots, (slots, 1, rank, in) and (slots, 1, out, rank), and its first column in y.
struct Slice {
  at::Tensor a, b;
  int64_t start;
  int64_t rank() const { return a.size(2); }
  int64_t out() const { return b.size(2); }
};

// y[o] += B[o] low for B (out, rank). Of 8 numbers, the lower and the upper half of a vector have a row of B each.
template <class T>
void add_products(const T* b, const float* low, T* y, int64_t rank, int64_t out) {
  const auto add = [&](int64_t o, float value) { y[o] = static_cast<T>(static_cast<float>(y[o]) + value); };
  int64_t o = 0;
  if (rank == LANES / 2) {
    Vec twice;
    for (int lane = 0; lane < LANES; ++lane) twice[lane] = low[lane % (LANES / 2)];
    for (; o + 1 < out; o += 2) {
      const Vec products = floats_at(b + o * rank) * twice;
      add(o, lower_sum(products));
      add(o + 1, sum(products) - lower_sum(products));
    }
  }
  for (; o < out; ++o) {
    Vec total = {};
    for (int64_t k = 0; k < rank; k += LANES)
      total += some_floats_at(low + k, rank - k) * some_floats_at(b + o * rank + k, rank - k);
    add(o, sum(total));
  }
}

// Adds scale * B (A x) to each row of y, row by row.
template <class T>
void add_few(const at::Tensor& x, const at::Tensor& y, const std::vector<Slice>& slices, int64_t slot, float scale) {
  const int64_t in = x.size(1);
  at::parallel_for(0, x.size(0), 1, [&](int64_t first, int64_t end) {
    std::vector<float> low;
    for (const Slice& slice : slices) {
      const int64_t rank = slice.rank(), out = slice.out();
      const T* a = slice.a.const_data_ptr<T>() + slot * rank * in;
      low.resize(rank);
      for (int64_t row = first; row < end; ++row) {
        const T* from = x.const_data_ptr<T>() + row * x.stride(0);
        for (int64_t k = 0; k < rank; ++k) low[k] = scale * dot(from, a + k * in, in);
        add_products(
            slice.b.const_data_ptr<T>() + slot * out * rank, low.data(),
            y.mutable_data_ptr<T>() + row * y.stride(0) + slice.start, rank, out);
      }
    }
  });
}

void add_many(const at::Tensor& x, const at::Tensor& y, const std::vector<Slice>& slices, int64_t slot, double scale) {
  for (const Slice& slice : slices) {
    const at::Tensor low = at::mm(x, slice.a.select(0, slot).select(0, 0).t()).mul_(scale);
    y.narrow(1, slice.start, slice.out()).addmm_(low, slice.b.select(0, slot).select(0, 0).t());
  }
}

// y[i, columns of slice s] += scale * B[s] (A[s] x[i]), with the matrices of slot indices[i]; -1: the row has none.
void add_lora(
    const at::Tensor& y, const at::Tensor& x, const at::Tensor& indices, at::TensorList first, at::TensorList second,
    double scale) {
  const int64_t rows = x.size(0);
  TORCH_CHECK_VALUE(
      x.dim() == 2 && y.dim() == 2 && y.size(0) == rows && x.stride(1) == 1 && y.stride(1) == 1,
      "x and y are matrices of as many rows, which lie in one piece");
  TORCH_CHECK_VALUE(
      indices.scalar_type() == at::kLong && indices.dim() == 1 && indices.is_contiguous() && indices.size(0) >= rows,
      "indices has no slot for each row");
  TORCH_CHECK_VALUE(first.size() == second.size() && !first.empty(), "each slice has two matrices");
  const int64_t slots = first[0].size(0);
  int64_t columns = 0;
  std::vector<Slice> slices;
  for (size_t i = 0; i < first.size(); ++i) {
    const at::Tensor &a = first[i], &b = second[i];
    TORCH_CHECK_VALUE(
        a.dim() == 4 && b.dim() == 4 && a.size(0) == slots && b.size(0) == slots && a.size(1) == 1 && b.size(1) == 1 &&
            a.size(2) == b.size(3) && a.size(3) == x.size(1),
        "slice ", i, " has matrices of ", a.sizes(), " and ", b.sizes(), " for rows of ", x.size(1));
    TORCH_CHECK_VALUE(
        a.is_contiguous() && b.is_contiguous() && a.scalar_type() == x.scalar_type() &&
            b.scalar_type() == x.scalar_type() && y.scalar_type() == x.scalar_type(),
        "x, y and the matrices of slice ", i, " have one dtype, and lie in one piece");
    slices.push_back({a, b, columns});
    columns += b.size(2);
  }
  TORCH_CHECK_VALUE(columns <= y.size(1), "the slices have ", columns, " columns, and y has ", y.size(1));
  const int64_t* of_row = indices.const_data_ptr<int64_t>();
  for (int64_t begin = 0, end = 0; begin < rows; begin = end) {
    while (end < rows && of_row[end] == of_row[begin]) ++end;
    const int64_t slot = of_row[begin];
    TORCH_CHECK_VALUE(slot < slots, "slot ", slot, ": there are ", slots);
    if (slot < 0) continue;
    const at::Tensor x_run = x.slice(0, begin, end), y_run = y.slice(0, begin, end);
    if (end - begin > FEW_ROWS) {
      add_many(x_run, y_run, slices, slot, scale);
    } else {
      with_dtype(x, [&](auto element) {
        add_few<decltype(element)>(x_run, y_run, slices, slot, static_cast<float>(scale));
      });
    }
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(starling_kernels, library) {
  library.def(
      "add_lora(Tensor(a!) y, Tensor x, Tensor indices, Tensor[] first, Tensor[] second, float scale) -> ()");
  library.impl("add_lora", c10::DispatchKey::CPU, &add_lora);
}

}  // namespace starling
