// Ranks to features of the experts that each token chose: y in the forward, dx in the backward.
#include "experts/grouped_expand.cuh"

namespace lowrank_ext::cuda {
namespace {

template <class Number>
ExpertExpandParams<Number> params_of(const TokenChoices& choices, const Any& left,
                                     const AnyStack& right, const Any& out) {
  using scalar_t = typename Number::scalar_t;
  ExpertExpandParams<Number> params{};
  params.tokens = dense_matrix(choices.tokens, 1, choices.num_tokens);
  params.ids = dense_matrix(choices.ids, choices.num_tokens, choices.top_k);
  params.left = matrix_of<const scalar_t>(left);
  params.right = stack_of<const scalar_t>(right);
  params.out = matrix_of<scalar_t>(out);
  params.part_scale = params.scale = 1;
  return params;
}

}  // namespace

void expert_up(NumberKind kind, const TokenChoices& choices, const Any& base, const Any& gated,
               const AnyStack& lora_b, double scaling, const Any& y, const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    auto params = params_of<Number>(choices, gated, lora_b, y);
    params.base = matrix_of<const typename Number::scalar_t>(base);
    params.scale = static_cast<typename Number::acc_t>(scaling);
    launch_expert_expand<Number, ExpertUpOp>("expert_up", params, device.num_sms, device.stream);
  });
}

void expert_down_backward_x(NumberKind kind, const TokenChoices& choices, const Any& dlogits,
                            const Any& router_weight, const Any& dh, const AnyStack& lora_a,
                            bool shared_dropout, const DropoutArgs& dropout, const Any& dx,
                            const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    auto params = params_of<Number>(choices, dh, lora_a, dx);
    params.dlogits = matrix_of<const typename Number::scalar_t>(dlogits);
    params.router_weight = matrix_of<const typename Number::scalar_t>(router_weight);
    params.part_scale = static_cast<typename Number::acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    params.shared_dropout = shared_dropout;
    launch_expert_expand<Number, ExpertDownBackwardXOp>("expert_down_backward_x", params,
                                                        device.num_sms, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
