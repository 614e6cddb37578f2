#include "row_products.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "dropout.h"
#include "features.h"
#include "isa.h"

namespace lowrank_ext::cpu {
namespace {

// ---- fp32 and fp64: the same loops compiled twice, with AVX-512 and without

constexpr int64_t kLanes = 16;       // partial sums of a dot product, added up in order at the end
constexpr int64_t kSumColumns = 64;  // columns of a weighted sum that stay in registers

template <typename acc_t>
inline __attribute__((always_inline)) void dot_rows_loop(acc_t* out, const acc_t* row,
                                                         const acc_t* rows, int64_t num_rows,
                                                         int64_t num_cols) {
  const int64_t whole = num_cols / kLanes * kLanes;
  for (int64_t j = 0; j < num_rows; ++j, rows += num_cols) {
    acc_t lanes[kLanes] = {};
    for (int64_t c = 0; c < whole; c += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += row[c + l] * rows[c + l];
    acc_t sum = 0;
    for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
    for (int64_t c = whole; c < num_cols; ++c) sum += row[c] * rows[c];
    out[j] = sum;
  }
}

template <typename acc_t>
inline __attribute__((always_inline)) void add_rows_loop(acc_t* row, const acc_t* factors,
                                                         const acc_t* rows, int64_t num_rows,
                                                         int64_t num_cols, const uint64_t* bits) {
  for (int64_t c = 0; c < num_cols; c += kSumColumns) {
    const uint64_t kept = bits == nullptr ? ~uint64_t{0} : bits[c / kSumColumns];
    const int64_t width = std::min(kSumColumns, num_cols - c);
    acc_t sums[kSumColumns] = {};
    for (int64_t j = 0; j < num_rows; ++j) {
      const acc_t* source = rows + j * num_cols + c;
      if (width == kSumColumns) {  // a count that the compiler knows
        for (int64_t l = 0; l < kSumColumns; ++l) sums[l] += factors[j] * source[l];
      } else {
        for (int64_t l = 0; l < width; ++l) sums[l] += factors[j] * source[l];
      }
    }
    for (int64_t l = 0; l < width; ++l) row[c + l] += kept >> l & 1 ? sums[l] : acc_t{0};
  }
}

#if LOWRANK_EXT_X86

template <typename acc_t>
LOWRANK_EXT_AVX512 void dot_rows_avx512(acc_t* out, const acc_t* row, const acc_t* rows,
                                        int64_t num_rows, int64_t num_cols) {
  dot_rows_loop(out, row, rows, num_rows, num_cols);
}

template <typename acc_t>
LOWRANK_EXT_AVX512 void add_rows_avx512(acc_t* row, const acc_t* factors, const acc_t* rows,
                                        int64_t num_rows, int64_t num_cols, const uint64_t* bits) {
  add_rows_loop(row, factors, rows, num_rows, num_cols, bits);
}

// ---- bf16: dot products of pairs

// kRows rows at once, each with kSteps sums, so that enough products are in flight.
template <int kRows, int kSteps>
LOWRANK_EXT_AVX512_BF16 void dot_block(float* out, const uint16_t* row, const uint16_t* rows,
                                       int64_t num_cols) {
  constexpr int64_t kVector = 32;
  __m512 sums[kSteps][kRows];
#pragma GCC unroll 4
  for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) sums[step][j] = _mm512_setzero_ps();
  int64_t c = 0;
  for (; c + kSteps * kVector <= num_cols; c += kSteps * kVector)
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
      const auto left = (__m512bh)_mm512_loadu_si512(row + c + step * kVector);
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j)
        sums[step][j] = _mm512_dpbf16_ps(
            sums[step][j], left,
            (__m512bh)_mm512_loadu_si512(rows + j * num_cols + c + step * kVector));
    }
  for (; c < num_cols; c += kVector) {
    const int64_t rest = std::min(kVector, num_cols - c);
    const auto lanes = static_cast<__mmask32>((uint64_t{1} << rest) - 1);
    const auto left = (__m512bh)_mm512_maskz_loadu_epi16(lanes, row + c);
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j)
      sums[0][j] = _mm512_dpbf16_ps(
          sums[0][j], left, (__m512bh)_mm512_maskz_loadu_epi16(lanes, rows + j * num_cols + c));
  }
#pragma GCC unroll 8
  for (int j = 0; j < kRows; ++j) {
    __m512 sum = sums[0][j];
#pragma GCC unroll 4
    for (int step = 1; step < kSteps; ++step) sum = _mm512_add_ps(sum, sums[step][j]);
    out[j] = _mm512_reduce_add_ps(sum);
  }
}

struct DotBlock {
  int rows;
  void (*dot)(float*, const uint16_t*, const uint16_t*, int64_t);
};
constexpr DotBlock kDotBlocks[] = {
    {8, dot_block<8, 1>}, {4, dot_block<4, 2>}, {2, dot_block<2, 4>}, {1, dot_block<1, 4>}};

// 64 columns of row += Σ over pairs of rows, where kept; `in_range` columns exist.
LOWRANK_EXT_AVX512_BF16 inline void add_columns(float* row, const uint32_t* factors,
                                                const uint32_t* pairs, int64_t num_pairs,
                                                int64_t num_cols, int64_t in_range, uint64_t kept) {
  constexpr int kVectors = kSumColumns / 16;
  __mmask16 lanes[kVectors];
  __m512 sums[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t rest = std::clamp<int64_t>(in_range - v * 16, 0, 16);
    lanes[v] = static_cast<__mmask16>((1u << rest) - 1);
    sums[v] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < num_pairs; ++p, pairs += num_cols) {
    const auto factor = (__m512bh)_mm512_set1_epi32(static_cast<int>(factors[p]));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[v] = _mm512_dpbf16_ps(sums[v], factor,
                                 (__m512bh)_mm512_maskz_loadu_epi32(lanes[v], pairs + v * 16));
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const auto added = static_cast<__mmask16>(kept >> (v * 16)) & lanes[v];
    const __m512 old = _mm512_maskz_loadu_ps(lanes[v], row + v * 16);
    _mm512_mask_storeu_ps(row + v * 16, added, _mm512_add_ps(old, sums[v]));
  }
}

