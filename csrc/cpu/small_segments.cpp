// shrink: a task owns four ranks of one adapter and walks over its rows four at a time
// (bf16_blocks.h). expand: a task owns a range of columns n; lora_b is transposed in registers to
// vectors of 16 columns by one pair of ranks, the operand layout of the bf16 dot product, which serve
// every row. Ragged ranks, columns and rows are masked: padding of lora_a and lora_b is never read.
#include "small_segments.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>

#include "bf16_blocks.h"

namespace lowrank_ext::cpu {

#if LOWRANK_EXT_X86

namespace {

constexpr int64_t kRanks = kDotBlock;   // of a register block of shrink
constexpr int64_t kRows = kDotBlock;    // of a register block of both
constexpr int64_t kLanes = kBf16Lanes;  // fp32 columns of a register
constexpr int64_t kColumnBlocks = 16;   // of kLanes columns: a task of expand
constexpr int64_t kAhead = 16;          // column blocks from prefetching to use
constexpr int64_t kMaxPairs = 64;       // pairs of ranks in one go: 4 KiB of transposed lora_b
// Multiply-adds worth a thread, about 5 us.
constexpr int64_t kTaskWork = 1 << 18;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A part of a segment.
struct Task {
  size_t segment;
  int64_t part;
};

template <typename NumParts>  // num_parts(segment)
std::vector<Task> tasks_of(const std::vector<SmallSegment>& segments, const NumParts& num_parts) {
  std::vector<Task> tasks;
  for (size_t segment = 0; segment < segments.size(); ++segment)
    for (int64_t part = 0; part < num_parts(segments[segment]); ++part)
      tasks.push_back({segment, part});
  return tasks;
}

// The fewest tasks per thread, so that small calls stay on one.
int64_t grain(const std::vector<SmallSegment>& segments, size_t num_tasks, int64_t num_cols) {
  int64_t work = 0;
  for (const SmallSegment& segment : segments) work += segment.num_rows * segment.rank * num_cols;
  const auto count = static_cast<int64_t>(num_tasks);
  return std::max<int64_t>(1, ceil_div(count * kTaskWork, std::max<int64_t>(1, work)));
}

// sums[m] += Σ_p pairs[p] · h_pairs[m][p] for kNumRows rows
template <int kNumRows>
LOWRANK_EXT_AVX512_BF16 inline void add_pairs(__m512* sums, const __m512i* pairs, int64_t num_pairs,
                                              const uint32_t* h_pairs, int64_t h_stride) {
  __m512 acc[kNumRows];
#pragma GCC unroll 4
  for (int m = 0; m < kNumRows; ++m) acc[m] = sums[m];
  for (int64_t p = 0; p < num_pairs; ++p) {
#pragma GCC unroll 4
    for (int m = 0; m < kNumRows; ++m)
      acc[m] = _mm512_dpbf16_ps(
          acc[m], (__m512bh)pairs[p],
          (__m512bh)_mm512_set1_epi32(static_cast<int>(h_pairs[m * h_stride + p])));
  }
#pragma GCC unroll 4
  for (int m = 0; m < kNumRows; ++m) sums[m] = acc[m];
}

using AddPairs = void (*)(__m512*, const __m512i*, int64_t, const uint32_t*, int64_t);
constexpr AddPairs kAddPairs[kRows] = {add_pairs<1>, add_pairs<2>, add_pairs<3>, add_pairs<4>};

// h of one segment as pairs of ranks, [rows, ceil(rank / 2)], zero past the last rank.
std::vector<uint32_t> pack_pairs(const SmallSegment& segment) {
  const int64_t num_pairs = num_rank_pairs(segment.rank);
  std::vector<uint32_t> pairs(segment.num_rows * num_pairs);
  for (int64_t m = 0; m < segment.num_rows; ++m)
    pack_ranks(pairs.data() + m * num_pairs, segment.h[m], segment.rank);
  return pairs;
}

// Prefetches the columns of lora_b that are used kAhead blocks later. The hardware does not recognize
// the transposing order: without this, cold adapters take three times as long.
inline void prefetch_lora_b(const SmallSegment& segment, int64_t n, int64_t out_features) {
  const int64_t last = std::min(n + (kAhead + 1) * kLanes, out_features);
  for (int64_t i = n + kAhead * kLanes; i < last; ++i) {
    const uint16_t* row = segment.lora_b + i * segment.b_stride;
    for (int64_t j = 0; j < segment.rank; j += 32) _mm_prefetch(row + j, _MM_HINT_T0);
  }
}

LOWRANK_EXT_AVX512_BF16 void expand_columns(const SmallSegment& segment, const uint32_t* h_pairs,
                                            int64_t n, int64_t width) {
  const auto lanes = static_cast<__mmask16>((1u << width) - 1);
  const int64_t num_rows = segment.num_rows;
  const int64_t num_pairs = num_rank_pairs(segment.rank);
  const __m512 factor = _mm512_set1_ps(segment.scaling);
  __m512i pairs[kMaxPairs];
  // Above 2 · kMaxPairs ranks the transpose is repeated for every four rows.
  for (int64_t row = 0; row < num_rows; row += kRows) {
    const int64_t count = std::min(kRows, num_rows - row);
    __m512 sums[kRows] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                          _mm512_setzero_ps()};
    for (int64_t first = 0; first < num_pairs; first += kMaxPairs) {
      const int64_t some = std::min(kMaxPairs, num_pairs - first);
      if (row == 0 || num_pairs > kMaxPairs)
        transpose_pairs(pairs, segment.lora_b + n * segment.b_stride + 2 * first, segment.b_stride,
                        std::min(2 * some, segment.rank - 2 * first), width);
      kAddPairs[count - 1](sums, pairs, some, h_pairs + row * num_pairs + first, num_pairs);
    }
    // All loads before the stores, which would delay them where row strides are powers of two.
    for (int64_t m = 0; m < count; ++m) {
      const __m512i wide =
          _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, segment.base[row + m] + n));
      const __m512 base = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
      sums[m] = _mm512_fmadd_ps(factor, sums[m], base);
    }
    for (int64_t m = 0; m < count; ++m)
      _mm256_mask_storeu_epi16(segment.y[row + m] + n, lanes, rounded(sums[m]));
  }
}

}  // namespace

