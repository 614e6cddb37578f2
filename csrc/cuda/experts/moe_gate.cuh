// What lies between the two projections of moe_lowrank_add in the dense form, on z [M, R] = x wᵀ:
//     moe_gate           softmax and top-k of the router's columns (topk.cuh); h [M, E r] where chosen
//                        and exact zeros elsewhere, gated = weight · h; balance.cuh adds the loss
//     dense_apply_gates  gated again, for the backward
//     moe_gate_backward  from G's splits, G = scaling · dout lora_b: per choice
//                            dweight_j = Σ_r G[e_j r] h[e_j r]
//                            dlogit_i  = p_i (b_i - Σ p b) + [i = e_j] w_j (dweight_j - Σ w dweight)
//                        with b the balance loss's gradient of the probabilities (the first term
//                        only of counted tokens), and dz [M, R] = [dlogits, w_j G where chosen]
// A group of 8, 16 or 32 lanes owns a row; a block of 256 threads as many rows as it has groups.
// Lanes of a row exchange ids, weights and probs through the outputs, ordered by __syncwarp.
// Statistics are in acc_t, sums over tokens in double, every sum in a fixed order. No shared
// memory. Lanes of rows beyond the end take part in the shuffles only. Of G and z only columns of
// chosen experts are read.
#pragma once

#include <algorithm>

#include "common/partial_sums.cuh"
#include "experts/kernels.h"
#include "routing/balance.cuh"
#include "routing/topk.cuh"

namespace lowrank_ext::cuda {

// ---- plan

constexpr int kGateThreads = 256;

// 64 registers a thread, except where a number takes two.
template <class Compute>
constexpr int kGateMinBlocks = sizeof(typename Compute::acc_t) == 8 ? 2 : 4;

struct GatePlan {
  int lanes;  // of a row
  int64_t num_blocks;
};

inline GatePlan plan_gate(int64_t num_rows, int num_experts) {
  int lanes = 8;
  while (lanes < num_experts && lanes < kWarpSize) lanes *= 2;
  const int64_t rows_per_block = kGateThreads / lanes;
  return {lanes, (num_rows + rows_per_block - 1) / rows_per_block};
}

// ---- the choice of a row, as the outputs hold it

template <class acc_t>
struct Choices {
  const int64_t* ids;    // [k]
  const acc_t* weights;  // [k]
  int top_k;

  // The place of an expert among them, -1 where it is not.
  __device__ __forceinline__ int find(int expert) const {
    for (int j = 0; j < top_k; ++j)
      if (ids[j] == expert) return j;
    return -1;
  }
};

template <class acc_t>
struct ChoiceTensors {
  Matrix<const int64_t> ids;    // [M, k]
  Matrix<const acc_t> weights;  // [M, k]

  __device__ __forceinline__ Choices<acc_t> of(int64_t row) const {
    return {ids.at(row, 0), weights.at(row, 0), static_cast<int>(ids.num_cols)};
  }
  template <class F>
  void each_tensor(F&& f) const {
    f("topk_ids", ids);
    f("topk_weights", weights);
  }
};

template <class acc_t>
ChoiceTensors<acc_t> choices_of(const ExpertRouting& routing) {
  const MatrixRef& weights = routing.weights;
  return {dense_matrix<const int64_t>(routing.ids, weights.num_rows, weights.num_cols),
          matrix_of<const acc_t>(weights)};
}

// [num_splits · num_rows, num_cols] of the accumulator's type.
template <class acc_t>
Matrix<const acc_t> slot_sums(const PartialSums& sums, int64_t num_rows, int64_t num_cols) {
  return {static_cast<const acc_t*>(sums.data), sums.num_splits * num_rows, num_cols,
          sums.row_stride, false};
}

// ---- forward

template <class Compute>
struct GateParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  DenseColumns columns;
  Matrix<const acc_t> z;  // [num_splits · M, R]
  int num_splits;
  Matrix<const bool> token_mask;  // [1, M]: which tokens count; absent: all
  Matrix<scalar_t> h, gated;      // [M, E r]
  Matrix<acc_t> probs;            // [M, E]
  Matrix<int64_t> ids;            // [M, k]
  Matrix<acc_t> weights;          // [M, k]
  Matrix<double> block_probs;     // [num_blocks, E]: sums over a block's counted tokens
  Matrix<int64_t> block_counts;   // [num_blocks, E]
  int lanes;

