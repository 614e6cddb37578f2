// The low-rank branch on the CPU, forward and backward, for both ops that carry it.
#pragma once

#include <optional>

#include "ops/branch.h"

namespace lowrank_ext::cpu {

// y [M, N] += scaling · out_scale ⊙ (mid(h) lora_bᵀ) and h [M, r] = drop(x) lora_aᵀ, x [M, K],
// M > 0.
void branch_forward(const BranchArgs& args, const Tensor& x, const Tensor& y, const Tensor& h);

// dout [M, N], M > 0, x [M, K] where needs.dlora_a, h [M, r] where needs.h(). With add_to_dx
// gradients.dx [M, K] holds the base's dx, and the branch's is added in place: cheaper than handing
// the vendor's product a seeded output.
void branch_backward(const BranchArgs& args, const BranchNeeds& needs, const Tensor& dout,
                     const std::optional<Tensor>& x, const std::optional<Tensor>& h, bool add_to_dx,
                     const BranchGradients& gradients);

}  // namespace lowrank_ext::cpu
