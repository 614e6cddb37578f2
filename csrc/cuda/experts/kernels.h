// The kernel interface of moe_lowrank_add: what host code calls, defined in the .cu files beside
// it. Names that begin with dense or grouped belong to one form (experts.h), others to both.
#pragma once

#include "common/arguments.h"
#include "experts/dense_columns.h"
#include "lowrank/kernels.h"

namespace lowrank_ext::cuda {

// ---- both forms

// What the router decided about M tokens. All of it dense, statistics in the accumulator's type.
struct ExpertRouting {
  MatrixRef probs, weights;  // [M, E], [M, k]
  int64_t* ids;              // [M, k]
  int64_t* counts;           // [E]: counted tokens per expert
  const bool* token_mask;    // [M]: which tokens count, or null: all
};

// From z [M, R]: the routing and its balance loss, h [M, E r] = z where the expert is chosen and
// zeros elsewhere, and gated [M, E r] = weight · h. The grouped form has the router's columns only,
// and neither h nor gated.
int64_t moe_gate_workspace_bytes(int64_t num_rows, int num_experts);
void moe_gate(ComputeType compute_type, const DenseColumns& columns, const PartialSums& z,
              const ExpertRouting& routing, const MatrixRef& balance_loss, const MatrixRef& h,
              const MatrixRef& gated, void* workspace, const Device& device);

// ---- the dense form: router and experts as columns of one thin product

// w [R, K] = router_weight [E, K] and lora_a [E r, K] as `columns` says; up [N, E r] = lora_b
// [E N, r] with the experts side by side. In x's type; either may be absent.
void dense_stack(ComputeType compute_type, const DenseColumns& columns,
                 const MatrixRef& router_weight, const MatrixRef& lora_a, const MatrixRef& lora_b,
                 const MatrixRef& w, const MatrixRef& up, const Device& device);

// The gradients from those of w, partial sums dw [num_partials · R, K], and of up, dup [N, E r],
// both in the accumulator's type. Gradients that are absent are not asked for.
void dense_unstack(ComputeType compute_type, const DenseColumns& columns, const MatrixRef& dw,
                   int num_partials, const MatrixRef& dup, const MatrixRef& drouter_weight,
                   const MatrixRef& dlora_a, const MatrixRef& dlora_b, const Device& device);

// gated [M, E r] = weight · h: applies given gates, does not route.
void dense_apply_gates(ComputeType compute_type, const DenseColumns& columns,
                       const ExpertRouting& routing, const MatrixRef& h, const MatrixRef& gated,
                       const Device& device);

// dz [M, R] = the gradient of z from G [M, E r] = scaling · dout up and from the balance loss's
// (absent: none). Without `gates` the router's columns are zero, and h and probs are not read.
void dense_gate_backward(ComputeType compute_type, const DenseColumns& columns, const GPartials& g,
                         const ExpertRouting& routing, const MatrixRef& dbalance_loss,
                         const MatrixRef& h, bool gates, const MatrixRef& dz, const Device& device);

// The three products under dropout: each group of columns g sees x through the group's dropout
// mask, the router's columns see x itself. columns is DenseColumns::padded of the same
// shared_dropout, the threshold at least 1. w [R, K] and dz [M, R] are of x's type, and zero in
// padding columns.

// z [M, R] = drop_g(x) w_gᵀ, left as it is split.
PartialSumsSize dense_down_workspace(ComputeType compute_type, int64_t num_rows,
                                     int64_t in_features, int64_t num_cols, int num_sms);
void dense_down(ComputeType compute_type, const MatrixRef& x, const MatrixRef& w,
                const DenseColumns& columns, bool shared_dropout, const DropoutArgs& dropout,
                const PartialSums& z, const Device& device);

// dw [R, K] = dz_gᵀ drop_g(x), left as it is split: part s in rows [s R, (s + 1) R) of dw. In the
// experts' rows, what is not finite in x counts as zero; the token's own experts have NaN in dz.
PartialSumsSize dense_outer_workspace(ComputeType compute_type, int64_t num_rows,
                                      int64_t in_features, int64_t num_cols, int num_sms);
void dense_outer(ComputeType compute_type, const MatrixRef& dz, const MatrixRef& x,
                 const DenseColumns& columns, bool shared_dropout, const DropoutArgs& dropout,
                 void* dw, const Device& device);

// dx [M, K] = Σ_g drop'_g(dz_g w_g).
void dense_expand(ComputeType compute_type, const MatrixRef& dz, const MatrixRef& w,
                  const DenseColumns& columns, bool shared_dropout, const DropoutArgs& dropout,
                  const MatrixRef& dx, const Device& device);

// Without dropout, columns packed: dw [R, K] = dzᵀ x, left as it is split. Elements of x that are
// not finite count as zero: the token's own experts have NaN in dz, and its others zeros, which the
// product would make NaN.
PartialSumsSize dense_outer_packed_workspace(ComputeType compute_type, int64_t num_rows,
                                             int64_t in_features, int64_t num_cols, int num_sms);
void dense_outer_packed(ComputeType compute_type, const MatrixRef& dz, const MatrixRef& x,
                        void* workspace, const Device& device);

// ---- the grouped form: token m's choice j is slot m k + j, and what lies between an expert's
// projections has a row for each slot

// From the sums of the slots' h, left as they are split: h [M, E r] with zeros where an expert was
// not chosen, and gated [M k, r] = weight · h.
void grouped_gate(ComputeType compute_type, const PartialSums& sums, const ExpertRouting& routing,
                  const MatrixRef& h, const MatrixRef& gated, const Device& device);

// gated [M k, r] = weight · h: applies given gates, does not route.
void grouped_apply_gates(ComputeType compute_type, const ExpertRouting& routing, const MatrixRef& h,
                         const MatrixRef& gated, const Device& device);

// G: a row for each slot, [num_splits · M k, r], or for each token, [num_splits · M, E r].
struct SlotGradient {
  PartialSums sums;
  bool by_slot;
};

// dlogits [M, E] (absent: not asked for, and then h and probs are not read) and dh [M k, r]: see
// dense_gate_backward.
void grouped_gate_backward(ComputeType compute_type, const SlotGradient& g,
                           const ExpertRouting& routing, const MatrixRef& dbalance_loss,
                           const MatrixRef& h, const MatrixRef& dlogits, const MatrixRef& dh,
                           const Device& device);

// Sums over the experts that each token chose. tokens [M] is order_tokens', ids [M, k].
struct TokenChoices {
  const int64_t* tokens;
  const int64_t* ids;
  int64_t num_tokens, top_k;
};

// y [M, N] = base + scaling Σ_j gated[m k + j] lora_b[e_j]ᵀ, lora_b [E, N, r].
void grouped_up(ComputeType compute_type, const TokenChoices& choices, const MatrixRef& base,
                const MatrixRef& gated, const StackRef& lora_b, double scaling, const MatrixRef& y,
                const Device& device);

// dx [M, K] = dlogits router_weight + Σ_j drop'(dh[m k + j] lora_a[e_j]), through the mask of
// expert e_j or, with shared dropout, mask 0.
void grouped_down_backward_x(ComputeType compute_type, const TokenChoices& choices,
                             const MatrixRef& dlogits, const MatrixRef& router_weight,
                             const MatrixRef& dh, const StackRef& lora_a, bool shared_dropout,
                             const DropoutArgs& dropout, const MatrixRef& dx, const Device& device);

}  // namespace lowrank_ext::cuda
