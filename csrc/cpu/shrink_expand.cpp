// shrink: a thread masks eight rows at a time into scratch that stays in its caches, and multiplies
// them by four ranks at a time (bf16_blocks.h). expand: a register block is eight rows by 32 columns;
// two ranks are interleaved into pairs, the operand layout of the bf16 dot product.
#include "shrink_expand.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "bf16_blocks.h"
#include "row_products.h"
#include "small_matrix.h"

namespace lowrank_ext::cpu {

#if LOWRANK_EXT_X86

namespace {

// Beyond both the vendor's bf16 product is faster, by up to 10 %; at a few rows its set-up dominates.
constexpr int64_t kMaxOwnRank = 32;
constexpr int64_t kMaxOwnRows = 256;

constexpr int64_t kRowGrain = 32;  // rows per task, about 20 us
constexpr int kGroupRows = 8;      // multiplied by four ranks while these are in L1
constexpr int kExpandRows = 8;     // of a register block of expand
constexpr int64_t kLanes = kBf16Lanes;
constexpr int kVectors = 2;  // of kLanes columns
constexpr int64_t kExpandColumns = kLanes * kVectors;
constexpr int64_t kPackGrain = 32;  // vectors of columns per task

bool vendor_is_faster(const Tensor& h) {
  return h.scalar_type() != ScalarType::BFloat16 ||
         (h.size(1) > kMaxOwnRank && h.size(0) > kMaxOwnRows);
}

struct Bf16Matrix {
  uint16_t* data;
  int64_t stride;

  explicit Bf16Matrix(const Tensor& tensor)
      : data(static_cast<uint16_t*>(rows_data(tensor))), stride(tensor.stride(0)) {}
  uint16_t* row(int64_t index) const { return data + index * stride; }
};

// Rows of drop(x), a group at a time, in scratch that its thread keeps from call to call.
class MaskedRows {
 public:
  MaskedRows(const Bf16Matrix& x, int64_t num_cols, const Dropout& dropout)
      : x_(x), num_cols_(num_cols), dropout_(dropout) {
    if (!dropout.active()) return;
    static thread_local std::vector<uint16_t> scratch;
    static thread_local std::vector<uint64_t> bits;
    scratch.resize(std::max<size_t>(scratch.size(), kGroupRows * num_cols));
    bits.resize(std::max<size_t>(bits.size(), mask_words_per_row(num_cols)));
    scratch_ = scratch.data();
    bits_ = bits.data();
  }

  void load(int64_t first, int64_t count, const uint16_t** rows) {
    for (int64_t m = 0; m < count; ++m) {
      rows[m] = x_.row(first + m);
      if (!dropout_.active()) continue;
      uint16_t* masked = scratch_ + m * num_cols_;
      draw_row_bits(dropout_, 0, first + m, 0, num_cols_, bits_);
      copy_row_kept(masked, rows[m], sizeof(uint16_t), bits_, num_cols_);
      rows[m] = masked;
    }
  }

