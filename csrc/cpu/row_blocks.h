// Blocks of rows small enough to stay in cache. A block is masked or converted into scratch, from
// which the products read it, so no [M, K] or [M, N] temporary exists. The bf16 products mask by
// themselves (shrink_expand.h, outer_sum.h), and their blocks have keep bits only.
#pragma once

#include <algorithm>
#include <optional>

#include "operands.h"
#include "outer_sum.h"
#include "shrink_expand.h"

namespace lowrank_ext::cpu {

// Scratch of one block: half of a 2 MiB L2, so that the block survives until the product reads it.
inline constexpr int64_t kBlockBytes = 1 << 20;
inline constexpr int64_t kMinBlockRows = 64;
inline constexpr int64_t kMaxBlockRows = 512;
inline constexpr int64_t kMaxBitRows = 8192;  // of a block of keep bits

inline int64_t block_rows(int64_t num_cols, int64_t element_size) {
  const int64_t rows = kBlockBytes / std::max<int64_t>(1, num_cols * element_size);
  return std::clamp(rows / 32 * 32, kMinBlockRows, kMaxBlockRows);
}

// drop(x), or any matrix, block by block in the compute dtype.
class RowBlocks {
 public:
  RowBlocks(const Operands& ops, int64_t num_rows, int64_t num_cols, bool masked)
      : ops_(ops),
        num_rows_(num_rows),
        num_cols_(num_cols),
        masked_(masked && ops.dropout.active()),
        in_place_(ops.in_bf16() || (!masked_ && !ops.converts())) {
    // Without scratch one block: the product has its own blocking.
    block_rows_ = num_rows;
    if (!in_place_) {
      block_rows_ = std::min(num_rows, block_rows(num_cols, size_of(ops.compute)));
    } else if (masked_) {
      block_rows_ = std::min(num_rows, kMaxBitRows);
    }
  }

  template <typename Body>  // body(first_row, num_rows)
  void for_each(const Body& body) {
    for (int64_t first = 0; first < num_rows_; first += block_rows_) {
      const int64_t count = std::min(block_rows_, num_rows_ - first);
      if (masked_) draw_bits(first, count);
      body(first, count);
    }
  }

  // The current block of `matrix`, masked and converted as needed; not masked in bf16.
  Tensor load(const Tensor& matrix, int64_t first, int64_t count) {
    const Tensor block = row_block(matrix, first, count);
    if (in_place_) return block;
    const Tensor target = row_block(scratch(), 0, count);
    if (ops_.converts()) {
      convert(rows_of(target), rows_of(block), 1.0, count, num_cols_, bits());
    } else {
      copy_kept(rows_data(target), target.stride(0), rows_data(block), block.stride(0),
                static_cast<int64_t>(block.element_size()), bits(), count, num_cols_);
    }
    return target;
  }

  // target block {=, +=} mask ⊙ (scale · left right)
  void multiply_into(const Tensor& target, int64_t first, int64_t count, const Tensor& left,
                     const Tensor& right, double scale, bool add) {
    const Tensor block = row_block(target, first, count);
    if (in_place_) return expand(block, left, right, scale, bits(), add);
    const Tensor product = row_block(scratch(), 0, count);
    multiply(product, left, right, 0.0, scale);
    const auto store = add ? accumulate : convert;
    store(rows_of(block), rows_of(product), 1.0, count, num_cols_, bits());
  }

  // Keep bits of the current block, null where nothing is dropped.
  const uint64_t* bits() const { return bits_ ? dense_data<const uint64_t>(*bits_) : nullptr; }

 private:
  void draw_bits(int64_t first, int64_t count) {
    if (!bits_) bits_ = empty({block_rows_ * mask_words_per_row(num_cols_)}, ScalarType::Long);
    draw_keep_bits(ops_.dropout, first, count, num_cols_, dense_data<uint64_t>(*bits_));
  }

  const Tensor& scratch() {
    if (!scratch_) scratch_ = empty({block_rows_, num_cols_}, ops_.compute);
    return *scratch_;
  }

  const Operands& ops_;
  int64_t num_rows_, num_cols_, block_rows_;
  bool masked_, in_place_;  // in place: products read and write matrices where they lie
  std::optional<Tensor> scratch_, bits_;
};

// sum [r, C] = Σ over row blocks of leftᵀ drop(right), in the accumulator's dtype.
class BlockSum {
 public:
  BlockSum(const Dtypes& dtypes, int64_t rank, int64_t num_cols)
      : dtypes_(dtypes), sum_(empty({rank, num_cols}, dtypes.accumulate)) {
    zero(sum_);
  }

  // left [rows, r] and right [rows, C] of one block, in the compute dtype. In bf16 `bits` drop
  // elements of right here; other dtypes come with zeros where dropped.
  void add(const Tensor& left, const Tensor& right, const uint64_t* bits) {
    if (!dtypes_.in_bf16()) return multiply(sum_, transposed(left), right, 1.0);
    outer_sum(dense_data<float>(sum_), rows_data(left), left.stride(0), left.size(1),
              rows_data(right), right.stride(0), right.size(0), right.size(1), bits);
  }

  const Tensor& result() const { return sum_; }

 private:
  Dtypes dtypes_;
  Tensor sum_;
};

}  // namespace lowrank_ext::cpu
