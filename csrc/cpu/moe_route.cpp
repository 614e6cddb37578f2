// moe_route on the CPU: weights, ids, counts, balance loss and the order of the slots by expert.
#include "ops/moe_route.h"

#include "routing.h"
#include "small_matrix.h"

namespace lowrank_ext::cpu {
namespace {

constexpr int64_t kTokenGrain = 128;  // about 10 us of work for 8 experts

// body(data, begin, end) with data the first element of `statistics`, over ranges of tokens
template <typename Body>
void for_tokens(const Tensor& statistics, const Body& body) {
  visit_accumulator(statistics, [&](auto* data) {
    torch::stable::parallel_for(0, statistics.size(0), kTokenGrain,
                                [&](int64_t begin, int64_t end) { body(data, begin, end); });
  });
}

void moe_route_cpu(const Tensor& router_logits, const std::optional<Tensor>& token_mask,
                   const RouteOutputs& out) {
  const ScratchScope scope;
  const int64_t num_experts = router_logits.size(1), top_k = out.topk_ids.size(1);
  const ScalarType statistics = out.topk_weights.scalar_type();
  const Tensor logits = converted(dense(router_logits), statistics);
  const Tensor probs = empty({logits.size(0), num_experts}, statistics);
  for_tokens(logits, [&](auto* logits_data, int64_t begin, int64_t end) {
    using acc_t = std::remove_reference_t<decltype(*logits_data)>;
    auto* probs_data = dense_data<acc_t>(probs);
    auto* weights_data = dense_data<acc_t>(out.topk_weights);
    int64_t* ids_data = ids_of(out.topk_ids);
    for (int64_t t = begin; t < end; ++t)
      route_row<acc_t>(logits_data + t * num_experts, probs_data + t * num_experts,
                       weights_data + t * top_k, ids_data + t * top_k, num_experts, top_k);
  });
  balance(probs, out.topk_ids, token_mask, out.expert_counts, out.balance_loss);
  sort_slots(out.topk_ids, {out.sorted_slots, out.expert_offsets, out.slot_positions});
}

void moe_route_backward_cpu(const std::optional<Tensor>& dtopk_weights,
                            const std::optional<Tensor>& dbalance_loss, const Tensor& router_logits,
                            const Tensor& topk_ids, const Tensor& expert_counts,
                            const std::optional<Tensor>& token_mask, const Tensor& drouter_logits) {
  const ScratchScope scope;
  const int64_t num_experts = router_logits.size(1), top_k = topk_ids.size(1);
  check_topk_ids("moe_route_backward", topk_ids, num_experts);
  const ScalarType statistics = statistics_dtype(router_logits.scalar_type());
  const Tensor logits = converted(dense(router_logits), statistics);
  const BalanceGradient balance_gradient(dbalance_loss, expert_counts, top_k, token_mask);
  const bool is_exact = drouter_logits.scalar_type() == statistics;
  const Tensor dlogits =
      is_exact ? drouter_logits : empty({logits.size(0), num_experts}, statistics);
  for_tokens(logits, [&](auto* logits_data, int64_t begin, int64_t end) {
    using acc_t = std::remove_reference_t<decltype(*logits_data)>;
    const int64_t* ids_data = ids_of(topk_ids);
    const auto* dweights_data = dense_data<const acc_t>(dtopk_weights);
    auto* dlogits_data = dense_data<acc_t>(dlogits);
    std::vector<acc_t> probs(num_experts), weights(top_k);
    for (int64_t t = begin; t < end; ++t) {
      route_row_probabilities<acc_t>(logits_data + t * num_experts, ids_data + t * top_k,
                                     probs.data(), weights.data(), num_experts, top_k);
      route_row_backward<acc_t>(probs.data(), weights.data(), ids_data + t * top_k,
                                dweights_data == nullptr ? nullptr : dweights_data + t * top_k,
                                balance_gradient, t, num_experts, top_k,
                                dlogits_data + t * num_experts);
    }
  });
  if (!is_exact) round_into(drouter_logits, dlogits, 1.0);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CPU, m) {
  m.impl("moe_route", TORCH_BOX(unpacked<moe_route<moe_route_cpu>>));
  m.impl("moe_route_backward", TORCH_BOX(unpacked<moe_route_backward<moe_route_backward_cpu>>));
}

}  // namespace lowrank_ext::cpu
