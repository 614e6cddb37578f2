// The adapters' gradients, each over the rows that have it.
#include "segments/segment_outer.cuh"

namespace lowrank_ext::cuda {
namespace {

template <class Number>
SegmentOuterParams<Number> params_of(const RowGroups& groups, const Any& large, const Any& thin,
                                     const AnyStack& out, bool transposed) {
  using scalar_t = typename Number::scalar_t;
  using acc_t = typename Number::acc_t;
  SegmentOuterParams<Number> params{};
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

void segment_up_backward_lora_b(NumberKind kind, const RowGroups& groups, const Any& dout,
                                const Any& h, const Any& scaling, double scale,
                                const AnyStack& dlora_b, const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    auto params = params_of<Number>(groups, dout, h, dlora_b, /*transposed=*/false);
    params.scaling = group_scaling<typename Number::acc_t>(scaling);
    params.scale = static_cast<typename Number::acc_t>(scale);
    launch_segment_outer("segment_up_backward_lora_b", params, device.stream);
  });
}

void segment_down_backward_lora_a(NumberKind kind, const RowGroups& groups, const Any& dh,
                                  const Any& x, const DropoutArgs& dropout, const AnyStack& dlora_a,
                                  const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    auto params = params_of<Number>(groups, x, dh, dlora_a, /*transposed=*/true);
    params.scale = static_cast<typename Number::acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_segment_outer("segment_down_backward_lora_a", params, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
