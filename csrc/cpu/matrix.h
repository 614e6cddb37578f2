// Fresh buffers on the CPU and the vendor's matrix products (oneDNN, MKL).
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../matrix.h"
#include "checks.h"
#include "convert.h"
#include "scratch.h"

namespace lowrank_ext::cpu {

// A temporary of an op, dense and uninitialized; in a ScratchScope it ends with that.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  int64_t num_bytes = dtype == ScalarType::Long ? 8 : size_of(dtype);
  for (const int64_t size : sizes) num_bytes *= size;
  void* bytes = scratch_bytes(num_bytes);
  if (bytes == nullptr) return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
  const std::vector<int64_t> strides = dense_strides(sizes);
  AtenTensorHandle fresh = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      bytes, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, aoti_dtype(dtype),
      aoti_torch_device_type_cpu(), 0, &fresh));
  return Tensor(fresh);
}

inline Rows rows_of(const Tensor& matrix) {
  return {rows_data(matrix), matrix.scalar_type(), matrix.stride(0)};
}

// A matrix as oneDNN may read it. Its products of half-size dtypes read columns in groups of 32, and
// multiply what lies behind the last column by zero: NaN there, in a slice's padding, would spread.
inline Tensor without_gaps(const Tensor& matrix) {
  const bool by_rows = matrix.stride(1) == 1;
  const int64_t num_cols = matrix.size(by_rows ? 1 : 0), stride = matrix.stride(by_rows ? 0 : 1);
  const bool safe = !is_half_size(matrix.scalar_type()) || num_cols % 32 == 0 || stride == num_cols;
  if (safe) return matrix;
  return by_rows ? torch::stable::contiguous(matrix)
                 : transposed(torch::stable::contiguous(transposed(matrix)));
}

// out = beta · out + alpha · left right
inline void multiply(const Tensor& out, const Tensor& left_matrix, const Tensor& right_matrix,
                     double beta = 0.0, double alpha = 1.0) {
  const Tensor left = without_gaps(left_matrix), right = without_gaps(right_matrix);
  if (beta == 0.0 && alpha == 1.0) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
  } else {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), beta, alpha));
  }
}

}  // namespace lowrank_ext::cpu
