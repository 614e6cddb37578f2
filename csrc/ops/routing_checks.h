// Argument checks that moe_route and moe_lowrank_add share.
#pragma once

#include "checks.h"

namespace lowrank_ext {

// The dtype of the router's statistics: fp32, fp64 beside fp64.
inline ScalarType statistics_dtype(ScalarType input) {
  return input == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_top_k(const char* op, int64_t top_k, int64_t num_experts) {
  check(top_k >= 1 && top_k <= num_experts, op,
        ": top_k must be between 1 and the number of experts ", num_experts, ", got ", top_k);
}

// topk_ids [..., k]: k.
inline int64_t top_k_of(const char* op, const Tensor& topk_ids) {
  check(topk_ids.dim() >= 1, op, ": topk_ids must be [..., k], got []");
  return topk_ids.size(topk_ids.dim() - 1);
}

inline void check_token_mask(const char* op, const std::optional<Tensor>& mask, const Tensor& like,
                             const char* like_name) {
  if (!mask) return;
  check_shape(op, "token_mask", *mask, is_per_row(*mask, like), like_name, "'s leading dimensions");
  check_dtype(op, "token_mask", *mask, ScalarType::Bool);
  check_same_device(op, "token_mask", *mask, like, like_name);
}

// A tensor of `like`'s leading dimensions and the given last one.
inline void check_per_token(const char* op, const char* name, const Tensor& tensor,
                            const Tensor& like, const char* like_name, int64_t last,
                            ScalarType dtype) {
  check_shape(op, name, tensor,
              leading_dims_match(tensor, like) && tensor.size(tensor.dim() - 1) == last, like_name,
              "'s leading dimensions and ", last);
  check_dtype(op, name, tensor, dtype);
  check_same_device(op, name, tensor, like, like_name);
}

inline void check_expert_counts(const char* op, const Tensor& counts, int64_t num_experts,
                                const Tensor& like, const char* like_name) {
  check_shape(op, "expert_counts", counts, counts.dim() == 1 && counts.size(0) == num_experts,
              "[E=", num_experts, "]");
  check_dtype(op, "expert_counts", counts, ScalarType::Long);
  check_same_device(op, "expert_counts", counts, like, like_name);
}

inline void check_dbalance_loss(const char* op, const std::optional<Tensor>& dbalance_loss,
                                ScalarType dtype, const Tensor& like, const char* like_name) {
  if (!dbalance_loss) return;
  check_shape(op, "dbalance_loss", *dbalance_loss, dbalance_loss->dim() == 0, "[]");
  check_dtype(op, "dbalance_loss", *dbalance_loss, dtype);
  check_same_device(op, "dbalance_loss", *dbalance_loss, like, like_name);
}

}  // namespace lowrank_ext
