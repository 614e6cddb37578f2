// A mixture of low-rank experts on top of any base module's output. Routing decides in fp32 which
// of two forms' products a token takes part in; experts.h says which form runs.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "experts.h"
#include "row_blocks.h"

namespace lowrank_ext::cpu {
namespace {

constexpr const char* kBackwardOp = "moe_lowrank_add_backward";

// drouter_weight [E, K] = dlogitsᵀ x
void sum_router(const ExpertOperands& ops, const Tensor& dlogits, const Tensor& x,
                const Tensor& gradient) {
  zero(gradient);
  if (ops.in_features == 0) return;
  BlockSum sum(ops, ops.num_experts, ops.in_features);
  const int64_t block = ops.converts() ? kMinBlockRows : x.size(0);
  for (int64_t first = 0; first < x.size(0); first += block) {
    const int64_t count = std::min(block, x.size(0) - first);
    sum.add(row_block(dlogits, first, count), converted(row_block(x, first, count), ops.compute),
            nullptr);
  }
  convert(rows_of(gradient), rows_of(sum.result()), 1.0, ops.num_experts, ops.in_features);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_lowrank_add_cpu(
    const Tensor& base_out, const Tensor& x, const Tensor& router_weight, const Tensor& lora_a,
    const Tensor& lora_b, int64_t top_k, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, bool shared_dropout,
    const std::optional<Tensor>& token_mask) {
  const ExpertArgs args{router_weight, lora_a, lora_b,         top_k,     scaling,
                        dropout_p,     seed,   shared_dropout, token_mask};
  check_moe_lowrank_add(base_out, x, args);
  const ScalarType input = x.scalar_type(), statistics = statistics_dtype(input);
  const Tensor y = empty(with_last_dim(x, args.out_features()), input);
  const Tensor h = empty(with_last_dim(x, args.num_experts() * args.rank()), input);
  const Tensor probs = empty(with_last_dim(x, args.num_experts()), statistics);
  const Tensor ids = empty(with_last_dim(x, top_k), ScalarType::Long);
  const Tensor weights = empty(with_last_dim(x, top_k), statistics);
  const ExpertOutputs out{as_matrix(y), as_matrix(h), as_matrix(probs), as_matrix(ids),
                          as_matrix(weights)};
  const Tensor rows = as_matrix(x);
  if (rows.size(0) > 0) {
    const ExpertOperands ops = prepare_experts(args, input);
    const auto forward = ops.form == ExpertForm::kByRow ? forward_by_row : forward_by_group;
    forward(ops, rows, as_matrix(base_out), out);
  }
  const Balance load = balance(out.router_probs.tensor, out.topk_ids.tensor, token_mask);
  return {y, h, probs, ids, weights, load.loss, load.expert_counts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_lowrank_add_backward_cpu(
    const Tensor& dout, const std::optional<Tensor>& dbalance_loss, const std::optional<Tensor>& x,
    const Tensor& router_weight, const Tensor& lora_a, const Tensor& lora_b,
    const std::optional<Tensor>& h, const Tensor& router_probs, const Tensor& topk_ids,
    const Tensor& topk_weights, const Tensor& expert_counts, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, bool shared_dropout, const std::optional<Tensor>& token_mask,
    bool need_dx, bool need_drouter_weight, bool need_dlora_a, bool need_dlora_b) {
  check(topk_ids.dim() >= 1, kBackwardOp, ": topk_ids must be [..., k], got []");
  const ExpertArgs args{router_weight, lora_a,    lora_b, topk_ids.size(topk_ids.dim() - 1),
                        scaling,       dropout_p, seed,   shared_dropout,
                        token_mask};
  const ExpertNeeds needs{need_dx, need_drouter_weight, need_dlora_a, need_dlora_b};
  const ExpertSaved saved{x, h, router_probs, topk_ids, topk_weights, expert_counts};
  check_moe_lowrank_add_backward(dout, dbalance_loss, args, saved, needs);

  const ScalarType input = dout.scalar_type();
  const auto none = [&] { return empty({0}, input); };  // each its own: outputs must not alias
  const Tensor dx = need_dx ? empty(with_last_dim(dout, args.in_features()), input) : none();
  const Tensor drouter_weight = need_drouter_weight ? dense_like(router_weight) : none();
  const Tensor dlora_a = need_dlora_a ? dense_like(lora_a) : none();
  const Tensor dlora_b = need_dlora_b ? dense_like(lora_b) : none();
  const std::tuple<Tensor, Tensor, Tensor, Tensor> result{dx, drouter_weight, dlora_a, dlora_b};
  const Tensor dout_rows = as_matrix(dout);
  const int64_t num_tokens = dout_rows.size(0);
  if (num_tokens == 0) {
    for (const Tensor& gradient : {drouter_weight, dlora_a, dlora_b}) zero(gradient);
    return result;
  }

  const ExpertOperands ops = prepare_experts(args, input);
  const Tensor ids = as_matrix(dense(topk_ids));
  const SlotOrder order = sort_slots(kBackwardOp, ids, ops.num_experts);
  const BalanceGradient balance_gradient(dbalance_loss, expert_counts, ops.top_k, token_mask);
  const auto rows = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Matrix>(as_matrix(*t)) : std::nullopt;
  };
  const ExpertBackward call{ops,
                            needs,
                            dout_rows,
                            rows(x),
                            rows(h),
                            as_matrix(dense(router_probs)),
                            ids,
                            as_matrix(dense(topk_weights)),
                            balance_gradient,
                            order,
                            static_cast<const int64_t*>(order.slot_positions.data_ptr())};
  ExpertGradients gradients;
  if (need_dx || need_dlora_a) gradients.dh = Matrix(empty({ids.numel(), ops.rank}, ops.compute));
  if (needs.gates()) gradients.dlogits = Matrix(empty({num_tokens, ops.num_experts}, ops.compute));
  if (need_dx) gradients.dx = Matrix(as_matrix(dx));
  if (need_dx && need_dlora_a && ops.dropout.active() && ops.form == ExpertForm::kByRow)
    gradients.keep_bits =
        Matrix(empty({ids.numel(), mask_words_per_row(ops.in_features)}, ScalarType::Long));
  std::optional<Tensor> z;
  if (need_dlora_b) z = gated_h(ops, order, *call.h, ids, call.topk_weights);

  if (ops.form == ExpertForm::kByGroup) {
    backward_by_group(call, gradients, z, need_dlora_b ? std::optional(dlora_b) : std::nullopt);
  } else {
    if (call.gradient_of_h()) backward_by_row(call, gradients);
    if (need_dlora_b) sum_groups(ops, order, *z, {call.dout}, dlora_b, /*transpose=*/true);
  }
  if (need_dlora_a)
    sum_groups(ops, order, gradients.dh->tensor,
               {*call.x, /*masked=*/true, gradients.keep_bits ? &*gradients.keep_bits : nullptr},
               dlora_a, /*transpose=*/false);
  if (need_drouter_weight)
    sum_router(ops, gradients.dlogits->tensor, call.x->tensor, drouter_weight);
  return result;
}

}  // namespace lowrank_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CPU, m) {
  m.impl("moe_lowrank_add", TORCH_BOX(&lowrank_ext::cpu::moe_lowrank_add_cpu));
  m.impl("moe_lowrank_add_backward", TORCH_BOX(&lowrank_ext::cpu::moe_lowrank_add_backward_cpu));
}
