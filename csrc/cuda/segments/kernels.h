// The kernel interface of segments: products whose thin operand differs from row to row. Defined in
// the .cu files beside it.
#pragma once

#include "common/arguments.h"

namespace lowrank_ext::cuda {

// Rows by group, for the kernels whose thin operand differs from row to row: what order_slots makes
// of M ids with extra_groups. Rows without a group (id -1), and those of a group of rank 0, are
// copies of the base, or zeros; rows of an invalid id, or of a group whose rank is out of range,
// are NaN. Nothing of a group without rows is read, nor what is beyond a group's rank.
//
// With several slots to a row (a token's experts), M is the number of slots: rows of thin matrices.
// Large matrices have M / slots_per_row rows.
struct RowGroups {
  const int64_t* rows;     // [M], slots sorted by group
  const int64_t* offsets;  // [n + 3]
  const int64_t* ranks;    // [n], or null: the whole rank for all
  int64_t num_rows, num_groups;
  int slots_per_row = 1;
  bool shared_dropout =
      true;  // one dropout mask, number 0, for all groups, else group i has mask i
};

// h [M, r]: h[m] = drop(x[m]) lora_a[i]ᵀ for row m of group i, x [M, K], lora_a [n, r, K].
int64_t segment_down_workspace_bytes(ComputeType compute_type, int64_t num_rows, int64_t num_groups,
                                     int64_t depth, int64_t rank, int num_sms);
void segment_down(ComputeType compute_type, const RowGroups& groups, const MatrixRef& x,
                  const StackRef& lora_a, const MatrixRef& h, const DropoutArgs& dropout,
                  void* workspace, const Device& device);

// The same sums, and those of segment_up_backward with one scaling for all groups, left as they are
// split.
PartialSumsSize segment_down_partials_workspace(ComputeType compute_type, int64_t num_rows,
                                                int64_t num_groups, int64_t depth, int64_t rank,
                                                int num_sms);
void segment_down_partials(ComputeType compute_type, const RowGroups& groups, const MatrixRef& x,
                           const StackRef& lora_a, const DropoutArgs& dropout, const PartialSums& h,
                           const Device& device);
void segment_up_backward_partials(ComputeType compute_type, const RowGroups& groups,
                                  const MatrixRef& dout, const StackRef& lora_b, double scaling,
                                  const PartialSums& dh, const Device& device);

// y [M, N]: y[m] = base[m] + scaling[i] · h[m] lora_b[i]ᵀ, lora_b [n, N, r], scaling [1, n] in fp32
// or fp64.
void segment_up(ComputeType compute_type, const RowGroups& groups, const MatrixRef& base,
                const MatrixRef& h, const StackRef& lora_b, const MatrixRef& scaling,
                const MatrixRef& y, const Device& device);

// dh [M, r]: dh[m] = scaling[i] · dout[m] lora_b[i]. Workspace as of segment_down at depth N.
void segment_up_backward(ComputeType compute_type, const RowGroups& groups, const MatrixRef& dout,
                         const StackRef& lora_b, const MatrixRef& scaling, const MatrixRef& dh,
                         void* workspace, const Device& device);

// dlora_b[i] [N, r] = scale · scaling[i] · Σ dout[m]ᵀ h[m] over the rows of group i; scaling may be
// absent.
void segment_up_backward_lora_b(ComputeType compute_type, const RowGroups& groups,
                                const MatrixRef& dout, const MatrixRef& h, const MatrixRef& scaling,
                                double scale, const StackRef& dlora_b, const Device& device);

// dlora_a[i] [r, K] = Σ dh[m]ᵀ drop(x[m]) over the rows of group i.
void segment_down_backward_lora_a(ComputeType compute_type, const RowGroups& groups,
                                  const MatrixRef& dh, const MatrixRef& x,
                                  const DropoutArgs& dropout, const StackRef& dlora_a,
                                  const Device& device);

// dx [M, K]: dx[m] = drop'(dh[m] lora_a[i]).
void segment_down_backward_x(ComputeType compute_type, const RowGroups& groups, const MatrixRef& dh,
                             const StackRef& lora_a, const DropoutArgs& dropout,
                             const MatrixRef& dx, const Device& device);

}  // namespace lowrank_ext::cuda
