// y = base_out + scaling · Σ_i w_i lora_b[i] lora_a[i] drop_i(x) over the top_k experts i of each
// row, on any backend: checks and outputs.
#pragma once

#include <tuple>

#include "ops/outputs.h"
#include "ops/routing_checks.h"
#include "ops/unpack.h"

namespace lowrank_ext {

struct ExpertWeights {
  Tensor router_weight;  // [E, K]
  Tensor lora_a;         // [E, r_e, K]
  Tensor lora_b;         // [E, N, r_e]

  using Arguments = std::tuple<Tensor, Tensor, Tensor>;

  int64_t num_experts() const { return lora_a.size(0); }
  int64_t rank() const { return lora_a.size(1); }  // of one expert
  int64_t in_features() const { return lora_a.size(2); }
  int64_t out_features() const { return lora_b.size(1); }
};

struct ExpertOptions {
  double scaling;
  double dropout_p;
  std::optional<Tensor> seed;        // int64, one element
  bool shared_dropout;               // one mask for all experts
  std::optional<Tensor> token_mask;  // bool [...]

  using Arguments = std::tuple<double, double, std::optional<Tensor>, bool, std::optional<Tensor>>;
};

// What forward and backward both take.
struct ExpertArgs : ExpertWeights, ExpertOptions {
  int64_t top_k;
};

// The routing, which forward returns and backward takes.
struct RoutingTensors {
  Tensor router_probs;   // [..., E]
  Tensor topk_ids;       // [..., k]
  Tensor topk_weights;   // [..., k]
  Tensor expert_counts;  // [E]

  using Arguments = std::tuple<Tensor, Tensor, Tensor, Tensor>;
};

// Which gradients a backward call is asked for.
struct ExpertNeeds {
  bool dx, drouter_weight, dlora_a, dlora_b;

  using Arguments = std::tuple<bool, bool, bool, bool>;

