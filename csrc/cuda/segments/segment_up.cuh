// From rank to features, for a row of group i:
//     y [M, N] = base + scaling[i] · h lora_b[i]ᵀ      (R_i = lora_b[i]ᵀ)
//     dx [M, K] = drop'(dh lora_a[i])                  (R_i = lora_a[i])
// as expand.cuh computes it for one R (a row has one slot here): a block owns a tile of one
// segment's rows, gathered, and a share of the columns; left of its rows stays in shared memory for
// all ranks, R_i streams by in tiles, a warp turns its accumulators around through 2 KiB of its
// own, so that a lane adds to, rounds and stores whole 16-byte chunks of the rows where they lie. A
// lane reads exactly what it writes.
//
// Only R_i's own ranks are read and multiplied. Rows without a group, or of rank 0, are copies of
// base (all of its bits; zeros where there is no base); rows of an invalid one are NaN.
//
// Shared memory as in expand.cuh: with rank tiles of 32 and 2-byte elements, 64 rows take 24 KiB
// up to rank 32 and 4 KiB more for each further 32; 16 rows 29 KiB and 1 KiB more.
#pragma once

#include "lowrank/expand.cuh"
#include "segments/segments.cuh"

namespace lowrank_ext::cuda {

template <class Compute>
struct SegmentUpParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  Segments segments;
  Matrix<const scalar_t> base;  // [M, C] or absent
  Matrix<const scalar_t> left;  // [M, r]
  Stack<const scalar_t> right;  // [n, C, r] or, along rows, [n, r, C]
  GroupScaling<acc_t> scaling;
  Matrix<scalar_t> out;  // [M, C]
  acc_t scale;
  Dropout dropout;
  int col_tiles_per_block;

  template <class F>
  void each_tensor(F&& f) const {
    segments.each_tensor(f);
    f("base", base);
    f("left", left);
    f("right", right.span());
    scaling.each_tensor(f);
    f("seed", Matrix<const int64_t>{dropout.seed, 1, 1, 1});
    f("out", out);
  }
};

template <class Compute, class Shape, class Op>
struct SegmentUpTraits : ExpandTraits<Compute, Shape, Op> {
  using Params = SegmentUpParams<Compute>;
  static constexpr bool kLanesAddBase = !Op::kHasDropout;
  static constexpr bool kLanesDrop = Op::kHasDropout;
};

namespace detail {

// What a lane adds to and stores.
template <class Traits>
struct SegmentOutputLane : LaneChunks<Traits> {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  using Params = typename Traits::Params;
  using Staging = typename Traits::Staging;
  using LaneChunks<Traits>::kPerChunk, LaneChunks<Traits>::col;
  static constexpr bool kHasBase = Traits::kLanesAddBase;

  int64_t rows[Traits::kChunksPerLane];  // of out; negative: none
  uint64_t seed;
  acc_t scale;
  PackedChunk<scalar_t> base[Traits::kRounds][Traits::kChunksPerLane];

  __device__ __forceinline__ void find_rows(const Segments& segments, const SegmentTile& tile,
                                            int warp_row) {
#pragma unroll
    for (int i = 0; i < Traits::kChunksPerLane; ++i) {
      const int row = warp_row + this->row(i);
      rows[i] = row < tile.num_rows ? segments.slot(tile.first + row) : -1;
    }
  }

  __device__ __forceinline__ void load_base(const Params& params, int64_t first_col, int round,
                                            int i) {
    if constexpr (kHasBase) {
      if (rows[i] >= 0)
        base[round][i] = load_packed_chunk<scalar_t>(params.base, rows[i], col(first_col, round));
    }
  }

  __device__ __forceinline__ void load(const Params& params, int64_t first_col) {
#pragma unroll
    for (int round = 0; round < Traits::kRounds; ++round)
#pragma unroll
      for (int i = 0; i < Traits::kChunksPerLane; ++i) load_base(params, first_col, round, i);
  }

  __device__ __forceinline__ Chunk<scalar_t> result(const Params& params,
                                                    acc_t (&branch)[kPerChunk], int64_t row,
                                                    int64_t col, int round, int i) const {
    Chunk<scalar_t> sum;
    if constexpr (kHasBase) {
      const Chunk<scalar_t> added = base[round][i].unpack();
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e)
        sum.elements[e] = convert<scalar_t>(convert<acc_t>(added.elements[e]) + scale * branch[e]);
    } else {
      if constexpr (Traits::kLanesDrop) {
        if (params.dropout.threshold != 0) drop(branch, params.dropout, seed, row, col);
      }
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e) sum.elements[e] = convert<scalar_t>(scale * branch[e]);
    }
    return sum;
  }

  // Stores the tile and loads base for the next one (next_col < 0: there is none).
  __device__ __forceinline__ void finish(const Params& params, const typename Traits::Sum& sum,
                                         const Staging& staging, int64_t first_col,
                                         int64_t next_col) {
#pragma unroll
    for (int round = 0; round < Traits::kRounds; ++round) {
      this->stage(sum, staging, round);
#pragma unroll
      for (int i = 0; i < Traits::kChunksPerLane; ++i) {
        if (rows[i] < 0) continue;
        acc_t branch[kPerChunk];
        this->read(staging, i, branch);
        const int64_t out_col = col(first_col, round);
        store_chunk(params.out, rows[i], out_col,
                    result(params, branch, rows[i], out_col, round, i));
        if (next_col >= 0) load_base(params, next_col, round, i);
      }
    }
  }
};

