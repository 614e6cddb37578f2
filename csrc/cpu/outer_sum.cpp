// A thread owns a range of columns and walks down the rows in tiles, so `right` is read once, in
// order, and no two threads share a sum. A register block is 16 columns by up to 16 ranks. Two rows
// are interleaved into pairs, the operand layout of the bf16 dot product; `left` is packed into pairs
// beforehand.
#include "outer_sum.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "dropout.h"
#include "isa.h"
#include "row_products.h"

namespace lowrank_ext::cpu {

#if LOWRANK_EXT_X86

namespace {

constexpr int64_t kLanes = 16;      // columns of a register block
constexpr int64_t kMaxRanks = 16;   // ranks of a register block: 16 of the 32 registers hold sums
constexpr int64_t kTileRows = 128;  // of `right`: 128 rows of 2 KiB stay in L2 for all ranks
constexpr int64_t kAhead = 32;      // columns to prefetch: a cache line
// Columns per task: about 10 us of work at 1024 rows and rank 16.
constexpr int64_t kColumnGrain = 64;

struct Operand {
  const uint16_t* data;
  int64_t stride;
};

// Rows of left [num_rows, rank] in pairs: [(num_rows + 1) / 2, rank] of 32 bits.
Tensor pack_pairs(Operand left, int64_t num_rows, int64_t rank) {
  const Tensor packed = empty({(num_rows + 1) / 2, rank}, ScalarType::Float);  // as large as a pair
  auto* pairs = dense_data<uint32_t>(packed);
  for (int64_t m = 0; m < num_rows; m += 2) {
    const uint16_t* row = left.data + m * left.stride;
    pack_row_pair(pairs + m / 2 * rank, row, m + 1 < num_rows ? row + left.stride : nullptr, rank);
  }
  return packed;
}

// 16 columns of a row, widened to 32 bits; columns outside `lanes` are zero. An unmasked load, where
// all columns are in range, is cheaper.
LOWRANK_EXT_AVX512_BF16 inline __m512i load_row(const uint16_t* row, __mmask16 lanes,
                                                bool all_in_range) {
  if (all_in_range)
    return _mm512_maskz_cvtepu16_epi32(lanes,
                                       _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row));
}

struct Tile {
  const uint32_t* pairs;  // of the tile's first row
  Operand right;          // at the tile's first row
  const uint64_t* bits;   // at the tile's first row, or null
  int64_t words_per_row;  // of bits
  int64_t num_rows;
  int64_t num_cols;
  int64_t rank;
};

// Lanes of `in_range` whose column is kept; `kept` are the keep bits of a row from the block's first
// column on.
template <bool kMasked>
LOWRANK_EXT_AVX512_BF16 inline __mmask16 lanes_of(const uint16_t* kept, __mmask16 in_range) {
  if constexpr (!kMasked) return in_range;
  __mmask16 word;
  std::memcpy(&word, kept, sizeof(word));
  return word & in_range;
}

// acc[j] += the pair's two rows times left[j]'s. Unrolled early, so that acc stays in registers.
template <int kRanks>
LOWRANK_EXT_AVX512_BF16 inline void add_pair(__m512 (&acc)[kRanks], __m512i pair,
                                             const uint32_t* left) {
#pragma GCC unroll 16
  for (int j = 0; j < kRanks; ++j)
    acc[j] = _mm512_dpbf16_ps(acc[j], (__m512bh)pair,
                              (__m512bh)_mm512_set1_epi32(static_cast<int>(left[j])));
}

template <int kRanks, bool kMasked>
LOWRANK_EXT_AVX512_BF16 void add_block(float* sum, const Tile& tile, int64_t rank_begin,
                                       int64_t column) {
  const int64_t width = std::min(kLanes, tile.num_cols - column);
  const auto in_range = static_cast<__mmask16>((1u << width) - 1);
  const bool all_in_range = width == kLanes;
  // Copies of the tile's fields: the compiler cannot know that stores to sum do not change them.
  const int64_t stride = tile.right.stride, rank = tile.rank;
  const uint16_t* row = tile.right.data + column;
  // Keep bits of 16 columns a word: x86 stores the low ones of 64 first.
  const int64_t kept_stride = tile.words_per_row * 4;
  const uint16_t* kept = nullptr;
  if constexpr (kMasked) kept = reinterpret_cast<const uint16_t*>(tile.bits) + column / kLanes;
  const uint32_t* left = tile.pairs + rank_begin;
  float* block = sum + rank_begin * tile.num_cols + column;
  __m512 acc[kRanks];
#pragma GCC unroll 16
  for (int j = 0; j < kRanks; ++j)
    acc[j] = _mm512_maskz_loadu_ps(in_range, block + j * tile.num_cols);
  for (int64_t pairs = tile.num_rows / 2; pairs > 0; --pairs) {
    const __m512i even = load_row(row, lanes_of<kMasked>(kept, in_range), all_in_range);
    const __m512i odd =
        load_row(row + stride, lanes_of<kMasked>(kept + kept_stride, in_range), all_in_range);
    // The next columns: a tile's rows are too many streams for the hardware's prefetching.
    _mm_prefetch(row + kAhead, _MM_HINT_T0);
    _mm_prefetch(row + stride + kAhead, _MM_HINT_T0);
    add_pair<kRanks>(acc, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)), left);
    row += 2 * stride;
    left += rank;
    if constexpr (kMasked) kept += 2 * kept_stride;
  }
  if (tile.num_rows % 2)
    add_pair<kRanks>(acc, load_row(row, lanes_of<kMasked>(kept, in_range), all_in_range), left);
