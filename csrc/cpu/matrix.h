// Two-dimensional views, fresh buffers and the vendor's matrix products (oneDNN, MKL), all through
// torch's C shim and without the dispatcher. No function here allocates a copy of its operands.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "convert.h"

namespace lowrank_ext::cpu {

using torch::stable::Tensor;

inline Tensor strided_view(const Tensor& tensor, int64_t offset, int64_t num_rows, int64_t num_cols,
                           int64_t row_stride, int64_t col_stride) {
  const int64_t sizes[] = {num_rows, num_cols};
  const int64_t strides[] = {row_stride, col_stride};
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, offset, &view));
  return Tensor(view);
}

inline Tensor transposed(const Tensor& matrix) {
  return strided_view(matrix, 0, matrix.size(1), matrix.size(0), matrix.stride(1),
                      matrix.stride(0));
}

inline Tensor row_block(const Tensor& matrix, int64_t first_row, int64_t num_rows) {
  return strided_view(matrix, first_row * matrix.stride(0), num_rows, matrix.size(1),
                      matrix.stride(0), matrix.stride(1));
}

inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t dim = static_cast<int64_t>(sizes.size()) - 2; dim >= 0; --dim)
    strides[dim] = strides[dim + 1] * (sizes[dim + 1] > 1 ? sizes[dim + 1] : 1);
  return strides;
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  const std::vector<int64_t> strides = dense_strides(sizes);
  int32_t aoti_dtype = aoti_torch_dtype_float32();
  if (dtype == ScalarType::Double) aoti_dtype = aoti_torch_dtype_float64();
  if (dtype == ScalarType::BFloat16) aoti_dtype = aoti_torch_dtype_bfloat16();
  if (dtype == ScalarType::Half) aoti_dtype = aoti_torch_dtype_float16();
  if (dtype == ScalarType::Long) aoti_dtype = aoti_torch_dtype_int64();
  AtenTensorHandle fresh = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), aoti_dtype,
                                                  aoti_torch_device_type_cpu(), 0, &fresh));
  return Tensor(fresh);
}

inline Rows rows_of(const Tensor& matrix) {
  return {matrix.data_ptr(), matrix.scalar_type(), matrix.stride(0)};
}

// [..., C] as [M, C] with dense columns: a view where the strides allow it, else a contiguous copy.
inline Tensor as_matrix(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  const int64_t num_cols = tensor.size(dim - 1);
  int64_t num_rows = 1;
  for (int64_t d = 0; d < dim - 1; ++d) num_rows *= tensor.size(d);
  const auto contiguous_view = [&](const Tensor& dense) {
    return strided_view(dense, 0, num_rows, num_cols, num_cols > 0 ? num_cols : 1, 1);
  };
  if (tensor.is_contiguous()) return contiguous_view(tensor);
  if (dim == 2 && tensor.stride(1) == 1 && tensor.stride(0) >= num_cols) return tensor;
  return contiguous_view(torch::stable::contiguous(tensor));
}

// The shape of `like` with another last dimension.
inline std::vector<int64_t> with_last_dim(const Tensor& like, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim + 1 < like.dim(); ++dim) sizes.push_back(like.size(dim));
  sizes.push_back(last);
  return sizes;
}

// A dense tensor under another shape of the same size.
inline Tensor with_shape(const Tensor& dense, const std::vector<int64_t>& sizes) {
  const std::vector<int64_t> strides = dense_strides(sizes);
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      dense.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, &view));
  return Tensor(view);
}

// out = beta · out + alpha · left right
inline void multiply(const Tensor& out, const Tensor& left, const Tensor& right, double beta = 0.0,
                     double alpha = 1.0) {
  if (beta == 0.0 && alpha == 1.0) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
  } else {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), beta, alpha));
  }
}

}  // namespace lowrank_ext::cpu
