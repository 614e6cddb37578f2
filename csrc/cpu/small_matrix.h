// Plain loops over matrices of [M, r], [N, r] or [r, r], in fp32 or fp64, and conversions into fresh
// buffers. They cost little beside the passes over [M, K] and [M, N].
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "matrix.h"

namespace lowrank_ext::cpu {

inline void zero(const Tensor& tensor) {
  std::memset(dense_data<void>(tensor), 0, tensor.numel() * tensor.element_size());
}

// The matrix in a fresh dense buffer.
inline Tensor fresh_copy(const Tensor& matrix, ScalarType dtype) {
  const Tensor result = empty({matrix.size(0), matrix.size(1)}, dtype);
  convert(rows_of(result), rows_of(matrix), 1.0, matrix.size(0), matrix.size(1));
  return result;
}

// The matrix itself, strides included, where it has the dtype.
inline Tensor converted(const Tensor& matrix, ScalarType dtype) {
  return matrix.scalar_type() == dtype ? matrix : fresh_copy(matrix, dtype);
}

// body(pointer) to the elements of a contiguous tensor of fp32 or fp64.
template <typename Body>
inline void visit_accumulator(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Double) {
    body(dense_data<double>(tensor));
  } else {
    body(dense_data<float>(tensor));
  }
}

// Matrices and vectors of one call below are contiguous, all fp32 or all fp64.

// matrix[m, j] *= scale[j]
inline void scale_columns(const Tensor& matrix, const Tensor& scale) {
  const int64_t num_rows = matrix.size(0), num_cols = matrix.size(1);
  visit_accumulator(matrix, [&](auto* data) {
    const auto* factor = dense_data<const std::remove_pointer_t<decltype(data)>>(scale);
    for (int64_t m = 0; m < num_rows; ++m)
      for (int64_t j = 0; j < num_cols; ++j) data[m * num_cols + j] *= factor[j];
  });
}

// matrix[n, j] *= scale[n]
inline void scale_rows(const Tensor& matrix, const Tensor& scale) {
  const int64_t num_rows = matrix.size(0), num_cols = matrix.size(1);
  visit_accumulator(matrix, [&](auto* data) {
    const auto* factor = dense_data<const std::remove_pointer_t<decltype(data)>>(scale);
    for (int64_t n = 0; n < num_rows; ++n)
      for (int64_t j = 0; j < num_cols; ++j) data[n * num_cols + j] *= factor[n];
  });
}

// out[j] = Σ_m left[m, j] right[m, j], summed in fp64: a long fp32 chain would lose the products'
// accuracy.
inline void sum_products_over_rows(const Tensor& out, const Tensor& left, const Tensor& right) {
  const int64_t num_rows = left.size(0), num_cols = left.size(1);
  std::vector<double> sums(num_cols, 0.0);
  visit_accumulator(out, [&](auto* result) {
    const auto* l = dense_data<const std::remove_pointer_t<decltype(result)>>(left);
    const auto* r = dense_data<const std::remove_pointer_t<decltype(result)>>(right);
    for (int64_t m = 0; m < num_rows; ++m)
      for (int64_t j = 0; j < num_cols; ++j)
        sums[j] += double{l[m * num_cols + j]} * double{r[m * num_cols + j]};
    std::copy(sums.begin(), sums.end(), result);
  });
}

// out[n] = scale · Σ_j left[n, j] right[n, j]
inline void sum_products_over_cols(const Tensor& out, const Tensor& left, const Tensor& right,
                                   double scale) {
  const int64_t num_rows = left.size(0), num_cols = left.size(1);
  visit_accumulator(out, [&](auto* result) {
    const auto* l = dense_data<const std::remove_pointer_t<decltype(result)>>(left);
    const auto* r = dense_data<const std::remove_pointer_t<decltype(result)>>(right);
    for (int64_t n = 0; n < num_rows; ++n) {
      double sum = 0.0;
      for (int64_t j = 0; j < num_cols; ++j)
        sum += double{l[n * num_cols + j]} * double{r[n * num_cols + j]};
      result[n] = scale * sum;
    }
  });
}

template <typename element_t>
void copy_transposed(const Tensor& to, const Tensor& matrix) {
  const int64_t num_rows = matrix.size(0), num_cols = matrix.size(1), stride = matrix.stride(0);
  const auto* in = static_cast<const element_t*>(rows_data(matrix));
  auto* out = dense_data<element_t>(to);
  constexpr int64_t kLine = 64 / sizeof(element_t);
  for (int64_t first = 0; first < num_cols; first += kLine)
    for (int64_t n = first; n < std::min(first + kLine, num_cols); ++n)
      for (int64_t j = 0; j < num_rows; ++j) *out++ = in[j * stride + n];
}

// A dense copy of matrixᵀ for [r, N], which is small: a cache line of each row at a time, so that
// writes are in order.
inline Tensor transposed_copy(const Tensor& matrix) {
  Tensor result = empty({matrix.size(1), matrix.size(0)}, matrix.scalar_type());
  const int64_t size = size_of(matrix.scalar_type());
  const auto copy = size == 8   ? copy_transposed<uint64_t>
                    : size == 4 ? copy_transposed<uint32_t>
                                : copy_transposed<uint16_t>;
  copy(result, matrix);
  return result;
}

// target = scale · matrix, rounded once to target's dtype.
inline void round_into(const Tensor& target, const Tensor& matrix, double scale) {
  convert(rows_of(target), rows_of(matrix), scale, matrix.size(0), matrix.size(1));
}

}  // namespace lowrank_ext::cpu
