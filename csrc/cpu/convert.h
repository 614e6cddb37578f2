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

// dst[m, k] = scale · src[m, k], or 0 where dropped. bits: keep bits as drawn by draw_keep_bits, or
// null.
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
