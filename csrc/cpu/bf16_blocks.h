// Register blocks of the bf16 products (small_segments.cpp, shrink_expand.cpp): dot products of up to
// 4 rows by 4 ranks, 32 columns per instruction; and 16 columns by pairs of ranks, the operand layout
// of the bf16 dot product where the sum runs over ranks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"

#if LOWRANK_EXT_X86

namespace lowrank_ext::cpu {

inline constexpr int kDotBlock = 4;        // rows and ranks of a block
inline constexpr int64_t kBf16Lanes = 16;  // fp32 sums, or pairs of bf16, of a register

inline constexpr int64_t num_rank_pairs(int64_t rank) { return (rank + 1) / 2; }

// pairs[p] = row[2p] in the low half, row[2p + 1] in the high half, 0 past the last rank.
inline void pack_ranks(uint32_t* pairs, const uint16_t* row, int64_t rank) {
  for (int64_t j = 0; j < rank; j += 2)
    pairs[j / 2] = row[j] | uint32_t{j + 1 < rank ? row[j + 1] : uint16_t{0}} << 16;
}

LOWRANK_EXT_AVX512_BF16 inline __m512bh load32(const uint16_t* p, __mmask32 lanes) {
  return (__m512bh)_mm512_maskz_loadu_epi16(lanes, p);
}

// Sums to bf16, to nearest even; NaN stays a quiet NaN.
LOWRANK_EXT_AVX512_BF16 inline __m256i rounded(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

// The sum over the lanes of each of four registers, in the same order for each.
LOWRANK_EXT_AVX512_BF16 inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  // Each 128-bit lane of ab has a, b, a, b.
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)),
                                    _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// out[m][j] = scale · Σ_k rows[m][k] a[j, k] for kNumRows rows and kNumRanks rows of `a`, rounded
// once. `next`, or null, is the next kNumRanks rows of `a`, which are prefetched: rows are whole pages
// apart, where the hardware's prefetching stops.
template <int kNumRows, int kNumRanks>
LOWRANK_EXT_AVX512_BF16 void dot_block(const uint16_t* const* rows, const uint16_t* a,
                                       int64_t a_stride, const uint16_t* next, int64_t num_cols,
                                       float scale, uint16_t* const* out, int64_t first_rank) {
  __m512 acc[kNumRows][kDotBlock];
#pragma GCC unroll 4
  for (int m = 0; m < kNumRows; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kDotBlock; ++j) acc[m][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < num_cols; k += 32) {
    const auto lanes =
        static_cast<__mmask32>(num_cols - k >= 32 ? ~0u : (1u << (num_cols - k)) - 1);
    __m512bh left[kNumRanks];
#pragma GCC unroll 4
    for (int j = 0; j < kNumRanks; ++j) {
      left[j] = load32(a + j * a_stride + k, lanes);
      if (next != nullptr) _mm_prefetch(next + j * a_stride + k, _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int m = 0; m < kNumRows; ++m) {
      const __m512bh right = load32(rows[m] + k, lanes);
#pragma GCC unroll 4
      for (int j = 0; j < kNumRanks; ++j) acc[m][j] = _mm512_dpbf16_ps(acc[m][j], left[j], right);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kNumRows; ++m) {
    const __m128 sums = sums_of(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
    const __m512 scaled = _mm512_castps128_ps512(_mm_mul_ps(sums, _mm_set1_ps(scale)));
    _mm_mask_storeu_epi16(out[m] + first_rank, (1 << kNumRanks) - 1,
                          _mm256_castsi256_si128(rounded(scaled)));
  }
}

using DotBlock = void (*)(const uint16_t* const*, const uint16_t*, int64_t, const uint16_t*,
                          int64_t, float, uint16_t* const*, int64_t);
template <int kNumRows>
constexpr DotBlock kDotRow[kDotBlock] = {dot_block<kNumRows, 1>, dot_block<kNumRows, 2>,
                                         dot_block<kNumRows, 3>, dot_block<kNumRows, 4>};
// kDotBlocks[rows - 1][ranks - 1]
constexpr const DotBlock* kDotBlocks[kDotBlock] = {kDotRow<1>, kDotRow<2>, kDotRow<3>, kDotRow<4>};

// Eight ranks of one row. Without kAll, ranks out of range and rows that do not exist are zero.
template <bool kAll>
LOWRANK_EXT_AVX512_BF16 inline __m128i load8(const uint16_t* p, bool exists, __mmask8 in_range) {
  if constexpr (kAll) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_maskz_loadu_epi16(exists ? in_range : 0, p);
}

// Eight ranks of 16 rows, four pairs each, as four vectors of one pair each. Pairs past the last rank
// are zero.
template <bool kAll>
LOWRANK_EXT_AVX512_BF16 inline void transpose8(__m512i* pairs, const uint16_t* b, int64_t b_stride,
                                               __mmask8 in_range, int64_t width) {
  // 128-bit lane L of rows[i] is row 4L + i; a 4 x 4 transpose in each lane follows.
  __m512i rows[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint16_t* p = b + i * b_stride;
    const int64_t step = 4 * b_stride;
    __m512i row = _mm512_castsi128_si512(load8<kAll>(p, i < width, in_range));
    row = _mm512_inserti32x4(row, load8<kAll>(p + step, 4 + i < width, in_range), 1);
    row = _mm512_inserti32x4(row, load8<kAll>(p + 2 * step, 8 + i < width, in_range), 2);
    rows[i] = _mm512_inserti32x4(row, load8<kAll>(p + 3 * step, 12 + i < width, in_range), 3);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(rows[0], rows[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(rows[2], rows[3]);
  const __m512i high01 = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i high23 = _mm512_unpackhi_epi32(rows[2], rows[3]);
  pairs[0] = _mm512_unpacklo_epi64(low01, low23);
  pairs[1] = _mm512_unpackhi_epi64(low01, low23);
  pairs[2] = _mm512_unpacklo_epi64(high01, high23);
  pairs[3] = _mm512_unpackhi_epi64(high01, high23);
}

// pairs[p] lane i = b[i, 2p] in the low half, b[i, 2p + 1] in the high half, for `ranks` ranks
// (odd: the last high half is 0) and `width` rows of b, else 0.
LOWRANK_EXT_AVX512_BF16 inline void transpose_pairs(__m512i* pairs, const uint16_t* b,
                                                    int64_t b_stride, int64_t ranks,
                                                    int64_t width) {
  for (int64_t rank = 0; rank < ranks; rank += 8) {
    const int64_t count = std::min<int64_t>(8, ranks - rank);
    const auto in_range = static_cast<__mmask8>((1 << count) - 1);
    const auto transpose = count == 8 && width == kBf16Lanes ? transpose8<true> : transpose8<false>;
    transpose(pairs + rank / 2, b + rank, b_stride, in_range, width);
  }
}

}  // namespace lowrank_ext::cpu

#endif  // LOWRANK_EXT_X86
