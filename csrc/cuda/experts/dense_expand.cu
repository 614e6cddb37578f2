#include "experts/dense_expand.cuh"

#include "common/dispatch.h"

namespace lowrank_ext::cuda {

void moe_expand(NumberKind kind, const Any& dz, const Any& w, const ExpertColumns& columns,
                bool shared_dropout, const DropoutArgs& dropout, const Any& dx,
                const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using scalar_t = typename Number::scalar_t;
    MoeExpandParams<Number> params{};
    params.dz = matrix_of<const scalar_t>(dz);
    params.w = matrix_of<const scalar_t>(w);
    params.dx = matrix_of<scalar_t>(dx);
    params.groups = MaskGroups::of(columns, shared_dropout);
    params.scale = static_cast<typename Number::acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_moe_expand<Number>(params, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
