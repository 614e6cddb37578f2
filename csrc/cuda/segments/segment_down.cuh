// From features to rank, C [M, r]: row m of group i is scale · scaling[i] · L[m] R_i,
//     h [M, r]  = drop(x) lora_a[i]ᵀ             L = drop(x), R_i = lora_a[i]ᵀ
//     dh [M, r] = scaling[i] · dout lora_b[i]    L = dout,    R_i = lora_b[i]
// Where a row has several slots, C has a row for each of them. As in thin_product.cuh, a block owns
// kBlockOuter rows of one segment, gathered, kRankTile columns of C and one split of the
// contraction; tiles of L and R_i come through kStages stages of cp.async, one barrier a step, sums
// in acc_t; a thread drops the chunks that it copied itself. Shared memory as there, 128 kStages
// (kBlockOuter + kRankTile) bytes: 40 KiB at rank tile 16, 48 at 32, 64 at 64, and 16 KiB where
// rows are few.
//
// Of R_i only the group's own ranks are read. Columns of C beyond them are zeros, as are rows
// without a group; rows of an invalid one are NaN. Rows of a tile beyond the segment's end are zero
// in shared memory and not stored. Sums of splits are added by partial_sums.cuh.
#pragma once

#include "lowrank/thin_product.cuh"
#include "segments/segments.cuh"

namespace lowrank_ext::cuda {

// ---- plan

// Up to this many rows (decoding) the stacks are what is read, and most segments are short.
constexpr int64_t kFewSegmentRows = 64;

struct SegmentDownPlan : ThinProductPlan {
  int64_t max_tiles;  // of rows
};

// Splits for as many tiles as there are at least: all rows of one group.
template <class Compute>
SegmentDownPlan plan_segment_down(int64_t num_rows, int64_t num_groups, int64_t depth, int64_t rank,
                                  int num_sms) {
  const bool few = num_rows <= kFewSegmentRows;
  SegmentDownPlan plan{};
  plan.block_outer = few ? 16 : 64;
  plan.rank_tile = few ? 16 : !Compute::kTensorCores ? 32 : rank <= 16 ? 16 : 64;
  plan_splits(plan, num_rows, depth, rank, compute_traits<Compute>(),
              few ? 2 * int64_t{num_sms} : blocks_to_fill(num_sms));
  plan.max_tiles = max_segment_tiles(num_rows, num_groups, plan.block_outer);
  return plan;
}

// ---- kernel

template <class Compute, class Op>
struct SegmentDownParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  Segments segments;
  Matrix<const scalar_t> large;  // [rows, depth]
  Stack<const scalar_t> thin;    // [n, r, depth] or, along rows, [n, depth, r]
  GroupScaling<acc_t> scaling;
  Matrix<scalar_t> out;    // [M, r], or absent: then the sums go to
  Matrix<acc_t> partials;  // [num_splits · M, r], columns padded
  int64_t num_rows;        // M
  acc_t scale;
  Dropout dropout;  // of large
  int num_rank_tiles;
  int64_t steps_per_split;

  template <class F>
  void each_tensor(F&& f) const {
    segments.each_tensor(f);
    f(Op::kLargeName, large);
    f(Op::kThinName, thin.span());
    scaling.each_tensor(f);
    f("out", out);
    f("partials", partials);
    f("seed", Matrix<const int64_t>{dropout.seed, 1, 1, 1});
  }
};

template <class Compute, class Op, int kBlockOuter, int kRankTile>
struct SegmentDownTraits : ThinProductTraits<Compute, Op, kBlockOuter, kRankTile> {
  using Params = SegmentDownParams<Compute, Op>;
  using LargeTile = typename ThinProductTraits<Compute, Op, kBlockOuter, kRankTile>::LargeTile;
  static constexpr int kOwnChunks =
      LargeTile::kChunks / ThinProductTraits<Compute, Op, kBlockOuter, kRankTile>::kThreads;
  static_assert(kOwnChunks == 2);
};

