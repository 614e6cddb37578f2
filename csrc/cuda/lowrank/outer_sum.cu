#include "lowrank/outer_sum.cuh"

#include "lowrank/kernels.h"

namespace lowrank_ext::cuda {
namespace {

ThinProductPlan plan_of(ComputeType compute_type, int64_t num_rows, int64_t num_cols, int64_t rank,
                        int num_sms) {
  return dispatch(compute_type, [&](auto compute) {
    return plan_thin_product(num_cols, num_rows, rank, compute_traits<decltype(compute)>(), false,
                             num_sms);
  });
}

}  // namespace

PartialSumsSize outer_sum_size(ComputeType compute_type, int64_t num_rows, int64_t num_cols,
                               int64_t rank, bool transposed, int num_sms) {
  const ThinProductPlan plan = plan_of(compute_type, num_rows, num_cols, rank, num_sms);
  const int64_t stride = padded_to_sector(transposed ? num_cols : rank);
  const int64_t num_sums = (transposed ? rank : num_cols) * stride;
  return dispatch(compute_type, [&](auto compute) -> PartialSumsSize {
    return {plan.num_splits, stride,
            plan.num_splits * num_sums * compute_traits<decltype(compute)>().acc_bytes};
  });
}

void outer_sum(ComputeType compute_type, const MatrixRef& source, const MatrixRef& thin,
               const DropoutArgs& dropout, double scale, bool transposed, void* partials,
               const Device& device, bool finite_only) {
  const ThinProductPlan plan =
      plan_of(compute_type, source.num_rows, source.num_cols, thin.num_cols, device.num_sms);
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    using acc_t = typename Compute::acc_t;
    ThinProductParams<Compute, OuterSumOp> params{};
    params.large = matrix_of<const scalar_t>(source);
    params.thin = matrix_of<const scalar_t>(thin);
    params.transposed_sums = transposed;
    params.rows_per_split = transposed ? thin.num_cols : source.num_cols;
    const int64_t stride = padded_to_sector(transposed ? source.num_cols : thin.num_cols);
    params.partials = {static_cast<acc_t*>(partials), plan.num_splits * params.rows_per_split,
                       stride, stride, true};
    params.scale = static_cast<acc_t>(scale);
    params.dropout = {dropout.threshold, dropout.seed};
    params.finite_only = finite_only;
    launch_outer_sum(plan, params, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
