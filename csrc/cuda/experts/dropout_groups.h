// The dense form of moe_lowrank_add under dropout. Columns of z that see x through the same dropout
// mask form a group of whole units (DenseColumns::padded). The router's columns come first and see
// x itself. The experts' columns are one group with mask 0 where dropout is shared, else one group
// per expert, with the expert's mask (word 3 of the Philox counter: dropout.cuh).
#pragma once

#include "experts/dense_columns.h"

namespace lowrank_ext::cuda {

// Neighboring columns that a kernel treats alike.
constexpr int kUnitCols = DenseColumns::kPaddedMultiple;
static_assert(kUnitCols == 16, "two pieces of a product's columns, and its contraction step");

struct DropoutGroups {
  int num_router_cols;  // the router's columns
  int group_cols;       // of every other group
  int num_cols;

  static DropoutGroups of(const DenseColumns& columns, bool shared_dropout) {
    const int expert_cols = columns.num_cols - columns.first_expert;
    return {columns.first_expert, shared_dropout ? expert_cols : columns.expert_stride,
            columns.num_cols};
  }
  // The mask that the columns of a unit see, -1 where they see none.
  __host__ __device__ __forceinline__ int mask_of(int col) const {
    return col < num_router_cols ? -1 : (col - num_router_cols) / group_cols;
  }
};

}  // namespace lowrank_ext::cuda
