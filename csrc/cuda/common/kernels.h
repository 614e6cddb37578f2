// What the host code (branch.cu) calls: one function per kernel family, dispatched on the number
// kind in the family's .cu file. No torch header: tensors arrive as Any matrices.
//
// Workspaces are scratch on the device. Their size comes from the plan, so the size functions take
// what the plan takes. All of them may be zero.
#pragma once

#include <cstdint>

#include "experts/dense_columns.h"
#include "common/launch.h"

namespace lowrank_ext::cuda {

// How the elements of x are stored and multiplied. kTf32 and kFp32 both store float.
enum class NumberKind { kBf16, kFp16, kTf32, kFp32, kFp64 };

enum class ElementType { kBf16, kFp16, kFp32, kFp64 };

// A [num_rows, num_cols] matrix of dense rows on the device; a vector has one row. data is null
// where the argument is absent (or the output not asked for).
struct Any {
  void* data = nullptr;
  ElementType type = ElementType::kFp32;
  int64_t num_rows = 0, num_cols = 0;
  int64_t row_stride = 0;  // in elements; 0 repeats one row

  explicit operator bool() const { return data != nullptr; }
};

// A matrix for each group.
struct AnyStack {
  Any first;  // group 0's
  int64_t num_groups = 0;
  int64_t group_stride = 0;  // in elements
};

// mid(h) = (h ⊙ rank_scale) coreᵀ; absent factors are ones. Elements as x's.
struct Mid {
  Any rank_scale;  // [1, r]
  Any core;        // [r, r]
};

struct DropoutArgs {
  uint32_t threshold = 0;         // of 65536: draws below it drop their element; 0 draws nothing
  double scale = 1.0;             // of what is kept
  const int64_t* seed = nullptr;  // one element, on the device
};

struct Device {
  int num_sms;
  Stream stream;
};

// An adapter tensor as it was given, and where its elements go: rounded to x's type, rows dense.
struct AdapterCopy {
  Any source;          // fp32, or of rounded's type
  int64_t col_stride;  // of source, in elements
  Any rounded;
};

// One launch for all copies of a call.
constexpr int kMaxAdapterCopies = 5;
void round_adapters(const AdapterCopy* copies, int num_copies, const Device& device);

// h [M, r] = drop(x) lora_aᵀ, x [M, K], lora_a [r, K].
int64_t lowrank_down_workspace_bytes(NumberKind kind, int64_t num_rows, int64_t in_features,
                                     int64_t rank, int num_sms);
void lowrank_down(NumberKind kind, const Any& x, const Any& lora_a, const Any& h,
                  const DropoutArgs& dropout, void* workspace, const Device& device);

// The same sums, of W [R, K] in place of lora_a, left as they are split: part s in rows
// [s M, (s + 1) M) of data [num_splits · M, R], rows row_stride elements apart, in the
// accumulator's type.
struct ZPartials {
  void* data = nullptr;
  int num_splits = 0;
  int64_t row_stride = 0;
};
struct PartialSumsWorkspace {
  int num_splits;
  int64_t row_stride, bytes;
};
PartialSumsWorkspace lowrank_down_partials_workspace(NumberKind kind, int64_t num_rows,
                                                     int64_t in_features, int64_t num_cols,
                                                     int num_sms);
void lowrank_down_partials(NumberKind kind, const Any& x, const Any& w, const ZPartials& z,
                           const Device& device);

// y [M, N] = base + scaling · out_scale ⊙ (mid(h) lora_bᵀ). base is [M, N], with row stride 0 where
// it is a bias, or absent (zero); it may be y itself.
void lowrank_up(NumberKind kind, const Any& base, const Any& h, const Mid& mid, const Any& lora_b,
                const Any& out_scale, double scaling, const Any& y, const Device& device);

// G = scaling · (dout ⊙ out_scale) lora_b, as partial sums: split s holds rows [s M, (s + 1) M) of
// data [num_splits · M, r] in the accumulator's type.
struct GPartials {
  void* data = nullptr;
  int num_splits = 0;
};

struct UpBackwardWorkspace {
  int num_g_splits;
  int64_t p_bytes;
};

// One pass over dout [M, N]: G (where g.data is not null) and, through P = scaling · doutᵀ mid(h),
// dlora_b [N, r] = out_scale ⊙ P and dout_scale [1, N] = rowsum(lora_b ⊙ P) where given.
UpBackwardWorkspace lowrank_up_backward_workspace(NumberKind kind, int64_t num_rows,
                                                  int64_t out_features, int64_t rank, bool need_g,
                                                  bool need_p, int num_sms);
void lowrank_up_backward(NumberKind kind, const Any& dout, const Any& h, const Mid& mid,
                         const Any& lora_b, const Any& out_scale, double scaling,
                         const GPartials& g, void* p_workspace, const Any& dlora_b,
                         const Any& dout_scale, const Device& device);

// On [M, r] only. du = sum of G's splits; dh [M, r] (x's type) = (du core) ⊙ rank_scale;
// dcore [r, r] = duᵀ (h ⊙ rank_scale); drank_scale [1, r] = colsum((du core) ⊙ h). h may be absent
// when neither dcore nor drank_scale is asked for; dh may be absent too.
int64_t lowrank_mid_backward_workspace_bytes(NumberKind kind, int64_t num_rows, int64_t rank,
                                             bool need_dcore, bool need_drank_scale, int num_sms);
void lowrank_mid_backward(NumberKind kind, const GPartials& g, const Any& h, const Mid& mid,
                          int64_t num_rows, int64_t rank, const Any& dh, const Any& dcore,
                          const Any& drank_scale, void* workspace, const Device& device);

// dlora_a [r, K] = dhᵀ drop(x), one pass over x [M, K].
int64_t lowrank_down_backward_workspace_bytes(NumberKind kind, int64_t num_rows,
                                              int64_t in_features, int64_t rank, int num_sms);
void lowrank_down_backward_lora_a(NumberKind kind, const Any& dh, const Any& x,
                                  const DropoutArgs& dropout, const Any& dlora_a, void* workspace,
                                  const Device& device);

// dw [R, K] = dzᵀ x, left as it is split: part s in rows [s R, (s + 1) R) of the workspace, rows
// row_stride elements apart. Elements of x that are not finite count as zero: the token's own
// experts have NaN in dz, and its others zeros, which the product would make NaN.
PartialSumsWorkspace moe_down_backward_workspace(NumberKind kind, int64_t num_rows,
                                                 int64_t in_features, int64_t num_cols,
                                                 int num_sms);
void moe_down_backward_w(NumberKind kind, const Any& dz, const Any& x, void* workspace,
                         const Device& device);

// dx [M, K] = base + drop'(dh lora_a). base may be absent (zero) or dx itself.
void lowrank_down_backward_x(NumberKind kind, const Any& base, const Any& dh, const Any& lora_a,
                             const DropoutArgs& dropout, const Any& dx, const Device& device);

// ---- moe_lowrank_add in the dense form: router and experts as columns of one thin product

// w [R, K] = router_weight [E, K] and lora_a [E r, K] as `columns` says; up [N, E r] = lora_b
// [E N, r] with the experts side by side. In x's type; either may be absent.
void stack_experts(NumberKind kind, const ExpertColumns& columns, const Any& router_weight,
                   const Any& lora_a, const Any& lora_b, const Any& w, const Any& up,
                   const Device& device);

// What the router decided about M tokens. All of it dense, statistics in the accumulator's type.
struct ExpertRouting {
  Any probs, weights;      // [M, E], [M, k]
  int64_t* ids;            // [M, k]
  int64_t* counts;         // [E]: counted tokens per expert
  const bool* token_mask;  // [M]: which tokens count, or null: all
};

// From z [M, R]: the routing and its balance loss, h [M, E r] = z where the expert
// is chosen and zeros elsewhere, and gated [M, E r] = weight · h.
int64_t moe_gate_workspace_bytes(int64_t num_rows, int num_experts);
void moe_gate(NumberKind kind, const ExpertColumns& columns, const ZPartials& z,
              const ExpertRouting& routing, const Any& balance_loss, const Any& h, const Any& gated,
              void* workspace, const Device& device);

// gated alone, of a routing that is there.
void moe_gate_h(NumberKind kind, const ExpertColumns& columns, const ExpertRouting& routing,
                const Any& h, const Any& gated, const Device& device);

// dz [M, R] = the gradient of z from G [M, E r] = scaling · dout up and from the balance loss's
// (absent: none). Without `gates` the router's columns are zero, and h and probs are not read.
void moe_gate_backward(NumberKind kind, const ExpertColumns& columns, const GPartials& g,
                       const ExpertRouting& routing, const Any& dbalance_loss, const Any& h,
                       bool gates, const Any& dz, const Device& device);

// The gradients from those of w, partial sums dw [num_partials · R, K], and of up, dup [N, E r],
// both in the accumulator's type. Gradients that are absent are not asked for.
void unstack_experts(NumberKind kind, const ExpertColumns& columns, const Any& dw, int num_partials,
                     const Any& dup, const Any& drouter_weight, const Any& dlora_a,
                     const Any& dlora_b, const Device& device);

// The three products of the dense form under dropout: each group of columns sees x through a mask
// of its own, the router's through none. columns is ExpertColumns::grouped of the same
// shared_dropout, the threshold at least 1. w [R, K] and dz [M, R] are of x's type, and zero in
// columns that are nobody's.

// z [M, R] = drop_g(x) w_gᵀ, left as it is split.
PartialSumsWorkspace moe_down_workspace(NumberKind kind, int64_t num_rows, int64_t in_features,
                                        int64_t num_cols, int num_sms);
void moe_down(NumberKind kind, const Any& x, const Any& w, const ExpertColumns& columns,
              bool shared_dropout, const DropoutArgs& dropout, const ZPartials& z,
              const Device& device);

// dw [R, K] = dz_gᵀ drop_g(x), left as it is split: part s in rows [s R, (s + 1) R) of dw. In the
// experts' rows, what is not finite in x counts as zero; the token's own experts have NaN in dz.
PartialSumsWorkspace moe_outer_workspace(NumberKind kind, int64_t num_rows, int64_t in_features,
                                         int64_t num_cols, int num_sms);
void moe_outer(NumberKind kind, const Any& dz, const Any& x, const ExpertColumns& columns,
               bool shared_dropout, const DropoutArgs& dropout, void* dw, const Device& device);

// dx [M, K] = Σ_g drop'_g(dz_g w_g).
void moe_expand(NumberKind kind, const Any& dz, const Any& w, const ExpertColumns& columns,
                bool shared_dropout, const DropoutArgs& dropout, const Any& dx,
                const Device& device);

// ---- moe_lowrank_add in the grouped form: token m's choice j is slot m k + j, and what lies
// between an expert's projections has a row for each slot

// From the sums of the slots' h, left as they are split: h [M, E r] with zeros where an expert was
// not chosen, and gated [M k, r] = weight · h.
void moe_slots(NumberKind kind, const ZPartials& sums, const ExpertRouting& routing, const Any& h,
               const Any& gated, const Device& device);

// gated alone, from h.
void moe_slots_h(NumberKind kind, const ExpertRouting& routing, const Any& h, const Any& gated,
                 const Device& device);

// G: a row for each slot, [num_splits · M k, r], or for each token, [num_splits · M, E r].
struct SlotGradient {
  ZPartials sums;
  bool by_slot;
};

// dlogits [M, E] (absent: not asked for, and then h and probs are not read) and dh [M k, r]: see
// moe_gate_backward.
void moe_slots_backward(NumberKind kind, const SlotGradient& g, const ExpertRouting& routing,
                        const Any& dbalance_loss, const Any& h, const Any& dlogits, const Any& dh,
                        const Device& device);

// Sums over the experts that each token chose. tokens [M] is order_tokens', ids [M, k].
struct TokenChoices {
  const int64_t* tokens;
  const int64_t* ids;
  int64_t num_tokens, top_k;
};

// y [M, N] = base + scaling Σ_j gated[m k + j] lora_b[e_j]ᵀ, lora_b [E, N, r].
void expert_up(NumberKind kind, const TokenChoices& choices, const Any& base, const Any& gated,
               const AnyStack& lora_b, double scaling, const Any& y, const Device& device);

// dx [M, K] = dlogits router_weight + Σ_j drop'(dh[m k + j] lora_a[e_j]), through the mask of
// expert e_j or, shared, mask 0.
void expert_down_backward_x(NumberKind kind, const TokenChoices& choices, const Any& dlogits,
                            const Any& router_weight, const Any& dh, const AnyStack& lora_a,
                            bool shared_dropout, const DropoutArgs& dropout, const Any& dx,
                            const Device& device);

// Slots stably ordered by their group: ids [S], an expert or an adapter each, 0 … n - 1. With
// extra_groups two more follow: n for the slots with id -1, n + 1 for those with any other id that
// is not a group's; without, every id must be a group's. One launch where that pays, else three.
struct SlotOrder {
  int64_t* sorted_slots;  // [S]
  int64_t* offsets;       // [groups + 1]: group g's are sorted_slots[offsets[g] … offsets[g + 1]]
  int64_t* positions;     // [S]: the inverse permutation, or null
};
int64_t order_slots_workspace_bytes(int64_t num_slots, int64_t num_groups, int num_sms);
void order_slots(const int64_t* ids, int64_t num_slots, int64_t num_groups, bool extra_groups,
                 const SlotOrder& order, void* workspace, const Device& device);

// Tokens with ids [T, k], ordered such that neighbours chose the same experts, or most of the same.
int64_t order_tokens_workspace_bytes(int64_t num_tokens, int64_t num_experts, int num_sms);
void order_tokens(const int64_t* ids, int64_t num_tokens, int64_t top_k, int64_t num_experts,
                  int64_t* tokens, void* workspace, const Device& device);

// Top-k routing of logits [T, E]; token_mask [T] or null. Statistics are fp32, fp64 beside fp64.
struct Routing {
  Any topk_weights;        // [T, k]
  int64_t* topk_ids;       // [T, k]
  int64_t* expert_counts;  // [E]
  Any balance_loss;        // one element
  SlotOrder order;         // of the T k slots, by expert
};
int64_t route_workspace_bytes(const Any& logits, int64_t top_k, int num_sms);
void route(const Any& logits, int64_t top_k, const bool* token_mask, const Routing& routing,
           void* workspace, const Device& device);

// dlogits [T, E] from dtopk_weights [T, k] and dbalance_loss, of which either may be absent.
void route_backward(const Any& dtopk_weights, const Any& dbalance_loss, const Any& logits,
                    const int64_t* topk_ids, int64_t top_k, const int64_t* expert_counts,
                    const bool* token_mask, const Any& dlogits, const Device& device);

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
  bool masks_by_group = false;  // dropout: each group has the mask of its number, or all mask 0
};

