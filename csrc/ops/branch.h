// The low-rank branch of lowrank_linear and lowrank_add on any backend: its arguments, their checks
// and its gradients.
#pragma once

#include <tuple>

#include "checks.h"
#include "ops/outputs.h"

namespace lowrank_ext {

// What forward and backward both take.
struct BranchArgs {
  Tensor lora_a;                     // [r, K]
  Tensor lora_b;                     // [N, r]
  std::optional<Tensor> core;        // [r, r]
  std::optional<Tensor> rank_scale;  // [r]
  std::optional<Tensor> out_scale;   // [N]
  double scaling;
  double dropout_p;
  std::optional<Tensor> seed;  // int64, one element
  bool allow_tf32;             // in fp32 products on a GPU, as torch is set

  using Arguments = std::tuple<Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>,
                               std::optional<Tensor>, double, double, std::optional<Tensor>, bool>;

  int64_t rank() const { return lora_a.size(0); }
  int64_t in_features() const { return lora_a.size(1); }
  int64_t out_features() const { return lora_b.size(0); }
};

// Which gradients a backward call is asked for.
struct BranchNeeds {
  bool dx, dlora_a, dlora_b, dcore, drank_scale, dout_scale;

  using Arguments = std::tuple<bool, bool, bool, bool, bool, bool>;

  bool mid_gradient() const { return dx || dlora_a || dcore || drank_scale; }
  bool h() const { return dlora_b || dout_scale || dcore || drank_scale; }
};

// ---- checks

inline void check_adapter_given(const char* op, const BranchArgs& args) {
  check_given(op, {{"lora_a", &args.lora_a}, {"lora_b", &args.lora_b}});
}

// Against `like`, x in forward and dout in backward: device and dtype.
inline void check_branch(const char* op, const BranchArgs& args, const Tensor& like,
                         const char* like_name, int64_t in_features, int64_t out_features) {
  const Tensor& a = args.lora_a;
  const Tensor& b = args.lora_b;
  check_shape(op, "lora_a", a, a.dim() == 2 && a.size(0) >= 1 && a.size(1) == in_features,
              "[r, in_features=", in_features, "]");
  const int64_t rank = a.size(0);
  check_shape(op, "lora_b", b, b.dim() == 2 && b.size(0) == out_features && b.size(1) == rank,
              "[out_features=", out_features, ", r=", rank, "]");
  const auto check_one = [&](const char* name, const std::optional<Tensor>& tensor, bool square,
                             int64_t size, const auto&... words) {
    if (!tensor) return;
    const bool matches =
        square ? tensor->dim() == 2 && tensor->size(0) == size && tensor->size(1) == size
               : tensor->dim() == 1 && tensor->size(0) == size;
    check_shape(op, name, *tensor, matches, words...);
    check_adapter_dtype(op, name, *tensor, like, like_name);
    check_same_device(op, name, *tensor, like, like_name);
  };
  check_one("core", args.core, true, rank, "[r=", rank, ", r=", rank, "]");
  check_one("rank_scale", args.rank_scale, false, rank, "[r=", rank, "]");
  check_one("out_scale", args.out_scale, false, out_features, "[out_features=", out_features, "]");
  for (const auto& [name, tensor] : {std::pair{"lora_a", &a}, std::pair{"lora_b", &b}}) {
    check_adapter_dtype(op, name, *tensor, like, like_name);
    check_same_device(op, name, *tensor, like, like_name);
  }
  check_dropout(op, args.dropout_p, args.seed, like, like_name);
}

// The checks that both backward ops share.
inline void check_branch_backward(const char* op, const BranchArgs& args, const BranchNeeds& needs,
                                  const Tensor& dout, const std::optional<Tensor>& x,
                                  const std::optional<Tensor>& h, int64_t in_features,
                                  int64_t out_features) {
  check_dout(op, dout, out_features);
  check_branch(op, args, dout, "dout", in_features, out_features);
  check_saved(op, "x", x, needs.dlora_a, dout, "in_features", in_features);
  check_saved(op, "h", h, needs.h(), dout, "r", args.rank());
  check(!needs.dcore || args.core, op, ": core must be given when need_dcore, got None");
  check(!needs.drank_scale || args.rank_scale, op,
        ": rank_scale must be given when need_drank_scale, got None");
  check(!needs.dout_scale || args.out_scale, op,
        ": out_scale must be given when need_dout_scale, got None");
}

// ---- gradients

// Empty ([0]) where not needed.
struct BranchGradients {
  Tensor dx, dlora_a, dlora_b, dcore, drank_scale, dout_scale;
};

using BranchGradientTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The tuple of gradients. backward(dout [M, N], gradients) writes those that are needed, dx as
// [M, K]; where dout has no rows it is not called, and every gradient but dx is zero.
template <class Backward>
BranchGradientTuple branch_gradients(const BranchArgs& args, const BranchNeeds& needs,
                                     const Tensor& dout, const Backward& backward) {
  const Tensor dout_rows = as_matrix(dout);
  const bool no_rows = dout_rows.size(0) == 0;
  const ParameterGradients fresh(dout, no_rows);
  const Tensor dx = input_gradient(dout, needs.dx, args.in_features());
  BranchGradients gradients{dx,
                            fresh.of(args.lora_a, needs.dlora_a),
                            fresh.of(args.lora_b, needs.dlora_b),
                            fresh.of(args.core, needs.dcore),
                            fresh.of(args.rank_scale, needs.drank_scale),
                            fresh.of(args.out_scale, needs.dout_scale)};
  if (!no_rows) {
    gradients.dx = as_matrix(dx);
    backward(dout_rows, gradients);
  }
  return {dx,
          gradients.dlora_a,
          gradients.dlora_b,
          gradients.dcore,
          gradients.drank_scale,
          gradients.dout_scale};
}

}  // namespace lowrank_ext
