// dw [R, K] = dz_gᵀ drop_g(x), as partial sums: the product of dropout_product.cuh with
// L = drop_g(x)ᵀ and R = dz.
#pragma once

#include "common/launch.h"
#include "experts/dropout_product.cuh"

namespace lowrank_ext::cuda {

struct DenseOuterOp {  // x [M, K], dz [M, R]; sums are transposed
  static constexpr Contraction kLarge = Contraction::kAlongRows;
  static constexpr Contraction kThin = Contraction::kAlongRows;
  static constexpr bool kSkipsZeros = true;  // of thin's rows, and what is not finite in large
  static constexpr const char* kThinName = "dz";
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    dense_outer_kernel(const typename Traits::Params params) {
  dropout_product<Traits>(params);
}

template <class Compute>
void launch_dense_outer(const ThinProductPlan& plan,
                        const DropoutProductParams<Compute, DenseOuterOp>& params, Stream stream) {
  launch_dropout_product(
      plan, params, [&](auto traits, const LaunchShape& shape, const auto& planned) {
        launch_kernel("dense_outer", &dense_outer_kernel<decltype(traits)>, shape, planned, stream);
      });
}

}  // namespace lowrank_ext::cuda
