#include "experts/grouped_gate.cuh"

#include "experts/kernels.h"

namespace lowrank_ext::cuda {

void grouped_gate(ComputeType compute_type, const PartialSums& sums, const ExpertRouting& routing,
                  const MatrixRef& h, const MatrixRef& gated, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    using acc_t = typename Compute::acc_t;
    launch_grouped_gate<Compute>(
        {choices_of<acc_t>(routing), slot_sums<acc_t>(sums, gated.num_rows, gated.num_cols),
         sums.num_splits, static_cast<int>(gated.num_cols), matrix_of<scalar_t>(h),
         matrix_of<scalar_t>(gated)},
        device.stream);
  });
}

void grouped_apply_gates(ComputeType compute_type, const ExpertRouting& routing, const MatrixRef& h,
                         const MatrixRef& gated, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    launch_grouped_apply_gates<Compute>({choices_of<typename Compute::acc_t>(routing),
                                         matrix_of<const scalar_t>(h), matrix_of<scalar_t>(gated)},
                                        device.stream);
  });
}

}  // namespace lowrank_ext::cuda