 private:
  Bf16Matrix x_;
  int64_t num_cols_;
  const Dropout& dropout_;
  uint16_t* scratch_ = nullptr;
  uint64_t* bits_ = nullptr;
};

// out[p · num_cols + i] = pair p of ranks of row i of b, i < width.
LOWRANK_EXT_AVX512_BF16 void pack_columns(uint32_t* out, const uint16_t* b, int64_t b_stride,
                                          int64_t rank, int64_t num_cols, int64_t width) {
  const auto lanes = static_cast<__mmask16>((1u << width) - 1);
  for (int64_t first = 0; first < rank; first += 8) {
    __m512i pairs[4];
    const int64_t ranks = std::min<int64_t>(8, rank - first);
    transpose_pairs(pairs, b + first, b_stride, ranks, width);
    for (int64_t p = 0; p < num_rank_pairs(ranks); ++p)
      _mm512_mask_storeu_epi32(out + (first / 2 + p) * num_cols, lanes, pairs[p]);
  }
}

// The rows of one register block.
struct ExpandRows {
  uint16_t* y[kExpandRows];
  const uint64_t* bits[kExpandRows];
  const uint32_t* h_pairs;     // [rows, num_pairs]
  const uint32_t* lora_pairs;  // [num_pairs, num_cols]
  int64_t num_pairs, num_cols;
  float scale;
};

// 16 columns of a row of y; `lanes` exist, and `sum` counts in the `kept` ones.
template <bool kAdd>
LOWRANK_EXT_AVX512_BF16 inline void store_columns(uint16_t* y, __m512 sum, float scale,
                                                  __mmask16 lanes, __mmask16 kept) {
  const __m512 factor = _mm512_set1_ps(scale);
  if constexpr (kAdd) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, y));
    const __m512 base = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    _mm256_mask_storeu_epi16(y, kept, rounded(_mm512_fmadd_ps(factor, sum, base)));
  } else {
    _mm256_mask_storeu_epi16(y, lanes, rounded(_mm512_maskz_mul_ps(kept, factor, sum)));
  }
}