// h [M, r]: h[m] = drop(x[m]) lora_a[i]ᵀ for row m of group i, x [M, K], lora_a [n, r, K].
int64_t segment_down_workspace_bytes(NumberKind kind, int64_t num_rows, int64_t num_groups,
                                     int64_t depth, int64_t rank, int num_sms);
void segment_down(NumberKind kind, const RowGroups& groups, const Any& x, const AnyStack& lora_a,
                  const Any& h, const DropoutArgs& dropout, void* workspace, const Device& device);

// The same sums, and those of segment_up_backward with one scaling for all groups, left as they are
// split.
PartialSumsWorkspace segment_down_partials_workspace(NumberKind kind, int64_t num_rows,
                                                     int64_t num_groups, int64_t depth,
                                                     int64_t rank, int num_sms);
void segment_down_partials(NumberKind kind, const RowGroups& groups, const Any& x,
                           const AnyStack& lora_a, const DropoutArgs& dropout, const ZPartials& h,
                           const Device& device);
void segment_up_backward_partials(NumberKind kind, const RowGroups& groups, const Any& dout,
                                  const AnyStack& lora_b, double scaling, const ZPartials& dh,
                                  const Device& device);

// y [M, N]: y[m] = base[m] + scaling[i] · h[m] lora_b[i]ᵀ, lora_b [n, N, r], scaling [1, n] in fp32
// or fp64.
void segment_up(NumberKind kind, const RowGroups& groups, const Any& base, const Any& h,
                const AnyStack& lora_b, const Any& scaling, const Any& y, const Device& device);

