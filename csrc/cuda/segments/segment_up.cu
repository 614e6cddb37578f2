// Ranks to features, row by row, with the row's adapter: y in the forward, dx in the backward.
#include "segments/segment_up.cuh"

#include "segments/kernels.h"

namespace lowrank_ext::cuda {
namespace {

template <class Compute>
SegmentUpParams<Compute> params_of(const RowGroups& groups, const MatrixRef& left,
                                   const StackRef& right, const MatrixRef& out) {
  using scalar_t = typename Compute::scalar_t;
  SegmentUpParams<Compute> params{};
  params.segments = segments_of(groups, left.num_cols);
  params.left = matrix_of<const scalar_t>(left);
  params.right = stack_of<const scalar_t>(right);
  params.out = matrix_of<scalar_t>(out);
  return params;
}

}  // namespace

void segment_up(ComputeType compute_type, const RowGroups& groups, const MatrixRef& base,
                const MatrixRef& h, const StackRef& lora_b, const MatrixRef& scaling,
                const MatrixRef& y, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    auto params = params_of<Compute>(groups, h, lora_b, y);
    params.base = matrix_of<const typename Compute::scalar_t>(base);
    params.scaling = group_scaling<typename Compute::acc_t>(scaling);
    params.scale = 1;
    launch_segment_up<Compute, UpOp>(params, groups.num_rows, device.num_sms, device.stream);
  });
}

void segment_down_backward_x(ComputeType compute_type, const RowGroups& groups, const MatrixRef& dh,
                             const StackRef& lora_a, const DropoutArgs& dropout,
                             const MatrixRef& dx, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    auto params = params_of<Compute>(groups, dh, lora_a, dx);
    params.scale = static_cast<typename Compute::acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_segment_up<Compute, DownBackwardXOp>(params, groups.num_rows, device.num_sms,
                                                device.stream);
  });
}

}  // namespace lowrank_ext::cuda
