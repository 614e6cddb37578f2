// Products run in bf16 where the CPU has bf16 dot products, else in fp32 (fp64 for fp64);
// everything on [M, r] runs in fp32 (fp64).
#include "branch.h"

#include "row_blocks.h"

namespace lowrank_ext::cpu {
namespace {

// y [rows, N] += scaling · mid(h) lora_bᵀ, h [rows, r] in the compute dtype.
void add_branch(const Operands& ops, const Tensor& y, const Tensor& h, double scaling) {
  const Tensor u = mid(ops, h);
  if (!ops.converts()) return expand(y, u, transposed(ops.lora_b), scaling, nullptr, /*add=*/true);
  const Tensor branch = empty({y.size(0), y.size(1)}, ops.compute);
  multiply(branch, u, transposed(ops.lora_b));
  accumulate(rows_of(y), rows_of(branch), scaling, y.size(0), y.size(1));
}

// First pass of the backward, over dout.
struct UpGradients {
  std::optional<Tensor> g;  // scaling · dout lora_b [M, r], compute dtype
  std::optional<Tensor> p;  // doutᵀ mid(h) [N, r], accumulator's dtype, not yet scaled
};

UpGradients up_backward(const BranchArgs& args, const Operands& ops, const BranchNeeds& needs,
                        const Tensor& dout, const std::optional<Tensor>& h) {
  const int64_t num_rows = dout.size(0);
  UpGradients result;
  if (needs.mid_gradient()) result.g = empty({num_rows, args.rank()}, ops.compute);
  std::optional<Tensor> u;
  std::optional<BlockSum> p_sum;
  if (needs.dlora_b || needs.dout_scale) {
    u = mid(ops, *h);
    p_sum.emplace(ops, args.rank(), args.out_features());
  }
  RowBlocks blocks(ops, num_rows, dout.size(1), /*masked=*/false);
  blocks.for_each([&](int64_t first, int64_t count) {
    const Tensor dout_block = blocks.load(dout, first, count);
    if (result.g) {
      const Tensor g_block = row_block(*result.g, first, count);
      shrink(g_block, dout_block, transposed(ops.lora_b), args.scaling, Dropout{});
    }
    if (p_sum) p_sum->add(row_block(*u, first, count), dout_block, nullptr);
  });
  if (p_sum) result.p = transposed_copy(p_sum->result());
  return result;
}

// Second step, on [M, r] only: returns dh in the compute dtype, writes dcore and drank_scale.
Tensor mid_backward(const Operands& ops, const BranchNeeds& needs, const Tensor& g,
                    const std::optional<Tensor>& h, const BranchGradients& gradients) {
  if (!ops.has_mid()) return g;
  Tensor du = converted(g, ops.accumulate);
  const int64_t num_rows = du.size(0), rank = du.size(1);
  if (needs.dcore) {
    const Tensor dcore = empty({rank, rank}, ops.accumulate);
    multiply(dcore, transposed(du), scaled_h(ops, *h));
    round_into(gradients.dcore, dcore, 1.0);
  }
  if (ops.core) {
    const Tensor product = empty({num_rows, rank}, ops.accumulate);
    multiply(product, du, *ops.core);
    du = product;
  }
  if (needs.drank_scale) {
    const Tensor sums = empty({1, rank}, ops.accumulate);
    sum_products_over_rows(sums, du, converted(dense(*h), ops.accumulate));
    round_into(as_matrix(gradients.drank_scale), sums, 1.0);
  }
  if (ops.rank_scale) {
    if (du.get() == g.get()) du = fresh_copy(g, ops.accumulate);
    scale_columns(du, *ops.rank_scale);
  }
  return converted(du, ops.compute);
}

// Last pass, over x and dx: dlora_a = dhᵀ drop(x) and dx {=, +=} drop'(dh lora_a).
void down_backward(const BranchArgs& args, const Operands& ops, const BranchNeeds& needs,
                   const Tensor& dh, const std::optional<Tensor>& x, bool add_to_dx,
                   const BranchGradients& gradients) {
  const int64_t num_rows = dh.size(0), in_features = args.in_features();
  const double scale = ops.dropout.scale();
  std::optional<BlockSum> dlora_a;
  if (needs.dlora_a) dlora_a.emplace(ops, args.rank(), in_features);
  RowBlocks blocks(ops, num_rows, in_features, /*masked=*/true);
  blocks.for_each([&](int64_t first, int64_t count) {
    const Tensor dh_block = row_block(dh, first, count);
    if (dlora_a) dlora_a->add(dh_block, blocks.load(*x, first, count), blocks.bits());
    if (needs.dx)
      blocks.multiply_into(gradients.dx, first, count, dh_block, ops.lora_a, scale, add_to_dx);
  });
  if (dlora_a) round_into(gradients.dlora_a, dlora_a->result(), scale);
}

void finish_up_gradients(const BranchArgs& args, const Operands& ops, const BranchNeeds& needs,
                         const Tensor& p, const BranchGradients& gradients) {
  if (needs.dout_scale) {
    const Tensor sums = empty({1, args.out_features()}, ops.accumulate);
    const Tensor lora_b = converted(operand(args.lora_b, ops), ops.accumulate);
    sum_products_over_cols(sums, lora_b, p, args.scaling);
    round_into(as_matrix(gradients.dout_scale), sums, 1.0);
  }
  if (needs.dlora_b) {
    if (args.out_scale) scale_rows(p, vector_operand(*args.out_scale, ops));
    round_into(gradients.dlora_b, p, args.scaling);
  }
}

}  // namespace

void branch_forward(const BranchArgs& args, const Tensor& x, const Tensor& y, const Tensor& h) {
  const int64_t num_rows = x.size(0);
  const Operands ops = prepare(args, x.scalar_type());
  const double scale = ops.dropout.scale();
  // In bf16 the product drops by itself, all rows in one block.
  const Dropout dropout = ops.in_bf16() ? ops.dropout : Dropout{};
  RowBlocks input(ops, num_rows, args.in_features(), /*masked=*/!ops.in_bf16());
  input.for_each([&](int64_t first, int64_t count) {
    const Tensor h_block =
        ops.converts() ? empty({count, args.rank()}, ops.compute) : row_block(h, first, count);
    shrink(h_block, input.load(x, first, count), ops.lora_a, scale, dropout);
    if (ops.converts()) round_into(row_block(h, first, count), h_block, 1.0);
    add_branch(ops, row_block(y, first, count), h_block, args.scaling);
  });
}

void branch_backward(const BranchArgs& args, const BranchNeeds& needs, const Tensor& dout,
                     const std::optional<Tensor>& x, const std::optional<Tensor>& h, bool add_to_dx,
                     const BranchGradients& gradients) {
  const Operands ops = prepare(args, dout.scalar_type());
  const UpGradients up = up_backward(args, ops, needs, dout, h);
  if (up.p) finish_up_gradients(args, ops, needs, *up.p, gradients);
  if (!up.g) return;
  const Tensor dh = mid_backward(ops, needs, *up.g, h, gradients);
  if (needs.dx || needs.dlora_a) down_backward(args, ops, needs, dh, x, add_to_dx, gradients);
}

}  // namespace lowrank_ext::cpu
