// Fresh buffers on the CPU and the vendor's matrix products (oneDNN, MKL).
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../matrix.h"
#include "convert.h"

namespace lowrank_ext::cpu {

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
}

inline Rows rows_of(const Tensor& matrix) {
  return {matrix.data_ptr(), matrix.scalar_type(), matrix.stride(0)};
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
