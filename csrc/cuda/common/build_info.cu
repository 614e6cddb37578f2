// cuda_build_info() -> str: the CUDA toolkit and the GPU architectures that this library was
// compiled with. It needs no GPU. Its schema is here and not in library.cpp because the op itself
// exists only in a build with CUDA: that is how a caller tells the two builds apart.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

std::string cuda_build_info() {
  int version = 0;  // 1000 * major + 10 * minor of the cudart linked in
  cudaRuntimeGetVersion(&version);
  return "nvcc " LOWRANK_EXT_NVCC_VERSION ", cudart " + std::to_string(version / 1000) + "." +
         std::to_string(version % 1000 / 10) + ", architectures " LOWRANK_EXT_CUDA_ARCHS;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowrank_ext, m) { m.def("cuda_build_info() -> str"); }

// The op takes no tensor, so it is never dispatched to a backend.
STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&cuda_build_info));
}
