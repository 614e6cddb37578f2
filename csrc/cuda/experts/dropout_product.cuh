// thin_product.cuh where groups of C's columns each see L through their own dropout mask
// (dropout_groups.h): dense_down and dense_outer.
//
// A block owns 64 rows and 64 columns (four units) of C and one split of the contraction, whose
// tiles of L and R come through three stages of cp.async. Of each step's tile of L it makes a
// dropped copy for every mask that its units see, at most four: a thread reads the chunks that it
// copied itself and writes them into each copy. One barrier frees the copies, another publishes
// them and the stage; then every warp multiplies its two units, each with its copy (the router's
// with the stage itself). In dense_outer a row of x is neither drawn nor copied for a group whose
// dz is zero in that row, and elements of x that are not finite are zero in the copies.
//
// Shared memory: 3 · 16 KiB of stages and 4 · 8 KiB of copies. Sums are in acc_t, scaled behind a
// mask, and leave through shared memory as a split's partial sums. What lies outside the matrices
// is zero in shared memory and never stored; units beyond the last are not multiplied.
#pragma once

#include "experts/dropout_groups.h"
#include "lowrank/thin_product.cuh"

namespace lowrank_ext::cuda {

template <class Compute>
ThinProductPlan plan_dropout_product(int64_t outer, int64_t depth, int num_cols, int num_sms) {
  ThinProductPlan plan;
  plan.block_outer = plan.rank_tile = 64;
  plan_splits(plan, outer, depth, num_cols, compute_traits<Compute>(), blocks_to_fill(num_sms));
  return plan;
}

// The partial sums, [num_splits · num_sum_rows, sum_row] of them.
template <class Compute>
PartialSumsSize dropout_product_size(int64_t outer, int64_t depth, int num_cols,
                                     int64_t num_sum_rows, int64_t sum_row, int num_sms) {
  const int num_splits = plan_dropout_product<Compute>(outer, depth, num_cols, num_sms).num_splits;
  const int64_t stride = padded_to_sector(sum_row);
  return {num_splits, stride,
          num_splits * num_sum_rows * stride * compute_traits<Compute>().acc_bytes};
}

// ---- kernel

template <class Compute, class Op>
struct DropoutProductParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  Matrix<const scalar_t> large;  // x [M, K]
  Matrix<const scalar_t> thin;   // w [R, K] or dz [M, R]
  Matrix<acc_t> partials;        // [num_splits · M, R] or [num_splits · R, K], which may be padded
  int64_t rows_per_split;        // of partials: M or R
  DropoutGroups groups;
  acc_t scale;  // of the experts' columns
  Dropout dropout;
  int num_rank_tiles;
  int64_t steps_per_split;

  template <class F>
  void each_tensor(F&& f) const {
    f("x", large);
    f(Op::kThinName, thin);
    f("partials", partials);
    f("seed", Matrix<const int64_t>{dropout.seed, 1, 1, 1});
  }
};

namespace detail {

// Sums of the two units that lie in one half of a rank tile: a warp owns 16 rows of one unit.
template <class Compute, int kHalf>
struct HalfSum : Accumulator<Compute, 64, 2 * kUnitCols, 4, 2> {
  using Base = Accumulator<Compute, 64, 2 * kUnitCols, 4, 2>;
  static constexpr int kFirstUnit = 2 * kHalf;

  static __device__ __forceinline__ int first_col(int thread) {
    return kFirstUnit * kUnitCols + Base::first_col(thread);
  }
  static __device__ __forceinline__ int unit(int thread) { return first_col(thread) / kUnitCols; }
};

template <class Compute>
struct UnitSums {
  static constexpr int kThreads = HalfSum<Compute, 0>::kThreads;

  HalfSum<Compute, 0> low;
  HalfSum<Compute, 1> high;

  // As Accumulator's.
  template <class F>
  __device__ __forceinline__ void for_each_pair(int thread, F f) {
    low.for_each_pair(thread, f);
    high.for_each_pair(thread, [&](int row, int col, auto& left, auto& right) {
      f(row, col + 2 * kUnitCols, left, right);
    });
  }
};

}  // namespace detail

template <class Compute_, class Op_>
struct DropoutProductTraits {
  using Compute = Compute_;
  using Op = Op_;
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  using Params = DropoutProductParams<Compute, Op>;
  static constexpr int kBlockOuter = 64;
  static constexpr int kRankTile = 64;
  static constexpr int kUnits = kRankTile / kUnitCols;
  static constexpr int kDepth = kThinProductStepBytes / sizeof(scalar_t);
  static constexpr bool kLargeAlongRows = Op::kLarge == Contraction::kAlongRows;
  static constexpr bool kThinAlongRows = Op::kThin == Contraction::kAlongRows;

