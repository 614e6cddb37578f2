// The kernel interface of the low-rank branch: what host code calls, one function per kernel or
// chain of kernels, defined in the .cu files beside it, which choose the compute type's
// instantiation.
//
// Workspaces are scratch on the device; their sizes come from the plans, so the size functions take
// what a plan takes. All of them may be zero.
#pragma once

#include "common/arguments.h"

namespace lowrank_ext::cuda {

// mid(h) = (h ⊙ rank_scale) coreᵀ; absent factors are ones. Elements as x's.
struct Mid {
  MatrixRef rank_scale;  // [1, r]
  MatrixRef core;        // [r, r]
};

// h [M, r] = drop(x) lora_aᵀ, x [M, K], lora_a [r, K].
int64_t lowrank_down_workspace_bytes(ComputeType compute_type, int64_t num_rows,
                                     int64_t in_features, int64_t rank, int num_sms);
void lowrank_down(ComputeType compute_type, const MatrixRef& x, const MatrixRef& lora_a,
                  const MatrixRef& h, const DropoutArgs& dropout, void* workspace,
                  const Device& device);

// The same sums, of W [R, K] in place of lora_a, left as they are split.
PartialSumsSize lowrank_down_partials_workspace(ComputeType compute_type, int64_t num_rows,
                                                int64_t in_features, int64_t num_cols, int num_sms);
void lowrank_down_partials(ComputeType compute_type, const MatrixRef& x, const MatrixRef& w,
                           const PartialSums& z, const Device& device);

// y [M, N] = base + scaling · out_scale ⊙ (mid(h) lora_bᵀ). base is [M, N], with row stride 0 where
// it is a bias, or absent (zero); it may be y itself.
void lowrank_up(ComputeType compute_type, const MatrixRef& base, const MatrixRef& h, const Mid& mid,
                const MatrixRef& lora_b, const MatrixRef& out_scale, double scaling,
                const MatrixRef& y, const Device& device);

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
UpBackwardWorkspace lowrank_up_backward_workspace(ComputeType compute_type, int64_t num_rows,
                                                  int64_t out_features, int64_t rank, bool need_g,
                                                  bool need_p, int num_sms);
void lowrank_up_backward(ComputeType compute_type, const MatrixRef& dout, const MatrixRef& h,
                         const Mid& mid, const MatrixRef& lora_b, const MatrixRef& out_scale,
                         double scaling, const GPartials& g, void* p_workspace,
                         const MatrixRef& dlora_b, const MatrixRef& dout_scale,
                         const Device& device);

// On [M, r] only. du = sum of G's splits; dh [M, r] (x's type) = (du core) ⊙ rank_scale;
// dcore [r, r] = duᵀ (h ⊙ rank_scale); drank_scale [1, r] = colsum((du core) ⊙ h). h may be absent
// when neither dcore nor drank_scale is asked for; dh may be absent too.
int64_t lowrank_mid_backward_workspace_bytes(ComputeType compute_type, int64_t num_rows,
                                             int64_t rank, bool need_dcore, bool need_drank_scale,
                                             int num_sms);
void lowrank_mid_backward(ComputeType compute_type, const GPartials& g, const MatrixRef& h,
                          const Mid& mid, int64_t num_rows, int64_t rank, const MatrixRef& dh,
                          const MatrixRef& dcore, const MatrixRef& drank_scale, void* workspace,
                          const Device& device);

// dlora_a [r, K] = dhᵀ drop(x), one pass over x [M, K].
int64_t lowrank_down_backward_workspace_bytes(ComputeType compute_type, int64_t num_rows,
                                              int64_t in_features, int64_t rank, int num_sms);
void lowrank_down_backward_lora_a(ComputeType compute_type, const MatrixRef& dh, const MatrixRef& x,
                                  const DropoutArgs& dropout, const MatrixRef& dlora_a,
                                  void* workspace, const Device& device);

// dx [M, K] = base + drop'(dh lora_a). base may be absent (zero) or dx itself.
void lowrank_down_backward_x(ComputeType compute_type, const MatrixRef& base, const MatrixRef& dh,
                             const MatrixRef& lora_a, const DropoutArgs& dropout,
                             const MatrixRef& dx, const Device& device);

// Partial sums of scale · drop(source)ᵀ thin, source [M, C] and thin [M, r]: part s in rows
// [s C, (s + 1) C) of data [num_splits · C, r] or, transposed, in rows [s r, (s + 1) r) of data
// [num_splits · r, C]. finite_only: elements of source that are not finite count as zero.
PartialSumsSize outer_sum_size(ComputeType compute_type, int64_t num_rows, int64_t num_cols,
                               int64_t rank, bool transposed, int num_sms);
void outer_sum(ComputeType compute_type, const MatrixRef& source, const MatrixRef& thin,
               const DropoutArgs& dropout, double scale, bool transposed, void* partials,
               const Device& device, bool finite_only = false);

}  // namespace lowrank_ext::cuda
