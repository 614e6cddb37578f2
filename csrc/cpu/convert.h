// Element-wise passes between the dtype of the tensors and the dtype that products run in: each one
// reads its source once, computes in fp32 (fp64 beside fp64) and rounds once.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace lowrank_ext::cpu {

using torch::headeronly::ScalarType;

struct Rows {
  void* data;
  ScalarType dtype;
  int64_t stride;  // elements between rows; columns are dense
};

inline int64_t size_of(ScalarType dtype) {  // of a floating dtype, in bytes
  if (dtype == ScalarType::Double) return 8;
  return dtype == ScalarType::Float ? 4 : 2;
}

// The rows from `row` on, and their columns from `col` on.
inline Rows row_at(Rows rows, int64_t row, int64_t col = 0) {
  rows.data = static_cast<char*>(rows.data) + (row * rows.stride + col) * size_of(rows.dtype);
  return rows;
}

// dst[m, k] = scale · src[m, k], or 0 where dropped. bits: from draw_keep_bits, or null.
void convert(Rows dst, Rows src, double scale, int64_t num_rows, int64_t num_cols,
             const uint64_t* bits = nullptr);

// dst[m, k] += scale · src[m, k] where kept
void accumulate(Rows dst, Rows src, double scale, int64_t num_rows, int64_t num_cols,
                const uint64_t* bits = nullptr);

// The same for one row, on the calling thread.
void convert_row(Rows dst, Rows src, double scale, int64_t num_cols,
                 const uint64_t* bits = nullptr);
void accumulate_row(Rows dst, Rows src, double scale, int64_t num_cols,
                    const uint64_t* bits = nullptr);

}  // namespace lowrank_ext::cpu