  using LargeTile = Tile<scalar_t, kLargeAlongRows ? kDepth : kBlockOuter,
                         kLargeAlongRows ? kBlockOuter : kDepth>;
  using ThinTile =
      Tile<scalar_t, kThinAlongRows ? kDepth : kRankTile, kThinAlongRows ? kRankTile : kDepth>;
  using Sum = detail::UnitSums<Compute>;
  using LargeStream = TileStream<Sum::kThreads, LargeTile, const scalar_t, kLargeAlongRows>;
  using ThinStream = TileStream<Sum::kThreads, ThinTile, const scalar_t, kThinAlongRows>;
  template <class T>
  using OutTile = Tile<T, kBlockOuter, kRankTile>;
  template <class T>
  using TransposedTile = Tile<T, kRankTile, kBlockOuter>;

  static constexpr int kThreads = Sum::kThreads;
  static constexpr int kMinBlocks = sizeof(acc_t) == 8 ? 1 : 2;
  static constexpr int kStages = 3;
  static constexpr int kStageBytes = LargeTile::kBytes + ThinTile::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + kUnits * LargeTile::kBytes;
  static constexpr int kOwnChunks = LargeTile::kChunks / kThreads;
  static_assert(LargeTile::kChunks % kThreads == 0);
  static_assert(kSharedBytes == 80 * 1024 && OutTile<acc_t>::kBytes <= kSharedBytes);
};

namespace detail {

// The masks that a block's units see, and the dropped copies of L.
template <class Traits>
struct DroppedCopies {
  using LargeTile = typename Traits::LargeTile;
  using scalar_t = typename Traits::scalar_t;
  static constexpr int kPerChunk = LargeTile::kPerChunk;

  DropoutGroups groups;
  int first_rank;             // of the block
  int first_mask, num_masks;  // of consecutive masks
  unsigned char* bytes;
  uint64_t seed;

  __device__ __forceinline__ DroppedCopies(const typename Traits::Params& params, int first_col,
                                           unsigned char* shared)
      : groups(params.groups), first_rank(first_col), bytes(shared) {
    const int end = first_rank + Traits::kRankTile;
    const int last = (end < groups.num_cols ? end : groups.num_cols) - kUnitCols;
    const int mask = groups.mask_of(first_rank);
    first_mask = mask < 0 ? 0 : mask;
    num_masks = groups.mask_of(last) - first_mask + 1;
    seed = static_cast<uint64_t>(*params.dropout.seed);
  }
  __device__ __forceinline__ LargeTile tile(int copy) const {
    return {reinterpret_cast<scalar_t*>(bytes + copy * LargeTile::kBytes)};
  }

  // Bits of the chunks of a row of R that lie in the columns that see a copy.
  __device__ __forceinline__ uint32_t chunks_of(int copy) const {
    const int group = groups.num_router_cols + (first_mask + copy) * groups.group_cols - first_rank;
    const int first = group < 0 ? 0 : group;
    const int end = group + groups.group_cols;
    const int size = (end < Traits::kRankTile ? end : Traits::kRankTile) - first;
    return ~0u >> (32 - size / kPerChunk) << (first / kPerChunk);
  }
};

// Bits of the chunks that are not zero in the row of a tile that holds this thread's chunk. Lanes
// whose chunks share a row are neighbors.
template <class TileT>
__device__ __forceinline__ uint32_t nonzero_chunks(const TileT& tile, int row, int chunk,
                                                   int thread) {
  static_assert(kWarpSize % TileT::kChunksPerRow == 0);
  const auto values = read_chunk(tile, row, chunk);
  uint32_t words[4];
  memcpy(words, values.elements, sizeof(words));
  const bool nonzero = (words[0] | words[1] | words[2] | words[3]) != 0;
  const uint32_t lanes = __ballot_sync(0xFFFFFFFFu, nonzero);
  return lanes >> (thread % kWarpSize - chunk) & ~0u >> (32 - TileT::kChunksPerRow);
}

// This thread's chunks of a step's tile of L, through each mask, into every copy.
template <class Traits>
__device__ __forceinline__ void fill_copies(const DroppedCopies<Traits>& copies,
                                            const typename Traits::LargeTile& large,
                                            const typename Traits::ThinTile& thin,
                                            const Dropout& dropout, int64_t first_row,
                                            int64_t first_col, int thread) {
  using scalar_t = typename Traits::scalar_t;
  using LargeTile = typename Traits::LargeTile;
  constexpr int kThreads = Traits::kThreads, kOwnChunks = Traits::kOwnChunks;
  Chunk<scalar_t> own[kOwnChunks];
  [[maybe_unused]] uint32_t needed[kOwnChunks];
  int i = 0;
  for_each_own_chunk<LargeTile, kThreads>(thread, [&](int row, int chunk) {
    if constexpr (Traits::Op::kSkipsZeros) {
      static_assert(std::is_same_v<LargeTile, typename Traits::ThinTile>, "rows of both");
      needed[i] = nonzero_chunks(thin, row, chunk, thread);
    }
    own[i] = read_chunk(large, row, chunk);
    if constexpr (Traits::Op::kSkipsZeros) clear_nonfinite<typename Traits::acc_t>(own[i]);
    ++i;
  });
#pragma unroll 1  // draws are long
  for (int copy = 0; copy < copies.num_masks; ++copy) {
    const auto tile = copies.tile(copy);
    const uint32_t mask = static_cast<uint32_t>(copies.first_mask + copy);
    i = 0;
    for_each_own_chunk<LargeTile, kThreads>(thread, [&](int row, int chunk) {
      Chunk<scalar_t> values = own[i];
      const auto draw = [&] {
        drop(values.elements, dropout, copies.seed, first_row + row,
             first_col + chunk * LargeTile::kPerChunk, mask);
      };
      if constexpr (!Traits::Op::kSkipsZeros) {
        draw();
      } else if (needed[i] & copies.chunks_of(copy)) {
        draw();
      } else {
        memset(values.elements, 0, sizeof(values.elements));
      }
      write_chunk(tile, row, chunk, values);
      ++i;
    });
  }
}

}  // namespace detail

