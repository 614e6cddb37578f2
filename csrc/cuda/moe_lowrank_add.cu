// A mixture of low-rank experts on top of any base module's output, in the dense form: every token
// multiplies with every expert, and those that it did not choose count as zero. With R = E r + E
// columns (router and experts stacked, expert_columns.h) that is lowrank_add's branch of rank R:
// one pass over x and one over y, one over dout and two of K columns in the backward. It serves any
// size; beyond about 256 columns its arithmetic costs more than its traffic, and a form that
// groups tokens by expert is still to come.
//
// Under dropout the columns are padded to groups that see the same mask, and three kernels draw the
// masks anew from the seed: moe_down, moe_outer and moe_expand in place of the products of rank R.
//
// Forward: stack, down, gate, balance, up. Backward: stack, gate h, up backward, gate backward, dw,
// unstack, dx.
#include <tuple>

#include "../moe_checks.h"
#include "matrix.h"

namespace lowrank_ext::cuda {
namespace {

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// A dense tensor of any shape as rows of its last dimension.
Any rows_of(const Tensor& tensor) {
  const int64_t num_cols = tensor.size(tensor.dim() - 1);
  return {tensor.data_ptr(), element_type(tensor.scalar_type()),
          num_cols == 0 ? 0 : tensor.numel() / num_cols, num_cols, num_cols};
}

// What both passes know about the call.
struct Experts {
  ScalarType input;
  NumberKind kind;
  DropoutArgs dropout;
  bool shared_dropout;
  ExpertColumns columns;
  Tensor router_weight, lora_a, lora_b;  // dense
  std::optional<Tensor> token_mask;      // dense
  Device device;

  Experts(const ExpertArgs& args, const Tensor& like)
      : input(like.scalar_type()),
        // Products of fp32 decide the routing: never in TF32.
        kind(number_kind(input, /*allow_tf32=*/false)),
        dropout(dropout_of(args.dropout_p, args.seed)),
        shared_dropout(args.shared_dropout),
        columns(columns_of(args, drops())),
        router_weight(dense(args.router_weight)),
        lora_a(dense(args.lora_a)),
        lora_b(dense(args.lora_b)),
        token_mask(dense(args.token_mask)),
        device(device_of_kernels(like)) {}

  static ExpertColumns columns_of(const ExpertArgs& args, bool drops) {
    const int num_experts = static_cast<int>(args.num_experts());
    const int rank = static_cast<int>(args.rank());
    return drops ? ExpertColumns::grouped(num_experts, rank, args.shared_dropout)
                 : ExpertColumns::packed(num_experts, rank);
  }
  bool drops() const { return dropout.threshold != 0; }
  int64_t in_features() const { return lora_a.size(2); }
  int64_t out_features() const { return lora_b.size(1); }
  int64_t num_h_cols() const { return int64_t{columns.num_experts} * columns.rank; }

