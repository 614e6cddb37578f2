// z [M, R] = drop_g(x) w_gᵀ, as partial sums: the product of dropout_product.cuh with L = drop_g(x)
// and R = wᵀ.
#pragma once

#include "common/launch.h"
#include "experts/dropout_product.cuh"

namespace lowrank_ext::cuda {

struct DenseDownOp {  // x [M, K], w [R, K]
  static constexpr Contraction kLarge = Contraction::kAlongColumns;
  static constexpr Contraction kThin = Contraction::kAlongColumns;
  static constexpr bool kSkipsZeros = false;
  static constexpr const char* kThinName = "w";
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    dense_down_kernel(const typename Traits::Params params) {
  dropout_product<Traits>(params);
}

template <class Compute>
void launch_dense_down(const ThinProductPlan& plan,
                       const DropoutProductParams<Compute, DenseDownOp>& params, Stream stream) {
  launch_dropout_product(
      plan, params, [&](auto traits, const LaunchShape& shape, const auto& planned) {
        launch_kernel("dense_down", &dense_down_kernel<decltype(traits)>, shape, planned, stream);
      });
}

}  // namespace lowrank_ext::cuda
