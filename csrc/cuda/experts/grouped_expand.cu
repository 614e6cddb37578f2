// Ranks to features of the experts that each token chose: y in the forward, dx in the backward.
#include "experts/grouped_expand.cuh"

#include "experts/kernels.h"

namespace lowrank_ext::cuda {
namespace {

template <class Compute>
GroupedExpandParams<Compute> params_of(const TokenChoices& choices, const MatrixRef& left,
                                       const StackRef& right, const MatrixRef& out) {
  using scalar_t = typename Compute::scalar_t;
  GroupedExpandParams<Compute> params{};
  params.tokens = dense_matrix(choices.tokens, 1, choices.num_tokens);
  params.ids = dense_matrix(choices.ids, choices.num_tokens, choices.top_k);
  params.left = matrix_of<const scalar_t>(left);
  params.right = stack_of<const scalar_t>(right);
  params.out = matrix_of<scalar_t>(out);
  params.part_scale = params.scale = 1;
  return params;
}

}  // namespace

void grouped_up(ComputeType compute_type, const TokenChoices& choices, const MatrixRef& base,
                const MatrixRef& gated, const StackRef& lora_b, double scaling, const MatrixRef& y,
                const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    auto params = params_of<Compute>(choices, gated, lora_b, y);
    params.base = matrix_of<const typename Compute::scalar_t>(base);
    params.scale = static_cast<typename Compute::acc_t>(scaling);
    launch_grouped_expand<Compute, GroupedUpOp>(params, device.num_sms, device.stream);
  });
}

void grouped_down_backward_x(ComputeType compute_type, const TokenChoices& choices,
                             const MatrixRef& dlogits, const MatrixRef& router_weight,
                             const MatrixRef& dh, const StackRef& lora_a, bool shared_dropout,
                             const DropoutArgs& dropout, const MatrixRef& dx,
                             const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    auto params = params_of<Compute>(choices, dh, lora_a, dx);
    params.dlogits = matrix_of<const typename Compute::scalar_t>(dlogits);
    params.router_weight = matrix_of<const typename Compute::scalar_t>(router_weight);
    params.part_scale = static_cast<typename Compute::acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    params.shared_dropout = shared_dropout;
    launch_grouped_expand<Compute, GroupedDownBackwardXOp>(params, device.num_sms, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