  template <class F>
  void each_tensor(F&& f) const {
    f("z", z);
    f("token_mask", token_mask);
    f("h", h);
    f("gated", gated);
    f("router_probs", probs);
    f("topk_ids", ids);
    f("topk_weights", weights);
    f("block_probs", block_probs);
    f("block_counts", block_counts);
  }
};

namespace detail {

template <class Compute>
struct GateBlock {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  const GateParams<Compute>& params;
  LaneGroup group;
  int64_t first_row, row;
  bool inside;

  __device__ __forceinline__ GateBlock(const GateParams<Compute>& params, int thread)
      : params(params), group(LaneGroup::of(thread, params.lanes)) {
    first_row = int64_t{blockIdx.x} * rows_per_block();
    row = first_row + thread / params.lanes;
    inside = row < params.probs.num_rows;
  }
  __device__ __forceinline__ int rows_per_block() const { return kGateThreads / params.lanes; }

  __device__ __forceinline__ acc_t z(int64_t col) const {
    return sum_partials(params.z, params.num_splits, params.probs.num_rows, row, col);
  }

  __device__ __forceinline__ void route_registers() const {
    RoutedRow<acc_t> routed(group, params.columns.num_experts);
#pragma unroll
    for (int slot = 0; slot < kExpertsPerLane; ++slot) {
      const int expert = routed.expert(slot);
      const bool exists = inside && expert < params.columns.num_experts;
      routed.logits[slot] = exists ? z(expert) : acc_t(0);
    }
    routed.route(static_cast<int>(params.ids.num_cols));
    if (!inside) return;
#pragma unroll
    for (int slot = 0; slot < kExpertsPerLane; ++slot) {
      const int expert = routed.expert(slot), rank = routed.ranks[slot];
      if (expert < params.columns.num_experts) *params.probs.at(row, expert) = routed.prob(slot);
      if (rank < 0) continue;
      *params.ids.at(row, rank) = expert;
      *params.weights.at(row, rank) = routed.weight(slot);
    }
  }

  // More logits than a group's registers hold: they lie where the probabilities will.
  __device__ __forceinline__ void route_memory() const {
    acc_t* const probs = params.probs.at(row, 0);
    const RowInMemory<acc_t, acc_t> stored{probs, group, inside ? params.columns.num_experts : 0};
    const int top_k = static_cast<int>(params.ids.num_cols);
    for (int i = group.lane; i < stored.num_experts; i += group.lanes) probs[i] = z(i);
    const bool writes = inside && group.lane == 0;
    const auto chosen =
        choose<acc_t>(stored, group, top_k, [&](int j, const Choice<acc_t>& choice) {
          if (!writes) return;
          *params.ids.at(row, j) = choice.expert;
          *params.weights.at(row, j) = choice.logit;
        });
    const acc_t sum = sum_exponentials(stored, group, chosen.max);
    stored.each(
        [&](acc_t logit, int expert) { probs[expert] = exponential(logit - chosen.max) / sum; });
    if (!writes) return;
    for (int j = 0; j < top_k; ++j) {
      acc_t& weight = *params.weights.at(row, j);
      weight = exponential(weight - chosen.max) / chosen.sum;
    }
  }

