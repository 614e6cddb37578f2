// h [M, r] = drop(x) lora_aᵀ: the product of thin_product.cuh with L = drop(x) and R = lora_aᵀ;
// tiles, shared memory, accumulation and tails are described there.
#pragma once

#include "common/launch.h"
#include "lowrank/thin_product.cuh"

namespace lowrank_ext::cuda {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    lowrank_down_kernel(const typename Traits::Params params) {
  thin_product<Traits>(params);
}

template <class Compute>
void launch_lowrank_down(const ThinProductPlan& plan,
                         const ThinProductParams<Compute, DownOp>& params, Stream stream) {
  launch_thin_product(plan, params,
                      [&](auto traits, const LaunchShape& shape, const auto& planned) {
                        launch_kernel("lowrank_down", &lowrank_down_kernel<decltype(traits)>, shape,
                                      planned, stream);
                      });
}

}  // namespace lowrank_ext::cuda
