// Products of one row with a few others: dot products over the columns, and weighted sums. A mixture
// of small experts takes them, since the rows to multiply with differ from token to token and a matrix
// product would have to gather.
//
// Storage is bf16 where the CPU has bf16 dot products, else fp32 or fp64. Sums are fp32 or fp64, in an
// order that depends on the sizes only.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "matrix.h"

namespace lowrank_ext::cpu {

using torch::headeronly::BFloat16;

// An element each of two bf16 rows, the operand layout of the bf16 dot product. Of an odd number of
// rows the last one is paired with zeros.
struct BFloat16Pair {
  BFloat16 first, second;
};

template <typename storage_t>
using acc_of = std::conditional_t<std::is_same_v<storage_t, double>, double, float>;
// An entry of the packed rows that add_rows reads.
template <typename storage_t>
using packed_of = std::conditional_t<std::is_same_v<storage_t, BFloat16>, BFloat16Pair, storage_t>;

// How many packed rows `num_rows` rows of storage_t make.
template <typename storage_t>
constexpr int64_t packed_rows(int64_t num_rows) {
  return std::is_same_v<storage_t, BFloat16> ? (num_rows + 1) / 2 : num_rows;
}

// pairs[c] = first[c] in the low half, second[c], or zero where it is null, in the high half.
inline void pack_row_pair(uint32_t* pairs, const uint16_t* first, const uint16_t* second,
                          int64_t num_cols) {
  if (second == nullptr) {
    std::copy(first, first + num_cols, pairs);
  } else {
    for (int64_t c = 0; c < num_cols; ++c) pairs[c] = first[c] | uint32_t{second[c]} << 16;
  }
}

// The `group` rows of each of the groups of matrix [groups · group, num_cols] as packed rows:
// [groups · packed_rows(group), num_cols].
Tensor pack_rows(const Tensor& matrix, int64_t group);

// out[j] = Σ_c row[c] rows[j, c], c < num_cols, j < num_rows; rows are num_cols apart.
void dot_rows(float* out, const BFloat16* row, const BFloat16* rows, int64_t num_rows,
              int64_t num_cols);
void dot_rows(float* out, const float* row, const float* rows, int64_t num_rows, int64_t num_cols);
void dot_rows(double* out, const double* row, const double* rows, int64_t num_rows,
              int64_t num_cols);

// row[c] += Σ_j factors[j] rows[j, c] where kept; bits: keep bits of the row, or null. bf16 factors
// are rounded from fp32.
void add_rows(float* row, const float* factors, const BFloat16Pair* rows, int64_t num_rows,
              int64_t num_cols, const uint64_t* bits = nullptr);
void add_rows(float* row, const float* factors, const float* rows, int64_t num_rows,
              int64_t num_cols, const uint64_t* bits = nullptr);
void add_rows(double* row, const double* factors, const double* rows, int64_t num_rows,
              int64_t num_cols, const uint64_t* bits = nullptr);

}  // namespace lowrank_ext::cpu
