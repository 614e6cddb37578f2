// Where router and experts lie among the R columns of the dense form of moe_lowrank_add: W [R, K]
// stacks router_weight and lora_a, z [M, R] = x Wᵀ holds logits and every expert's h, and dz [M, R]
// their gradients. Router first, then the experts, each in `rank` neighboring columns.
//
// Without dropout the columns are packed. With it, columns that see the same mask form a group (the
// router, which sees none; then all experts, or each of them), and every group starts on a multiple
// of what a matrix product takes at a time. Columns between groups are zero in W and dz; in z they
// are not read.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lowrank_ext::cuda {

struct DenseColumns {
  int num_experts, rank;  // of one expert
  int first_expert;       // first column of expert 0
  int expert_stride;      // from one expert's first column to the next one's
  int num_cols;           // R

  static DenseColumns packed(int num_experts, int rank) {
    return {num_experts, rank, num_experts, rank, num_experts + num_experts * rank};
  }
  static DenseColumns padded(int num_experts, int rank, bool shared_dropout,
                             int multiple = kPaddedMultiple) {
    const auto padded = [&](int size) { return (size + multiple - 1) / multiple * multiple; };
    const int first = padded(num_experts);
    if (shared_dropout) return {num_experts, rank, first, rank, first + padded(num_experts * rank)};
    const int stride = padded(rank);
    return {num_experts, rank, first, stride, first + num_experts * stride};
  }
  static constexpr int kPaddedMultiple = 16;  // contraction step of a product of 2-byte elements

  __host__ __device__ __forceinline__ int first_col(int expert) const {
    return first_expert + expert * expert_stride;
  }
  // The expert whose column this is, -1 for the router's columns and for padding.
  __host__ __device__ __forceinline__ int expert_of(int col) const {
    const int inside = col - first_expert;
    if (inside < 0 || inside >= num_experts * expert_stride) return -1;
    return inside % expert_stride < rank ? inside / expert_stride : -1;
  }
  // Between a column and its place in what holds the experts only, [.., E r]: an expert's column
  // has one (so expert_of is not -1), and every place has a column.
  __host__ __device__ __forceinline__ int place_of(int col) const {
    const int expert = expert_of(col);
    return expert * rank + col - first_col(expert);
  }
  __host__ __device__ __forceinline__ int col_of(int place) const {
    return first_col(place / rank) + place % rank;
  }
};

}  // namespace lowrank_ext::cuda
