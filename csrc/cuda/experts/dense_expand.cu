#include "experts/dense_expand.cuh"

#include "common/dispatch.h"
#include "experts/kernels.h"

namespace lowrank_ext::cuda {

void dense_expand(ComputeType compute_type, const MatrixRef& dz, const MatrixRef& w,
                  const DenseColumns& columns, bool shared_dropout, const DropoutArgs& dropout,
                  const MatrixRef& dx, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    DenseExpandParams<Compute> params{};
    params.dz = matrix_of<const scalar_t>(dz);
    params.w = matrix_of<const scalar_t>(w);
    params.dx = matrix_of<scalar_t>(dx);
    params.groups = DropoutGroups::of(columns, shared_dropout);
    params.scale = static_cast<typename Compute::acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_dense_expand<Compute>(params, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