template <int kNumRows, bool kAdd>
LOWRANK_EXT_AVX512_BF16 void expand_columns(const ExpandRows& rows, int64_t col) {
  __mmask16 lanes[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t rest = std::clamp<int64_t>(rows.num_cols - col - v * kLanes, 0, kLanes);
    lanes[v] = static_cast<__mmask16>((1u << rest) - 1);
  }
  __m512 acc[kNumRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kNumRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[m][v] = _mm512_setzero_ps();
  const uint32_t* a = rows.lora_pairs + col;
  const uint32_t* h = rows.h_pairs;
  for (int64_t p = 0; p < rows.num_pairs; ++p, a += rows.num_cols) {
    __m512bh right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      right[v] = (__m512bh)_mm512_maskz_loadu_epi32(lanes[v], a + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kNumRows; ++m) {
      const auto left = (__m512bh)_mm512_set1_epi32(static_cast<int>(h[m * rows.num_pairs + p]));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[m][v] = _mm512_dpbf16_ps(acc[m][v], right[v], left);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kNumRows; ++m) {
    const uint64_t* bits = rows.bits[m];
    const uint64_t kept = bits == nullptr ? ~uint64_t{0} : bits[col / 64] >> (col % 64);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      store_columns<kAdd>(rows.y[m] + col + v * kLanes, acc[m][v], rows.scale, lanes[v],
                          static_cast<__mmask16>(kept >> (v * kLanes)) & lanes[v]);
  }
}

template <int kNumRows, bool kAdd>
void expand_rows(const ExpandRows& rows) {
  for (int64_t col = 0; col < rows.num_cols; col += kExpandColumns)
    expand_columns<kNumRows, kAdd>(rows, col);
}

template <bool kAdd>
void expand_block(const ExpandRows& rows, int64_t count) {
  if (count == kExpandRows) return expand_rows<kExpandRows, kAdd>(rows);
  for (int64_t m = 0; m < count; ++m) {  // the last few of a matrix, one at a time
    ExpandRows one = rows;
    one.y[0] = rows.y[m];
    one.bits[0] = rows.bits[m];
    one.h_pairs = rows.h_pairs + m * rows.num_pairs;
    expand_rows<1, kAdd>(one);
  }
}

// lora [r, N] as pairs of ranks: [num_pairs, N] of 32 bits. Of an odd rank the last one is paired with
// zeros.
Tensor pairs_of(const Tensor& lora) {
  const int64_t rank = lora.size(0), num_cols = lora.size(1);
  if (lora.stride(1) == 1) return pack_rows(lora, rank);
  const int64_t num_pairs = num_rank_pairs(rank);
  const Tensor packed = empty({num_pairs, num_cols}, ScalarType::Float);  // as large as a pair
  const Bf16Matrix rows(transposed(lora));
  auto* out = dense_data<uint32_t>(packed);
  const int64_t num_vectors = (num_cols + kLanes - 1) / kLanes;
  torch::stable::parallel_for(0, num_vectors, kPackGrain, [&](int64_t begin, int64_t end) {
    for (int64_t vector = begin; vector < end; ++vector)
      pack_columns(out + vector * kLanes, rows.row(vector * kLanes), rows.stride, rank, num_cols,
                   std::min(kLanes, num_cols - vector * kLanes));
  });
  return packed;
}

}  // namespace

void shrink(const Tensor& h, const Tensor& x, const Tensor& lora_a, double scale,
            const Dropout& dropout) {
  if (!dropout.active() && vendor_is_faster(h))
    return multiply(h, x, transposed(lora_a), 0.0, scale);
  const Bf16Matrix rows(x), out(h);
  const Tensor dense = lora_a.stride(1) == 1 ? lora_a : transposed_copy(transposed(lora_a));
  const Bf16Matrix a(dense);
  const int64_t num_cols = lora_a.size(1), rank = lora_a.size(0);
  torch::stable::parallel_for(0, x.size(0), kRowGrain, [&](int64_t begin, int64_t end) {
    MaskedRows masked(rows, num_cols, dropout);
    for (int64_t first = begin; first < end; first += kGroupRows) {
      const int64_t count = std::min<int64_t>(kGroupRows, end - first);
      const uint16_t* group[kGroupRows];
      uint16_t* results[kGroupRows];
      masked.load(first, count, group);
      for (int64_t m = 0; m < count; ++m) results[m] = out.row(first + m);
      for (int64_t j = 0; j < rank; j += kDotBlock) {
        const int64_t ranks = std::min<int64_t>(kDotBlock, rank - j);
        for (int64_t m = 0; m < count; m += kDotBlock)
          kDotBlocks[std::min<int64_t>(kDotBlock, count - m) - 1][ranks - 1](
              group + m, a.row(j), a.stride, nullptr, num_cols, static_cast<float>(scale),
              results + m, j);
      }
    }
  });
}

void expand(const Tensor& y, const Tensor& h, const Tensor& lora, double scale,
            const uint64_t* bits, bool add) {
  if (bits == nullptr && vendor_is_faster(h)) return multiply(y, h, lora, add ? 1.0 : 0.0, scale);
  const Bf16Matrix out(y), left(h);
  const int64_t num_cols = lora.size(1), rank = lora.size(0);
  const int64_t num_pairs = num_rank_pairs(rank), num_words = mask_words_per_row(num_cols);
  const Tensor packed = pairs_of(lora);
  torch::stable::parallel_for(0, y.size(0), kRowGrain, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> h_pairs(kExpandRows * num_pairs);
    ExpandRows rows{
        {},        {},       h_pairs.data(),           dense_data<const uint32_t>(packed),
        num_pairs, num_cols, static_cast<float>(scale)};
    for (int64_t first = begin; first < end; first += kExpandRows) {
      const int64_t count = std::min<int64_t>(kExpandRows, end - first);
      for (int64_t m = 0; m < count; ++m) {
        pack_ranks(h_pairs.data() + m * num_pairs, left.row(first + m), rank);
        rows.y[m] = out.row(first + m);
        rows.bits[m] = bits == nullptr ? nullptr : bits + (first + m) * num_words;
      }
      add ? expand_block<true>(rows, count) : expand_block<false>(rows, count);
    }
  });
}

#else

void shrink(const Tensor& h, const Tensor& x, const Tensor& lora_a, double scale, const Dropout&) {
  multiply(h, x, transposed(lora_a), 0.0, scale);
}

void expand(const Tensor& y, const Tensor& h, const Tensor& lora, double scale, const uint64_t*,
            bool add) {
  multiply(y, h, lora, add ? 1.0 : 0.0, scale);
}

#endif

}  // namespace lowrank_ext::cpu
