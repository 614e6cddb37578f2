// The low-rank branch on the GPU, forward and backward, for both ops that carry it.
#pragma once

#include <cstdint>
#include <optional>

#include "ops/branch.h"

namespace lowrank_ext::cuda {

// Below this size of y (or dx) in bytes the base's product comes first. The SIMT executor's build
// can set it, so that both orders run at the sizes of its tests.
#ifdef LOWRANK_EXT_SIMT
inline int64_t min_seeded_bytes = 4096;
#else
inline constexpr int64_t min_seeded_bytes = 8 << 20;
#endif

// Who writes an output that the vendor's product and the branch share, [num_rows, num_cols].
// Seeded: the branch writes it and the product adds to it (beta = 1); its kernel reads the seed
// under its arithmetic, so the branch costs one pass over the output, a write. Otherwise the
// product writes it and the branch adds to it in place, a read and a write.
//
// What seeding changes in the numbers: the seed (bias + branch in the forward) is rounded to the
// output's dtype before the product is added, where otherwise the product is; and the vendor is
// asked for a product with a full matrix C in place of one with a bias row or none, for which it
// may choose another kernel, with another order of summation. So a zero branch leaves the base's
// output bit for bit only where the base comes first. That holds for few rows (decoding), where the
// output is small beside the weights and a pass over it is not worth it anyway.
//
// The limit is not measured yet on a GPU: reading 8 MiB at 3 TB/s takes 3 us, about what a launch
// costs.
inline bool seed_base_output(int64_t num_rows, int64_t num_cols, int64_t element_size) {
  return num_rows * num_cols * element_size >= min_seeded_bytes;
}

// Both run on the current device, which the caller has set.
//
// y [M, N] = base + scaling · out_scale ⊙ (mid(h) lora_bᵀ) and h [M, r] = drop(x) lora_aᵀ, x [M,
// K], M > 0. base: [M, N] (y itself too), or a vector [N] that is added to every row, or nothing.
void branch_forward(const BranchArgs& args, const Tensor& x, const std::optional<Tensor>& base,
                    const Tensor& y, const Tensor& h);

// dout [M, N], M > 0, x [M, K] where needs.dlora_a, h [M, r] where needs.h(). gradients.dx [M, K]
// becomes dout weight + drop'(dh lora_a), the first term where a weight [N, K] is given.
void branch_backward(const BranchArgs& args, const BranchNeeds& needs, const Tensor& dout,
                     const std::optional<Tensor>& x, const std::optional<Tensor>& h,
                     const std::optional<Tensor>& weight, const BranchGradients& gradients);

}  // namespace lowrank_ext::cuda