  bool any() const { return dx || drouter_weight || dlora_a || dlora_b; }
  bool gates() const { return dx || drouter_weight; }  // gradients of the router's logits
  bool x() const { return drouter_weight || dlora_a; }
  bool h() const { return gates() || dlora_b; }
};

// ---- checks

inline void check_experts_given(const char* op, const ExpertWeights& weights) {
  check_given(op, {{"router_weight", &weights.router_weight},
                   {"lora_a", &weights.lora_a},
                   {"lora_b", &weights.lora_b}});
}

// Against `like`, x in forward and dout in backward: device and dtype.
inline void check_experts(const char* op, const ExpertArgs& args, const Tensor& like,
                          const char* like_name, int64_t in_features, int64_t out_features) {
  const Tensor& a = args.lora_a;
  check_shape(op, "lora_a", a,
              a.dim() == 3 && a.size(0) >= 1 && a.size(1) >= 1 && a.size(2) == in_features,
              "[E, r_e, in_features=", in_features, "]");
  const Tensor& b = args.lora_b;
  check_shape(
      op, "lora_b", b,
      b.dim() == 3 && b.size(0) == a.size(0) && b.size(1) == out_features && b.size(2) == a.size(1),
      "[E=", a.size(0), ", out_features=", out_features, ", r_e=", a.size(1), "]");
  const Tensor& router = args.router_weight;
  check_shape(op, "router_weight", router,
              router.dim() == 2 && router.size(0) == a.size(0) && router.size(1) == in_features,
              "[E=", a.size(0), ", in_features=", in_features, "]");
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
  check_given(kOp, {{"base_out", &base_out}, {"x", &x}});
  check_experts_given(kOp, args);
  check_x_and_base_out(kOp, x, base_out);
  check_experts(kOp, args, x, "x", x.size(x.dim() - 1), base_out.size(base_out.dim() - 1));
}

inline void check_routing(const char* op, const RoutingTensors& routing, const ExpertArgs& args,
                          const Tensor& dout) {
  const ScalarType statistics = statistics_dtype(dout.scalar_type());
  check_per_token(op, "router_probs", routing.router_probs, dout, "dout", args.num_experts(),
                  statistics);
  check_per_token(op, "topk_ids", routing.topk_ids, dout, "dout", args.top_k, ScalarType::Long);
  check_per_token(op, "topk_weights", routing.topk_weights, dout, "dout", args.top_k, statistics);
  check_expert_counts(op, routing.expert_counts, args.num_experts(), dout, "dout");
}

inline void check_moe_lowrank_add_backward(const Tensor& dout,
                                           const std::optional<Tensor>& dbalance_loss,
                                           const std::optional<Tensor>& x,
                                           const std::optional<Tensor>& h,
                                           const RoutingTensors& routing, const ExpertArgs& args,
                                           const ExpertNeeds& needs) {
  constexpr const char* kOp = "moe_lowrank_add_backward";
  check_input_dtype(kOp, "dout", dout);
  check_shape(kOp, "lora_a", args.lora_a, args.lora_a.dim() == 3, "[E, r_e, in_features]");
  check_shape(kOp, "lora_b", args.lora_b, args.lora_b.dim() == 3, "[E, out_features, r_e]");
  check_dout(kOp, dout, args.out_features());
  check_experts(kOp, args, dout, "dout", args.in_features(), args.out_features());
  const ScalarType input = dout.scalar_type();
  check(!needs.x() || x, kOp, ": x must be given for the gradients asked for, got None");
  check(!needs.h() || h, kOp, ": h must be given for the gradients asked for, got None");
  if (x) check_per_token(kOp, "x", *x, dout, "dout", args.in_features(), input);
  if (h) check_per_token(kOp, "h", *h, dout, "dout", args.num_experts() * args.rank(), input);
  check_routing(kOp, routing, args, dout);
  check_dbalance_loss(kOp, dbalance_loss, statistics_dtype(input), dout, "dout");
}

// ---- outputs

// What forward writes, T rows for T tokens.
struct ExpertOutputs {
  Tensor y;                // [T, N]
  Tensor h;                // [T, E r_e]
  RoutingTensors routing;  // [T, …]
  Tensor balance_loss;     // []
};

// What forward left for backward, T rows for T tokens.
struct ExpertSaved {
  std::optional<Tensor> x;  // [T, K], where needs.x()
  std::optional<Tensor> h;  // [T, E r_e], where needs.h()
  RoutingTensors routing;   // [T, …], dense
};

// Empty ([0]) where not needed.
struct ExpertGradients {
  Tensor dx, drouter_weight, dlora_a, dlora_b;
};

// forward(args, base_out [T, N], x [T, K], outputs) writes the outputs.
template <auto forward>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_lowrank_add(
    const Tensor& base_out, const Tensor& x, const ExpertWeights& weights, int64_t top_k,
    const ExpertOptions& options) {
  const ExpertArgs args{weights, options, top_k};
  check_moe_lowrank_add(base_out, x, args);
  const ScalarType statistics = statistics_dtype(x.scalar_type());
  const auto [y, h] = branch_outputs(x, args.out_features(), args.num_experts() * args.rank());
  const auto per_token = [&](int64_t last, ScalarType dtype) {
    return empty(with_last_dim(x, last), dtype, x);
  };
  const Tensor probs = per_token(args.num_experts(), statistics);
  const Tensor ids = per_token(top_k, ScalarType::Long);
  const Tensor topk_weights = per_token(top_k, statistics);
  const Tensor counts = empty({args.num_experts()}, ScalarType::Long, x);
  const Tensor loss = empty({}, statistics, x);
  forward(
      args, as_matrix(base_out), as_matrix(x),
      ExpertOutputs{
          as_matrix(y), as_matrix(h),
          RoutingTensors{as_matrix(probs), as_matrix(ids), as_matrix(topk_weights), counts}, loss});
  return {y, h, probs, ids, topk_weights, loss, counts};
}

// backward(args, needs, dout [T, N], dbalance_loss, saved, gradients) writes what is needed; T > 0,
// and something is needed.
template <auto backward>
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_lowrank_add_backward(
    const Tensor& dout, const std::optional<Tensor>& dbalance_loss, const std::optional<Tensor>& x,
    const ExpertWeights& weights, const std::optional<Tensor>& h, const RoutingTensors& routing,
    const ExpertOptions& options, const ExpertNeeds& needs) {
  constexpr const char* kOp = "moe_lowrank_add_backward";
  check_given(kOp, {{"dout", &dout},
                    {"router_probs", &routing.router_probs},
                    {"topk_ids", &routing.topk_ids},
                    {"topk_weights", &routing.topk_weights},
                    {"expert_counts", &routing.expert_counts}});
  check_experts_given(kOp, weights);
  const ExpertArgs args{weights, options, top_k_of(kOp, routing.topk_ids)};
  check_moe_lowrank_add_backward(dout, dbalance_loss, x, h, routing, args, needs);
  const Tensor dout_rows = as_matrix(dout);
  const bool no_rows = dout_rows.size(0) == 0;
  const ParameterGradients fresh(dout, no_rows);
  const Tensor dx = input_gradient(dout, needs.dx, args.in_features());
  const ExpertGradients gradients{as_matrix(dx), fresh.of(args.router_weight, needs.drouter_weight),
                                  fresh.of(args.lora_a, needs.dlora_a),
                                  fresh.of(args.lora_b, needs.dlora_b)};
  if (!no_rows && needs.any())
    backward(
        args, needs, dout_rows, dbalance_loss,
        ExpertSaved{as_matrix(x), as_matrix(h),
                    RoutingTensors{
                        as_matrix(dense(routing.router_probs)), as_matrix(dense(routing.topk_ids)),
                        as_matrix(dense(routing.topk_weights)), dense(routing.expert_counts)}},
        gradients);
  return {dx, gradients.drouter_weight, gradients.dlora_a, gradients.dlora_b};
}

}  // namespace lowrank_ext
