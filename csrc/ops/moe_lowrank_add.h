// Argument checks of moe_route and moe_lowrank_add, shared by both backends like those of checks.h.
#pragma once

#include "../checks.h"

namespace lowrank_ext {

// Everything about the experts that the forward and the backward both need.
struct ExpertArgs {
  Tensor router_weight;  // [E, K]
  Tensor lora_a;         // [E, r_e, K]
  Tensor lora_b;         // [E, N, r_e]
  int64_t top_k;
  double scaling;
  double dropout_p;
  std::optional<Tensor> seed;        // int64, one element
  bool shared_dropout;               // one mask for all experts
  std::optional<Tensor> token_mask;  // bool [...]

  int64_t num_experts() const { return lora_a.size(0); }
  int64_t rank() const { return lora_a.size(1); }  // of one expert
  int64_t in_features() const { return lora_a.size(2); }
  int64_t out_features() const { return lora_b.size(1); }
};

// Which gradients a backward call is asked for.
struct ExpertNeeds {
  bool dx, drouter_weight, dlora_a, dlora_b;

  bool gates() const { return dx || drouter_weight; }  // gradients of the router's logits
  bool x() const { return drouter_weight || dlora_a; }
  bool h() const { return gates() || dlora_b; }
};

// Statistics of the router: fp32, fp64 beside fp64.
inline ScalarType statistics_dtype(ScalarType input) {
  return input == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_top_k(const char* op, int64_t top_k, int64_t num_experts) {
  check(top_k >= 1 && top_k <= num_experts, op,
        ": top_k must be between 1 and the number of experts ", num_experts, ", got ", top_k);
}

inline void check_token_mask(const char* op, const std::optional<Tensor>& mask, const Tensor& like,
                             const char* like_name) {
  if (!mask) return;
  bool matches = mask->dim() + 1 == like.dim();
  for (int64_t dim = 0; matches && dim < mask->dim(); ++dim)
    matches = mask->size(dim) == like.size(dim);
  check_shape(op, "token_mask", *mask, matches, std::string(like_name) + "'s leading dimensions");
  check(mask->scalar_type() == ScalarType::Bool, op, ": token_mask must be bool, got ",
        dtype_name(mask->scalar_type()));
  check_same_device(op, "token_mask", *mask, like, like_name);
}

// A tensor of `like`'s leading dimensions and the given last one.
inline void check_per_token(const char* op, const char* name, const Tensor& tensor,
                            const Tensor& like, const char* like_name, int64_t last,
                            ScalarType dtype) {
  check_shape(op, name, tensor,
              leading_dims_match(tensor, like) && tensor.size(tensor.dim() - 1) == last,
              std::string(like_name) + "'s leading dimensions and " + std::to_string(last));
  check(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", got ",
        dtype_name(tensor.scalar_type()));
  check_same_device(op, name, tensor, like, like_name);
}

inline void check_expert_counts(const char* op, const Tensor& counts, int64_t num_experts,
                                const Tensor& like, const char* like_name) {
  check_shape(op, "expert_counts", counts, counts.dim() == 1 && counts.size(0) == num_experts,
              "[E=" + std::to_string(num_experts) + "]");
  check(counts.scalar_type() == ScalarType::Long, op, ": expert_counts must be int64, got ",
        dtype_name(counts.scalar_type()));
  check_same_device(op, "expert_counts", counts, like, like_name);
}

inline void check_scalar(const char* op, const char* name, const std::optional<Tensor>& scalar,
                         ScalarType dtype, const Tensor& like, const char* like_name) {
  if (!scalar) return;
  check_shape(op, name, *scalar, scalar->dim() == 0, "[]");
  check(scalar->scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", got ",
        dtype_name(scalar->scalar_type()));
  check_same_device(op, name, *scalar, like, like_name);
}

inline void check_router_logits(const char* op, const Tensor& logits) {
  check_input_dtype(op, "router_logits", logits);
  check_shape(op, "router_logits", logits, logits.dim() >= 1 && logits.size(logits.dim() - 1) >= 1,
              "[..., E] with at least one expert");
}

inline void check_moe_route_backward(const std::optional<Tensor>& dtopk_weights,
                                     const std::optional<Tensor>& dbalance_loss,
                                     const Tensor& router_logits, const Tensor& topk_ids,
                                     const Tensor& expert_counts,
                                     const std::optional<Tensor>& token_mask) {
  constexpr const char* kOp = "moe_route_backward";
  constexpr const char* kLike = "router_logits";
  check_router_logits(kOp, router_logits);
  const ScalarType statistics = statistics_dtype(router_logits.scalar_type());
  const int64_t num_experts = router_logits.size(router_logits.dim() - 1);
  check(topk_ids.dim() >= 1, kOp, ": topk_ids must be [..., k], got []");
  const int64_t top_k = topk_ids.size(topk_ids.dim() - 1);
  check_top_k(kOp, top_k, num_experts);
  check_per_token(kOp, "topk_ids", topk_ids, router_logits, kLike, top_k, ScalarType::Long);
  if (dtopk_weights)
    check_per_token(kOp, "dtopk_weights", *dtopk_weights, router_logits, kLike, top_k, statistics);
  check_expert_counts(kOp, expert_counts, num_experts, router_logits, kLike);
  check_scalar(kOp, "dbalance_loss", dbalance_loss, statistics, router_logits, kLike);
  check_token_mask(kOp, token_mask, router_logits, kLike);
}

// Checks the experts against `like` (x in the forward, dout in the backward: device and dtype).
inline void check_experts(const char* op, const ExpertArgs& args, const Tensor& like,
                          const char* like_name, int64_t in_features, int64_t out_features) {
  const Tensor& a = args.lora_a;
  const std::string in_words = "in_features=" + std::to_string(in_features);
  check_shape(op, "lora_a", a,
              a.dim() == 3 && a.size(0) >= 1 && a.size(1) >= 1 && a.size(2) == in_features,
              "[E, r_e, " + in_words + "]");
  const std::string experts = "E=" + std::to_string(a.size(0));
  const Tensor& b = args.lora_b;
  check_shape(
      op, "lora_b", b,
      b.dim() == 3 && b.size(0) == a.size(0) && b.size(1) == out_features && b.size(2) == a.size(1),
      "[" + experts + ", out_features=" + std::to_string(out_features) +
          ", r_e=" + std::to_string(a.size(1)) + "]");
  const Tensor& router = args.router_weight;
  check_shape(op, "router_weight", router,
              router.dim() == 2 && router.size(0) == a.size(0) && router.size(1) == in_features,
              "[" + experts + ", " + in_words + "]");
  for (const auto& [name, tensor] :
       {std::pair{"lora_a", &a}, std::pair{"lora_b", &b}, std::pair{"router_weight", &router}}) {
    check_adapter_dtype(op, name, *tensor, like, like_name);
    check_same_device(op, name, *tensor, like, like_name);
  }
  check_top_k(op, args.top_k, args.num_experts());
  check_dropout(op, args.dropout_p, args.seed, like, like_name);
  check_token_mask(op, args.token_mask, like, like_name);
}

inline void check_moe_lowrank_add(const Tensor& base_out, const Tensor& x, const ExpertArgs& args) {
  constexpr const char* kOp = "moe_lowrank_add";
  check_input_dtype(kOp, "x", x);
  check_shape(kOp, "x", x, x.dim() >= 1, "[..., in_features]");
  check_shape(kOp, "base_out", base_out, leading_dims_match(base_out, x),
              "x's leading dimensions and out_features");
  check_same_dtype(kOp, "base_out", base_out, x, "x");
  check_same_device(kOp, "base_out", base_out, x, "x");
  check_experts(kOp, args, x, "x", x.size(x.dim() - 1), base_out.size(base_out.dim() - 1));
}

// What the forward left for the backward.
struct ExpertSaved {
  std::optional<Tensor> x;  // [..., K]
  std::optional<Tensor> h;  // [..., E r_e]
  Tensor router_probs;      // [..., E]
  Tensor topk_ids;          // [..., k]
  Tensor topk_weights;      // [..., k]
  Tensor expert_counts;     // [E]
};

inline void check_moe_lowrank_add_backward(const Tensor& dout,
                                           const std::optional<Tensor>& dbalance_loss,
                                           const ExpertArgs& args, const ExpertSaved& saved,
                                           const ExpertNeeds& needs) {
  constexpr const char* kOp = "moe_lowrank_add_backward";
  check_input_dtype(kOp, "dout", dout);
  check_shape(kOp, "lora_a", args.lora_a, args.lora_a.dim() == 3, "[E, r_e, in_features]");
  check_shape(kOp, "lora_b", args.lora_b, args.lora_b.dim() == 3, "[E, out_features, r_e]");
  check_shape(kOp, "dout", dout,
              dout.dim() >= 1 && dout.size(dout.dim() - 1) == args.out_features(),
              "[..., out_features=" + std::to_string(args.out_features()) + "]");
  check_experts(kOp, args, dout, "dout", args.in_features(), args.out_features());
  const ScalarType input = dout.scalar_type(), statistics = statistics_dtype(input);
  check(!needs.x() || saved.x, kOp, ": x must be given for the gradients asked for, got None");
  check(!needs.h() || saved.h, kOp, ": h must be given for the gradients asked for, got None");
  if (saved.x) check_per_token(kOp, "x", *saved.x, dout, "dout", args.in_features(), input);
  if (saved.h)
    check_per_token(kOp, "h", *saved.h, dout, "dout", args.num_experts() * args.rank(), input);
  check_per_token(kOp, "router_probs", saved.router_probs, dout, "dout", args.num_experts(),
                  statistics);
  check_per_token(kOp, "topk_ids", saved.topk_ids, dout, "dout", args.top_k, ScalarType::Long);
  check_per_token(kOp, "topk_weights", saved.topk_weights, dout, "dout", args.top_k, statistics);
  check_expert_counts(kOp, saved.expert_counts, args.num_experts(), dout, "dout");
  check_scalar(kOp, "dbalance_loss", dbalance_loss, statistics, dout, "dout");
}

}  // namespace lowrank_ext
