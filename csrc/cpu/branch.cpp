// Products run in the vendor's library, in bf16 where the CPU has bf16 dot products, else in fp32
// (fp64 for fp64). Rows go through in blocks small enough to stay in cache: a block of x is masked
// or converted into scratch and consumed from there, so no [M, K] or [M, N] temporary exists.
// Everything on [M, r] runs in fp32 (fp64).
#include "branch.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "dropout.h"
#include "matrix.h"
#include "outer_sum.h"

namespace lowrank_ext::cpu {
namespace {

// Scratch of one row block: half of a 2 MiB L2, so that the block survives until the product reads
// it.
constexpr int64_t kBlockBytes = 1 << 20;
constexpr int64_t kMinBlockRows = 64;
constexpr int64_t kMaxBlockRows = 512;

ScalarType compute_dtype(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16 && has_outer_sum()) return dtype;
  return is_half_size(dtype) ? ScalarType::Float : dtype;
}

ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

Dropout dropout_of(const BranchArgs& args) {
  const uint32_t threshold = Dropout::threshold_of(args.dropout_p);
  if (threshold == 0) return {0, 0};
  return {threshold, static_cast<uint64_t>(*static_cast<const int64_t*>(args.seed->data_ptr()))};
}

int64_t block_rows(int64_t num_cols, int64_t element_size) {
  const int64_t rows = kBlockBytes / std::max<int64_t>(1, num_cols * element_size);
  return std::clamp(rows / 32 * 32, kMinBlockRows, kMaxBlockRows);
}

void zero(const Tensor& tensor) {
  std::memset(tensor.data_ptr(), 0, tensor.numel() * tensor.element_size());
}

Tensor converted(const Tensor& matrix, ScalarType dtype) {
  if (matrix.scalar_type() == dtype) return matrix;
  Tensor result = empty({matrix.size(0), matrix.size(1)}, dtype);
  convert(rows_of(result), rows_of(matrix), 1.0, matrix.size(0), matrix.size(1));
  return result;
}

// An adapter tensor as the products read it: rounded to the dtype of x once, then held in the
// compute dtype.
Tensor operand(const Tensor& tensor, ScalarType input_dtype) {
  const Tensor dense = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  return converted(converted(dense, input_dtype), compute_dtype(input_dtype));
}

// A vector [n] as fp32 or fp64, rounded to the dtype of x first.
Tensor vector_operand(const Tensor& vector, ScalarType input_dtype) {
  const Tensor dense = vector.is_contiguous() ? vector : torch::stable::contiguous(vector);
  const Tensor row = strided_view(dense, 0, 1, dense.size(0), dense.size(0), 1);
  return converted(converted(row, input_dtype), accumulate_dtype(input_dtype));
}

template <typename Body>
void visit_accumulator(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Double) {
    body(static_cast<double*>(tensor.data_ptr()));
  } else {
    body(static_cast<float*>(tensor.data_ptr()));
  }
}

// matrix[m, j] *= scale[j]; both fp32 or both fp64, dense.
void scale_columns(const Tensor& matrix, const Tensor& scale) {
  const int64_t num_rows = matrix.size(0), num_cols = matrix.size(1);
  visit_accumulator(matrix, [&](auto* data) {
    const auto* factor = static_cast<const decltype(data)>(scale.data_ptr());
    for (int64_t m = 0; m < num_rows; ++m)
      for (int64_t j = 0; j < num_cols; ++j) data[m * num_cols + j] *= factor[j];
  });
}

// matrix[n, j] *= scale[n]
void scale_rows(const Tensor& matrix, const Tensor& scale) {
  const int64_t num_rows = matrix.size(0), num_cols = matrix.size(1);
  visit_accumulator(matrix, [&](auto* data) {
    const auto* factor = static_cast<const decltype(data)>(scale.data_ptr());
    for (int64_t n = 0; n < num_rows; ++n)
      for (int64_t j = 0; j < num_cols; ++j) data[n * num_cols + j] *= factor[n];
  });
}