  __device__ __forceinline__ void write_h() const {
    if (!inside) return;
    const DenseColumns& columns = params.columns;
    const Choices<acc_t> choices{params.ids.at(row, 0), params.weights.at(row, 0),
                                 static_cast<int>(params.ids.num_cols)};
    for (int col = group.lane; col < params.h.num_cols; col += group.lanes) {
      const int expert = col / columns.rank;
      const int choice = choices.find(expert);
      scalar_t h = scalar_t(0.0f), gated = scalar_t(0.0f);
      if (choice >= 0) {
        h = convert<scalar_t>(z(columns.col_of(col)));
        gated = convert<scalar_t>(choices.weights[choice] * convert<acc_t>(h));
      }
      *params.h.at(row, col) = h;
      *params.gated.at(row, col) = gated;
    }
  }

  // Over the block's counted rows in their order; a thread per expert.
  __device__ __forceinline__ void write_block_sums(int thread) const {
    const int64_t end = first_row + rows_per_block();
    const int64_t last = end < params.probs.num_rows ? end : params.probs.num_rows;
    for (int expert = thread; expert < params.columns.num_experts; expert += kGateThreads) {
      double sum = 0;
      int64_t count = 0;
      for (int64_t t = first_row; t < last; ++t) {
        if (params.token_mask && !*params.token_mask.at(0, t)) continue;
        const Choices<acc_t> choices{params.ids.at(t, 0), params.weights.at(t, 0),
                                     static_cast<int>(params.ids.num_cols)};
        sum += static_cast<double>(*params.probs.at(t, expert));
        count += choices.find(expert) >= 0;
      }
      *params.block_probs.at(blockIdx.x, expert) = sum;
      *params.block_counts.at(blockIdx.x, expert) = count;
    }
  }
};

}  // namespace detail

template <class Compute>
__global__ void __launch_bounds__(kGateThreads, kGateMinBlocks<Compute>)
    moe_gate_kernel(GateParams<Compute> params) {
  const int thread = static_cast<int>(threadIdx.x);
  const detail::GateBlock<Compute> block(params, thread);
  if (params.columns.num_experts <= kExpertsPerLane * params.lanes) {
    block.route_registers();
  } else {
    block.route_memory();
  }
  __syncwarp();  // the row's lanes see its ids and weights
  block.write_h();
  __syncthreads();
  block.write_block_sums(thread);
}

// ---- backward

template <class Compute>
struct DenseApplyGatesParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  ChoiceTensors<acc_t> choices;
  Matrix<const scalar_t> h;  // [M, E r]
  Matrix<scalar_t> gated;    // [M, E r]
  int rank;

  template <class F>
  void each_tensor(F&& f) const {
    choices.each_tensor(f);
    f("h", h);
    f("gated", gated);
  }
};

template <class Compute>
__global__ void __launch_bounds__(kGateThreads, kGateMinBlocks<Compute>)
    dense_apply_gates_kernel(DenseApplyGatesParams<Compute> params) {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  const int64_t i = int64_t{blockIdx.x} * kGateThreads + threadIdx.x;
  const int64_t num_cols = params.gated.num_cols;
  if (i >= params.gated.num_rows * num_cols) return;
  const int64_t row = i / num_cols;
  const int col = static_cast<int>(i % num_cols);
  const Choices<acc_t> choices = params.choices.of(row);
  const int choice = choices.find(col / params.rank);
  scalar_t gated = scalar_t(0.0f);
  if (choice >= 0)
    gated = convert<scalar_t>(choices.weights[choice] * convert<acc_t>(*params.h.at(row, col)));
  *params.gated.at(row, col) = gated;
}

template <class Compute>
struct GateBackwardParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  DenseColumns columns;
  Matrix<const acc_t> g;  // [num_splits · M, E r] or, by slot, [num_splits · M k, r]
  int num_splits;
  bool g_by_slot;
  bool gates;  // whether the logits' gradients are asked for; else they are zero
  ChoiceTensors<acc_t> choices;
  Matrix<const scalar_t> h;       // [M, E r], where gates
  Matrix<const acc_t> probs;      // [M, E]
  Matrix<const acc_t> dloss;      // [1, 1] or absent
  Matrix<const int64_t> counts;   // [1, E]
  Matrix<const bool> token_mask;  // [1, M] or absent
  Matrix<scalar_t> dz;            // [M, R] or, beside dh, dlogits [M, E]
  Matrix<scalar_t> dh;            // [M k, r] or absent: a part of dz
  int lanes;

  template <class F>
  void each_tensor(F&& f) const {
    f("g", g);
    choices.each_tensor(f);
    f("h", h);
    f("router_probs", probs);
    f("dbalance_loss", dloss);
    f("expert_counts", counts);
    f("token_mask", token_mask);
    f("dz", dz);
    f("dh", dh);
  }
};

