// A mixture of low-rank experts on top of any base module's output: checks and outputs; the work is
// done in one of two forms (experts.h).
#include <tuple>

#include "experts/experts.h"

namespace lowrank_ext::cuda {

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

ForwardResult moe_lowrank_add_cuda(const Tensor& base_out, const Tensor& x,
                                   const Tensor& router_weight, const Tensor& lora_a,
                                   const Tensor& lora_b, int64_t top_k, double scaling,
                                   double dropout_p, const std::optional<Tensor>& seed,
                                   bool shared_dropout, const std::optional<Tensor>& token_mask) {
  const ExpertArgs args{router_weight, lora_a, lora_b,         top_k,     scaling,
                        dropout_p,     seed,   shared_dropout, token_mask};
  check_moe_lowrank_add(base_out, x, args);
  const DeviceGuard guard(x.get_device_index());
  const ScalarType input = x.scalar_type(), statistics = statistics_dtype(input);
  const Tensor y = empty(with_last_dim(x, args.out_features()), input, x);
  const Tensor h = empty(with_last_dim(x, args.num_experts() * args.rank()), input, x);
  const Tensor probs = empty(with_last_dim(x, args.num_experts()), statistics, x);
  const Tensor ids = empty(with_last_dim(x, top_k), ScalarType::Long, x);
  const Tensor weights = empty(with_last_dim(x, top_k), statistics, x);
  const Tensor loss = empty({}, statistics, x);
  const Tensor counts = empty({args.num_experts()}, ScalarType::Long, x);

  const ExpertCall call(args, x);
  const Tensor x_rows = as_matrix(x), base_rows = as_matrix(base_out);
  const ExpertForward pass{
      any(x_rows),     any(base_rows),    call.routing(probs, ids, weights, counts),
      scalar_of(loss), any(as_matrix(y)), any(as_matrix(h))};
  const auto forward = call.plan().grouped ? forward_grouped : forward_dense;
  forward(call, pass, x);
  return {y, h, probs, ids, weights, loss, counts};
}

BackwardResult moe_lowrank_add_backward_cuda(
    const Tensor& dout, const std::optional<Tensor>& dbalance_loss, const std::optional<Tensor>& x,
    const Tensor& router_weight, const Tensor& lora_a, const Tensor& lora_b,
    const std::optional<Tensor>& h, const Tensor& router_probs, const Tensor& topk_ids,
    const Tensor& topk_weights, const Tensor& expert_counts, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, bool shared_dropout, const std::optional<Tensor>& token_mask,
    bool need_dx, bool need_drouter_weight, bool need_dlora_a, bool need_dlora_b) {
  check(topk_ids.dim() >= 1, "moe_lowrank_add_backward: topk_ids must be [..., k], got []");
  const ExpertArgs args{router_weight, lora_a,    lora_b, topk_ids.size(topk_ids.dim() - 1),
                        scaling,       dropout_p, seed,   shared_dropout,
                        token_mask};
  const ExpertNeeds needs{need_dx, need_drouter_weight, need_dlora_a, need_dlora_b};
  check_moe_lowrank_add_backward(dout, dbalance_loss, args,
                                 {x, h, router_probs, topk_ids, topk_weights, expert_counts},
                                 needs);
  const DeviceGuard guard(dout.get_device_index());
  const ScalarType input = dout.scalar_type();
  const auto none = [&] { return empty({0}, input, dout); };  // outputs must not alias
  const Tensor dout_rows = as_matrix(dout);
  const bool no_rows = dout_rows.size(0) == 0;
  const auto gradient = [&](bool is_needed, const Tensor& like) {
    if (!is_needed) return none();
    return no_rows ? zeros_like(like) : dense_like(like);
  };
  const Tensor dx = need_dx ? empty(with_last_dim(dout, args.in_features()), input, dout) : none();
  const Tensor drouter_weight = gradient(need_drouter_weight, router_weight);
  const Tensor dlora_a = gradient(need_dlora_a, lora_a);
  const Tensor dlora_b = gradient(need_dlora_b, lora_b);
  const BackwardResult result{dx, drouter_weight, dlora_a, dlora_b};
  if (no_rows || !(need_dx || need_drouter_weight || need_dlora_a || need_dlora_b)) return result;

  const ExpertCall call(args, dout);
  const Tensor probs = dense(router_probs), ids = dense(topk_ids), weights = dense(topk_weights);
  const Tensor counts = dense(expert_counts);
  const auto rows = [](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional(as_matrix(*tensor)) : tensor;
  };
  const std::optional<Tensor> x_rows = rows(x), h_rows = rows(h);
  const auto needed = [](bool is_needed, const Tensor& tensor) {
    return is_needed ? rows_of(tensor) : Any{};
  };
  const ExpertBackward pass{needs,
                            any(dout_rows),
                            any(x_rows),
                            any(h_rows),
                            call.routing(probs, ids, weights, counts),
                            dbalance_loss ? scalar_of(*dbalance_loss) : Any{},
                            need_dx ? any(as_matrix(dx)) : Any{},
                            needed(need_drouter_weight, drouter_weight),
                            needed(need_dlora_a, dlora_a),
                            needed(need_dlora_b, dlora_b)};
  const auto backward = call.plan().grouped ? backward_grouped : backward_dense;
  backward(call, pass, dout);
  return result;
}

}  // namespace lowrank_ext::cuda

// For benchmarks/bench_expert_forms.py, by ctypes: 0 the dense form, 1 the grouped one, 2 the
// grouped one with a dense up backward, anything else what is planned.
extern "C" __attribute__((visibility("default"))) void lowrank_ext_fix_expert_plan(int form) {
  using lowrank_ext::cuda::ExpertPlan, lowrank_ext::cuda::fixed_expert_plan;
  const bool is_form = form >= 0 && form <= 2;
  fixed_expert_plan = is_form ? std::optional(ExpertPlan{form > 0, form == 2}) : std::nullopt;
}

LOWRANK_EXT_CUDA_IMPL(m) {
  m.impl("moe_lowrank_add", TORCH_BOX(&lowrank_ext::cuda::moe_lowrank_add_cuda));
  m.impl("moe_lowrank_add_backward", TORCH_BOX(&lowrank_ext::cuda::moe_lowrank_add_backward_cuda));
}
