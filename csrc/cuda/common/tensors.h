// Between torch's tensors and kernels.h: untyped matrices, scratch memory, the vendor's matrix
// products (cuBLAS; in the executor's build, whose tensors are on the CPU, the CPU's),
// registration.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "checks.h"
#include "common/kernels.h"
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

// A matrix of dense columns, or a dense vector: one row, which needs no row stride to be aligned.
inline MatrixRef ref(const Tensor& tensor) {
  const ElementType type = element_type(tensor.scalar_type());
  if (tensor.dim() == 1) return {tensor.data_ptr(), type, 1, tensor.size(0), 0};
  return {tensor.data_ptr(), type, tensor.size(0), tensor.size(1), tensor.stride(0)};
}

inline MatrixRef ref(const std::optional<Tensor>& tensor) {
  return tensor ? ref(*tensor) : MatrixRef{};
}

inline MatrixRef scalar_ref(const Tensor& tensor) {
  return {tensor.data_ptr(), element_type(tensor.scalar_type()), 1, 1, 0};
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? data_of<T>(*tensor) : nullptr;
}

inline Device device_of_kernels(const Tensor& like) {
  const int index = like.get_device_index();
  return {num_sms(index), current_stream(index)};
}

// One piece of scratch memory per call, from torch's allocator: first every part is reserved, then
// the whole is allocated. Torch may reuse it as soon as the call returns, but only behind the
// call's kernels on their stream.
class Workspace {
 public:
  // Returns the part's offset; parts are aligned to a cache line of the L2.
  int64_t reserve(int64_t num_bytes) {
    constexpr int64_t kAlignment = 128;
    const int64_t offset = num_bytes_;
    num_bytes_ += (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  }
  void allocate(const Tensor& like) {
    if (num_bytes_ > 0) buffer_ = empty({num_bytes_}, ScalarType::Byte, like);
  }
  void* at(int64_t offset) const {
    return buffer_ ? static_cast<char*>(buffer_->data_ptr()) + offset : nullptr;
  }

 private:
  int64_t num_bytes_ = 0;
  std::optional<Tensor> buffer_;
};

// A matrix in scratch memory whose rows start on 16 bytes, as the kernels' fast path wants them.
struct ScratchMatrix {
  MatrixRef matrix;  // no data before the workspace is allocated
  int64_t offset;
};

inline ScratchMatrix reserve_matrix(Workspace& workspace, ScalarType dtype, int64_t num_rows,
                                    int64_t num_cols) {
  const int64_t chunk = 16 / element_size(dtype);
  const int64_t row_stride = (num_cols + chunk - 1) / chunk * chunk;
  const int64_t offset = workspace.reserve(num_rows * row_stride * element_size(dtype));
  return {{nullptr, element_type(dtype), num_rows, num_cols, row_stride}, offset};
}

// Once the workspace is allocated.
inline MatrixRef placed(const ScratchMatrix& scratch, const Workspace& workspace) {
  MatrixRef matrix = scratch.matrix;
  matrix.data = workspace.at(scratch.offset);
  return matrix;
}

// Adapter tensors that the kernels cannot read where they are, since they have another dtype than x
// or strided columns: copies in scratch memory, all by one launch.
class AdapterCopies {
 public:
  AdapterCopies(ScalarType input, Workspace& workspace) : input_(input), workspace_(workspace) {}

  // `operand` becomes the copy, whose data come with round; it must stay where it is until then.
  void add(const MatrixRef& source, int64_t col_stride, MatrixRef& operand) {
    const ScratchMatrix scratch =
        reserve_matrix(workspace_, input_, source.num_rows, source.num_cols);
    copies_.push_back({source, col_stride, scratch.matrix});
    offsets_.push_back(scratch.offset);
    operands_.push_back(&operand);
    operand = scratch.matrix;
  }

  // Once the workspace is allocated.
  void round(const Device& device) {
    if (copies_.empty()) return;
    for (size_t i = 0; i < copies_.size(); ++i)
      copies_[i].rounded.data = operands_[i]->data = workspace_.at(offsets_[i]);
    round_adapters(copies_.data(), static_cast<int>(copies_.size()), device);
  }

 private:
  const ScalarType input_;
  Workspace& workspace_;
  std::vector<AdapterCopy> copies_;
  std::vector<int64_t> offsets_;
  std::vector<MatrixRef*> operands_;
};

inline DropoutArgs dropout_of(double dropout_p, const std::optional<Tensor>& seed) {
  const auto threshold = static_cast<uint32_t>(std::nearbyint(dropout_p * 65536));
  if (threshold == 0) return {};
  // Of 1 / (1 - p) for the probability really used; where nothing is kept any finite factor will
  // do.
  const double scale = threshold == 65536 ? 1.0 : 65536.0 / (65536.0 - threshold);
  return {threshold, scale, data_of<const int64_t>(seed)};
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
