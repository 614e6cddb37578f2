// y [M, N] = base + scaling · out_scale ⊙ (mid(h) lora_bᵀ): the expansion of expand.cuh with
// right = lora_b [N, r], contracted along its columns; tiles, shared memory, accumulation and tails
// are described there. mid(h) is formed in each block's prologue and never leaves shared memory.
#pragma once

#include "lowrank/expand.cuh"

namespace lowrank_ext::cuda {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    lowrank_up_kernel(const typename Traits::Params params) {
  expand<Traits>(params);
}

template <class Compute>
void launch_lowrank_up(const ExpandParams<Compute>& params, int num_sms, Stream stream) {
  launch_expand<Compute, UpOp>(
      params, num_sms, [&](auto traits, const LaunchShape& shape, const auto& planned) {
        launch_kernel("lowrank_up", &lowrank_up_kernel<decltype(traits)>, shape, planned, stream);
      });
}

}  // namespace lowrank_ext::cuda
