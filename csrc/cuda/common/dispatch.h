// From the interfaces' arguments to the kernels' template arguments.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/arguments.h"
#include "common/compute_type.cuh"
#include "common/tile.cuh"

namespace lowrank_ext::cuda {

// f(Compute{}) of the compute type.
template <class F>
auto dispatch(ComputeType compute_type, F f) {
  switch (compute_type) {
    case ComputeType::kBf16:
      return f(Bf16{});
    case ComputeType::kFp16:
      return f(Fp16{});
    case ComputeType::kTf32:
      return f(Tf32{});
    case ComputeType::kFp32:
      return f(Fp32{});
    default:
      return f(Fp64{});
  }
}

template <class T>
constexpr ElementType element_type() {
  if constexpr (std::is_same_v<T, double>) return ElementType::kFp64;
  if constexpr (std::is_same_v<T, float>) return ElementType::kFp32;
  if constexpr (std::is_same_v<T, Fp16::scalar_t>) return ElementType::kFp16;
  return ElementType::kBf16;
}

template <class T>
Matrix<T> matrix_of(const MatrixRef& ref) {
  const int64_t row_bytes = ref.row_stride * static_cast<int64_t>(sizeof(T));
  const bool aligned = (reinterpret_cast<uintptr_t>(ref.data) | row_bytes) % 16 == 0;
  return {static_cast<T*>(ref.data), ref.num_rows, ref.num_cols, ref.row_stride, aligned};
}

// Rows without gaps.
template <class T>
Matrix<T> dense_matrix(T* data, int64_t num_rows, int64_t num_cols) {
  return {data, num_rows, num_cols, num_cols, false};
}

}  // namespace lowrank_ext::cuda