// Rows without a branch: base's bits, or zeros, or NaN. Several loads in flight a thread.
template <class Traits>
__device__ __forceinline__ void copy_rows(const typename Traits::Params& params,
                                          const SegmentTile& tile, bool valid, int64_t first_col,
                                          int64_t num_cols, int thread) {
  using scalar_t = typename Traits::scalar_t;
  constexpr int kThreads = Traits::kThreads, kPerChunk = Traits::kPerChunk, kLoads = 4;
  const int64_t chunks_per_row = (num_cols + kPerChunk - 1) / kPerChunk;
  const int64_t num_chunks = tile.num_rows * chunks_per_row;
  const Matrix<const scalar_t> base = valid ? params.base : Matrix<const scalar_t>{};
  const scalar_t fill =
      valid ? scalar_t(0.0f) : convert<scalar_t>(not_a_number<typename Traits::acc_t>());
#pragma unroll 1
  for (int64_t first = thread; first < num_chunks; first += kLoads * kThreads) {
    PackedChunk<scalar_t> chunks[kLoads];
    int64_t rows[kLoads], cols[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t index = first + i * kThreads;
      if (index >= num_chunks) continue;
      rows[i] = params.segments.slot(tile.first + index / chunks_per_row);
      cols[i] = first_col + index % chunks_per_row * kPerChunk;
      if (base) {
        chunks[i] = load_packed_chunk<scalar_t>(base, rows[i], cols[i]);
      } else {
        Chunk<scalar_t> filled;
#pragma unroll
        for (int e = 0; e < kPerChunk; ++e) filled.elements[e] = fill;
        chunks[i] = PackedChunk<scalar_t>(filled);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (first + i * kThreads < num_chunks)
        store_chunk(params.out, rows[i], cols[i], chunks[i].unpack());
  }
}

}  // namespace detail

// Block (x, y) owns tile x of the segments and column tiles y · col_tiles_per_block ….
template <class Traits>
__device__ __forceinline__ void segment_expand(const typename Traits::Params& params) {
  using scalar_t = typename Traits::scalar_t;
  using MidTile = typename Traits::MidTile;
  using Staging = typename Traits::Staging;
  const int thread = static_cast<int>(threadIdx.x);
  const SegmentTile tile =
      find_segment_tile(params.segments, Traits::kBlockRows, blockIdx.x, thread % kWarpSize);
  if (tile.num_rows == 0) return;
  const int64_t block_cols = int64_t{params.col_tiles_per_block} * Traits::kBlockCols;
  const int64_t first_col = blockIdx.y * block_cols, cols_left = params.out.num_cols - first_col;
  const int64_t num_cols = cols_left < block_cols ? cols_left : block_cols;
  const int rank = params.segments.rank(tile.group);
  if (rank <= 0) {
    detail::copy_rows<Traits>(params, tile, rank == 0, first_col, num_cols, thread);
    return;
  }
  const int num_col_tiles =
      static_cast<int>((num_cols + Traits::kBlockCols - 1) / Traits::kBlockCols);
  const int num_rank_tiles = (rank + Traits::kRankTile - 1) / Traits::kRankTile;

  unsigned char* const mid = dynamic_shared_memory();
  const auto left_tile = [&](int rank_tile) {
    return MidTile{reinterpret_cast<scalar_t*>(mid + rank_tile * MidTile::kBytes)};
  };
  unsigned char* const stages = mid + num_rank_tiles * MidTile::kBytes;
  const Staging staging{reinterpret_cast<typename Traits::acc_t*>(
      stages + Traits::kStageBytes + thread / kWarpSize * Staging::kBytes)};

  auto left = params.left;
  auto right = params.right.at(tile.group);
  left.num_cols = rank;
  (Traits::kAlongRows ? right.num_rows : right.num_cols) = rank;
  detail::RightStream<Traits> stream;
  stream.stages = stages;
  stream.first_col = first_col;
  stream.tiles_left = num_col_tiles * num_rank_tiles;
#pragma unroll 1
  for (int k = 0; k < num_rank_tiles; ++k)
    copy_gathered_tile_async<Traits::kThreads>(
        left_tile(k), left,
        [&](int row, int) {
          return row < tile.num_rows ? params.segments.slot(tile.first + row) : -1;
        },
        k * Traits::kRankTile, thread);  // in the first stage's group
#pragma unroll
  for (int stage = 0; stage < Traits::kStages - 1; ++stage)
    stream.issue(right, num_rank_tiles, thread);

  detail::SegmentOutputLane<Traits> output;
  output.lane = thread % kWarpSize;
  output.scale = params.scale * params.scaling.at(tile.group);
  output.seed = 0;
  if constexpr (Traits::Op::kHasDropout) {
    if (params.dropout.threshold != 0) output.seed = static_cast<uint64_t>(*params.dropout.seed);
  }
  output.find_rows(params.segments, tile, Traits::Sum::first_row(thread));
  const int64_t warp_col = first_col + Traits::Sum::first_col(thread);
  output.load(params, warp_col);

  detail::expand_column_tiles<Traits>(params, right, left_tile, stream, staging, output,
                                      num_col_tiles, num_rank_tiles, warp_col, thread);
}

// y in the forward.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    segment_up_kernel(const typename Traits::Params params) {
  segment_expand<Traits>(params);
}

