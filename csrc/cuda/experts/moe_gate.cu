#include "experts/moe_gate.cuh"

#include "common/scratch.h"
#include "experts/kernels.h"

namespace lowrank_ext::cuda {
namespace {

Matrix<const bool> mask_of(const ExpertRouting& routing) {
  if (!routing.token_mask) return {};
  return dense_matrix(routing.token_mask, 1, routing.probs.num_rows);
}

// Each block's sums of probabilities, and its counts.
struct BlockSums {
  double* probs;
  int64_t* counts;

  BlockSums(int64_t num_blocks, int num_experts, Scratch& scratch)
      : probs(scratch.array<double>(num_blocks * num_experts)),
        counts(scratch.array<int64_t>(num_blocks * num_experts)) {}
};

template <class Compute>
GateBackwardParams<Compute> gate_backward_params(const DenseColumns& columns,
                                                 const ExpertRouting& routing,
                                                 const MatrixRef& dbalance_loss, const MatrixRef& h,
                                                 bool gates) {
  using acc_t = typename Compute::acc_t;
  GateBackwardParams<Compute> params{};
  params.columns = columns;
  params.gates = gates;
  params.choices = choices_of<acc_t>(routing);
  params.h = matrix_of<const typename Compute::scalar_t>(h);
  params.probs = matrix_of<const acc_t>(routing.probs);
  params.dloss = matrix_of<const acc_t>(dbalance_loss);
  params.counts = dense_matrix<const int64_t>(routing.counts, 1, columns.num_experts);
  params.token_mask = mask_of(routing);
  return params;
}

}  // namespace

int64_t moe_gate_workspace_bytes(int64_t num_rows, int num_experts) {
  Scratch scratch;
  BlockSums(plan_gate(num_rows, num_experts).num_blocks, num_experts, scratch);
  return scratch.num_bytes();
}

void moe_gate(ComputeType compute_type, const DenseColumns& columns, const PartialSums& z,
              const ExpertRouting& routing, const MatrixRef& balance_loss, const MatrixRef& h,
              const MatrixRef& gated, void* workspace, const Device& device) {
  const int64_t num_rows = routing.probs.num_rows, num_experts = columns.num_experts;
  const int64_t top_k = routing.weights.num_cols;
  const int64_t num_blocks = plan_gate(num_rows, columns.num_experts).num_blocks;
  Scratch scratch(workspace);
  const BlockSums sums(num_blocks, columns.num_experts, scratch);
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    using acc_t = typename Compute::acc_t;
    GateParams<Compute> params{};
    params.columns = columns;
    params.z = {static_cast<const acc_t*>(z.data), z.num_splits * num_rows, columns.num_cols,
                z.row_stride, false};
    params.num_splits = z.num_splits;
    params.token_mask = mask_of(routing);
    params.h = matrix_of<scalar_t>(h);
    params.gated = matrix_of<scalar_t>(gated);
    params.probs = matrix_of<acc_t>(routing.probs);
    params.ids = dense_matrix(routing.ids, num_rows, top_k);
    params.weights = matrix_of<acc_t>(routing.weights);
    params.block_probs = dense_matrix(sums.probs, num_blocks, num_experts);
    params.block_counts = dense_matrix(sums.counts, num_blocks, num_experts);
    launch_moe_gate(params, device.stream);
    launch_balance<double, int64_t, acc_t>(
        {dense_matrix<const double>(sums.probs, num_blocks, num_experts),
         dense_matrix<const int64_t>(sums.counts, num_blocks, num_experts), static_cast<int>(top_k),
         dense_matrix(routing.counts, 1, num_experts), matrix_of<acc_t>(balance_loss)},
        device.stream);
  });
}

void dense_apply_gates(ComputeType compute_type, const DenseColumns& columns,
                       const ExpertRouting& routing, const MatrixRef& h, const MatrixRef& gated,
                       const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    launch_dense_apply_gates<Compute>(
        {choices_of<typename Compute::acc_t>(routing), matrix_of<const scalar_t>(h),
         matrix_of<scalar_t>(gated), columns.rank},
        device.stream);
  });
}

void dense_gate_backward(ComputeType compute_type, const DenseColumns& columns, const GPartials& g,
                         const ExpertRouting& routing, const MatrixRef& dbalance_loss,
                         const MatrixRef& h, bool gates, const MatrixRef& dz,
                         const Device& device) {
  const int64_t num_rows = dz.num_rows, num_h_cols = int64_t{columns.num_experts} * columns.rank;
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using acc_t = typename Compute::acc_t;
    auto params = gate_backward_params<Compute>(columns, routing, dbalance_loss, h, gates);
    params.g = dense_matrix(static_cast<const acc_t*>(g.data), g.num_splits * num_rows, num_h_cols);
    params.num_splits = g.num_splits;
    params.dz = matrix_of<typename Compute::scalar_t>(dz);
    launch_moe_gate_backward(params, device.stream);
  });
}

void grouped_gate_backward(ComputeType compute_type, const SlotGradient& g,
                           const ExpertRouting& routing, const MatrixRef& dbalance_loss,
                           const MatrixRef& h, const MatrixRef& dlogits, const MatrixRef& dh,
                           const Device& device) {
  const int64_t num_rows = routing.probs.num_rows, num_experts = routing.probs.num_cols;
  const auto columns =
      DenseColumns::packed(static_cast<int>(num_experts), static_cast<int>(dh.num_cols));
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    using acc_t = typename Compute::acc_t;
    const bool gates = static_cast<bool>(dlogits);
    auto params = gate_backward_params<Compute>(columns, routing, dbalance_loss, h, gates);
    params.g = g.by_slot ? slot_sums<acc_t>(g.sums, dh.num_rows, dh.num_cols)
                         : slot_sums<acc_t>(g.sums, num_rows, num_experts * dh.num_cols);
    params.num_splits = g.sums.num_splits;
    params.g_by_slot = g.by_slot;
    params.dz = matrix_of<scalar_t>(dlogits);
    params.dh = matrix_of<scalar_t>(dh);
    launch_moe_gate_backward(params, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
