#include "experts/dense_outer.cuh"

#include "experts/kernels.h"

namespace lowrank_ext::cuda {

PartialSumsSize dense_outer_workspace(ComputeType compute_type, int64_t num_rows,
                                      int64_t in_features, int64_t num_cols, int num_sms) {
  return dispatch(compute_type, [&](auto compute) {
    return dropout_product_size<decltype(compute)>(in_features, num_rows, num_cols, num_cols,
                                                   in_features, num_sms);
  });
}

void dense_outer(ComputeType compute_type, const MatrixRef& dz, const MatrixRef& x,
                 const DenseColumns& columns, bool shared_dropout, const DropoutArgs& dropout,
                 void* dw, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    using acc_t = typename Compute::acc_t;
    const int64_t num_cols = columns.num_cols, stride = padded_to_sector(x.num_cols);
    const ThinProductPlan plan =
        plan_dropout_product<Compute>(x.num_cols, x.num_rows, columns.num_cols, device.num_sms);
    DropoutProductParams<Compute, DenseOuterOp> params{};
    params.large = matrix_of<const scalar_t>(x);
    params.thin = matrix_of<const scalar_t>(dz);
    params.partials = {static_cast<acc_t*>(dw), plan.num_splits * num_cols, stride, stride, true};
    params.rows_per_split = num_cols;
    params.groups = DropoutGroups::of(columns, shared_dropout);
    params.scale = static_cast<acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_dense_outer(plan, params, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
