// h [M, r] = drop(x) lora_aᵀ; where the contraction is split, partial_sums.cuh adds the parts.
#include "lowrank/lowrank_down.cuh"

#include "common/partial_sums.cuh"
#include "lowrank/kernels.h"

namespace lowrank_ext::cuda {
namespace {

// Up to 16 rows, lora_a is what streams (decoding).
template <class Compute>
ThinProductPlan plan_lowrank_down(int64_t num_rows, int64_t in_features, int64_t rank,
                                  int num_sms) {
  return plan_thin_product(num_rows, in_features, rank, compute_traits<Compute>(), num_rows <= 16,
                           num_sms);
}

template <class Compute>
ThinProductParams<Compute, DownOp> params_of(const MatrixRef& x, const MatrixRef& lora_a,
                                             const DropoutArgs& dropout) {
  ThinProductParams<Compute, DownOp> params{};
  params.large = matrix_of<const typename Compute::scalar_t>(x);
  params.thin = matrix_of<const typename Compute::scalar_t>(lora_a);
  params.rows_per_split = x.num_rows;
  params.scale = static_cast<typename Compute::acc_t>(dropout.scale);
  params.dropout = {dropout.threshold, dropout.seed};
  return params;
}

template <class Compute>
void down_to_matrix(const MatrixRef& x, const MatrixRef& lora_a, const MatrixRef& h,
                    const DropoutArgs& dropout, void* workspace, const Device& device) {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  const int64_t num_rows = x.num_rows, rank = lora_a.num_rows;
  const ThinProductPlan plan =
      plan_lowrank_down<Compute>(num_rows, x.num_cols, rank, device.num_sms);
  ThinProductParams<Compute, DownOp> params = params_of<Compute>(x, lora_a, dropout);
  if (plan.num_splits == 1) {
    params.out = matrix_of<scalar_t>(h);
    return launch_lowrank_down(plan, params, device.stream);
  }
  const int64_t stride = padded_to_sector(rank);
  params.partials = {static_cast<acc_t*>(workspace), plan.num_splits * num_rows, stride, stride,
                     true};
  launch_lowrank_down(plan, params, device.stream);
  const Matrix<acc_t>& partials = params.partials;
  launch_partial_sums<Compute>({partials.data, partials.num_rows, rank, stride, true},
                               plan.num_splits, {matrix_of<scalar_t>(h), {}}, num_rows, rank,
                               device.stream);
}

}  // namespace

int64_t lowrank_down_workspace_bytes(ComputeType compute_type, int64_t num_rows,
                                     int64_t in_features, int64_t rank, int num_sms) {
  return dispatch(compute_type, [&](auto compute) -> int64_t {
    using Compute = decltype(compute);
    const auto plan = plan_lowrank_down<Compute>(num_rows, in_features, rank, num_sms);
    if (plan.num_splits == 1) return 0;
    return plan.num_splits * num_rows * padded_to_sector(rank) * sizeof(typename Compute::acc_t);
  });
}

void lowrank_down(ComputeType compute_type, const MatrixRef& x, const MatrixRef& lora_a,
                  const MatrixRef& h, const DropoutArgs& dropout, void* workspace,
                  const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    down_to_matrix<decltype(compute)>(x, lora_a, h, dropout, workspace, device);
  });
}

PartialSumsSize lowrank_down_partials_workspace(ComputeType compute_type, int64_t num_rows,
                                                int64_t in_features, int64_t num_cols,
                                                int num_sms) {
  return dispatch(compute_type, [&](auto compute) -> PartialSumsSize {
    using Compute = decltype(compute);
    const int num_splits =
        plan_lowrank_down<Compute>(num_rows, in_features, num_cols, num_sms).num_splits;
    const int64_t stride = padded_to_sector(num_cols), element = sizeof(typename Compute::acc_t);
    return {num_splits, stride, num_splits * num_rows * stride * element};
  });
}

void lowrank_down_partials(ComputeType compute_type, const MatrixRef& x, const MatrixRef& w,
                           const PartialSums& z, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    auto params = params_of<Compute>(x, w, DropoutArgs{});
    params.partials = {static_cast<typename Compute::acc_t*>(z.data), z.num_splits * x.num_rows,
                       z.row_stride, z.row_stride, true};
    const auto plan =
        plan_lowrank_down<Compute>(x.num_rows, x.num_cols, w.num_rows, device.num_sms);
    launch_lowrank_down(plan, params, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