// dh [M, r]: dh[m] = scaling[i] · dout[m] lora_b[i]. Workspace as of segment_down at depth N.
void segment_up_backward(NumberKind kind, const RowGroups& groups, const Any& dout,
                         const AnyStack& lora_b, const Any& scaling, const Any& dh, void* workspace,
                         const Device& device);

// dlora_b[i] [N, r] = scale · scaling[i] · Σ dout[m]ᵀ h[m] over the rows of group i; scaling may be
// absent.
void segment_up_backward_lora_b(NumberKind kind, const RowGroups& groups, const Any& dout,
                                const Any& h, const Any& scaling, double scale,
                                const AnyStack& dlora_b, const Device& device);

// dlora_a[i] [r, K] = Σ dh[m]ᵀ drop(x[m]) over the rows of group i.
void segment_down_backward_lora_a(NumberKind kind, const RowGroups& groups, const Any& dh,
                                  const Any& x, const DropoutArgs& dropout, const AnyStack& dlora_a,
                                  const Device& device);

// dx [M, K]: dx[m] = drop'(dh[m] lora_a[i]).
void segment_down_backward_x(NumberKind kind, const RowGroups& groups, const Any& dh,
                             const AnyStack& lora_a, const DropoutArgs& dropout, const Any& dx,
                             const Device& device);

}  // namespace lowrank_ext::cuda