template <class Traits>
__device__ __forceinline__ void dropout_product(const typename Traits::Params& params) {
  using Op = typename Traits::Op;
  using acc_t = typename Traits::acc_t;
  constexpr int kStages = Traits::kStages;
  const int thread = static_cast<int>(threadIdx.x);
  const detail::ThinProductBlock<Traits> block(params);
  const detail::ThinProductStages<Traits> stages{dynamic_shared_memory()};
  const detail::DroppedCopies<Traits> copies(params, block.first_rank,
                                             stages.bytes + kStages * Traits::kStageBytes);

  typename Traits::LargeStream large(params.large, block.large_row(0), block.large_col(0), thread);
  typename Traits::ThinStream thin(
      params.thin, Traits::kThinAlongRows ? block.depth(0) : block.first_rank,
      Traits::kThinAlongRows ? block.first_rank : block.depth(0), thread);

  const auto load = [&](int step, int slot) {
    large.copy_async_to(stages.large(slot), step, thread);
    thin.copy_async_to(stages.thin(slot), step, thread);
  };
  const auto as_copied = [](int, int) {};

  // Which tile of L this warp's unit of each half sees.
  constexpr int kNone = -2, kStage = -1;
  const auto copy_of = [&](int unit) {
    const int col = block.first_rank + unit * kUnitCols;
    if (col >= params.groups.num_cols) return kNone;
    const int mask = params.groups.mask_of(col);
    return mask < 0 ? kStage : mask - copies.first_mask;
  };
  typename Traits::Sum sum;
  const int low_copy = copy_of(sum.low.unit(thread)), high_copy = copy_of(sum.high.unit(thread));
  const auto multiply = [&](auto& half, int copy, int slot, int now) {
    if (copy == kNone) return;
    const auto tile = copy == kStage ? stages.large(slot) : copies.tile(copy);
    multiply_add<Op::kLarge, Op::kThin, Traits::kDepth>(half, tile, stages.thin(slot), now);
  };

  sum.low.clear();
  sum.high.clear();
  // The pipeline's barrier also says that the copies have been read.
  run_pipeline<kStages>(block.num_steps, load, as_copied, [&](int step, int slot) {
    const int now = opaque(thread);  // registers: addresses are not kept across steps
    detail::fill_copies<Traits>(copies, stages.large(slot), stages.thin(slot), params.dropout,
                                block.large_row(step), block.large_col(step), now);
    __syncthreads();  // this step's stage and copies are complete
    multiply(sum.low, low_copy, slot, now);
    multiply(sum.high, high_copy, slot, now);
  });
  __syncthreads();  // the stages have been read

  // A warp has a unit in each half of the columns.
  const acc_t low_scale = low_copy < 0 ? acc_t(1) : params.scale;
  const acc_t high_scale = high_copy < 0 ? acc_t(1) : params.scale;
  const auto scaled = [&](int col, acc_t value) {
    return value * (col < 2 * kUnitCols ? low_scale : high_scale);
  };
  auto partials = params.partials;  // of this split
  partials.data = partials.at(block.split * params.rows_per_split, 0);
  partials.num_rows = params.rows_per_split;
  if constexpr (Traits::kLargeAlongRows) {
    detail::store_transposed_sum<Traits>(sum, stages.bytes, scaled, partials, block.first_rank,
                                         block.first_outer, thread);
  } else {
    detail::store_sum<Traits>(sum, stages.bytes, scaled, partials, block.first_outer,
                              block.first_rank, thread);
  }
}

// launch(Traits{}, shape of the launch, params) for the kernel that the plan names.
template <class Compute, class Op, class F>
void launch_dropout_product(const ThinProductPlan& plan, DropoutProductParams<Compute, Op> params,
                            F launch) {
  using Traits = DropoutProductTraits<Compute, Op>;
  params.num_rank_tiles = plan.num_rank_tiles;
  params.steps_per_split = plan.steps_per_split;
  launch(Traits{},
         LaunchShape{static_cast<unsigned>(plan.num_outer_tiles * plan.num_rank_tiles),
                     static_cast<unsigned>(plan.num_splits), 1, Traits::kThreads,
                     Traits::kSharedBytes},
         params);
}

}  // namespace lowrank_ext::cuda
