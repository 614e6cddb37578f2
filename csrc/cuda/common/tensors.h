// Between torch's tensors and the kernel interfaces: references to matrices, scratch memory, the
// vendor's matrix products (cuBLAS; in the SIMT executor's build, whose tensors are on the CPU, the
// CPU's), registration.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "checks.h"
#include "common/kernels.h"
#include "common/scratch.h"
#include "matrix.h"

// STABLE_TORCH_LIBRARY_IMPL of the backend that csrc/cuda is.
#ifdef LOWRANK_EXT_SIMT
#define LOWRANK_EXT_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(lowrank_ext_simt, CPU, m)
#else
#define LOWRANK_EXT_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CUDA, m)
#endif

namespace lowrank_ext::cuda {

inline ComputeType compute_type_of(ScalarType dtype, bool allow_tf32) {
  switch (dtype) {
    case ScalarType::Double:
      return ComputeType::kFp64;
    case ScalarType::BFloat16:
      return ComputeType::kBf16;
    case ScalarType::Half:
      return ComputeType::kFp16;
    default:
      return allow_tf32 ? ComputeType::kTf32 : ComputeType::kFp32;
  }
}

inline ElementType element_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return ElementType::kFp64;
    case ScalarType::BFloat16:
      return ElementType::kBf16;
    case ScalarType::Half:
      return ElementType::kFp16;
    default:
      return ElementType::kFp32;
  }
}

inline int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : is_half_size(dtype) ? 2 : 4;
}

// A matrix or a vector, with the column stride left out.
inline MatrixRef strided_ref(const Tensor& tensor) {
  const ElementType type = element_type(tensor.scalar_type());
  if (tensor.dim() == 1) return {strided_data(tensor), type, 1, tensor.size(0), 0};
  return {strided_data(tensor), type, tensor.size(0), tensor.size(1), tensor.stride(0)};
}

// A matrix of dense columns, or a dense vector: one row, which needs no row stride to be aligned.
inline MatrixRef ref(const Tensor& tensor) {
  MatrixRef matrix = strided_ref(tensor);
  matrix.data = tensor.dim() == 1 ? dense_data<void>(tensor) : rows_data(tensor);
  return matrix;
}

inline MatrixRef ref(const std::optional<Tensor>& tensor) {
  return tensor ? ref(*tensor) : MatrixRef{};
}

inline MatrixRef scalar_ref(const Tensor& tensor) {
  return {dense_data<void>(tensor), element_type(tensor.scalar_type()), 1, 1, 0};
}

inline Device device_of_kernels(const Tensor& like) {
  const int index = like.get_device_index();
  return {num_sms(index), current_stream(index)};
}

// One piece of scratch memory per call, from torch's allocator, laid out by lay_out(scratch), which
// is called twice (scratch.h). Torch may reuse it as soon as the call returns, but only behind the
// call's kernels on their stream.
class Workspace {
 public:
  template <class F>
  Workspace(const Tensor& like, F lay_out) {
    Scratch measured;
    lay_out(measured);
    if (measured.num_bytes() == 0) return;
    buffer_ = empty({measured.num_bytes()}, ScalarType::Byte, like);
    Scratch placed(dense_data<void>(*buffer_));
    lay_out(placed);
  }

 private:
  std::optional<Tensor> buffer_;
};

// Adapter tensors that the kernels cannot read where they are, since they have another dtype than x
// or strided columns: copies in scratch memory, all by one launch.
class AdapterCopies {
 public:
  // The copy of source, of dense rows, which round fills.
  MatrixRef add(const MatrixRef& source, int64_t col_stride, ElementType type, Scratch& scratch) {
    const MatrixRef rounded = scratch.matrix(type, source.num_rows, source.num_cols);
    copies_.push_back({source, col_stride, rounded});
    return rounded;
  }
  void round(const Device& device) const {
    if (!copies_.empty()) round_adapters(copies_.data(), static_cast<int>(copies_.size()), device);
  }

 private:
  std::vector<AdapterCopy> copies_;
};

inline DropoutArgs dropout_of(double dropout_p, const std::optional<Tensor>& seed) {
  const auto threshold = static_cast<uint32_t>(std::nearbyint(dropout_p * 65536));
  if (threshold == 0) return {};
  // 1 / (1 - p) of the rounded p; any finite factor where nothing is kept.
  const double scale = threshold == 65536 ? 1.0 : 65536.0 / (65536.0 - threshold);
  return {threshold, scale, dense_data<const int64_t>(seed)};
}

// ---- the vendor's products

using MmOut = AOTITorchError(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);
using AddmmOut = AOTITorchError(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle,
                                AtenTensorHandle, double, double);

#ifdef LOWRANK_EXT_SIMT
inline MmOut* vendor_mm() { return &aoti_torch_cpu_mm_out; }
inline AddmmOut* vendor_addmm() { return &aoti_torch_cpu_addmm_out; }
#else
inline MmOut* vendor_mm() {
  static auto* const mm = torch_cuda_function<MmOut>("aoti_torch_cuda_mm_out");
  return mm;
}
inline AddmmOut* vendor_addmm() {
  static auto* const addmm = torch_cuda_function<AddmmOut>("aoti_torch_cuda_addmm_out");
  return addmm;
}
#endif

// out = left right
inline void multiply(const Tensor& out, const Tensor& left, const Tensor& right) {
  TORCH_ERROR_CODE_CHECK(vendor_mm()(out.get(), left.get(), right.get()));
}

// out = addend + left right; addend is out itself, or a vector that is added to every row.
inline void multiply_add(const Tensor& out, const Tensor& addend, const Tensor& left,
                         const Tensor& right) {
  TORCH_ERROR_CODE_CHECK(
      vendor_addmm()(out.get(), addend.get(), left.get(), right.get(), 1.0, 1.0));
}

}  // namespace lowrank_ext::cuda
