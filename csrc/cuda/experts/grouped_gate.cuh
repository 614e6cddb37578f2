// The gates of the grouped form, where what belongs to an expert has a row for each slot (token m's
// choice j is slot m k + j):
//     grouped_gate         from the sums of the slots' h [M k, r], split: h [M, E r], zeros where an
//                          expert was not chosen, and gated [M k, r] = weight · h
//     grouped_apply_gates  gated again, for the backward, from h [M, E r]
// A thread owns an element. Sums over splits have a fixed order; no shared memory.
#pragma once

#include "experts/moe_gate.cuh"

namespace lowrank_ext::cuda {

template <class Compute>
struct GroupedGateParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  ChoiceTensors<acc_t> choices;
  Matrix<const acc_t> sums;  // [num_splits · M k, r]
  int num_splits, rank;
  Matrix<scalar_t> h;      // [M, E r]
  Matrix<scalar_t> gated;  // [M k, r]

  template <class F>
  void each_tensor(F&& f) const {
    choices.each_tensor(f);
    f("partials", sums);
    f("h", h);
    f("gated", gated);
  }
};

// A thread owns an element of h.
template <class Compute>
__global__ void __launch_bounds__(kGateThreads, kGateMinBlocks<Compute>)
    grouped_gate_kernel(GroupedGateParams<Compute> params) {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  const int64_t i = int64_t{blockIdx.x} * kGateThreads + threadIdx.x;
  if (i >= params.h.num_rows * params.h.num_cols) return;
  const int64_t row = i / params.h.num_cols;
  const int col = static_cast<int>(i % params.h.num_cols), r = col % params.rank;
  const Choices<acc_t> choices = params.choices.of(row);
  const int choice = choices.find(col / params.rank);
  scalar_t h = scalar_t(0.0f);
  if (choice >= 0) {
    const int64_t slot = row * choices.top_k + choice, num_slots = params.gated.num_rows;
    h = convert<scalar_t>(sum_partials(params.sums, params.num_splits, num_slots, slot, r));
    *params.gated.at(slot, r) = convert<scalar_t>(choices.weights[choice] * convert<acc_t>(h));
  }
  *params.h.at(row, col) = h;
}

template <class Compute>
struct GroupedApplyGatesParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  ChoiceTensors<acc_t> choices;
  Matrix<const scalar_t> h;  // [M, E r]
  Matrix<scalar_t> gated;    // [M k, r]

  template <class F>
  void each_tensor(F&& f) const {
    choices.each_tensor(f);
    f("h", h);
    f("gated", gated);
  }
};

// A thread owns an element of gated.
template <class Compute>
__global__ void __launch_bounds__(kGateThreads, kGateMinBlocks<Compute>)
    grouped_apply_gates_kernel(GroupedApplyGatesParams<Compute> params) {
  using acc_t = typename Compute::acc_t;
  const int64_t i = int64_t{blockIdx.x} * kGateThreads + threadIdx.x;
  const int64_t rank = params.gated.num_cols;
  if (i >= params.gated.num_rows * rank) return;
  const int64_t slot = i / rank, r = i % rank, top_k = params.choices.ids.num_cols;
  const int64_t row = slot / top_k, expert = params.choices.of(row).ids[slot % top_k];
  if (expert < 0 || (expert + 1) * rank > params.h.num_cols) return;
  const acc_t weight = params.choices.of(row).weights[slot % top_k];
  *params.gated.at(slot, r) = convert<typename Compute::scalar_t>(
      weight * convert<acc_t>(*params.h.at(row, expert * rank + r)));
}

template <class Compute>
void launch_grouped_gate(const GroupedGateParams<Compute>& params, Stream stream) {
  launch_kernel("grouped_gate", grouped_gate_kernel<Compute>, gate_shape(params.h), params, stream);
}

template <class Compute>
void launch_grouped_apply_gates(const GroupedApplyGatesParams<Compute>& params, Stream stream) {
  launch_kernel("grouped_apply_gates", grouped_apply_gates_kernel<Compute>,
                gate_shape(params.gated), params, stream);
}

}  // namespace lowrank_ext::cuda
