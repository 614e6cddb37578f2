#include "experts/dense_down.cuh"

#include "experts/kernels.h"

namespace lowrank_ext::cuda {

PartialSumsSize dense_down_workspace(ComputeType compute_type, int64_t num_rows,
                                     int64_t in_features, int64_t num_cols, int num_sms) {
  return dispatch(compute_type, [&](auto compute) {
    return dropout_product_size<decltype(compute)>(num_rows, in_features, num_cols, num_rows,
                                                   num_cols, num_sms);
  });
}

void dense_down(ComputeType compute_type, const MatrixRef& x, const MatrixRef& w,
                const DenseColumns& columns, bool shared_dropout, const DropoutArgs& dropout,
                const PartialSums& z, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    using acc_t = typename Compute::acc_t;
    const ThinProductPlan plan =
        plan_dropout_product<Compute>(x.num_rows, x.num_cols, columns.num_cols, device.num_sms);
    DropoutProductParams<Compute, DenseDownOp> params{};
    params.large = matrix_of<const scalar_t>(x);
    params.thin = matrix_of<const scalar_t>(w);
    params.partials = {static_cast<acc_t*>(z.data), z.num_splits * x.num_rows, z.row_stride,
                       z.row_stride, true};
    params.rows_per_split = x.num_rows;
    params.groups = DropoutGroups::of(columns, shared_dropout);
    params.scale = static_cast<acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_dense_down(plan, params, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
