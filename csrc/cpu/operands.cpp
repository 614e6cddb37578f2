#include "operands.h"

#include "features.h"

namespace lowrank_ext::cpu {

Dtypes dtypes_for(ScalarType input) {
  if (!is_half_size(input)) return {input, input, input};
  const bool in_bf16 = input == ScalarType::BFloat16 && features().avx512_bf16;
  return {input, in_bf16 ? input : ScalarType::Float, ScalarType::Float};
}

Dropout dropout_of(double dropout_p, const std::optional<Tensor>& seed) {
  const uint32_t threshold = Dropout::threshold_of(dropout_p);
  if (threshold == 0) return {0, 0};
  return {threshold, static_cast<uint64_t>(*dense_data<const int64_t>(*seed))};
}

Tensor operand(const Tensor& tensor, const Dtypes& dtypes) {
  return converted(converted(dense(tensor), dtypes.input), dtypes.compute);
}

Tensor vector_operand(const Tensor& vector, const Dtypes& dtypes) {
  return converted(converted(as_matrix(vector), dtypes.input), dtypes.accumulate);
}

static Tensor scaled_lora_b(const BranchArgs& args, const Dtypes& dtypes) {
  const Tensor lora_b = operand(args.lora_b, dtypes);
  if (!args.out_scale) return lora_b;
  const Tensor scaled = fresh_copy(lora_b, dtypes.accumulate);
  scale_rows(scaled, vector_operand(*args.out_scale, dtypes));
  return converted(scaled, dtypes.compute);
}

Operands prepare(const BranchArgs& args, ScalarType input) {
  const Dtypes dtypes = dtypes_for(input);
  Operands ops{dtypes,
               dropout_of(args.dropout_p, args.seed),
               operand(args.lora_a, dtypes),
               scaled_lora_b(args, dtypes),
               std::nullopt,
               std::nullopt};
  if (args.core) ops.core = converted(operand(*args.core, dtypes), dtypes.accumulate);
  if (args.rank_scale) ops.rank_scale = vector_operand(*args.rank_scale, dtypes);
  return ops;
}

Tensor scaled_h(const Operands& ops, const Tensor& h) {
  const Tensor scaled = fresh_copy(h, ops.accumulate);
  if (ops.rank_scale) scale_columns(scaled, *ops.rank_scale);
  return scaled;
}

Tensor mid(const Operands& ops, const Tensor& h) {
  if (!ops.has_mid()) return converted(h, ops.compute);
  Tensor u = scaled_h(ops, h);
  if (ops.core) {
    const Tensor product = empty({u.size(0), u.size(1)}, ops.accumulate);
    multiply(product, u, transposed(*ops.core));
    u = product;
  }
  return converted(u, ops.compute);
}

}  // namespace lowrank_ext::cpu
