// Features to ranks, row by row of its own adapter: h in the forward, dh in the backward.
#include "segment_down.cuh"

#include "partial_sums.cuh"

namespace lowrank_ext::cuda {
namespace {

template <class Number, class Op>
void launch(const char* name, const RowGroups& groups, const Any& large, const AnyStack& thin,
            int64_t rank, const Any& scaling, const Any& out, const DropoutArgs& dropout,
            void* workspace, const Device& device) {
  using scalar_t = typename Number::scalar_t;
  using acc_t = typename Number::acc_t;
  const int64_t num_rows = groups.num_rows;
  const SegmentDownPlan plan =
      plan_segment_down<Number>(num_rows, groups.num_groups, large.num_cols, rank, device.num_sms);
  SegmentDownParams<Number, Op> params{};
  params.segments = segments_of(groups, rank);
  params.large = matrix_of<const scalar_t>(large);
  params.thin = stack_of<const scalar_t>(thin);
  params.scaling = group_scaling<acc_t>(scaling);
  params.num_rows = num_rows;
  params.scale = static_cast<acc_t>(dropout.scale);
  params.dropout = {dropout.threshold, dropout.seed};
  if (plan.num_splits == 1) {
    params.out = matrix_of<scalar_t>(out);
    return launch_segment_down(name, plan, params, device.stream);
  }
  const int64_t stride = padded_to_sector(rank);
  params.partials = {static_cast<acc_t*>(workspace), plan.num_splits * num_rows, stride, stride,
                     true};
  launch_segment_down(name, plan, params, device.stream);
  launch_partial_sums<Number>({params.partials.data, params.partials.num_rows, rank, stride, true},
                              plan.num_splits, {matrix_of<scalar_t>(out), {}}, num_rows, rank,
                              device.stream);
}

}  // namespace

int64_t segment_down_workspace_bytes(NumberKind kind, int64_t num_rows, int64_t num_groups,
                                     int64_t depth, int64_t rank, int num_sms) {
  return dispatch(kind, [&](auto number) -> int64_t {
    using Number = decltype(number);
    const auto plan = plan_segment_down<Number>(num_rows, num_groups, depth, rank, num_sms);
    if (plan.num_splits == 1) return 0;
    return plan.num_splits * num_rows * padded_to_sector(rank) * sizeof(typename Number::acc_t);
  });
}

void segment_down(NumberKind kind, const RowGroups& groups, const Any& x, const AnyStack& lora_a,
                  const Any& h, const DropoutArgs& dropout, void* workspace, const Device& device) {
  dispatch(kind, [&](auto number) {
    launch<decltype(number), DownOp>("segment_down", groups, x, lora_a, h.num_cols, {}, h, dropout,
                                     workspace, device);
  });
}

void segment_up_backward(NumberKind kind, const RowGroups& groups, const Any& dout,
                         const AnyStack& lora_b, const Any& scaling, const Any& dh, void* workspace,
                         const Device& device) {
  dispatch(kind, [&](auto number) {
    launch<decltype(number), UpBackwardOp>("segment_up_backward", groups, dout, lora_b, dh.num_cols,
                                           scaling, dh, {}, workspace, device);
  });
}

}  // namespace lowrank_ext::cuda
