// Argument checks of multi_lowrank_add and its backward, shared by the backends.
#pragma once

#include "../checks.h"

namespace lowrank_ext {

// The arguments of multi_lowrank_add beside base_out and x.
struct MultiBranchArgs {
  Tensor lora_a;                // [n, r, K]
  Tensor lora_b;                // [n, N, r]
  Tensor adapter_ids;           // int64, one for each row; -1: none
  Tensor scaling;               // [n], fp32 or fp64
  std::optional<Tensor> ranks;  // int64 [n]: what of r is not padding
  double dropout_p;
  std::optional<Tensor> seed;  // int64, one element

  int64_t num_adapters() const { return lora_a.size(0); }
  int64_t rank() const { return lora_a.size(1); }
  int64_t in_features() const { return lora_a.size(2); }
  int64_t out_features() const { return lora_b.size(1); }
};

struct MultiBranchNeeds {
  bool dx, dlora_a, dlora_b;

  bool g() const { return dx || dlora_a; }
};

// All but the values of adapter_ids and ranks, which lie on the device.
inline void check_multi_branch(const char* op, const MultiBranchArgs& args, const Tensor& like,
                               const char* like_name, int64_t in_features, int64_t out_features) {
  const Tensor &a = args.lora_a, &b = args.lora_b, &ids = args.adapter_ids;
  check_shape(op, "lora_a", a, a.dim() == 3 && a.size(1) >= 1 && a.size(2) == in_features,
              "[n, r, in_features=" + std::to_string(in_features) + "]");
  const std::string n = "[n=" + std::to_string(a.size(0));
  check_shape(
      op, "lora_b", b,
      b.dim() == 3 && b.size(0) == a.size(0) && b.size(1) == out_features && b.size(2) == a.size(1),
      n + ", out_features=" + std::to_string(out_features) + ", r=" + std::to_string(a.size(1)) +
          "]");
  bool one_per_row = ids.dim() == like.dim() - 1;
  for (int64_t dim = 0; one_per_row && dim < ids.dim(); ++dim)
    one_per_row = ids.size(dim) == like.size(dim);
  check_shape(op, "adapter_ids", ids, one_per_row,
              std::string(like_name) + "'s leading dimensions, an id for each row");
  const auto check_vector = [&](const char* name, const Tensor& vector) {
    check_shape(op, name, vector, vector.dim() == 1 && vector.size(0) == a.size(0), n + "]");
  };
  check_vector("scaling", args.scaling);
  if (args.ranks) check_vector("ranks", *args.ranks);
  for (const auto& [name, tensor] : {std::pair{"lora_a", &a}, std::pair{"lora_b", &b}})
    check_adapter_dtype(op, name, *tensor, like, like_name);
  const auto check_int64 = [&](const char* name, const Tensor& tensor) {
    check(tensor.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64, got ",
          dtype_name(tensor.scalar_type()));
  };
  check_int64("adapter_ids", ids);
  if (args.ranks) check_int64("ranks", *args.ranks);
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

inline void check_multi_forward(const char* op, const MultiBranchArgs& args, const Tensor& base_out,
                                const Tensor& x) {
  check_input_dtype(op, "x", x);
  check_shape(op, "x", x, x.dim() >= 1, "[..., in_features]");
  check_shape(op, "base_out", base_out, leading_dims_match(base_out, x),
              "x's leading dimensions and out_features");
  check_same_dtype(op, "base_out", base_out, x, "x");
  check_same_device(op, "base_out", base_out, x, "x");
  check_multi_branch(op, args, x, "x", x.size(x.dim() - 1), base_out.size(base_out.dim() - 1));
}

inline void check_multi_backward(const char* op, const MultiBranchArgs& args,
                                 const MultiBranchNeeds& needs, const Tensor& dout,
                                 const std::optional<Tensor>& x, const std::optional<Tensor>& h) {
  check_input_dtype(op, "dout", dout);
  check_shape(op, "lora_a", args.lora_a, args.lora_a.dim() == 3, "[n, r, in_features]");
  check_shape(op, "lora_b", args.lora_b, args.lora_b.dim() == 3, "[n, out_features, r]");
  check_shape(op, "dout", dout, dout.dim() >= 1 && dout.size(dout.dim() - 1) == args.out_features(),
              "[..., out_features=" + std::to_string(args.out_features()) + "]");
  check_multi_branch(op, args, dout, "dout", args.in_features(), args.out_features());
  check_saved(op, "x", x, needs.dlora_a, dout, "in_features", args.in_features());
  check_saved(op, "h", h, needs.dlora_b, dout, "r", args.rank());
}

}  // namespace lowrank_ext
