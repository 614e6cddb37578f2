// The operands of one call, in the dtypes of its products.
#pragma once

#include <optional>

#include "dropout.h"
#include "ops/branch.h"
#include "small_matrix.h"

namespace lowrank_ext::cpu {

struct Dtypes {
  ScalarType input;       // of x, y, dout
  ScalarType compute;     // of the products
  ScalarType accumulate;  // of the tensors [M, r] and of the reductions

  bool converts() const { return input != compute; }
  bool in_bf16() const { return compute == ScalarType::BFloat16; }
};

// bf16 where the CPU has products of it, fp32 for other half-size input.
Dtypes dtypes_for(ScalarType input);

Dropout dropout_of(double dropout_p, const std::optional<Tensor>& seed);

struct Operands : Dtypes {
  Dropout dropout;
  Tensor lora_a;                     // [r, K], compute
  Tensor lora_b;                     // [N, r], compute, out_scale folded in
  std::optional<Tensor> core;        // [r, r], accumulate
  std::optional<Tensor> rank_scale;  // [1, r], accumulate

  bool has_mid() const { return core || rank_scale; }
};

Operands prepare(const BranchArgs& args, ScalarType input);

// An adapter tensor as the products read it: rounded to the dtype of x, then in the compute dtype.
Tensor operand(const Tensor& tensor, const Dtypes& dtypes);

// A vector [n] as [1, n] in fp32 or fp64, rounded to the dtype of x first.
Tensor vector_operand(const Tensor& vector, const Dtypes& dtypes);

// h ⊙ rank_scale in the accumulator's dtype, in a fresh buffer.
Tensor scaled_h(const Operands& ops, const Tensor& h);

// mid(h) = (h ⊙ rank_scale) coreᵀ in the compute dtype.
Tensor mid(const Operands& ops, const Tensor& h);

}  // namespace lowrank_ext::cpu
