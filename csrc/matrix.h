// Two-dimensional views, fresh buffers and the pointers that kernels take, on any device, through
// torch's C shim and without the dispatcher. Only dense and as_matrix copy their operand, where its
// strides leave no choice.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

namespace lowrank_ext {

using torch::headeronly::ScalarType;
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

inline int32_t aoti_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      return aoti_torch_dtype_float32();
  }
}

// Dense, uninitialized.
inline Tensor empty_on(int32_t device_type, int32_t device_index, const std::vector<int64_t>& sizes,
                       ScalarType dtype) {
  const std::vector<int64_t> strides = dense_strides(sizes);
  AtenTensorHandle fresh = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), aoti_dtype(dtype), device_type,
                                                  device_index, &fresh));
  return Tensor(fresh);
}

// On the device of `like`.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  return empty_on(device_type, like.get_device_index(), sizes, dtype);
}

// Dense, whatever the strides of `like`.
inline Tensor dense_like(const Tensor& like) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < like.dim(); ++dim) sizes.push_back(like.size(dim));
  return empty(sizes, like.scalar_type(), like);
}

inline Tensor zeros_like(const Tensor& like) {
  const Tensor zeros = dense_like(like);
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(zeros.get()));
  return zeros;
}

// The tensor itself where it is contiguous, else a copy.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(dense(*tensor)) : tensor;
}

// [..., C] as [M, C] with dense columns: a view where the strides allow it, else a contiguous copy.
inline Tensor as_matrix(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  const int64_t num_cols = tensor.size(dim - 1);
  int64_t num_rows = 1;
  for (int64_t d = 0; d < dim - 1; ++d) num_rows *= tensor.size(d);
  const auto contiguous_view = [&](const Tensor& rows) {
    return strided_view(rows, 0, num_rows, num_cols, num_cols > 0 ? num_cols : 1, 1);
  };
  if (!tensor.is_contiguous() && dim == 2 && tensor.stride(1) == 1 && tensor.stride(0) >= num_cols)
    return tensor;
  return contiguous_view(dense(tensor));
}

inline std::optional<Tensor> as_matrix(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(as_matrix(*tensor)) : tensor;
}

// ---- pointers. Nothing else in csrc takes a tensor's: a kernel never gets strides that it does not
// expect.

// Of a contiguous tensor, whose elements a kernel finds by its sizes alone.
template <class T>
inline T* dense_data(const Tensor& tensor) {
  if (!tensor.is_contiguous())
    throw std::logic_error("lowrank_ext: a kernel for contiguous tensors got a strided one");
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
inline T* dense_data(const std::optional<Tensor>& tensor) {
  return tensor ? dense_data<T>(*tensor) : nullptr;
}

// Of a matrix whose columns are dense; its rows may lie anywhere.
inline void* rows_data(const Tensor& matrix) {
  if (matrix.size(0) > 0 && matrix.size(1) > 1 && matrix.stride(1) != 1)
    throw std::logic_error("lowrank_ext: a kernel for dense columns got strided ones");
  return matrix.data_ptr();
}

// Of a tensor whose strides the caller passes on.
inline void* strided_data(const Tensor& tensor) { return tensor.data_ptr(); }

// The shape of `like` with another last dimension.
inline std::vector<int64_t> with_last_dim(const Tensor& like, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim + 1 < like.dim(); ++dim) sizes.push_back(like.size(dim));
  sizes.push_back(last);
  return sizes;
}

}  // namespace lowrank_ext
