// What the backward of a branch returns, on any device.
#pragma once

#include <tuple>

#include "../checks.h"
#include "../matrix.h"

namespace lowrank_ext {

// Empty ([0]) where not needed.
struct BranchGradients {
  Tensor dx, dlora_a, dlora_b, dcore, drank_scale, dout_scale;

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> as_tuple() const {
    return {dx, dlora_a, dlora_b, dcore, drank_scale, dout_scale};
  }
};

// Nothing is needed yet. Each one is its own: the outputs of an op must not alias.
inline BranchGradients empty_gradients(const Tensor& dout) {
  const auto none = [&] { return empty({0}, dout.scalar_type(), dout); };
  return {none(), none(), none(), none(), none(), none()};
}

// Of a dout without rows: dx is empty and every other gradient is zero.
inline BranchGradients gradients_of_no_rows(const BranchArgs& args, const BranchNeeds& needs,
                                            const Tensor& dout) {
  BranchGradients gradients = empty_gradients(dout);
  if (needs.dx) gradients.dx = empty({0, args.in_features()}, dout.scalar_type(), dout);
  if (needs.dlora_a) gradients.dlora_a = zeros_like(args.lora_a);
  if (needs.dlora_b) gradients.dlora_b = zeros_like(args.lora_b);
  if (needs.dcore) gradients.dcore = zeros_like(*args.core);
  if (needs.drank_scale) gradients.drank_scale = zeros_like(*args.rank_scale);
  if (needs.dout_scale) gradients.dout_scale = zeros_like(*args.out_scale);
  return gradients;
}

}  // namespace lowrank_ext
