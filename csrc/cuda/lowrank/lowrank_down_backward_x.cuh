// dx [M, K] = base + scale · drop'(dh lora_a): the expansion of expand.cuh with left = dh and
// right = lora_a [r, K], contracted along its rows; tiles, shared memory, accumulation and
// tails are described there. The dropout of the forward pass is drawn again, for whole chunks of
// dx, from (seed, m, k).
#pragma once

#include "lowrank/expand.cuh"

namespace lowrank_ext::cuda {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    lowrank_down_backward_x_kernel(const typename Traits::Params params) {
  expand<Traits>(params);
}

template <class Compute>
void launch_lowrank_down_backward_x(const ExpandParams<Compute>& params, int num_sms,
                                    Stream stream) {
  launch_expand<Compute, DownBackwardXOp>(
      params, num_sms, [&](auto traits, const LaunchShape& shape, const auto& planned) {
        launch_kernel("lowrank_down_backward_x", &lowrank_down_backward_x_kernel<decltype(traits)>,
                      shape, planned, stream);
      });
}

}  // namespace lowrank_ext::cuda
