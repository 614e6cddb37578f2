// moe_lowrank_add on the CPU, in one of two forms (experts.h); the router decides in fp32.
#include "ops/moe_lowrank_add.h"

#include "experts.h"
#include "row_blocks.h"

namespace lowrank_ext::cpu {
namespace {

void moe_lowrank_add_cpu(const ExpertArgs& args, const Tensor& base_out, const Tensor& x,
                         const ExpertOutputs& out) {
  const ScratchScope scope;
  const RoutingTensors& routing = out.routing;
  if (x.size(0) > 0) {
    const ExpertOperands ops = prepare_experts(args, x.scalar_type());
    const ExpertForward call{ops,
                             x,
                             base_out,
                             out.y,
                             out.h,
                             routing.router_probs,
                             routing.topk_ids,
                             routing.topk_weights};
    ops.form == ExpertForm::kPerToken ? forward_per_token(call) : forward_grouped(call);
  }
  balance(routing.router_probs, routing.topk_ids, dense(args.token_mask), routing.expert_counts,
          out.balance_loss);
}

// drouter_weight [E, K] = dlogitsᵀ x
void sum_router(const ExpertBackward& call, const Tensor& dlogits, const Tensor& gradient) {
  const ExpertOperands& ops = call.ops;
  const Tensor& x = call.x->tensor;
  zero(gradient);
  if (ops.in_features == 0) return;
  BlockSum sum(ops, ops.num_experts, ops.in_features);
  const int64_t block = ops.converts() ? kMinBlockRows : x.size(0);
  for (int64_t first = 0; first < x.size(0); first += block) {
    const int64_t count = std::min(block, x.size(0) - first);
    sum.add(row_block(dlogits, first, count), converted(row_block(x, first, count), ops.compute),
            nullptr);
  }
  round_into(gradient, sum.result(), 1.0);
}

TokenGradients allocate_token_gradients(const ExpertBackward& call, const Tensor& dx) {
  const ExpertOperands& ops = call.ops;
  const ExpertNeeds& needs = call.needs;
  const int64_t num_tokens = call.num_tokens(), num_slots = num_tokens * ops.top_k;
  TokenGradients gradients;
  if (needs.dx || needs.dlora_a) gradients.dh = empty({num_slots, ops.rank}, ops.compute);
  if (needs.gates()) gradients.dlogits = empty({num_tokens, ops.num_experts}, ops.compute);
  if (needs.dx) gradients.dx = dx;
  if (needs.dx && needs.dlora_a && ops.dropout.active() && ops.form == ExpertForm::kPerToken)
    gradients.keep_bits = empty({num_slots, mask_words_per_row(ops.in_features)}, ScalarType::Long);
  return gradients;
}

// First what is written per token and slot, then the sums over rows.
void backward(const ExpertBackward& call, const ExpertGradients& out) {
  const ExpertOperands& ops = call.ops;
  const ExpertNeeds& needs = call.needs;
  const TokenGradients gradients = allocate_token_gradients(call, out.dx);
  std::optional<Tensor> z, dlora_b;
  if (needs.dlora_b) {
    z = gated_h(ops, call.order, *call.h, call.topk_ids, call.topk_weights);
    dlora_b = out.dlora_b;
  }
  if (ops.form == ExpertForm::kGrouped) {
    backward_grouped(call, gradients, z, dlora_b);
  } else {
    if (call.gradient_of_h()) backward_per_token(call, gradients);
    if (z) sum_groups(ops, call.order, *z, {call.dout}, *dlora_b, /*transpose=*/true);
  }
  if (needs.dlora_a)
    sum_groups(ops, call.order, gradients.dh->tensor,
               {*call.x, /*masked=*/true, gradients.keep_bits ? &*gradients.keep_bits : nullptr},
               out.dlora_a, /*transpose=*/false);
  if (needs.drouter_weight) sum_router(call, gradients.dlogits->tensor, out.drouter_weight);
}

void moe_lowrank_add_backward_cpu(const ExpertArgs& args, const ExpertNeeds& needs,
                                  const Tensor& dout, const std::optional<Tensor>& dbalance_loss,
                                  const ExpertSaved& saved, const ExpertGradients& gradients) {
  const ScratchScope scope;
  const RoutingTensors& routing = saved.routing;
  check_topk_ids("moe_lowrank_add_backward", routing.topk_ids, args.num_experts());
  const SlotOrder order = SlotOrder::allocate(routing.topk_ids.numel(), args.num_experts());
  sort_slots(routing.topk_ids, order);
  const ExpertOperands ops = prepare_experts(args, dout.scalar_type());
  const BalanceGradient balance_gradient(dbalance_loss, routing.expert_counts, args.top_k,
                                         dense(args.token_mask));
  const auto matrix = [](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Matrix>(*tensor) : std::nullopt;
  };
  backward(
      {ops, needs, dout, matrix(saved.x), matrix(saved.h), routing.router_probs, routing.topk_ids,
       routing.topk_weights, balance_gradient, order, ids_of(order.slot_positions)},
      gradients);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CPU, m) {
  m.impl("moe_lowrank_add", TORCH_BOX(unpacked<moe_lowrank_add<moe_lowrank_add_cpu>>));
  m.impl("moe_lowrank_add_backward",
         TORCH_BOX(unpacked<moe_lowrank_add_backward<moe_lowrank_add_backward_cpu>>));
}

}  // namespace lowrank_ext::cpu
