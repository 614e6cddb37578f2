#include "lowrank/lowrank_down_backward_x.cuh"

#include "common/dispatch.h"
#include "lowrank/kernels.h"

namespace lowrank_ext::cuda {

void lowrank_down_backward_x(ComputeType compute_type, const MatrixRef& base, const MatrixRef& dh,
                             const MatrixRef& lora_a, const DropoutArgs& dropout,
                             const MatrixRef& dx, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    ExpandParams<Compute> params{};
    params.base = matrix_of<const scalar_t>(base);
    params.left = matrix_of<const scalar_t>(dh);
    params.right = matrix_of<const scalar_t>(lora_a);
    params.out = matrix_of<scalar_t>(dx);
    params.scale = static_cast<typename Compute::acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_lowrank_down_backward_x<Compute>(params, device.num_sms, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
