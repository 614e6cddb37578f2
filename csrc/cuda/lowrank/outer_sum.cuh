// Partial sums of scale · drop(source)ᵀ thin, source [M, C] and thin [M, r]: what dlora_a and, in a
// pass of its own, dlora_b are made of. The product of thin_product.cuh with L = drop(source)ᵀ;
// tiles, shared memory, accumulation and tails are described there.
#pragma once

#include "common/launch.h"
#include "lowrank/thin_product.cuh"

namespace lowrank_ext::cuda {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    outer_sum_kernel(const typename Traits::Params params) {
  thin_product<Traits>(params);
}

template <class Compute>
void launch_outer_sum(const ThinProductPlan& plan,
                      const ThinProductParams<Compute, OuterSumOp>& params, Stream stream) {
  launch_thin_product(
      plan, params, [&](auto traits, const LaunchShape& shape, const auto& planned) {
        launch_kernel("outer_sum", &outer_sum_kernel<decltype(traits)>, shape, planned, stream);
      });
}

}  // namespace lowrank_ext::cuda