  ExpertRouting routing(const Tensor& probs, const Tensor& ids, const Tensor& weights,
                        const Tensor& counts) const {
    return {rows_of(probs), rows_of(weights), data_of<int64_t>(ids), data_of<int64_t>(counts),
            data_of<const bool>(token_mask)};
  }
  PartialSumsWorkspace down_workspace(int64_t num_rows) const {
    const auto size = drops() ? moe_down_workspace : lowrank_down_partials_workspace;
    return size(kind, num_rows, in_features(), columns.num_cols, device.num_sms);
  }
  PartialSumsWorkspace outer_workspace(int64_t num_rows) const {
    const auto size = drops() ? moe_outer_workspace : moe_down_backward_workspace;
    return size(kind, num_rows, in_features(), columns.num_cols, device.num_sms);
  }
  // z = drop(x) wᵀ
  void down(const Any& x, const Any& w, const ZPartials& z) const {
    if (!drops()) return lowrank_down_partials(kind, x, w, z, device);
    moe_down(kind, x, w, columns, shared_dropout, dropout, z, device);
  }
  // dw = dzᵀ drop(x)
  void outer(const Any& dz, const Any& x, void* dw) const {
    if (!drops()) return moe_down_backward_w(kind, dz, x, dw, device);
    moe_outer(kind, dz, x, columns, shared_dropout, dropout, dw, device);
  }
  // dx = drop'(dz w)
  void expand(const Any& dz, const Any& w, const Any& dx) const {
    if (!drops()) return lowrank_down_backward_x(kind, Any{}, dz, w, DropoutArgs{}, dx, device);
    moe_expand(kind, dz, w, columns, shared_dropout, dropout, dx, device);
  }
  void stack(const Any& w, const Any& up) const {
    stack_experts(kind, columns, rows_of(router_weight), rows_of(lora_a), rows_of(lora_b), w, up,
                  device);
  }
};

void forward(const Experts& experts, const Any& x, const Any& base, double scaling,
             const ExpertRouting& routing, const Any& balance_loss, const Any& y, const Any& h,
             const Tensor& like) {
  const auto& [input, kind, columns, device] =
      std::tie(experts.input, experts.kind, experts.columns, experts.device);
  const int64_t num_rows = x.num_rows, in_features = experts.in_features();
  const PartialSumsWorkspace down = experts.down_workspace(num_rows);
  Workspace workspace;
  const ScratchMatrix w = reserve_matrix(workspace, input, columns.num_cols, in_features);
  const ScratchMatrix up =
      reserve_matrix(workspace, input, experts.out_features(), experts.num_h_cols());
  const ScratchMatrix gated = reserve_matrix(workspace, input, num_rows, experts.num_h_cols());
  const int64_t z_offset = workspace.reserve(down.bytes);
  const int64_t gate_offset =
      workspace.reserve(moe_gate_workspace_bytes(num_rows, columns.num_experts));
  workspace.allocate(like);

  const ZPartials z{workspace.at(z_offset), down.num_splits, down.row_stride};
  if (num_rows > 0) {
    experts.stack(placed(w, workspace), placed(up, workspace));
    experts.down(x, placed(w, workspace), z);
  }
  // Without rows too: then counts and loss are zero.
  moe_gate(kind, columns, z, routing, balance_loss, h, placed(gated, workspace),
           workspace.at(gate_offset), device);
  lowrank_up(kind, base, placed(gated, workspace), Mid{}, placed(up, workspace), Any{}, scaling, y,
             device);
}

struct Gradients {
  Any dx, drouter_weight, dlora_a, dlora_b;  // absent where not needed
};

void backward(const Experts& experts, const ExpertNeeds& needs, const Any& dout, const Any& x,
              const Any& h, double scaling, const ExpertRouting& routing, const Any& dbalance_loss,
              const Gradients& gradients, const Tensor& like) {
  const auto& [input, kind, columns, device] =
      std::tie(experts.input, experts.kind, experts.columns, experts.device);
  const int64_t num_rows = dout.num_rows, in_features = experts.in_features();
  const int64_t out_features = experts.out_features(), num_h_cols = experts.num_h_cols();
  const ScalarType accumulator = statistics_dtype(input);
  const bool need_g = needs.gates() || needs.dlora_a, need_p = needs.dlora_b;
  const UpBackwardWorkspace up_sizes = lowrank_up_backward_workspace(
      kind, num_rows, out_features, num_h_cols, need_g, need_p, device.num_sms);
  const PartialSumsWorkspace dw_sizes = experts.outer_workspace(num_rows);
  const auto if_needed = [](bool is_needed, int64_t size) { return is_needed ? size : 0; };

  Workspace workspace;
  const ScratchMatrix w =
      reserve_matrix(workspace, input, if_needed(needs.dx, columns.num_cols), in_features);
  const ScratchMatrix up = reserve_matrix(workspace, input, out_features, num_h_cols);
  const ScratchMatrix gated =
      reserve_matrix(workspace, input, if_needed(need_p, num_rows), num_h_cols);
  const int64_t g_offset = workspace.reserve(
      if_needed(need_g, up_sizes.num_g_splits * num_rows * num_h_cols * element_size(accumulator)));
  const int64_t p_offset = workspace.reserve(up_sizes.p_bytes);
  const ScratchMatrix dup =
      reserve_matrix(workspace, accumulator, if_needed(need_p, out_features), num_h_cols);
  const ScratchMatrix dz =
      reserve_matrix(workspace, input, if_needed(need_g, num_rows), columns.num_cols);
  const int64_t dw_offset = workspace.reserve(if_needed(needs.x(), dw_sizes.bytes));
  workspace.allocate(like);
  const auto at = [&](bool is_needed, const ScratchMatrix& scratch) {
    return is_needed ? placed(scratch, workspace) : Any{};
  };

  experts.stack(at(needs.dx, w), placed(up, workspace));
  if (need_p) moe_gate_h(kind, columns, routing, h, placed(gated, workspace), device);
  const GPartials g =
      need_g ? GPartials{workspace.at(g_offset), up_sizes.num_g_splits} : GPartials{};
  lowrank_up_backward(kind, dout, at(need_p, gated), Mid{}, placed(up, workspace), Any{}, scaling,
                      g, workspace.at(p_offset), at(need_p, dup), Any{}, device);
  Any dw;
  if (need_g) {
    moe_gate_backward(kind, columns, g, routing, dbalance_loss, h, needs.gates(),
                      placed(dz, workspace), device);
    if (needs.x()) {
      dw = {workspace.at(dw_offset), element_type(accumulator),
            dw_sizes.num_splits * columns.num_cols, in_features, dw_sizes.row_stride};
      experts.outer(placed(dz, workspace), x, dw.data);
    }
  }
  if (needs.x() || need_p)
    unstack_experts(kind, columns, dw, dw_sizes.num_splits, at(need_p, dup),
                    gradients.drouter_weight, gradients.dlora_a, gradients.dlora_b, device);
  if (needs.dx) experts.expand(placed(dz, workspace), placed(w, workspace), gradients.dx);
}

}  // namespace

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

