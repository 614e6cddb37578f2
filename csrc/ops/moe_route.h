// Top-k routing of given logits, on any backend: checks and outputs.
#pragma once

#include <tuple>

#include "matrix.h"
#include "ops/routing_checks.h"
#include "ops/unpack.h"

namespace lowrank_ext {

inline void check_router_logits(const char* op, const Tensor& logits) {
  check_input_dtype(op, "router_logits", logits);
  check_shape(op, "router_logits", logits, logits.dim() >= 1 && logits.size(logits.dim() - 1) >= 1,
              "[..., E] with at least one expert");
}

inline void check_moe_route(const Tensor& router_logits, int64_t top_k,
                            const std::optional<Tensor>& token_mask) {
  constexpr const char* kOp = "moe_route";
  check_given(kOp, {{"router_logits", &router_logits}});
  check_router_logits(kOp, router_logits);
  check_top_k(kOp, top_k, router_logits.size(router_logits.dim() - 1));
  check_token_mask(kOp, token_mask, router_logits, "router_logits");
}

inline void check_moe_route_backward(const std::optional<Tensor>& dtopk_weights,
                                     const std::optional<Tensor>& dbalance_loss,
                                     const Tensor& router_logits, const Tensor& topk_ids,
                                     const Tensor& expert_counts,
                                     const std::optional<Tensor>& token_mask) {
  constexpr const char* kOp = "moe_route_backward";
  constexpr const char* kLike = "router_logits";
  check_given(kOp, {{"router_logits", &router_logits},
                    {"topk_ids", &topk_ids},
                    {"expert_counts", &expert_counts}});
  check_router_logits(kOp, router_logits);
  const ScalarType statistics = statistics_dtype(router_logits.scalar_type());
  const int64_t num_experts = router_logits.size(router_logits.dim() - 1);
  const int64_t top_k = top_k_of(kOp, topk_ids);
  check_top_k(kOp, top_k, num_experts);
  check_per_token(kOp, "topk_ids", topk_ids, router_logits, kLike, top_k, ScalarType::Long);
  if (dtopk_weights)
    check_per_token(kOp, "dtopk_weights", *dtopk_weights, router_logits, kLike, top_k, statistics);
  check_expert_counts(kOp, expert_counts, num_experts, router_logits, kLike);
  check_dbalance_loss(kOp, dbalance_loss, statistics, router_logits, kLike);
  check_token_mask(kOp, token_mask, router_logits, kLike);
}

// What routing of [T, E] logits writes. Slot t k + j is token t's j-th choice.
struct RouteOutputs {
  Tensor topk_weights;    // [T, k], dtype of the statistics
  Tensor topk_ids;        // [T, k] int64
  Tensor expert_counts;   // [E] int64
  Tensor balance_loss;    // [], dtype of the statistics
  Tensor sorted_slots;    // [T k] int64
  Tensor expert_offsets;  // [E + 1] int64
  Tensor slot_positions;  // [T k] int64
};

// forward(router_logits [T, E], token_mask, outputs) writes the outputs; token_mask is dense.
template <auto forward>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route(
    const Tensor& router_logits, int64_t top_k, const std::optional<Tensor>& token_mask) {
  check_moe_route(router_logits, top_k, token_mask);
  const Tensor logits = as_matrix(router_logits);
  const int64_t num_slots = logits.size(0) * top_k, num_experts = logits.size(1);
  const ScalarType statistics = statistics_dtype(router_logits.scalar_type());
  const auto fresh = [&](const std::vector<int64_t>& sizes, ScalarType dtype) {
    return empty(sizes, dtype, router_logits);
  };
  const std::vector<int64_t> per_choice = with_last_dim(router_logits, top_k);
  const Tensor weights = fresh(per_choice, statistics), ids = fresh(per_choice, ScalarType::Long);
  const RouteOutputs out{as_matrix(weights),
                         as_matrix(ids),
                         fresh({num_experts}, ScalarType::Long),
                         fresh({}, statistics),
                         fresh({num_slots}, ScalarType::Long),
                         fresh({num_experts + 1}, ScalarType::Long),
                         fresh({num_slots}, ScalarType::Long)};
  forward(logits, dense(token_mask), out);
  return {weights,           ids,
          out.expert_counts, out.balance_loss,
          out.sorted_slots,  out.expert_offsets,
          out.slot_positions};
}

// backward(dtopk_weights [T, k], dbalance_loss, router_logits [T, E], topk_ids [T, k],
// expert_counts, token_mask, drouter_logits [T, E]) writes drouter_logits; T > 0, all but the logits
// dense.
template <auto backward>
Tensor moe_route_backward(const std::optional<Tensor>& dtopk_weights,
                          const std::optional<Tensor>& dbalance_loss, const Tensor& router_logits,
                          const Tensor& topk_ids, const Tensor& expert_counts,
                          const std::optional<Tensor>& token_mask) {
  check_moe_route_backward(dtopk_weights, dbalance_loss, router_logits, topk_ids, expert_counts,
                           token_mask);
  const Tensor drouter_logits = dense_like(router_logits);
  const Tensor logits = as_matrix(router_logits);
  if (logits.size(0) > 0)
    backward(as_matrix(dense(dtopk_weights)), dbalance_loss, logits, as_matrix(dense(topk_ids)),
             dense(expert_counts), dense(token_mask), as_matrix(drouter_logits));
  return drouter_logits;
}

}  // namespace lowrank_ext
