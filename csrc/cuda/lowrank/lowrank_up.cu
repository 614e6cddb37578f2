#include "lowrank/lowrank_up.cuh"

#include "common/dispatch.h"

namespace lowrank_ext::cuda {

void lowrank_up(NumberKind kind, const Any& base, const Any& h, const Mid& mid, const Any& lora_b,
                const Any& out_scale, double scaling, const Any& y, const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using scalar_t = typename Number::scalar_t;
    ExpandParams<Number> params{};
    params.base = matrix_of<const scalar_t>(base);
    if (base) params.base.num_rows = y.num_rows;  // a bias row stands for all
    params.left = matrix_of<const scalar_t>(h);
    params.mid = {matrix_of<const scalar_t>(mid.rank_scale), matrix_of<const scalar_t>(mid.core)};
    params.right = matrix_of<const scalar_t>(lora_b);
    params.col_scale = matrix_of<const scalar_t>(out_scale);
    params.out = matrix_of<scalar_t>(y);
    params.scale = static_cast<typename Number::acc_t>(scaling);
    launch_lowrank_up<Number>(params, device.num_sms, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
