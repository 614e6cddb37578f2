// y = base_out + scaling[i] · lora_b[i] lora_a[i] drop(x), i the row's adapter id, on any backend:
// checks and outputs.
#pragma once

#include <tuple>

#include "checks.h"
#include "ops/outputs.h"
#include "ops/unpack.h"

namespace lowrank_ext {

// What forward and backward both take.
struct MultiBranchArgs {
  Tensor lora_a;                // [n, r, K]
  Tensor lora_b;                // [n, N, r]
  Tensor adapter_ids;           // int64 [...], -1 for rows without an adapter
  Tensor scaling;               // [n], fp32 or fp64
  std::optional<Tensor> ranks;  // int64 [n]: the ranks of an adapter that are not padding
  double dropout_p;
  std::optional<Tensor> seed;  // int64, one element

  using Arguments = std::tuple<Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>, double,
                               std::optional<Tensor>>;

  int64_t num_adapters() const { return lora_a.size(0); }
  int64_t rank() const { return lora_a.size(1); }
  int64_t in_features() const { return lora_a.size(2); }
  int64_t out_features() const { return lora_b.size(1); }
};

// Which gradients a backward call is asked for.
struct MultiBranchNeeds {
  bool dx, dlora_a, dlora_b;

  using Arguments = std::tuple<bool, bool, bool>;

  bool g() const { return dx || dlora_a; }
};

// ---- checks

inline void check_adapters_given(const char* op, const MultiBranchArgs& args) {
  check_given(op, {{"lora_a", &args.lora_a},
                   {"lora_b", &args.lora_b},
                   {"adapter_ids", &args.adapter_ids},
                   {"scaling", &args.scaling}});
}

// The values of adapter_ids and ranks, which lie on the device, are not looked at.
inline void check_multi_branch(const char* op, const MultiBranchArgs& args, const Tensor& like,
                               const char* like_name, int64_t in_features, int64_t out_features) {
  const Tensor &a = args.lora_a, &b = args.lora_b, &ids = args.adapter_ids;
  check_shape(op, "lora_a", a, a.dim() == 3 && a.size(1) >= 1 && a.size(2) == in_features,
              "[n, r, in_features=", in_features, "]");
  const int64_t n = a.size(0);
  check_shape(op, "lora_b", b,
              b.dim() == 3 && b.size(0) == n && b.size(1) == out_features && b.size(2) == a.size(1),
              "[n=", n, ", out_features=", out_features, ", r=", a.size(1), "]");
  check_shape(op, "adapter_ids", ids, is_per_row(ids, like), like_name,
              "'s leading dimensions, an id for each row");
  const auto check_vector = [&](const char* name, const Tensor& vector) {
    check_shape(op, name, vector, vector.dim() == 1 && vector.size(0) == n, "[n=", n, "]");
  };
  check_vector("scaling", args.scaling);
  if (args.ranks) check_vector("ranks", *args.ranks);
  for (const auto& [name, tensor] : {std::pair{"lora_a", &a}, std::pair{"lora_b", &b}})
    check_adapter_dtype(op, name, *tensor, like, like_name);
  check_dtype(op, "adapter_ids", ids, ScalarType::Long);
  if (args.ranks) check_dtype(op, "ranks", *args.ranks, ScalarType::Long);
  const ScalarType scaling_dtype = args.scaling.scalar_type();
  check(scaling_dtype == ScalarType::Float || scaling_dtype == ScalarType::Double, op,
        ": scaling must be float32 or float64, got ", dtype_name(scaling_dtype));
  for (const auto& [name, tensor] :
       {std::pair{"lora_a", &a}, std::pair{"lora_b", &b}, std::pair{"adapter_ids", &ids},
        std::pair{"scaling", &args.scaling}})
    check_same_device(op, name, *tensor, like, like_name);
  if (args.ranks) check_same_device(op, "ranks", *args.ranks, like, like_name);
  check_dropout(op, args.dropout_p, args.seed, like, like_name);
}

inline void check_multi_lowrank_add(const MultiBranchArgs& args, const Tensor& base_out,
                                    const Tensor& x) {
  constexpr const char* kOp = "multi_lowrank_add";
  check_given(kOp, {{"base_out", &base_out}, {"x", &x}});
  check_adapters_given(kOp, args);
  check_x_and_base_out(kOp, x, base_out);
  check_multi_branch(kOp, args, x, "x", x.size(x.dim() - 1), base_out.size(base_out.dim() - 1));
}

inline void check_multi_lowrank_add_backward(const MultiBranchArgs& args,
                                             const MultiBranchNeeds& needs, const Tensor& dout,
                                             const std::optional<Tensor>& x,
                                             const std::optional<Tensor>& h) {
  constexpr const char* kOp = "multi_lowrank_add_backward";
  check_given(kOp, {{"dout", &dout}});
  check_adapters_given(kOp, args);
  check_input_dtype(kOp, "dout", dout);
  check_shape(kOp, "lora_a", args.lora_a, args.lora_a.dim() == 3, "[n, r, in_features]");
  check_shape(kOp, "lora_b", args.lora_b, args.lora_b.dim() == 3, "[n, out_features, r]");
  check_dout(kOp, dout, args.out_features());
  check_multi_branch(kOp, args, dout, "dout", args.in_features(), args.out_features());
  check_saved(kOp, "x", x, needs.dlora_a, dout, "in_features", args.in_features());
  check_saved(kOp, "h", h, needs.dlora_b, dout, "r", args.rank());
}

// ---- outputs

// Empty ([0]) where not needed.
struct MultiBranchGradients {
  Tensor dx, dlora_a, dlora_b;
};

// forward(args, base_out [M, N], x [M, K], y [M, N], h [M, r]) writes y and h.
template <auto forward>
std::tuple<Tensor, Tensor> multi_lowrank_add(const Tensor& base_out, const Tensor& x,
                                             const MultiBranchArgs& args) {
  check_multi_lowrank_add(args, base_out, x);
  const auto [y, h] = branch_outputs(x, args.out_features(), args.rank());
  forward(args, as_matrix(base_out), as_matrix(x), as_matrix(y), as_matrix(h));
  return {y, h};
}

// backward(args, needs, dout [M, N], x [M, K], h [M, r], gradients) writes what is needed, x and h
// where the needed gradients take them. Without rows dlora_a and dlora_b are zeros already.
template <auto backward>
std::tuple<Tensor, Tensor, Tensor> multi_lowrank_add_backward(const Tensor& dout,
                                                              const std::optional<Tensor>& x,
                                                              const std::optional<Tensor>& h,
                                                              const MultiBranchArgs& args,
                                                              const MultiBranchNeeds& needs) {
  check_multi_lowrank_add_backward(args, needs, dout, x, h);
  const Tensor dout_rows = as_matrix(dout);
  const ParameterGradients fresh(dout, dout_rows.size(0) == 0);
  const Tensor dx = input_gradient(dout, needs.dx, args.in_features());
  const MultiBranchGradients gradients{as_matrix(dx), fresh.of(args.lora_a, needs.dlora_a),
                                       fresh.of(args.lora_b, needs.dlora_b)};
  backward(args, needs, dout_rows, as_matrix(x), as_matrix(h), gradients);
  return {dx, gradients.dlora_a, gradients.dlora_b};
}

}  // namespace lowrank_ext
