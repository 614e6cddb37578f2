#include "lowrank/lowrank_down_backward_x.cuh"

#include "common/dispatch.h"

namespace lowrank_ext::cuda {

void lowrank_down_backward_x(NumberKind kind, const Any& base, const Any& dh, const Any& lora_a,
                             const DropoutArgs& dropout, const Any& dx, const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using scalar_t = typename Number::scalar_t;
    ExpandParams<Number> params{};
    params.base = matrix_of<const scalar_t>(base);
    params.left = matrix_of<const scalar_t>(dh);
    params.right = matrix_of<const scalar_t>(lora_a);
    params.out = matrix_of<scalar_t>(dx);
    params.scale = static_cast<typename Number::acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_lowrank_down_backward_x<Number>(params, device.num_sms, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