#pragma GCC unroll 16
  for (int j = 0; j < kRanks; ++j)
    _mm512_mask_storeu_ps(block + j * tile.num_cols, in_range, acc[j]);
}

using AddBlock = void (*)(float*, const Tile&, int64_t, int64_t);

// Ranks that are no multiple of 16 end with smaller blocks: 8, 4, 2, 1.
struct RankBlock {
  int ranks;
  AddBlock plain, masked;
};
template <int kRanks>
constexpr RankBlock kRankBlock{kRanks, add_block<kRanks, false>, add_block<kRanks, true>};
constexpr RankBlock kRankBlocks[] = {kRankBlock<kMaxRanks>, kRankBlock<8>, kRankBlock<4>,
                                     kRankBlock<2>, kRankBlock<1>};

void add_columns(float* sum, const Tile& tile, int64_t column_begin, int64_t column_end) {
  for (int64_t rank_begin = 0; rank_begin < tile.rank;) {
    const RankBlock* block = kRankBlocks;
    while (block->ranks > tile.rank - rank_begin) ++block;
    const AddBlock add = tile.bits == nullptr ? block->plain : block->masked;
    for (int64_t column = column_begin; column < column_end; column += kLanes)
      add(sum, tile, rank_begin, column);
    rank_begin += block->ranks;
  }
}

}  // namespace

void outer_sum(float* sum, const void* left, int64_t left_stride, int64_t rank, const void* right,
               int64_t right_stride, int64_t num_rows, int64_t num_cols, const uint64_t* bits) {
  const Tensor packed =
      pack_pairs({static_cast<const uint16_t*>(left), left_stride}, num_rows, rank);
  const auto* pairs = dense_data<const uint32_t>(packed);
  const int64_t num_blocks = (num_cols + kLanes - 1) / kLanes;
  torch::stable::parallel_for(
      0, num_blocks, kColumnGrain / kLanes, [&](int64_t begin, int64_t end) {
        for (int64_t first = 0; first < num_rows; first += kTileRows) {
          const int64_t words_per_row = mask_words_per_row(num_cols);
          const Tile tile{
              pairs + first / 2 * rank,
              {static_cast<const uint16_t*>(right) + first * right_stride, right_stride},
              bits == nullptr ? nullptr : bits + first * words_per_row,
              words_per_row,
              std::min(kTileRows, num_rows - first),
              num_cols,
              rank};
          add_columns(sum, tile, begin * kLanes, std::min(end * kLanes, num_cols));
        }
      });
}

#else

void outer_sum(float*, const void*, int64_t, int64_t, const void*, int64_t, int64_t, int64_t,
               const uint64_t*) {
  throw std::logic_error("outer_sum: called on a CPU without bf16 dot products");
}

#endif

}  // namespace lowrank_ext::cpu