namespace detail {

template <class Compute>
struct GateBackwardRow {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  const GateBackwardParams<Compute>& params;
  LaneGroup group;
  int64_t row;
  bool inside;

  __device__ __forceinline__ GateBackwardRow(const GateBackwardParams<Compute>& params, int thread)
      : params(params), group(LaneGroup::of(thread, params.lanes)) {
    row = int64_t{blockIdx.x} * (kGateThreads / params.lanes) + thread / params.lanes;
    inside = row < params.choices.ids.num_rows;
  }
  __device__ __forceinline__ Choices<acc_t> choices() const { return params.choices.of(row); }
  // Of the row's j-th choice.
  __device__ __forceinline__ acc_t g(int j, int64_t expert, int r) const {
    const int64_t num_rows = params.choices.ids.num_rows, top_k = params.choices.ids.num_cols;
    if (params.g_by_slot)
      return sum_partials(params.g, params.num_splits, num_rows * top_k, row * top_k + j, r);
    return sum_partials(params.g, params.num_splits, num_rows, row,
                        expert * params.columns.rank + r);
  }

  // The row's j-th expert, -1 beyond the end.
  __device__ __forceinline__ int chosen(int j) const {
    if (!inside) return -1;
    const int64_t expert = choices().ids[j];
    const bool valid = expert >= 0 && expert < params.columns.num_experts;
    return valid ? static_cast<int>(expert) : -1;
  }
  // Σ_r G h of the j-th choice, the same in all lanes.
  __device__ __forceinline__ acc_t dweight(int j, int expert) const {
    const int rank = params.columns.rank;
    acc_t sum = 0;
    if (expert >= 0) {
      const int64_t first = int64_t{expert} * rank;
      for (int r = group.lane; r < rank; r += group.lanes)
        sum += g(j, expert, r) * convert<acc_t>(*params.h.at(row, first + r));
    }
    return group.sum(sum);
  }
  // d loss / d probs[row, i] over expert_counts[i].
  __device__ __forceinline__ acc_t balance_factor() const {
    if (!params.dloss) return 0;
    const int num_experts = params.columns.num_experts;
    int64_t chosen = 0;
    for (int i = group.lane; i < num_experts; i += group.lanes) chosen += *params.counts.at(0, i);
    chosen = group.sum(chosen);
    const bool counted = inside && (!params.token_mask || *params.token_mask.at(0, row));
    if (!counted || chosen == 0) return 0;
    const double tokens = static_cast<double>(chosen) / params.choices.ids.num_cols;
    return static_cast<acc_t>(static_cast<double>(*params.dloss.at(0, 0)) * num_experts /
                              (tokens * tokens));
  }

  __device__ __forceinline__ void write_dlogits() const {
    const int num_experts = params.columns.num_experts;
    const int top_k = static_cast<int>(params.choices.ids.num_cols);
    const acc_t factor = balance_factor();
    const auto dprob = [&](int i) { return factor * static_cast<acc_t>(*params.counts.at(0, i)); };
    acc_t mean = 0;
    if (params.dloss && inside)
      for (int i = group.lane; i < num_experts; i += group.lanes)
        mean += *params.probs.at(row, i) * dprob(i);
    mean = group.sum(mean);
    const auto balance = [&](int i) -> acc_t {
      return factor == acc_t(0) ? acc_t(0) : *params.probs.at(row, i) * (dprob(i) - mean);
    };
    if (inside) {
      for (int i = group.lane; i < num_experts; i += group.lanes)
        if (choices().find(i) < 0) *params.dz.at(row, i) = convert<scalar_t>(balance(i));
    }
    acc_t dweight_mean = 0;
    for (int j = 0; j < top_k; ++j) {
      const int expert = chosen(j);
      const acc_t gradient = dweight(j, expert);
      if (expert >= 0) dweight_mean += choices().weights[j] * gradient;
    }
    for (int j = 0; j < top_k; ++j) {
      const int expert = chosen(j);
      const acc_t gradient = dweight(j, expert);
      if (expert >= 0 && group.lane == 0)
        *params.dz.at(row, expert) =
            convert<scalar_t>(balance(expert) + choices().weights[j] * (gradient - dweight_mean));
    }
  }

