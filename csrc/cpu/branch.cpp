// Products run in bf16 where the CPU has bf16 dot products, else in fp32 (fp64 for fp64);
// everything on [M, r] runs in fp32 (fp64).
#include "branch.h"

#include "row_blocks.h"

namespace lowrank_ext::cpu {
namespace {

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
      features_to_ranks(g_block, dout_block, transposed(ops.lora_b), args.scaling, Dropout{});
    }
    if (p_sum) p_sum->add(row_block(*u, first, count), dout_block, nullptr);
  });
  if (p_sum) result.p = transposed_copy(p_sum->result());
  return result;
}

// Second step, on [M, r] only: dh in the compute dtype, dcore and drank_scale into `gradients`.
Tensor mid_backward(const BranchArgs& args, const Operands& ops, const BranchNeeds& needs,
                    const Tensor& g, const std::optional<Tensor>& h, BranchGradients& gradients) {
  if (!ops.has_mid()) return g;
  Tensor du = converted(g, ops.accumulate);
  const int64_t num_rows = du.size(0), rank = du.size(1);
  if (needs.dcore) {
    const Tensor dcore = empty({rank, rank}, ops.accumulate);
    multiply(dcore, transposed(du), scaled_h(ops, *h));
    gradients.dcore = rounded_to(dcore, *args.core, 1.0);
  }
  if (ops.core) {
    const Tensor product = empty({num_rows, rank}, ops.accumulate);
    multiply(product, du, *ops.core);
    du = product;
  }
  if (needs.drank_scale) {
    const Tensor sums = empty({rank}, ops.accumulate);
    sum_products_over_rows(sums, du, converted(*h, ops.accumulate));
    gradients.drank_scale = vector_rounded_to(sums, *args.rank_scale);
  }
  if (ops.rank_scale) {
    if (du.get() == g.get()) du = rounded_to(du, du, 1.0);  // g is not ours to change
    scale_columns(du, *ops.rank_scale);
  }
  return converted(du, ops.compute);
}

// Last pass, over x and dx: dlora_a = dhᵀ drop(x), and dx {=, +=} drop'(dh lora_a) on top of the
// base's part.
void down_backward(const BranchArgs& args, const Operands& ops, const BranchNeeds& needs,
                   const Tensor& dh, const std::optional<Tensor>& x,
                   const std::optional<Tensor>& base_dx, BranchGradients& gradients) {
  const int64_t num_rows = dh.size(0), in_features = args.in_features();
  const double scale = ops.dropout.active() ? ops.dropout.scale() : 1.0;
  std::optional<BlockSum> dlora_a;
  if (needs.dlora_a) dlora_a.emplace(ops, args.rank(), in_features);
  if (needs.dx) gradients.dx = base_dx ? *base_dx : empty({num_rows, in_features}, ops.input);
  RowBlocks blocks(ops, num_rows, in_features, /*masked=*/true);
  blocks.for_each([&](int64_t first, int64_t count) {
    const Tensor dh_block = row_block(dh, first, count);
    if (dlora_a) dlora_a->add(dh_block, blocks.load(*x, first, count), blocks.bits());
    if (needs.dx)
      blocks.multiply_into(gradients.dx, first, count, dh_block, ops.lora_a, scale,
                           base_dx.has_value());
  });
  if (dlora_a) gradients.dlora_a = rounded_to(dlora_a->result(), args.lora_a, scale);
}

void finish_up_gradients(const BranchArgs& args, const Operands& ops, const BranchNeeds& needs,
                         const Tensor& p, BranchGradients& gradients) {
  if (needs.dout_scale) {
    const Tensor sums = empty({args.out_features()}, ops.accumulate);
    const Tensor lora_b = converted(operand(args.lora_b, ops), ops.accumulate);
    sum_products_over_cols(sums, lora_b, p, args.scaling);
    gradients.dout_scale = vector_rounded_to(sums, *args.out_scale);
  }
  if (needs.dlora_b) {
    if (args.out_scale) scale_rows(p, vector_operand(*args.out_scale, ops));
    gradients.dlora_b = rounded_to(p, args.lora_b, args.scaling);
  }
}

}  // namespace

void branch_forward(const BranchArgs& args, const Tensor& x, const Tensor& y, const Tensor& h) {
  const int64_t num_rows = x.size(0);
  if (num_rows == 0) return;
  const Operands ops = prepare(args, x.scalar_type());
  const double scale = ops.dropout.active() ? ops.dropout.scale() : 1.0;
  // In bf16 the product drops by itself, all rows in one block.
  const Dropout dropout = ops.in_bf16() ? ops.dropout : Dropout{};
  RowBlocks input(ops, num_rows, args.in_features(), /*masked=*/!ops.in_bf16());
  input.for_each([&](int64_t first, int64_t count) {
    const Tensor h_block =
        ops.converts() ? empty({count, args.rank()}, ops.compute) : row_block(h, first, count);
    features_to_ranks(h_block, input.load(x, first, count), ops.lora_a, scale, dropout);
    if (ops.converts())
      convert(rows_of(row_block(h, first, count)), rows_of(h_block), 1.0, count, args.rank());
    const Tensor y_block = row_block(y, first, count);
    const Tensor u = mid(ops, h_block);
    if (!ops.converts()) {
      ranks_to_features(y_block, u, transposed(ops.lora_b), args.scaling, nullptr, /*add=*/true);
    } else {
      const Tensor branch = empty({count, args.out_features()}, ops.compute);
      multiply(branch, u, transposed(ops.lora_b));
      accumulate(rows_of(y_block), rows_of(branch), args.scaling, count, args.out_features());
    }
  });
}

BranchGradients branch_backward(const BranchArgs& args, const BranchNeeds& needs,
                                const Tensor& dout, const std::optional<Tensor>& x,
                                const std::optional<Tensor>& h,
                                const std::optional<Tensor>& base_dx) {
  if (dout.size(0) == 0) return gradients_of_no_rows(args, needs, dout);
  BranchGradients gradients = empty_gradients(dout);
  const Operands ops = prepare(args, dout.scalar_type());
  const UpGradients up = up_backward(args, ops, needs, dout, h);
  if (up.p) finish_up_gradients(args, ops, needs, *up.p, gradients);
  if (!up.g) return gradients;
  const Tensor dh = mid_backward(args, ops, needs, *up.g, h, gradients);
  if (needs.dx || needs.dlora_a) down_backward(args, ops, needs, dh, x, base_dx, gradients);
  return gradients;
}

}  // namespace lowrank_ext::cpu
