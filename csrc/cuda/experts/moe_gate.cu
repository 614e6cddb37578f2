#include "experts/moe_gate.cuh"

namespace lowrank_ext::cuda {
namespace {

Matrix<const bool> mask_of(const ExpertRouting& routing) {
  if (!routing.token_mask) return {};
  return dense_matrix(routing.token_mask, 1, routing.probs.num_rows);
}

template <class acc_t>
ChoiceTensors<acc_t> choices_of(const ExpertRouting& routing) {
  const Any& weights = routing.weights;
  return {dense_matrix<const int64_t>(routing.ids, weights.num_rows, weights.num_cols),
          matrix_of<const acc_t>(weights)};
}

// Of the workspace: each block's sums of probabilities, then its counts.
struct BlockSums {
  double* probs;
  int64_t* counts;
};

BlockSums block_sums_of(void* workspace, int64_t num_blocks, int num_experts) {
  const auto probs = static_cast<double*>(workspace);
  return {probs, reinterpret_cast<int64_t*>(probs + num_blocks * num_experts)};
}

template <class Number>
GateBackwardParams<Number> gate_backward_params(const ExpertColumns& columns,
                                                const ExpertRouting& routing,
                                                const Any& dbalance_loss, const Any& h,
                                                bool gates) {
  using acc_t = typename Number::acc_t;
  GateBackwardParams<Number> params{};
  params.columns = columns;
  params.gates = gates;
  params.choices = choices_of<acc_t>(routing);
  params.h = matrix_of<const typename Number::scalar_t>(h);
  params.probs = matrix_of<const acc_t>(routing.probs);
  params.dloss = matrix_of<const acc_t>(dbalance_loss);
  params.counts = dense_matrix<const int64_t>(routing.counts, 1, columns.num_experts);
  params.token_mask = mask_of(routing);
  return params;
}

// [num_splits · num_rows, num_cols] of the accumulator's type.
template <class acc_t>
Matrix<const acc_t> slot_sums(const ZPartials& sums, int64_t num_rows, int64_t num_cols) {
  return {static_cast<const acc_t*>(sums.data), sums.num_splits * num_rows, num_cols,
          sums.row_stride, false};
}

}  // namespace

int64_t moe_gate_workspace_bytes(int64_t num_rows, int num_experts) {
  const int64_t num_sums = plan_gate(num_rows, num_experts).num_blocks * num_experts;
  return num_sums * static_cast<int64_t>(sizeof(double) + sizeof(int64_t));
}

void moe_gate(NumberKind kind, const ExpertColumns& columns, const ZPartials& z,
              const ExpertRouting& routing, const Any& balance_loss, const Any& h, const Any& gated,
              void* workspace, const Device& device) {
  const int64_t num_rows = routing.probs.num_rows, num_experts = columns.num_experts;
  const int64_t top_k = routing.weights.num_cols;
  const int64_t num_blocks = plan_gate(num_rows, columns.num_experts).num_blocks;
  const BlockSums sums = block_sums_of(workspace, num_blocks, columns.num_experts);
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using scalar_t = typename Number::scalar_t;
    using acc_t = typename Number::acc_t;
    GateParams<Number> params{};
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

void moe_gate_h(NumberKind kind, const ExpertColumns& columns, const ExpertRouting& routing,
                const Any& h, const Any& gated, const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using scalar_t = typename Number::scalar_t;
    launch_moe_gate_h<Number>(
        {choices_of<typename Number::acc_t>(routing), matrix_of<const scalar_t>(h),
         matrix_of<scalar_t>(gated), columns.rank},
        device.stream);
  });
}

void moe_gate_backward(NumberKind kind, const ExpertColumns& columns, const GPartials& g,
                       const ExpertRouting& routing, const Any& dbalance_loss, const Any& h,
                       bool gates, const Any& dz, const Device& device) {
  const int64_t num_rows = dz.num_rows, num_h_cols = int64_t{columns.num_experts} * columns.rank;
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using acc_t = typename Number::acc_t;
    auto params = gate_backward_params<Number>(columns, routing, dbalance_loss, h, gates);
    params.g = dense_matrix(static_cast<const acc_t*>(g.data), g.num_splits * num_rows, num_h_cols);
    params.num_splits = g.num_splits;
    params.dz = matrix_of<typename Number::scalar_t>(dz);
    launch_moe_gate_backward(params, device.stream);
  });
}

void moe_slots(NumberKind kind, const ZPartials& sums, const ExpertRouting& routing, const Any& h,
               const Any& gated, const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using scalar_t = typename Number::scalar_t;
    using acc_t = typename Number::acc_t;
    launch_moe_slots<Number>(
        {choices_of<acc_t>(routing), slot_sums<acc_t>(sums, gated.num_rows, gated.num_cols),
         sums.num_splits, static_cast<int>(gated.num_cols), matrix_of<scalar_t>(h),
         matrix_of<scalar_t>(gated)},
        device.stream);
  });
}

void moe_slots_h(NumberKind kind, const ExpertRouting& routing, const Any& h, const Any& gated,
                 const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using scalar_t = typename Number::scalar_t;
    launch_moe_slots_h<Number>({choices_of<typename Number::acc_t>(routing),
                                matrix_of<const scalar_t>(h), matrix_of<scalar_t>(gated)},
                               device.stream);
  });
}

void moe_slots_backward(NumberKind kind, const SlotGradient& g, const ExpertRouting& routing,
                        const Any& dbalance_loss, const Any& h, const Any& dlogits, const Any& dh,
                        const Device& device) {
  const int64_t num_rows = routing.probs.num_rows, num_experts = routing.probs.num_cols;
  const auto columns =
      ExpertColumns::packed(static_cast<int>(num_experts), static_cast<int>(dh.num_cols));
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using scalar_t = typename Number::scalar_t;
    using acc_t = typename Number::acc_t;
    const bool gates = static_cast<bool>(dlogits);
    auto params = gate_backward_params<Number>(columns, routing, dbalance_loss, h, gates);
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
