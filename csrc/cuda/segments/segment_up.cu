// Ranks to features, row by row of its own adapter: y in the forward, dx in the backward.
#include "segments/segment_up.cuh"

namespace lowrank_ext::cuda {
namespace {

template <class Number>
SegmentUpParams<Number> params_of(const RowGroups& groups, const Any& left, const AnyStack& right,
                                  const Any& out) {
  using scalar_t = typename Number::scalar_t;
  SegmentUpParams<Number> params{};
  params.segments = segments_of(groups, left.num_cols);
  params.left = matrix_of<const scalar_t>(left);
  params.right = stack_of<const scalar_t>(right);
  params.out = matrix_of<scalar_t>(out);
  return params;
}

}  // namespace

void segment_up(NumberKind kind, const RowGroups& groups, const Any& base, const Any& h,
                const AnyStack& lora_b, const Any& scaling, const Any& y, const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    auto params = params_of<Number>(groups, h, lora_b, y);
    params.base = matrix_of<const typename Number::scalar_t>(base);
    params.scaling = group_scaling<typename Number::acc_t>(scaling);
    params.scale = 1;
    launch_segment_up<Number, UpOp>("segment_up", params, groups.num_rows, device.num_sms,
                                    device.stream);
  });
}

void segment_down_backward_x(NumberKind kind, const RowGroups& groups, const Any& dh,
                             const AnyStack& lora_a, const DropoutArgs& dropout, const Any& dx,
                             const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    auto params = params_of<Number>(groups, dh, lora_a, dx);
    params.scale = static_cast<typename Number::acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_segment_up<Number, DownBackwardXOp>("segment_down_backward_x", params, groups.num_rows,
                                               device.num_sms, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