  // Columns from `first` on: weight · G where chosen, zeros elsewhere.
  __device__ __forceinline__ void write_dh(int first) const {
    if (!inside) return;
    const DenseColumns& columns = params.columns;
    for (int col = first + group.lane; col < columns.num_cols; col += group.lanes) {
      const int expert = columns.expert_of(col);
      const int choice = expert < 0 ? -1 : choices().find(expert);
      scalar_t dh = scalar_t(0.0f);
      if (choice >= 0) {
        const int r = col - columns.first_col(expert);
        dh = convert<scalar_t>(choices().weights[choice] * g(choice, expert, r));
      }
      *params.dz.at(row, col) = dh;
    }
  }

  // weight · G of every choice, a row for each.
  __device__ __forceinline__ void write_slots() const {
    const int top_k = static_cast<int>(params.choices.ids.num_cols);
    for (int j = 0; j < top_k; ++j) {
      const int expert = chosen(j);
      if (expert < 0) continue;
      for (int r = group.lane; r < params.columns.rank; r += group.lanes)
        *params.dh.at(row * top_k + j, r) =
            convert<scalar_t>(choices().weights[j] * g(j, expert, r));
    }
  }
};

}  // namespace detail

template <class Compute>
__global__ void __launch_bounds__(kGateThreads, kGateMinBlocks<Compute>)
    moe_gate_backward_kernel(GateBackwardParams<Compute> params) {
  const detail::GateBackwardRow<Compute> row(params, static_cast<int>(threadIdx.x));
  if (params.gates) row.write_dlogits();
  if (params.dh) {
    row.write_slots();
  } else {
    row.write_dh(params.gates ? params.columns.num_experts : 0);
  }
}

// ---- launch

template <class Compute>
void launch_moe_gate(GateParams<Compute> params, Stream stream) {
  const GatePlan plan = plan_gate(params.probs.num_rows, params.columns.num_experts);
  params.lanes = plan.lanes;
  launch_kernel("moe_gate", moe_gate_kernel<Compute>,
                {static_cast<unsigned>(plan.num_blocks), 1, 1, kGateThreads, 0}, params, stream);
}

// A thread for each element.
template <class T>
LaunchShape gate_shape(const Matrix<T>& matrix) {
  const int64_t num_elements = matrix.num_rows * matrix.num_cols;
  const int64_t num_blocks = (num_elements + kGateThreads - 1) / kGateThreads;
  return {static_cast<unsigned>(num_blocks), 1, 1, kGateThreads, 0};
}

template <class Compute>
void launch_dense_apply_gates(const DenseApplyGatesParams<Compute>& params, Stream stream) {
  launch_kernel("dense_apply_gates", dense_apply_gates_kernel<Compute>, gate_shape(params.gated),
                params, stream);
}

template <class Compute>
void launch_moe_gate_backward(GateBackwardParams<Compute> params, Stream stream) {
  const GatePlan plan = plan_gate(params.choices.ids.num_rows, params.columns.num_experts);
  params.lanes = plan.lanes;
  launch_kernel("moe_gate_backward", moe_gate_backward_kernel<Compute>,
                {static_cast<unsigned>(plan.num_blocks), 1, 1, kGateThreads, 0}, params, stream);
}

}  // namespace lowrank_ext::cuda
