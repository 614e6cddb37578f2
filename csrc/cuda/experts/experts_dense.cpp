// The dense form of moe_lowrank_add: every token multiplies with every expert, and those that it
// did not choose count as zero. With R = E r + E columns (router and experts stacked,
// dense_columns.h) that is lowrank_add's branch of rank R: one pass over x and one over y, one
// over dout and two of K columns in the backward.
//
// Under dropout the columns are padded to groups that see the same mask, and three kernels draw the
// masks anew from the seed: dense_down, dense_outer and dense_expand in place of the products of
// rank R.
//
// Forward: stack, down, gate, balance, up. Backward: stack, gate h, up backward, gate backward, dw,
// unstack, dx.
#include <tuple>

#include "experts/experts.h"
#include "lowrank/kernels.h"

namespace lowrank_ext::cuda {
namespace {

// The stacked columns and their products.
struct DenseExperts {
  const ExpertCall& call;
  DenseColumns columns;

  explicit DenseExperts(const ExpertCall& call) : call(call), columns(columns_of(call)) {}

  static DenseColumns columns_of(const ExpertCall& call) {
    const int num_experts = static_cast<int>(call.num_experts);
    const int rank = static_cast<int>(call.rank);
    return call.drops() ? DenseColumns::padded(num_experts, rank, call.shared_dropout)
                        : DenseColumns::packed(num_experts, rank);
  }
  PartialSumsSize down_workspace(int64_t num_rows) const {
    const auto size = call.drops() ? dense_down_workspace : lowrank_down_partials_workspace;
    return size(call.compute_type, num_rows, call.in_features, columns.num_cols,
                call.device.num_sms);
  }
  PartialSumsSize outer_workspace(int64_t num_rows) const {
    const auto size = call.drops() ? dense_outer_workspace : dense_outer_packed_workspace;
    return size(call.compute_type, num_rows, call.in_features, columns.num_cols,
                call.device.num_sms);
  }
  // z = drop(x) wᵀ
  void down(const MatrixRef& x, const MatrixRef& w, const PartialSums& z) const {
    if (!call.drops()) return lowrank_down_partials(call.compute_type, x, w, z, call.device);
    dense_down(call.compute_type, x, w, columns, call.shared_dropout, call.dropout, z, call.device);
  }
  // dw = dzᵀ drop(x)
  void outer(const MatrixRef& dz, const MatrixRef& x, void* dw) const {
    if (!call.drops()) return dense_outer_packed(call.compute_type, dz, x, dw, call.device);
    dense_outer(call.compute_type, dz, x, columns, call.shared_dropout, call.dropout, dw,
                call.device);
  }
  // dx = drop'(dz w)
  void expand(const MatrixRef& dz, const MatrixRef& w, const MatrixRef& dx) const {
    if (!call.drops())
      return lowrank_down_backward_x(call.compute_type, MatrixRef{}, dz, w, DropoutArgs{}, dx,
                                     call.device);
    dense_expand(call.compute_type, dz, w, columns, call.shared_dropout, call.dropout, dx,
                 call.device);
  }
  void stack(const MatrixRef& w, const MatrixRef& up) const {
    dense_stack(call.compute_type, columns, rows_of(call.router_weight), rows_of(call.lora_a),
                rows_of(call.lora_b), w, up, call.device);
  }
};

}  // namespace

void forward_dense(const ExpertCall& call, const ExpertForward& pass, const Tensor& like) {
  const DenseExperts experts(call);
  const auto& [compute_type, device] = std::tie(call.compute_type, call.device);
  const DenseColumns& columns = experts.columns;
  const int64_t num_rows = pass.x.num_rows, num_h_cols = call.num_h_cols();
  MatrixRef w, up, gated;
  PartialSums z;
  void* gate = nullptr;
  const Workspace workspace(like, [&](Scratch& scratch) {
    const ElementType input = element_type(call.input);
    w = scratch.matrix(input, columns.num_cols, call.in_features);
    up = scratch.matrix(input, call.out_features, num_h_cols);
    gated = scratch.matrix(input, num_rows, num_h_cols);
    z = scratch.partial_sums(experts.down_workspace(num_rows));
    gate = scratch.bytes(moe_gate_workspace_bytes(num_rows, columns.num_experts));
  });

  if (num_rows > 0) {
    experts.stack(w, up);
    experts.down(pass.x, w, z);
  }
  // Without rows too: then counts and loss are zero.
  moe_gate(compute_type, columns, z, pass.routing, pass.balance_loss, pass.h, gated, gate, device);
  lowrank_up(compute_type, pass.base, gated, Mid{}, up, MatrixRef{}, call.scaling, pass.y, device);
}

void backward_dense(const ExpertCall& call, const ExpertBackward& pass, const Tensor& like) {
  const DenseExperts experts(call);
  const auto& [compute_type, device, needs] = std::tie(call.compute_type, call.device, pass.needs);
  const DenseColumns& columns = experts.columns;
  const int64_t num_rows = pass.dout.num_rows, num_h_cols = call.num_h_cols();
  const bool need_g = pass.need_g(), need_p = needs.dlora_b;
  const ElementType input = element_type(call.input);
  const ElementType accumulator = element_type(statistics_dtype(call.input));
  const UpBackwardWorkspace up_sizes = lowrank_up_backward_workspace(
      compute_type, num_rows, call.out_features, num_h_cols, need_g, need_p, device.num_sms);
  MatrixRef w, up, gated, dup, dz;
  GPartials g;
  void* p = nullptr;
  PartialSums dw_sums;
  const Workspace workspace(like, [&](Scratch& scratch) {
    if (needs.dx) w = scratch.matrix(input, columns.num_cols, call.in_features);
    up = scratch.matrix(input, call.out_features, num_h_cols);
    if (need_p) gated = scratch.matrix(input, num_rows, num_h_cols);
    if (need_g)
      g = {
          scratch.bytes(up_sizes.num_g_splits * num_rows * num_h_cols * element_bytes(accumulator)),
          up_sizes.num_g_splits};
    p = scratch.bytes(up_sizes.p_bytes);
    if (need_p) dup = scratch.matrix(accumulator, call.out_features, num_h_cols);
    if (need_g) dz = scratch.matrix(input, num_rows, columns.num_cols);
    if (needs.x()) dw_sums = scratch.partial_sums(experts.outer_workspace(num_rows));
  });

  experts.stack(w, up);
  if (need_p) dense_apply_gates(compute_type, columns, pass.routing, pass.h, gated, device);
  lowrank_up_backward(compute_type, pass.dout, gated, Mid{}, up, MatrixRef{}, call.scaling, g, p,
                      dup, MatrixRef{}, device);
  MatrixRef dw;
  if (need_g) {
    dense_gate_backward(compute_type, columns, g, pass.routing, pass.dbalance_loss, pass.h,
                        needs.gates(), dz, device);
    if (needs.x()) {
      dw = {dw_sums.data, accumulator, dw_sums.num_splits * columns.num_cols, call.in_features,
            dw_sums.row_stride};
      experts.outer(dz, pass.x, dw.data);
    }
  }
  if (needs.x() || need_p)
    dense_unstack(compute_type, columns, dw, dw_sums.num_splits, dup, pass.drouter_weight,
                  pass.dlora_a, pass.dlora_b, device);
  if (needs.dx) experts.expand(dz, w, pass.dx);
}

}  // namespace lowrank_ext::cuda