LOWRANK_EXT_AVX512_BF16 void add_pairs(float* row, const uint32_t* factors, const uint32_t* pairs,
                                       int64_t num_pairs, int64_t num_cols, const uint64_t* bits) {
  for (int64_t c = 0; c < num_cols; c += kSumColumns)
    add_columns(row + c, factors, pairs + c, num_pairs, num_cols, num_cols - c,
                bits == nullptr ? ~uint64_t{0} : bits[c / kSumColumns]);
}

#endif  // LOWRANK_EXT_X86

template <typename acc_t>
void dot_rows_any(acc_t* out, const acc_t* row, const acc_t* rows, int64_t num_rows,
                  int64_t num_cols) {
#if LOWRANK_EXT_X86
  if (features().avx512) return dot_rows_avx512(out, row, rows, num_rows, num_cols);
#endif
  dot_rows_loop(out, row, rows, num_rows, num_cols);
}

template <typename acc_t>
void add_rows_any(acc_t* row, const acc_t* factors, const acc_t* rows, int64_t num_rows,
                  int64_t num_cols, const uint64_t* bits) {
#if LOWRANK_EXT_X86
  if (features().avx512) return add_rows_avx512(row, factors, rows, num_rows, num_cols, bits);
#endif
  add_rows_loop(row, factors, rows, num_rows, num_cols, bits);
}

[[maybe_unused]] [[noreturn]] void no_bf16() {
  throw std::logic_error("row_products: called on a CPU without bf16 dot products");
}

}  // namespace

Tensor pack_rows(const Tensor& matrix, int64_t group) {
  if (matrix.scalar_type() != ScalarType::BFloat16) return matrix;
  const int64_t num_cols = matrix.size(1), num_groups = matrix.size(0) / group;
  const int64_t pairs = packed_rows<BFloat16>(group);
  // An fp32 entry has the size of a pair.
  Tensor packed = empty({num_groups * pairs, num_cols}, ScalarType::Float);
  const auto* in = dense_data<const uint16_t>(matrix);
  auto* out = dense_data<uint32_t>(packed);
  torch::stable::parallel_for(0, num_groups * pairs, 16, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = p / pairs * group + p % pairs * 2;
      const bool alone = p % pairs * 2 + 1 == group;
      pack_row_pair(out + p * num_cols, in + row * num_cols,
                    alone ? nullptr : in + (row + 1) * num_cols, num_cols);
    }
  });
  return packed;
}

void dot_rows(float* out, const float* row, const float* rows, int64_t num_rows, int64_t num_cols) {
  dot_rows_any(out, row, rows, num_rows, num_cols);
}
void dot_rows(double* out, const double* row, const double* rows, int64_t num_rows,
              int64_t num_cols) {
  dot_rows_any(out, row, rows, num_rows, num_cols);
}
void add_rows(float* row, const float* factors, const float* rows, int64_t num_rows,
              int64_t num_cols, const uint64_t* bits) {
  add_rows_any(row, factors, rows, num_rows, num_cols, bits);
}
void add_rows(double* row, const double* factors, const double* rows, int64_t num_rows,
              int64_t num_cols, const uint64_t* bits) {
  add_rows_any(row, factors, rows, num_rows, num_cols, bits);
}

#if LOWRANK_EXT_X86

void dot_rows(float* out, const BFloat16* row, const BFloat16* rows, int64_t num_rows,
              int64_t num_cols) {
  const auto* left = reinterpret_cast<const uint16_t*>(row);
  const auto* right = reinterpret_cast<const uint16_t*>(rows);
  for (const DotBlock* block = kDotBlocks; num_rows > 0;) {
    while (block->rows > num_rows) ++block;
    block->dot(out, left, right, num_cols);
    out += block->rows;
    right += block->rows * num_cols;
    num_rows -= block->rows;
  }
}

void add_rows(float* row, const float* factors, const BFloat16Pair* rows, int64_t num_rows,
              int64_t num_cols, const uint64_t* bits) {
  constexpr int64_t kMostPairs = 64;  // of factors that are converted at a time
  const auto* pairs = reinterpret_cast<const uint32_t*>(rows);
  for (int64_t first = 0; first < num_rows; first += 2 * kMostPairs) {
    const int64_t count = std::min(2 * kMostPairs, num_rows - first);
    BFloat16Pair rounded[kMostPairs];
    for (int64_t j = 0; j < count; j += 2)
      rounded[j / 2] = {BFloat16(factors[first + j]),
                        BFloat16(j + 1 < count ? factors[first + j + 1] : 0.0f)};
    uint32_t words[kMostPairs];
    std::memcpy(words, rounded, sizeof(words));
    add_pairs(row, words, pairs + first / 2 * num_cols, (count + 1) / 2, num_cols, bits);
  }
}

#else

void dot_rows(float*, const BFloat16*, const BFloat16*, int64_t, int64_t) { no_bf16(); }
void add_rows(float*, const float*, const BFloat16Pair*, int64_t, int64_t, const uint64_t*) {
  no_bf16();
}

#endif

}  // namespace lowrank_ext::cpu