// out[j] = Σ_m left[m, j] right[m, j], summed in fp64: a long fp32 chain would lose what the
// products kept.
void sum_products_over_rows(const Tensor& out, const Tensor& left, const Tensor& right) {
  const int64_t num_rows = left.size(0), num_cols = left.size(1);
  std::vector<double> sums(num_cols, 0.0);
  visit_accumulator(out, [&](auto* result) {
    const auto* l = static_cast<const decltype(result)>(left.data_ptr());
    const auto* r = static_cast<const decltype(result)>(right.data_ptr());
    for (int64_t m = 0; m < num_rows; ++m)
      for (int64_t j = 0; j < num_cols; ++j)
        sums[j] += double{l[m * num_cols + j]} * double{r[m * num_cols + j]};
    std::copy(sums.begin(), sums.end(), result);
  });
}

// out[n] = scale · Σ_j left[n, j] right[n, j]
void sum_products_over_cols(const Tensor& out, const Tensor& left, const Tensor& right,
                            double scale) {
  const int64_t num_rows = left.size(0), num_cols = left.size(1);
  visit_accumulator(out, [&](auto* result) {
    const auto* l = static_cast<const decltype(result)>(left.data_ptr());
    const auto* r = static_cast<const decltype(result)>(right.data_ptr());
    for (int64_t n = 0; n < num_rows; ++n) {
      double sum = 0.0;
      for (int64_t j = 0; j < num_cols; ++j)
        sum += double{l[n * num_cols + j]} * double{r[n * num_cols + j]};
      result[n] = scale * sum;
    }
  });
}

// The operands of one call in the dtypes that its products run in.
struct Operands {
  ScalarType input;       // dtype of x, y, dout
  ScalarType compute;     // dtype of the products
  ScalarType accumulate;  // dtype of everything on [M, r] and of the reductions
  Dropout dropout;
  Tensor lora_a;                     // [r, K], compute
  Tensor lora_b;                     // [N, r], compute, out_scale folded in
  std::optional<Tensor> core;        // [r, r], accumulate
  std::optional<Tensor> rank_scale;  // [1, r], accumulate

  bool converts() const { return input != compute; }
  bool has_mid() const { return core || rank_scale; }
};