// dx in the backward.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    segment_down_backward_x_kernel(const typename Traits::Params params) {
  segment_expand<Traits>(params);
}

// ---- plan

struct SegmentUpPlan {
  int block_rows;  // 64 or 16
  int col_tiles_per_block;
  int64_t max_tiles, num_col_blocks;
  int64_t shared_bytes;
};

namespace detail {

template <class Compute, class F>
void with_segment_up_shape(int block_rows, F f) {
  constexpr int kRankTile = Compute::kTensorCores ? 32 : 16;
  if (block_rows == 16) return f(ExpandShape<1, 2, kRankTile>{});
  return f(ExpandShape<4, 1, kRankTile>{});
}

}  // namespace detail

// Few rows (decoding) take blocks of 16 rows, which leave fewer of them empty where every row has
// an adapter of its own; so do ranks so large that left of 64 rows has no room. Columns are shared
// out among the blocks for as many row tiles as there are at least.
template <class Compute, class Op>
SegmentUpPlan plan_segment_up(int64_t num_rows, int64_t num_groups, int64_t num_cols, int64_t rank,
                              int num_sms) {
  constexpr int64_t kFewRows = 64;
  SegmentUpPlan plan{};
  plan.block_rows = num_rows <= kFewRows ? 16 : 64;
  detail::with_segment_up_shape<Compute>(64, [&](auto shape) {
    using Traits = SegmentUpTraits<Compute, decltype(shape), Op>;
    if (Traits::shared_bytes(rank) > detail::kMaxBlockSharedBytes) plan.block_rows = 16;
  });
  plan.max_tiles = max_segment_tiles(num_rows, num_groups, plan.block_rows);
  detail::with_segment_up_shape<Compute>(plan.block_rows, [&](auto shape) {
    using Traits = SegmentUpTraits<Compute, decltype(shape), Op>;
    const int64_t num_col_tiles = (num_cols + Traits::kBlockCols - 1) / Traits::kBlockCols;
    plan.shared_bytes = Traits::shared_bytes(rank);
    if (num_rows == 0 || num_cols == 0) return;
    plan.col_tiles_per_block =
        detail::choose_col_tiles((num_rows + plan.block_rows - 1) / plan.block_rows, num_col_tiles,
                                 int64_t{num_sms} * Traits::kMinBlocks);
    plan.num_col_blocks = (num_col_tiles + plan.col_tiles_per_block - 1) / plan.col_tiles_per_block;
  });
  return plan;
}

template <class Compute, class Op>
void launch_segment_up(SegmentUpParams<Compute> params, int64_t num_rows, int num_sms,
                       Stream stream) {
  const SegmentUpPlan plan = plan_segment_up<Compute, Op>(
      num_rows, params.segments.num_groups, params.out.num_cols, params.segments.max_rank, num_sms);
  params.col_tiles_per_block = plan.col_tiles_per_block;
  detail::with_segment_up_shape<Compute>(plan.block_rows, [&](auto shape) {
    using Traits = SegmentUpTraits<Compute, decltype(shape), Op>;
    const LaunchShape launch_shape{static_cast<unsigned>(plan.max_tiles),
                                   static_cast<unsigned>(plan.num_col_blocks), 1, Traits::kThreads,
                                   static_cast<size_t>(plan.shared_bytes)};
    if constexpr (std::is_same_v<Op, UpOp>) {
      launch_kernel("segment_up", &segment_up_kernel<Traits>, launch_shape, params, stream);
    } else {
      launch_kernel("segment_down_backward_x", &segment_down_backward_x_kernel<Traits>,
                    launch_shape, params, stream);
    }
  });
}

}  // namespace lowrank_ext::cuda
