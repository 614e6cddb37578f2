// The rows of a segment block by block, next to each other and in the dtype of the products: viewed
// where they lie so already, else gathered, and scattered after the products.
#pragma once

#include <algorithm>
#include <optional>

#include "row_blocks.h"
#include "segments.h"

namespace lowrank_ext::cpu {

class SegmentBlocks {
 public:
  SegmentBlocks(const Segment& segment, const Dtypes& dtypes, const Dropout& dropout,
                int64_t in_features, int64_t out_features)
      : segment_(segment), dtypes_(dtypes), dropout_(dropout) {
    const int64_t widest = std::max(in_features, out_features);
    const bool in_place = segment.rows.runs.size() == 1 && !dtypes.converts() && !dropout.active();
    block_rows_ = in_place ? segment.rows.num_rows : block_rows(widest, size_of(dtypes.compute));
  }

  template <typename Body>  // body(first, count), positions in the segment
  void for_each(const Body& body) {
    const int64_t num_rows = segment_.rows.num_rows;
    for (int64_t first = 0; first < num_rows; first += block_rows_) {
      const int64_t count = std::min(block_rows_, num_rows - first);
      block_ = segment_.rows.part(first, count);
      body(first, count);
    }
  }

  // The block's rows of `matrix`: a view where that is possible.
  Tensor load(const Tensor& matrix) const {
    if (is_view(matrix)) return row_block(matrix, block_.runs[0].first, block_.num_rows);
    return gathered(matrix, nullptr);
  }

  Tensor load_dropped(const Tensor& x) {
    if (!dropout_.active()) return load(x);
    return gathered(x, draw_bits(x.size(1)));
  }

  // Whether load(matrix) is a view, through which products can write.
  bool is_view(const Tensor& matrix) const {
    return block_.runs.size() == 1 && matrix.scalar_type() == dtypes_.compute;
  }

  // The block's rows of `matrix` = values, which are not load()'s view of them.
  void store(const Tensor& matrix, const Tensor& values) const {
    scatter(convert, matrix, values, 1.0, nullptr);
  }

  // The same with dropped elements zero.
  void store_dropped(const Tensor& dx, const Tensor& values) {
    scatter(convert, dx, values, 1.0, dropout_.active() ? draw_bits(dx.size(1)) : nullptr);
  }

  void add(const Tensor& matrix, const Tensor& values, double scale) const {
    scatter(accumulate, matrix, values, scale, nullptr);
  }

 private:
  Tensor gathered(const Tensor& matrix, const uint64_t* bits) const {
    const int64_t num_cols = matrix.size(1);
    const Tensor result = empty({block_.num_rows, num_cols}, dtypes_.compute);
    const Rows to = rows_of(result), from = rows_of(matrix);
    block_.for_each_run([&](const Run& run, int64_t position) {
      convert(row_at(to, position), row_at(from, run.first), 1.0, run.count, num_cols,
              bits_at(bits, position, num_cols));
    });
    return result;
  }

  void scatter(decltype(&convert) pass, const Tensor& matrix, const Tensor& values, double scale,
               const uint64_t* bits) const {
    const int64_t num_cols = matrix.size(1);
    const Rows to = rows_of(matrix), from = rows_of(values);
    block_.for_each_run([&](const Run& run, int64_t position) {
      pass(row_at(to, run.first), row_at(from, position), scale, run.count, num_cols,
           bits_at(bits, position, num_cols));
    });
  }

  static const uint64_t* bits_at(const uint64_t* bits, int64_t position, int64_t num_cols) {
    return bits == nullptr ? nullptr : bits + position * mask_words_per_row(num_cols);
  }

  // Keep bits of the block's rows, which are drawn for their places in the whole batch.
  const uint64_t* draw_bits(int64_t num_cols) {
    const int64_t words = mask_words_per_row(num_cols);
    if (!bits_) bits_ = empty({block_rows_ * words}, ScalarType::Long);
    auto* bits = dense_data<uint64_t>(*bits_);
    block_.for_each_run([&](const Run& run, int64_t position) {
      draw_keep_bits(dropout_, run.first, run.count, num_cols, bits + position * words);
    });
    return bits;
  }

  const Segment& segment_;
  const Dtypes& dtypes_;
  const Dropout& dropout_;
  int64_t block_rows_;
  RowList block_;
  std::optional<Tensor> bits_;
};

}  // namespace lowrank_ext::cpu
