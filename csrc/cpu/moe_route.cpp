// Routing of given logits: weights, ids, counts, balance loss and the order of the slots by expert.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../ops/moe_lowrank_add.h"
#include "routing.h"
#include "small_matrix.h"

namespace lowrank_ext::cpu {
namespace {

constexpr const char* kOp = "moe_route";
constexpr const char* kBackwardOp = "moe_route_backward";
constexpr int64_t kTokenGrain = 128;  // about 10 us of work for 8 experts

// body(data, begin, end) with data the first element of `statistics`, over ranges of tokens
template <typename Body>
void for_tokens(const Tensor& statistics, const Body& body) {
  visit_accumulator(statistics, [&](auto* data) {
    torch::stable::parallel_for(0, statistics.size(0), kTokenGrain,
                                [&](int64_t begin, int64_t end) { body(data, begin, end); });
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route_cpu(
    const Tensor& router_logits, int64_t top_k, const std::optional<Tensor>& token_mask) {
  check_router_logits(kOp, router_logits);
  const int64_t num_experts = router_logits.size(router_logits.dim() - 1);
  check_top_k(kOp, top_k, num_experts);
  check_token_mask(kOp, token_mask, router_logits, "router_logits");

  const ScalarType statistics = statistics_dtype(router_logits.scalar_type());
  const Tensor logits = as_matrix(dense(router_logits));
  const Tensor exact = converted(logits, statistics);
  const Tensor probs = empty({logits.size(0), num_experts}, statistics);
  const Tensor weights = empty(with_last_dim(router_logits, top_k), statistics);
  const Tensor ids = empty(with_last_dim(router_logits, top_k), ScalarType::Long);
  for_tokens(exact, [&](auto* logits_data, int64_t begin, int64_t end) {
    using acc_t = std::remove_reference_t<decltype(*logits_data)>;
    auto* probs_data = static_cast<acc_t*>(probs.data_ptr());
    auto* weights_data = static_cast<acc_t*>(weights.data_ptr());
    auto* ids_data = static_cast<int64_t*>(ids.data_ptr());
    for (int64_t t = begin; t < end; ++t)
      route_row<acc_t>(logits_data + t * num_experts, probs_data + t * num_experts,
                       weights_data + t * top_k, ids_data + t * top_k, num_experts, top_k);
  });
  const Balance load = balance(probs, as_matrix(ids), token_mask);
  const SlotOrder order = sort_slots(kOp, ids, num_experts);
  return {weights,
          ids,
          load.expert_counts,
          load.loss,
          order.sorted_slots,
          order.expert_offsets,
          order.slot_positions};
}

Tensor moe_route_backward_cpu(const std::optional<Tensor>& dtopk_weights,
                              const std::optional<Tensor>& dbalance_loss,
                              const Tensor& router_logits, const Tensor& topk_ids,
                              const Tensor& expert_counts,
                              const std::optional<Tensor>& token_mask) {
  check_moe_route_backward(dtopk_weights, dbalance_loss, router_logits, topk_ids, expert_counts,
                           token_mask);
  const ScalarType statistics = statistics_dtype(router_logits.scalar_type());
  const int64_t num_experts = router_logits.size(router_logits.dim() - 1);
  const int64_t top_k = topk_ids.size(topk_ids.dim() - 1);

  const Tensor exact = converted(as_matrix(dense(router_logits)), statistics);
  const Tensor ids = dense(topk_ids);
  sort_slots(kBackwardOp, ids, num_experts);  // raises where an id is no expert's
  const std::optional<Tensor> dweights = dense(dtopk_weights);
  const BalanceGradient balance_gradient(dbalance_loss, expert_counts, top_k, token_mask);
  const Tensor dlogits = empty({exact.size(0), num_experts}, statistics);
  for_tokens(exact, [&](auto* logits_data, int64_t begin, int64_t end) {
    using acc_t = std::remove_reference_t<decltype(*logits_data)>;
    const auto* ids_data = static_cast<const int64_t*>(ids.data_ptr());
    const auto* dweights_data =
        dweights ? static_cast<const acc_t*>(dweights->data_ptr()) : nullptr;
    auto* dlogits_data = static_cast<acc_t*>(dlogits.data_ptr());
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
  const Tensor result = converted(dlogits, router_logits.scalar_type());
  std::vector<int64_t> sizes = with_last_dim(router_logits, num_experts);
  return with_shape(result, sizes);
}

}  // namespace lowrank_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&lowrank_ext::cpu::moe_route_cpu));
  m.impl("moe_route_backward", TORCH_BOX(&lowrank_ext::cpu::moe_route_backward_cpu));
}