namespace detail {

template <class Traits>
__device__ __forceinline__ void segment_down_sum(typename Traits::Sum& sum,
                                                 const ThinProductStages<Traits>& stages,
                                                 const typename Traits::Params& params,
                                                 const ThinProductBlock<Traits>& block,
                                                 const SegmentTile& tile, int rank, int thread) {
  using Op = typename Traits::Op;
  constexpr int kStages = Traits::kStages, kThreads = Traits::kThreads;
  int64_t rows[Traits::kOwnChunks];  // of the thread's own chunks
  int i = 0;
  for_each_own_chunk<typename Traits::LargeTile, kThreads>(thread, [&](int tile_row, int) {
    rows[i++] = tile_row < tile.num_rows
                    ? params.segments.row_of(params.segments.slot(tile.first + tile_row))
                    : -1;
  });
  const auto row_of = [&](int, int own) { return rows[own]; };

  const bool drops = Op::kHasDropout && params.dropout.threshold != 0;
  const uint64_t seed = drops ? static_cast<uint64_t>(*params.dropout.seed) : 0;

  auto thin_matrix = params.thin.at(tile.group);
  (Traits::kThinAlongRows ? thin_matrix.num_cols : thin_matrix.num_rows) = rank;
  typename Traits::ThinStream thin(
      thin_matrix, Traits::kThinAlongRows ? block.depth(0) : block.first_rank,
      Traits::kThinAlongRows ? block.first_rank : block.depth(0), thread);
  const auto load = [&](int step, int slot) {
    copy_gathered_tile_async<kThreads>(stages.large(slot), params.large, row_of, block.depth(step),
                                       thread);
    thin.copy_async_to(stages.thin(slot), step, thread);
  };
  const auto drop_own_chunks = [&](int step, int slot) {
    if (drops)
      drop_gathered_chunks<kThreads>(stages.large(slot), params.dropout, seed, row_of,
                                     block.depth(step), params.segments.mask_of(tile.group),
                                     thread);
  };
  run_pipeline<kStages>(block.num_steps, load, drop_own_chunks, [&](int, int slot) {
    multiply_add<Op::kLarge, Op::kThin, Traits::kDepth>(sum, stages.large(slot), stages.thin(slot),
                                                        thread);
  });
  __syncthreads();  // the stages have been read
}

// By way of shared memory, which is free again; out's row m is first_row + m.
template <class Traits, class T>
__device__ __forceinline__ void store_segment_sum(typename Traits::Sum& sum, unsigned char* shared,
                                                  const typename Traits::Params& params,
                                                  const SegmentTile& tile, int rank, int first_rank,
                                                  const Matrix<T>& out, int64_t first_row,
                                                  int thread) {
  using acc_t = typename Traits::acc_t;
  using OutTile = typename Traits::template OutTile<T>;
  const OutTile staging{reinterpret_cast<T*>(shared)};
  const acc_t scale = rank > 0 ? params.scale * params.scaling.at(tile.group) : acc_t(0);
  const acc_t padding = rank < 0 ? not_a_number<acc_t>() : acc_t(0);
  sum.for_each_pair(thread, [&](int row, int col, auto& left, auto& right) {
    write_pair(staging, row, col, first_rank + col < rank ? left * scale : padding,
               first_rank + col + 1 < rank ? right * scale : padding);
  });
  __syncthreads();
  for_each_own_chunk<OutTile, Traits::kThreads>(thread, [&](int row, int chunk) {
    if (row < tile.num_rows)
      store_chunk(out, first_row + params.segments.slot(tile.first + row),
                  first_rank + chunk * OutTile::kPerChunk, read_chunk(staging, row, chunk));
  });
}

}  // namespace detail

// Block (x, y): tile x / num_rank_tiles of the segments, rank tile x % num_rank_tiles, split y.
template <class Traits>
__device__ __forceinline__ void segment_thin_product(const typename Traits::Params& params) {
  const int thread = static_cast<int>(threadIdx.x);
  const SegmentTile tile =
      find_segment_tile(params.segments, Traits::kBlockOuter,
                        int64_t{blockIdx.x} / params.num_rank_tiles, thread % kWarpSize);
  if (tile.num_rows == 0) return;
  const int rank = params.segments.rank(tile.group);
  const detail::ThinProductBlock<Traits> block(params);
  const detail::ThinProductStages<Traits> stages{dynamic_shared_memory()};
  typename Traits::Sum sum;
  sum.clear();
  if (block.first_rank < rank)
    detail::segment_down_sum<Traits>(sum, stages, params, block, tile, rank, thread);
  if (params.out) {
    detail::store_segment_sum<Traits>(sum, stages.bytes, params, tile, rank, block.first_rank,
                                      params.out, 0, thread);
  } else {
    detail::store_segment_sum<Traits>(sum, stages.bytes, params, tile, rank, block.first_rank,
                                      params.partials, block.split * params.num_rows, thread);
  }
}

// h in the forward.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    segment_down_kernel(const typename Traits::Params params) {
  segment_thin_product<Traits>(params);
}

// dh in the backward.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    segment_up_backward_kernel(const typename Traits::Params params) {
  segment_thin_product<Traits>(params);
}

// ---- launch

namespace detail {

template <class Compute, class Op, int kBlockOuter, int kRankTile>
void launch_segment_down_as(const SegmentDownPlan& plan,
                            const SegmentDownParams<Compute, Op>& params, Stream stream) {
  using Traits = SegmentDownTraits<Compute, Op, kBlockOuter, kRankTile>;
  const LaunchShape shape{static_cast<unsigned>(plan.max_tiles * plan.num_rank_tiles),
                          static_cast<unsigned>(plan.num_splits), 1, Traits::kThreads,
                          Traits::kSharedBytes};
  if constexpr (std::is_same_v<Op, DownOp>) {
    launch_kernel("segment_down", &segment_down_kernel<Traits>, shape, params, stream);
  } else {
    launch_kernel("segment_up_backward", &segment_up_backward_kernel<Traits>, shape, params,
                  stream);
  }
}

}  // namespace detail

template <class Compute, class Op>
void launch_segment_down(const SegmentDownPlan& plan, SegmentDownParams<Compute, Op> params,
                         Stream stream) {
  params.num_rank_tiles = plan.num_rank_tiles;
  params.steps_per_split = plan.steps_per_split;
  if (plan.block_outer == 16)
    return detail::launch_segment_down_as<Compute, Op, 16, 16>(plan, params, stream);
  if constexpr (Compute::kTensorCores) {
    if (plan.rank_tile == 16)
      return detail::launch_segment_down_as<Compute, Op, 64, 16>(plan, params, stream);
    detail::launch_segment_down_as<Compute, Op, 64, 64>(plan, params, stream);
  } else {
    detail::launch_segment_down_as<Compute, Op, 64, 32>(plan, params, stream);
  }
}

}  // namespace lowrank_ext::cuda