Tensor scaled_lora_b(const BranchArgs& args, ScalarType input) {
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

// h ⊙ rank_scale in the accumulator's dtype; always a buffer of its own.
Tensor scaled_h(const Operands& ops, const Tensor& h) {
  Tensor scaled = empty({h.size(0), h.size(1)}, ops.accumulate);
  convert(rows_of(scaled), rows_of(h), 1.0, h.size(0), h.size(1));
  if (ops.rank_scale) scale_columns(scaled, *ops.rank_scale);
  return scaled;
}

// mid(h) = (h ⊙ rank_scale) coreᵀ in the compute dtype.
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

// Feeds drop(x), or any matrix, block by block in the compute dtype.
class RowBlocks {
 public:
  RowBlocks(const Operands& ops, int64_t num_rows, int64_t num_cols, bool masked)
      : ops_(ops),
        num_rows_(num_rows),
        num_cols_(num_cols),
        masked_(masked && ops.dropout.active()) {
    // Without scratch there is nothing to keep in cache: one product, cut up by the vendor's own
    // blocking.
    const bool in_one_piece = !masked_ && !ops.converts();
    const int64_t element_size = ops.compute == ScalarType::Double  ? 8
                                 : ops.compute == ScalarType::Float ? 4
                                                                    : 2;
    block_rows_ = in_one_piece ? num_rows : std::min(num_rows, block_rows(num_cols, element_size));
  }

  template <typename Body>  // body(first_row, num_rows)
  void for_each(const Body& body) {
    for (int64_t first = 0; first < num_rows_; first += block_rows_) {
      const int64_t count = std::min(block_rows_, num_rows_ - first);
      if (masked_) draw_bits(first, count);
      body(first, count);
    }
  }

  // The current block of `matrix`, masked and converted as needed.
  Tensor load(const Tensor& matrix, int64_t first, int64_t count) {
    const Tensor block = row_block(matrix, first, count);
    if (!masked_ && !ops_.converts()) return block;
    const Tensor target = row_block(scratch(), 0, count);
    if (ops_.converts()) {
      convert(rows_of(target), rows_of(block), 1.0, count, num_cols_, bits());
    } else {
      copy_kept(target.data_ptr(), target.stride(0), block.data_ptr(), block.stride(0),
                static_cast<int64_t>(block.element_size()), bits(), count, num_cols_);
    }
    return target;
  }

  // target block {=, +=} mask ⊙ (scale · left right)
  void multiply_into(const Tensor& target, int64_t first, int64_t count, const Tensor& left,
                     const Tensor& right, double scale, bool add) {
    const Tensor block = row_block(target, first, count);
    if (!masked_ && !ops_.converts()) return multiply(block, left, right, add ? 1.0 : 0.0, scale);
    const Tensor product = row_block(scratch(), 0, count);
    multiply(product, left, right, 0.0, scale);
    const auto store = add ? accumulate : convert;
    store(rows_of(block), rows_of(product), 1.0, count, num_cols_, bits());
  }

  // Keep bits of the current block, null where nothing is dropped.
  const uint64_t* bits() const {
    return bits_ ? static_cast<const uint64_t*>(bits_->data_ptr()) : nullptr;
  }

 private:
  void draw_bits(int64_t first, int64_t count) {
    if (!bits_) bits_ = empty({block_rows_ * mask_words_per_row(num_cols_)}, ScalarType::Long);
    draw_keep_bits(ops_.dropout, first, count, num_cols_,
                   static_cast<uint64_t*>(bits_->data_ptr()));
  }

  const Tensor& scratch() {
    if (!scratch_) scratch_ = empty({block_rows_, num_cols_}, ops_.compute);
    return *scratch_;
  }

  const Operands& ops_;
  int64_t num_rows_, num_cols_, block_rows_;
  bool masked_;
  std::optional<Tensor> scratch_, bits_;
};

// sum [r, C] = Σ over row blocks of leftᵀ drop(right), in the accumulator's dtype.
class BlockSum {
 public:
  BlockSum(const Operands& ops, int64_t rank, int64_t num_cols)
      : ops_(ops), sum_(empty({rank, num_cols}, ops.accumulate)) {
    zero(sum_);
  }

  // Whether add() takes `right` as it is and drops by `bits`, so that no masked copy is needed.
  bool masks() const { return ops_.compute != ops_.accumulate; }

  // left [rows, r] and right [rows, C] in the compute dtype, rows of one block.
  void add(const Tensor& left, const Tensor& right, const uint64_t* bits) {
    if (!masks()) return multiply(sum_, transposed(left), right, 1.0);
    outer_sum(static_cast<float*>(sum_.data_ptr()), left.data_ptr(), left.stride(0), left.size(1),
              right.data_ptr(), right.stride(0), right.size(0), right.size(1), bits);
  }

  const Tensor& result() const { return sum_; }

 private:
  const Operands& ops_;
  Tensor sum_;
};

// A dense copy of matrixᵀ, read a cache line at a time; for [r, N] sums, which are small.
Tensor transposed_copy(const Tensor& matrix) {
  const int64_t num_rows = matrix.size(0), num_cols = matrix.size(1);
  Tensor result = empty({num_cols, num_rows}, matrix.scalar_type());
  visit_accumulator(result, [&](auto* out) {
    const auto* in = static_cast<const decltype(out)>(matrix.data_ptr());
    constexpr int64_t kLine = 16;
    for (int64_t first = 0; first < num_cols; first += kLine)
      for (int64_t j = 0; j < num_rows; ++j)
        for (int64_t n = first; n < std::min(first + kLine, num_cols); ++n)
          out[n * num_rows + j] = in[j * num_cols + n];
  });
  return result;
}

Tensor rounded_to(const Tensor& matrix, const Tensor& like, double scale) {
  Tensor result = empty({matrix.size(0), matrix.size(1)}, like.scalar_type());
  convert(rows_of(result), rows_of(matrix), scale, matrix.size(0), matrix.size(1));
  return result;
}

Tensor vector_rounded_to(const Tensor& vector, const Tensor& like) {
  const int64_t n = vector.numel();
  Tensor result = empty({n}, like.scalar_type());
  convert({result.data_ptr(), like.scalar_type(), n}, {vector.data_ptr(), vector.scalar_type(), n},
          1.0, 1, n);
  return result;
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
    if (result.g)
      multiply(row_block(*result.g, first, count), dout_block, ops.lora_b, 0.0, args.scaling);
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
    if (dlora_a) {
      const Tensor x_block =
          dlora_a->masks() ? row_block(*x, first, count) : blocks.load(*x, first, count);
      dlora_a->add(dh_block, x_block, blocks.bits());
    }
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
    const Tensor lora_b = converted(operand(args.lora_b, ops.input), ops.accumulate);
    sum_products_over_cols(sums, lora_b, p, args.scaling);
    gradients.dout_scale = vector_rounded_to(sums, *args.out_scale);
  }
  if (needs.dlora_b) {
    if (args.out_scale) scale_rows(p, vector_operand(*args.out_scale, ops.input));
    gradients.dlora_b = rounded_to(p, args.lora_b, args.scaling);
  }
}

