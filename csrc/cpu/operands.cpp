#include "operands.h"

#include "outer_sum.h"

namespace lowrank_ext::cpu {

static ScalarType compute_dtype(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16 && has_outer_sum()) return dtype;
  return is_half_size(dtype) ? ScalarType::Float : dtype;
}

static ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

static Dropout dropout_of(const BranchArgs& args) {
  const uint32_t threshold = Dropout::threshold_of(args.dropout_p);
  if (threshold == 0) return {0, 0};
  return {threshold, static_cast<uint64_t>(*static_cast<const int64_t*>(args.seed->data_ptr()))};
}

Tensor operand(const Tensor& tensor, ScalarType input_dtype) {
  const Tensor dense = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  return converted(converted(dense, input_dtype), compute_dtype(input_dtype));
}

Tensor vector_operand(const Tensor& vector, ScalarType input_dtype) {
  const Tensor dense = vector.is_contiguous() ? vector : torch::stable::contiguous(vector);
  const Tensor row = strided_view(dense, 0, 1, dense.size(0), dense.size(0), 1);
  return converted(converted(row, input_dtype), accumulate_dtype(input_dtype));
}

static Tensor scaled_lora_b(const BranchArgs& args, ScalarType input) {
  if (!args.out_scale) return operand(args.lora_b, input);
  const ScalarType accumulate = accumulate_dtype(input);
  const Tensor rounded = operand(args.lora_b, input);
  Tensor scaled = empty({rounded.size(0), rounded.size(1)}, accumulate);
  convert(rows_of(scaled), rows_of(rounded), 1.0, rounded.size(0), rounded.size(1));
  scale_rows(scaled, vector_operand(*args.out_scale, input));
  return converted(scaled, compute_dtype(input));
}

Operands prepare(const BranchArgs& args, ScalarType input) {
  const ScalarType accumulate = accumulate_dtype(input);
  Operands ops{input,
               compute_dtype(input),
               accumulate,
               dropout_of(args),
               operand(args.lora_a, input),
               scaled_lora_b(args, input),
               std::nullopt,
               std::nullopt};
  if (args.core) ops.core = converted(operand(*args.core, input), accumulate);
  if (args.rank_scale) ops.rank_scale = vector_operand(*args.rank_scale, input);
  return ops;
}

Tensor scaled_h(const Operands& ops, const Tensor& h) {
  Tensor scaled = empty({h.size(0), h.size(1)}, ops.accumulate);
  convert(rows_of(scaled), rows_of(h), 1.0, h.size(0), h.size(1));
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
