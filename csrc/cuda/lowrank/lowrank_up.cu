#include "lowrank/lowrank_up.cuh"

#include "common/dispatch.h"
#include "lowrank/kernels.h"

namespace lowrank_ext::cuda {

void lowrank_up(ComputeType compute_type, const MatrixRef& base, const MatrixRef& h, const Mid& mid,
                const MatrixRef& lora_b, const MatrixRef& out_scale, double scaling,
                const MatrixRef& y, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    ExpandParams<Compute> params{};
    params.base = matrix_of<const scalar_t>(base);
    if (base) params.base.num_rows = y.num_rows;  // a bias row stands for all
    params.left = matrix_of<const scalar_t>(h);
    params.mid = {matrix_of<const scalar_t>(mid.rank_scale), matrix_of<const scalar_t>(mid.core)};
    params.right = matrix_of<const scalar_t>(lora_b);
    params.col_scale = matrix_of<const scalar_t>(out_scale);
    params.out = matrix_of<scalar_t>(y);
    params.scale = static_cast<typename Compute::acc_t>(scaling);
    launch_lowrank_up<Compute>(params, device.num_sms, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