Tensor zeros_like(const Tensor& tensor, int64_t dim) {
  const std::vector<int64_t> sizes = dim == 1
                                         ? std::vector<int64_t>{tensor.size(0)}
                                         : std::vector<int64_t>{tensor.size(0), tensor.size(1)};
  Tensor result = empty(sizes, tensor.scalar_type());
  zero(result);
  return result;
}

// No rows: dx is empty and every other gradient is zero.
void zero_gradients(const BranchArgs& args, const BranchNeeds& needs, ScalarType input,
                    BranchGradients& gradients) {
  if (needs.dx) gradients.dx = empty({0, args.in_features()}, input);
  if (needs.dlora_a) gradients.dlora_a = zeros_like(args.lora_a, 2);
  if (needs.dlora_b) gradients.dlora_b = zeros_like(args.lora_b, 2);
  if (needs.dcore) gradients.dcore = zeros_like(*args.core, 2);
  if (needs.drank_scale) gradients.drank_scale = zeros_like(*args.rank_scale, 1);
  if (needs.dout_scale) gradients.dout_scale = zeros_like(*args.out_scale, 1);
}

}  // namespace

void branch_forward(const BranchArgs& args, const Tensor& x, const Tensor& y, const Tensor& h) {
  const int64_t num_rows = x.size(0);
  if (num_rows == 0) return;
  const Operands ops = prepare(args, x.scalar_type());
  const double scale = ops.dropout.active() ? ops.dropout.scale() : 1.0;
  RowBlocks input(ops, num_rows, args.in_features(), /*masked=*/true);
  input.for_each([&](int64_t first, int64_t count) {
    const Tensor h_block =
        ops.converts() ? empty({count, args.rank()}, ops.compute) : row_block(h, first, count);
    multiply(h_block, input.load(x, first, count), transposed(ops.lora_a), 0.0, scale);
    if (ops.converts())
      convert(rows_of(row_block(h, first, count)), rows_of(h_block), 1.0, count, args.rank());
    const Tensor y_block = row_block(y, first, count);
    const Tensor u = mid(ops, h_block);
    if (!ops.converts()) {
      multiply(y_block, u, transposed(ops.lora_b), 1.0, args.scaling);
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
  const ScalarType input = dout.scalar_type();
  const auto none = [&] {
    return empty({0}, input);
  };  // each its own: outputs of an op must not alias
  BranchGradients gradients{none(), none(), none(), none(), none(), none()};
  if (dout.size(0) == 0) {
    zero_gradients(args, needs, input, gradients);
    return gradients;
  }
  const Operands ops = prepare(args, input);
  const UpGradients up = up_backward(args, ops, needs, dout, h);
  if (up.p) finish_up_gradients(args, ops, needs, *up.p, gradients);
  if (!up.g) return gradients;
  const Tensor dh = mid_backward(args, ops, needs, *up.g, h, gradients);
  if (needs.dx || needs.dlora_a) down_backward(args, ops, needs, dh, x, base_dx, gradients);
  return gradients;
}

}  // namespace lowrank_ext::cpu
