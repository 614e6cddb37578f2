// Features to ranks, row by row, with the row's adapter: h in the forward, dh in the backward.
#include "segments/segment_down.cuh"

#include "common/partial_sums.cuh"
#include "segments/kernels.h"

namespace lowrank_ext::cuda {
namespace {

// One call, whose sums go to a matrix in x's type or to partial sums.
template <class Compute, class Op>
struct SegmentDownCall {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  Device device;
  SegmentDownPlan plan;
  SegmentDownParams<Compute, Op> params{};

  SegmentDownCall(const RowGroups& groups, const MatrixRef& large, const StackRef& thin,
                  int64_t rank, double scale, const DropoutArgs& dropout, const Device& device)
      : device(device),
        plan(plan_segment_down<Compute>(groups.num_rows, groups.num_groups, large.num_cols, rank,
                                        device.num_sms)) {
    params.segments = segments_of(groups, rank);
    params.large = matrix_of<const scalar_t>(large);
    params.thin = stack_of<const scalar_t>(thin);
    params.num_rows = groups.num_rows;
    params.scale = static_cast<acc_t>(scale);
    params.dropout = {dropout.threshold, dropout.seed};
  }

  void to_partials(void* data) {
    const int64_t stride = padded_to_sector(params.segments.max_rank);
    params.partials = {static_cast<acc_t*>(data), plan.num_splits * params.num_rows, stride, stride,
                       true};
    launch_segment_down(plan, params, device.stream);
  }

  void to_matrix(const MatrixRef& out, void* workspace) {
    const int64_t rank = out.num_cols;
    if (plan.num_splits == 1) {
      params.out = matrix_of<scalar_t>(out);
      return launch_segment_down(plan, params, device.stream);
    }
    to_partials(workspace);
    const Matrix<acc_t>& sums = params.partials;
    launch_partial_sums<Compute>({sums.data, sums.num_rows, rank, sums.row_stride, true},
                                 plan.num_splits, {matrix_of<scalar_t>(out), {}}, params.num_rows,
                                 rank, device.stream);
  }
};

}  // namespace

PartialSumsSize segment_down_partials_workspace(ComputeType compute_type, int64_t num_rows,
                                                int64_t num_groups, int64_t depth, int64_t rank,
                                                int num_sms) {
  return dispatch(compute_type, [&](auto compute) -> PartialSumsSize {
    using Compute = decltype(compute);
    const int num_splits =
        plan_segment_down<Compute>(num_rows, num_groups, depth, rank, num_sms).num_splits;
    const int64_t stride = padded_to_sector(rank);
    return {num_splits, stride,
            num_splits * num_rows * stride * compute_traits<Compute>().acc_bytes};
  });
}

int64_t segment_down_workspace_bytes(ComputeType compute_type, int64_t num_rows, int64_t num_groups,
                                     int64_t depth, int64_t rank, int num_sms) {
  const PartialSumsSize sums =
      segment_down_partials_workspace(compute_type, num_rows, num_groups, depth, rank, num_sms);
  return sums.num_splits == 1 ? 0 : sums.bytes;
}

void segment_down(ComputeType compute_type, const RowGroups& groups, const MatrixRef& x,
                  const StackRef& lora_a, const MatrixRef& h, const DropoutArgs& dropout,
                  void* workspace, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    SegmentDownCall<decltype(compute), DownOp>(groups, x, lora_a, h.num_cols, dropout.scale,
                                               dropout, device)
        .to_matrix(h, workspace);
  });
}

void segment_down_partials(ComputeType compute_type, const RowGroups& groups, const MatrixRef& x,
                           const StackRef& lora_a, const DropoutArgs& dropout, const PartialSums& h,
                           const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    SegmentDownCall<decltype(compute), DownOp>(groups, x, lora_a, lora_a.first.num_rows,
                                               dropout.scale, dropout, device)
        .to_partials(h.data);
  });
}

void segment_up_backward(ComputeType compute_type, const RowGroups& groups, const MatrixRef& dout,
                         const StackRef& lora_b, const MatrixRef& scaling, const MatrixRef& dh,
                         void* workspace, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    SegmentDownCall<Compute, UpBackwardOp> call(groups, dout, lora_b, dh.num_cols, 1.0, {}, device);
    call.params.scaling = group_scaling<typename Compute::acc_t>(scaling);
    call.to_matrix(dh, workspace);
  });
}

void segment_up_backward_partials(ComputeType compute_type, const RowGroups& groups,
                                  const MatrixRef& dout, const StackRef& lora_b, double scaling,
                                  const PartialSums& dh, const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    SegmentDownCall<decltype(compute), UpBackwardOp>(groups, dout, lora_b, lora_b.first.num_cols,
                                                     scaling, {}, device)
        .to_partials(dh.data);
  });
}

}  // namespace lowrank_ext::cuda
