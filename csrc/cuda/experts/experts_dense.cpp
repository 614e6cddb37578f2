// The dense form of moe_lowrank_add: every token multiplies with every expert, and those that it
// did not choose count as zero. With R = E r + E columns (router and experts stacked,
// expert_columns.h) that is lowrank_add's branch of rank R: one pass over x and one over y, one
// over dout and two of K columns in the backward.
//
// Under dropout the columns are padded to groups that see the same mask, and three kernels draw the
// masks anew from the seed: moe_down, moe_outer and moe_expand in place of the products of rank R.
//
// Forward: stack, down, gate, balance, up. Backward: stack, gate h, up backward, gate backward, dw,
// unstack, dx.
#include <tuple>

#include "experts/experts.h"

namespace lowrank_ext::cuda {
namespace {

// The stacked columns and their products.
struct DenseExperts {
  const ExpertCall& call;
  ExpertColumns columns;

  explicit DenseExperts(const ExpertCall& call) : call(call), columns(columns_of(call)) {}

  static ExpertColumns columns_of(const ExpertCall& call) {
    const int num_experts = static_cast<int>(call.num_experts);
    const int rank = static_cast<int>(call.rank);
    return call.drops() ? ExpertColumns::grouped(num_experts, rank, call.shared_dropout)
                        : ExpertColumns::packed(num_experts, rank);
  }
  PartialSumsWorkspace down_workspace(int64_t num_rows) const {
    const auto size = call.drops() ? moe_down_workspace : lowrank_down_partials_workspace;
    return size(call.kind, num_rows, call.in_features, columns.num_cols, call.device.num_sms);
  }
  PartialSumsWorkspace outer_workspace(int64_t num_rows) const {
    const auto size = call.drops() ? moe_outer_workspace : moe_down_backward_workspace;
    return size(call.kind, num_rows, call.in_features, columns.num_cols, call.device.num_sms);
  }
  // z = drop(x) wᵀ
  void down(const Any& x, const Any& w, const ZPartials& z) const {
    if (!call.drops()) return lowrank_down_partials(call.kind, x, w, z, call.device);
    moe_down(call.kind, x, w, columns, call.shared_dropout, call.dropout, z, call.device);
  }
  // dw = dzᵀ drop(x)
  void outer(const Any& dz, const Any& x, void* dw) const {
    if (!call.drops()) return moe_down_backward_w(call.kind, dz, x, dw, call.device);
    moe_outer(call.kind, dz, x, columns, call.shared_dropout, call.dropout, dw, call.device);
  }
  // dx = drop'(dz w)
  void expand(const Any& dz, const Any& w, const Any& dx) const {
    if (!call.drops())
      return lowrank_down_backward_x(call.kind, Any{}, dz, w, DropoutArgs{}, dx, call.device);
    moe_expand(call.kind, dz, w, columns, call.shared_dropout, call.dropout, dx, call.device);
  }
  void stack(const Any& w, const Any& up) const {
    stack_experts(call.kind, columns, rows_of(call.router_weight), rows_of(call.lora_a),
                  rows_of(call.lora_b), w, up, call.device);
  }
};

}  // namespace

void forward_dense(const ExpertCall& call, const ExpertForward& pass, const Tensor& like) {
  const DenseExperts experts(call);
  const auto& [kind, device] = std::tie(call.kind, call.device);
  const ExpertColumns& columns = experts.columns;
  const int64_t num_rows = pass.x.num_rows, num_h_cols = call.num_h_cols();
  const PartialSumsWorkspace down = experts.down_workspace(num_rows);
  Workspace workspace;
  const ScratchMatrix w = reserve_matrix(workspace, call.input, columns.num_cols, call.in_features);
  const ScratchMatrix up = reserve_matrix(workspace, call.input, call.out_features, num_h_cols);
  const ScratchMatrix gated = reserve_matrix(workspace, call.input, num_rows, num_h_cols);
  const int64_t z_offset = workspace.reserve(down.bytes);
  const int64_t gate_offset =
      workspace.reserve(moe_gate_workspace_bytes(num_rows, columns.num_experts));
  workspace.allocate(like);

  const ZPartials z{workspace.at(z_offset), down.num_splits, down.row_stride};
  if (num_rows > 0) {
    experts.stack(placed(w, workspace), placed(up, workspace));
    experts.down(pass.x, placed(w, workspace), z);
  }
  // Without rows too: then counts and loss are zero.
  moe_gate(kind, columns, z, pass.routing, pass.balance_loss, pass.h, placed(gated, workspace),
           workspace.at(gate_offset), device);
  lowrank_up(kind, pass.base, placed(gated, workspace), Mid{}, placed(up, workspace), Any{},
             call.scaling, pass.y, device);
}

void backward_dense(const ExpertCall& call, const ExpertBackward& pass, const Tensor& like) {
  const DenseExperts experts(call);
  const auto& [kind, device, needs] = std::tie(call.kind, call.device, pass.needs);
  const ExpertColumns& columns = experts.columns;
  const int64_t num_rows = pass.dout.num_rows, num_h_cols = call.num_h_cols();
  const ScalarType accumulator = statistics_dtype(call.input);
  const bool need_g = pass.need_g(), need_p = needs.dlora_b;
  const UpBackwardWorkspace up_sizes = lowrank_up_backward_workspace(
      kind, num_rows, call.out_features, num_h_cols, need_g, need_p, device.num_sms);
  const PartialSumsWorkspace dw_sizes = experts.outer_workspace(num_rows);

  Workspace workspace;
  const ScratchMatrix w = reserve_matrix(workspace, call.input,
                                         if_needed(needs.dx, columns.num_cols), call.in_features);
  const ScratchMatrix up = reserve_matrix(workspace, call.input, call.out_features, num_h_cols);
  const ScratchMatrix gated =
      reserve_matrix(workspace, call.input, if_needed(need_p, num_rows), num_h_cols);
  const int64_t g_offset = workspace.reserve(
      if_needed(need_g, up_sizes.num_g_splits * num_rows * num_h_cols * element_size(accumulator)));
  const int64_t p_offset = workspace.reserve(up_sizes.p_bytes);
  const ScratchMatrix dup =
      reserve_matrix(workspace, accumulator, if_needed(need_p, call.out_features), num_h_cols);
  const ScratchMatrix dz =
      reserve_matrix(workspace, call.input, if_needed(need_g, num_rows), columns.num_cols);
  const int64_t dw_offset = workspace.reserve(if_needed(needs.x(), dw_sizes.bytes));
  workspace.allocate(like);
  const auto at = [&](bool is_needed, const ScratchMatrix& scratch) {
    return is_needed ? placed(scratch, workspace) : Any{};
  };

  experts.stack(at(needs.dx, w), placed(up, workspace));
  if (need_p) moe_gate_h(kind, columns, pass.routing, pass.h, placed(gated, workspace), device);
  const GPartials g =
      need_g ? GPartials{workspace.at(g_offset), up_sizes.num_g_splits} : GPartials{};
  lowrank_up_backward(kind, pass.dout, at(need_p, gated), Mid{}, placed(up, workspace), Any{},
                      call.scaling, g, workspace.at(p_offset), at(need_p, dup), Any{}, device);
  Any dw;
  if (need_g) {
    moe_gate_backward(kind, columns, g, pass.routing, pass.dbalance_loss, pass.h, needs.gates(),
                      placed(dz, workspace), device);
    if (needs.x()) {
      dw = {workspace.at(dw_offset), element_type(accumulator),
            dw_sizes.num_splits * columns.num_cols, call.in_features, dw_sizes.row_stride};
      experts.outer(placed(dz, workspace), pass.x, dw.data);
    }
  }
  if (needs.x() || need_p)
    unstack_experts(kind, columns, dw, dw_sizes.num_splits, at(need_p, dup), pass.drouter_weight,
                    pass.dlora_a, pass.dlora_b, device);
  if (needs.dx) experts.expand(placed(dz, workspace), placed(w, workspace), pass.dx);
}

}  // namespace lowrank_ext::cuda
