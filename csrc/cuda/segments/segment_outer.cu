// The adapters' gradients, each over the rows that have it.
#include "segments/segment_outer.cuh"

#include "segments/kernels.h"

namespace lowrank_ext::cuda {
namespace {

template <class Compute>
SegmentOuterParams<Compute> params_of(const RowGroups& groups, const MatrixRef& large,
                                      const MatrixRef& thin, const StackRef& out, bool transposed) {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  SegmentOuterParams<Compute> params{};
  params.segments = segments_of(groups, thin.num_cols);
  params.large = matrix_of<const scalar_t>(large);
  params.thin = matrix_of<const scalar_t>(thin);
  params.transposed = transposed;
  if (out.first.type == element_type<scalar_t>()) {
    params.narrow = stack_of<scalar_t>(out);
  } else {
    params.wide = stack_of<acc_t>(out);
  }
  return params;
}

}  // namespace

void segment_up_backward_lora_b(ComputeType compute_type, const RowGroups& groups,
                                const MatrixRef& dout, const MatrixRef& h, const MatrixRef& scaling,
                                double scale, const StackRef& dlora_b, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    auto params = params_of<Compute>(groups, dout, h, dlora_b, /*transposed=*/false);
    params.scaling = group_scaling<typename Compute::acc_t>(scaling);
    params.scale = static_cast<typename Compute::acc_t>(scale);
    launch_segment_outer(params, device.stream);
  });
}

void segment_down_backward_lora_a(ComputeType compute_type, const RowGroups& groups,
                                  const MatrixRef& dh, const MatrixRef& x,
                                  const DropoutArgs& dropout, const StackRef& dlora_a,
                                  const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    auto params = params_of<Compute>(groups, x, dh, dlora_a, /*transposed=*/true);
    params.scale = static_cast<typename Compute::acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_segment_outer(params, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