  const Experts experts(args, x);
  const Tensor x_rows = as_matrix(x), base_rows = as_matrix(base_out);
  forward(experts, any(x_rows), any(base_rows), scaling,
          experts.routing(probs, ids, weights, counts), scalar_of(loss), any(as_matrix(y)),
          any(as_matrix(h)), x);
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

  const Experts experts(args, dout);
  const Tensor probs = dense(router_probs), ids = dense(topk_ids), weights = dense(topk_weights);
  const Tensor counts = dense(expert_counts);
  const auto rows = [](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional(as_matrix(*tensor)) : tensor;
  };
  const std::optional<Tensor> x_rows = rows(x), h_rows = rows(h);
  const auto needed = [](bool is_needed, const Tensor& tensor) {
    return is_needed ? rows_of(tensor) : Any{};
  };
  backward(experts, needs, any(dout_rows), any(x_rows), any(h_rows), scaling,
           experts.routing(probs, ids, weights, counts),
           dbalance_loss ? scalar_of(*dbalance_loss) : Any{},
           {need_dx ? any(as_matrix(dx)) : Any{}, needed(need_drouter_weight, drouter_weight),
            needed(need_dlora_a, dlora_a), needed(need_dlora_b, dlora_b)},
           dout);
  return result;
}

}  // namespace lowrank_ext::cuda

LOWRANK_EXT_CUDA_IMPL(m) {
  m.impl("moe_lowrank_add", TORCH_BOX(&lowrank_ext::cuda::moe_lowrank_add_cuda));
  m.impl("moe_lowrank_add_backward", TORCH_BOX(&lowrank_ext::cuda::moe_lowrank_add_backward_cuda));
}