void shrink_small_segments(const std::vector<SmallSegment>& segments, int64_t in_features,
                           float x_scale) {
  const std::vector<Task> tasks = tasks_of(
      segments, [](const SmallSegment& segment) { return ceil_div(segment.rank, kRanks); });
  const auto num_tasks = static_cast<int64_t>(tasks.size());
  const auto lora_a_of = [&](const Task& task) {
    const SmallSegment& segment = segments[task.segment];
    return segment.lora_a + task.part * kRanks * segment.a_stride;
  };
  torch::stable::parallel_for(
      0, num_tasks, grain(segments, tasks.size(), in_features), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const SmallSegment& segment = segments[tasks[i].segment];
          const int64_t rank = tasks[i].part * kRanks;
          const int64_t ranks = std::min(kRanks, segment.rank - rank);
          const uint16_t* next = i + 1 < end ? lora_a_of(tasks[i + 1]) : nullptr;
          for (int64_t row = 0; row < segment.num_rows; row += kRows) {
            const int64_t rows = std::min(kRows, segment.num_rows - row);
            kDotBlocks[rows - 1][ranks - 1](segment.x + row, lora_a_of(tasks[i]), segment.a_stride,
                                            row == 0 ? next : nullptr, in_features, x_scale,
                                            segment.h + row, rank);
          }
        }
      });
}

void expand_small_segments(const std::vector<SmallSegment>& segments, int64_t out_features) {
  std::vector<std::vector<uint32_t>> h_pairs;
  for (const SmallSegment& segment : segments) h_pairs.push_back(pack_pairs(segment));
  constexpr int64_t kColumns = kColumnBlocks * kLanes;
  const std::vector<Task> tasks =
      tasks_of(segments, [&](const SmallSegment&) { return ceil_div(out_features, kColumns); });
  torch::stable::parallel_for(
      0, static_cast<int64_t>(tasks.size()), grain(segments, tasks.size(), out_features),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = tasks[i].part * kColumns;
          const int64_t last = std::min(first + kColumns, out_features);
          for (int64_t n = first; n < last; n += kLanes) {
            prefetch_lora_b(segments[tasks[i].segment], n, out_features);
            expand_columns(segments[tasks[i].segment], h_pairs[tasks[i].segment].data(), n,
                           std::min(kLanes, last - n));
          }
        }
      });
}

#else

void shrink_small_segments(const std::vector<SmallSegment>&, int64_t, float) {
  throw std::logic_error("shrink_small_segments: called on a CPU without bf16 dot products");
}

void expand_small_segments(const std::vector<SmallSegment>&, int64_t) {
  throw std::logic_error("expand_small_segments: called on a CPU without bf16 dot products");
}

#endif

}  // namespace lowrank_ext::cpu
