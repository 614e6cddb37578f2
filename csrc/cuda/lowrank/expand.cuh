// The expansion from rank to features that ends the forward and the backward pass of the branch:
//     out [M, C] = base + scale · col_scale ⊙ drop'(mid(left) right),   left [M, r]
// with right = lora_bᵀ for y (left = h) and right = lora_a for dx (left = dh).
//
// A warp owns 16 rows and, at a time, one line of 128 bytes of columns of out; a block of kWarpsM x
// kWarpsN warps walks over its share of the columns. mid(left) of the block's rows stays in shared
// memory for all ranks; tiles [columns, kRankTile] of right stream through kStages stages of
// cp.async. Sums are in acc_t. A warp turns its accumulators around through 2 KiB, so that each
// lane adds base to whole 16-byte chunks, rounds once and stores; the next tile's base is loaded
// under the next product. A lane reads exactly what it writes, so base may be out itself.
//
// Shared memory: 16 kWarpsM · r' elements of mid (r' = r up to a multiple of kRankTile), kStages
// tiles of right, 2 KiB per warp. What lies outside is zero in shared memory and not stored.
#pragma once

#include <algorithm>

#include "common/dropout.cuh"
#include "common/launch.h"
#include "lowrank/mid.cuh"

namespace lowrank_ext::cuda {

// y: right is lora_b [C, r].
struct UpOp {
  static constexpr Contraction kRightContraction = Contraction::kAlongColumns;
  static constexpr bool kHasMid = true;
  static constexpr bool kHasColScale = true;
  static constexpr bool kHasDropout = false;
};
// dx: right is lora_a [r, C].
struct DownBackwardXOp {
  static constexpr Contraction kRightContraction = Contraction::kAlongRows;
  static constexpr bool kHasMid = false;
  static constexpr bool kHasColScale = false;
  static constexpr bool kHasDropout = true;
};

template <class Compute>
struct ExpandParams {
  using scalar_t = typename Compute::scalar_t;

  Matrix<const scalar_t> base;       // [M, C], or one row repeated, or absent
  Matrix<const scalar_t> left;       // [M, r]
  MidFactors<scalar_t> mid;          // of left; absent: left itself
  Matrix<const scalar_t> right;      // [C, r] or, along rows, [r, C]
  Matrix<const scalar_t> col_scale;  // [1, C] or absent
  Matrix<scalar_t> out;              // [M, C]
  typename Compute::acc_t scale;
  Dropout dropout;
  int col_tiles_per_block;

  template <class F>
  void each_tensor(F&& f) const {
    if (base.data != out.data) f("base", base);
    f("left", left);
    mid.each_tensor(f);
    f("right", right);
    f("col_scale", col_scale);
    f("seed", Matrix<const int64_t>{dropout.seed, 1, 1, 1});
    f("out", out);
  }
};

// kWarpsM x kWarpsN warps and the rank tile: what a kernel is compiled for.
template <int kWarpsM_, int kWarpsN_, int kRankTile_>
struct ExpandShape {
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kRankTile = kRankTile_;
  static constexpr int kThreads = kWarpSize * kWarpsM * kWarpsN;
  static constexpr int kBlockRows = 16 * kWarpsM;
  // Two blocks of 256 threads leave each thread 128 registers; with base's chunks in flight they
  // hold 512 · 64 bytes = 32 KiB of loads. The other two shapes need more registers: one is for
  // many ranks, which wait less for memory, the other for few rows, which do not fill the SMs.
  static constexpr int kMinBlocks = kBlockRows == 128 ? 2 : kBlockRows == 64 ? 3 : 4;
};

template <class Compute_, class Shape, class Op_>
struct ExpandTraits : Shape {
  using Compute = Compute_;
  using Op = Op_;
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  using Params = ExpandParams<Compute>;
  using Shape::kRankTile, Shape::kThreads, Shape::kBlockRows, Shape::kWarpsM, Shape::kWarpsN;

  static constexpr int kColTile = 128 / sizeof(scalar_t);  // of a warp
  static constexpr int kBlockCols = kColTile * kWarpsN;
  static constexpr int kStages = 3;
  static constexpr bool kAlongRows = Op::kRightContraction == Contraction::kAlongRows;

  using Mid = MidProduct<Compute, kBlockRows, kRankTile, kWarpsM, kWarpsN>;
  using MidTile = typename Mid::Result;
  using RightTile =
      Tile<scalar_t, kAlongRows ? kRankTile : kBlockCols, kAlongRows ? kBlockCols : kRankTile>;
  using Sum = Accumulator<Compute, kBlockRows, kBlockCols, kWarpsM, kWarpsN>;
  static_assert(Sum::kPiecesM == 1 && Sum::kWarpTileN == kColTile);

  // The turn-around of one warp: a line of accumulators per row, so wider accumulators than
  // elements take several rounds.
  using Staging = Tile<acc_t, 16, 128 / sizeof(acc_t)>;
  static constexpr int kRounds = kColTile / Staging::kCols;
  static constexpr int kPerChunk = Chunk<scalar_t>::kSize;
  static constexpr int kChunksPerRow = Staging::kCols / kPerChunk;  // in a round
  static constexpr int kChunksPerLane = 16 * kChunksPerRow / kWarpSize;
  static_assert(Staging::kBytes == 2048 && kRounds * kChunksPerLane == 4);

  static constexpr int kStageBytes = kStages * RightTile::kBytes;
  static constexpr int kStagingBytes = kThreads / kWarpSize * Staging::kBytes;
  static_assert(Mid::kScratchBytes <= kStageBytes + kStagingBytes, "mid's scratch reuses them");

  static constexpr int64_t shared_bytes(int64_t rank) {
    const int64_t num_rank_tiles = (rank + kRankTile - 1) / kRankTile;
    return num_rank_tiles * MidTile::kBytes + kStageBytes + kStagingBytes;
  }
};

namespace detail {

// The stream of right's tiles: column tile by column tile, in each rank tile by rank tile.
template <class Traits>
struct RightStream {
  using RightTile = typename Traits::RightTile;
  using scalar_t = typename Traits::scalar_t;

  unsigned char* stages;
  int64_t first_col;  // of the next tile to issue
  int rank_tile = 0;  // of the next tile to issue
  int tiles_left;     // to issue
  int issue_slot = 0, read_slot = 0;

  __device__ __forceinline__ RightTile slot(int index) const {
    return {reinterpret_cast<scalar_t*>(stages + index * RightTile::kBytes)};
  }

  // Starts the next copy, if there is one, and closes its group in any case: the number of groups
  // is what the waits count.
  __device__ __forceinline__ void issue(const Matrix<const scalar_t>& right, int num_rank_tiles,
                                        int thread) {
    if (tiles_left > 0) {
      const int64_t rank = int64_t{rank_tile} * Traits::kRankTile;
      copy_tile_async<Traits::kThreads>(slot(issue_slot), right,
                                        Traits::kAlongRows ? rank : first_col,
                                        Traits::kAlongRows ? first_col : rank, thread);
      --tiles_left;
      if (++rank_tile == num_rank_tiles) {
        rank_tile = 0;
        first_col += Traits::kBlockCols;
      }
      if (++issue_slot == Traits::kStages) issue_slot = 0;
    }
    copy_async_commit();
  }

  __device__ __forceinline__ RightTile take() {
    const RightTile tile = slot(read_slot);
    if (++read_slot == Traits::kStages) read_slot = 0;
    return tile;
  }
};

// The chunks that a lane stores of a column tile of its warp's 16 rows, and how their values come
// to it from the lanes that have summed them up: through the warp's staging tile, in rounds.
template <class Traits>
struct LaneChunks {
  using acc_t = typename Traits::acc_t;
  using Staging = typename Traits::Staging;
  static constexpr int kPerChunk = Traits::kPerChunk;

  int lane;

  // Four chunks a row: a phase of eight lanes reads two rows, four apart, which differ in the
  // lowest bit of their turn, so that the even (and the odd) chunks of both miss each other's
  // banks.
  __device__ __forceinline__ int row(int i) const {
    if constexpr (Traits::kChunksPerRow == 4) {
      const int eighth = lane / 4;
      return 8 * i + eighth % 2 * 4 + eighth / 2;
    } else {
      static_assert(Traits::kChunksPerRow == 8);
      return 4 * i + lane / 8;
    }
  }
  __device__ __forceinline__ int chunk() const { return lane % Traits::kChunksPerRow; }
  __device__ __forceinline__ int64_t col(int64_t first_col, int round) const {
    return first_col + round * Staging::kCols + chunk() * kPerChunk;
  }

  // All lanes: the warp's sums of a round's columns.
  __device__ __forceinline__ void stage(const typename Traits::Sum& sum, const Staging& staging,
                                        int round) const {
    constexpr int kPieces = Staging::kCols / 8;
    const int g = lane / 4, t = lane % 4;
    __syncwarp();  // the round before has been read
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const auto& values = sum.values[0][round * kPieces + piece];
      write_pair(staging, g, 8 * piece + 2 * t, values[0], values[1]);
      write_pair(staging, g + 8, 8 * piece + 2 * t, values[2], values[3]);
    }
    __syncwarp();
  }

  // Of the lane's i-th chunk in the round.
  __device__ __forceinline__ void read(const Staging& staging, int i,
                                       acc_t (&branch)[kPerChunk]) const {
    constexpr int kStagedChunks = kPerChunk / Staging::kPerChunk;
#pragma unroll
    for (int part = 0; part < kStagedChunks; ++part)
      load_vector<16>(branch + part * Staging::kPerChunk,
                      staging.chunk(row(i), chunk() * kStagedChunks + part));
  }
};

// What a lane adds, scales and stores.
template <class Traits>
struct OutputLane : LaneChunks<Traits> {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  using Params = typename Traits::Params;
  using Staging = typename Traits::Staging;
  using LaneChunks<Traits>::kPerChunk, LaneChunks<Traits>::row, LaneChunks<Traits>::col;

  int64_t first_row;  // of the warp
  uint64_t seed;
  PackedChunk<scalar_t> base[Traits::kRounds][Traits::kChunksPerLane];
  PackedChunk<scalar_t> col_scale[Traits::kRounds];

  __device__ __forceinline__ void load_base(const Params& params, int64_t first_col, int round,
                                            int i) {
    if (i > 0 && params.base.row_stride == 0) {  // also where absent
      base[round][i] = base[round][0];
    } else {
      base[round][i] =
          load_packed_chunk<scalar_t>(params.base, first_row + row(i), col(first_col, round));
    }
  }

  __device__ __forceinline__ void load_col_scale(const Params& params, int64_t first_col,
                                                 int round) {
    if constexpr (Traits::Op::kHasColScale) {
      if (params.col_scale)
        col_scale[round] = load_packed_chunk<scalar_t>(params.col_scale, 0, col(first_col, round));
    }
  }

  __device__ __forceinline__ void load(const Params& params, int64_t first_col) {
#pragma unroll
    for (int round = 0; round < Traits::kRounds; ++round) {
      col_scale[round] = PackedChunk<scalar_t>(load_factors<scalar_t>({}, 0));
      load_col_scale(params, first_col, round);
#pragma unroll
      for (int i = 0; i < Traits::kChunksPerLane; ++i) load_base(params, first_col, round, i);
    }
  }

  // base + scale · col_scale ⊙ drop'(branch) for the chunk at (row, col).
  __device__ __forceinline__ Chunk<scalar_t> result(const Params& params,
                                                    acc_t (&branch)[kPerChunk], int64_t row,
                                                    int64_t col, int round, int i) const {
    if constexpr (Traits::Op::kHasDropout) {
      if (params.dropout.threshold != 0) drop(branch, params.dropout, seed, row, col);
    }
    const Chunk<scalar_t> added = base[round][i].unpack(), factors = col_scale[round].unpack();
    Chunk<scalar_t> sum;
#pragma unroll
    for (int e = 0; e < kPerChunk; ++e) {
      acc_t factor = params.scale;
      if constexpr (Traits::Op::kHasColScale) factor *= convert<acc_t>(factors.elements[e]);
      sum.elements[e] = convert<scalar_t>(convert<acc_t>(added.elements[e]) + factor * branch[e]);
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
        acc_t branch[kPerChunk];
        this->read(staging, i, branch);
        const int64_t out_row = first_row + row(i), out_col = col(first_col, round);
        store_chunk(params.out, out_row, out_col,
                    result(params, branch, out_row, out_col, round, i));
        if (next_col >= 0) load_base(params, next_col, round, i);
      }
      if (next_col >= 0) load_col_scale(params, next_col, round);
    }
  }
};

// A block's column tiles: left_tile(k) of each rank tile k times the tile of right that streams by,
// summed, then finished and stored by `output`.
template <class Traits, class LeftTile, class Output>
__device__ __forceinline__ void expand_column_tiles(
    const typename Traits::Params& params, const Matrix<const typename Traits::scalar_t>& right,
    LeftTile left_tile, RightStream<Traits>& stream, const typename Traits::Staging& staging,
    Output& output, int num_col_tiles, int num_rank_tiles, int64_t warp_col, int thread) {
#pragma unroll 1
  for (int tile = 0; tile < num_col_tiles; ++tile) {
    typename Traits::Sum sum;
    sum.clear();
#pragma unroll 1
    for (int k = 0; k < num_rank_tiles; ++k) {
      const int now = opaque(thread);  // registers: addresses are not kept across steps
      copy_async_wait<Traits::kStages - 2>();
      __syncthreads();  // this step's tile is complete, and the one before it has been read
      stream.issue(right, num_rank_tiles, now);
      multiply_add<Contraction::kAlongColumns, Traits::Op::kRightContraction, Traits::kRankTile>(
          sum, left_tile(k), stream.take(), now);
    }
    const int64_t tile_col = warp_col + int64_t{tile} * Traits::kBlockCols;
    output.lane = opaque(output.lane);  // as above
    output.finish(params, sum, staging, tile_col,
                  tile + 1 < num_col_tiles ? tile_col + Traits::kBlockCols : -1);
  }
}

}  // namespace detail

// Block (x, y) owns rows x · kBlockRows … and column tiles y · col_tiles_per_block ….
template <class Traits>
__device__ __forceinline__ void expand(const typename Traits::Params& params) {
  using scalar_t = typename Traits::scalar_t;
  using MidTile = typename Traits::MidTile;
  using Staging = typename Traits::Staging;
  const int thread = threadIdx.x;
  const int64_t first_row = int64_t{blockIdx.x} * Traits::kBlockRows;
  const int64_t block_cols = int64_t{params.col_tiles_per_block} * Traits::kBlockCols;
  const int64_t first_col = blockIdx.y * block_cols;
  const int64_t cols_left = params.out.num_cols - first_col;
  const int64_t num_cols = cols_left < block_cols ? cols_left : block_cols;
  const int num_col_tiles =
      static_cast<int>((num_cols + Traits::kBlockCols - 1) / Traits::kBlockCols);
  const int num_rank_tiles =
      static_cast<int>((params.left.num_cols + Traits::kRankTile - 1) / Traits::kRankTile);

  unsigned char* const mid = dynamic_shared_memory();
  const auto mid_tile = [&](int rank_tile) {
    return MidTile{reinterpret_cast<scalar_t*>(mid + rank_tile * MidTile::kBytes)};
  };
  unsigned char* const stages = mid + num_rank_tiles * MidTile::kBytes;
  const Staging staging{reinterpret_cast<typename Traits::acc_t*>(
      stages + Traits::kStageBytes + thread / kWarpSize * Staging::kBytes)};

  detail::OutputLane<Traits> output;
  output.first_row = first_row + Traits::Sum::first_row(thread);
  output.seed = 0;
  if constexpr (Traits::Op::kHasDropout) {
    if (params.dropout.threshold != 0) output.seed = static_cast<uint64_t>(*params.dropout.seed);
  }
  output.lane = thread % kWarpSize;
  const int64_t warp_col = first_col + Traits::Sum::first_col(thread);

  detail::RightStream<Traits> stream;
  stream.stages = stages;
  stream.first_col = first_col;
  stream.tiles_left = num_col_tiles * num_rank_tiles;
  const auto start_stream = [&] {
#pragma unroll
    for (int stage = 0; stage < Traits::kStages - 1; ++stage)
      stream.issue(params.right, num_rank_tiles, thread);
  };
  MidFactors<scalar_t> factors;  // constant where the op has no mid: no code for it
  if constexpr (Traits::Op::kHasMid) factors = params.mid;
  // A product's scratch is where the stages will be; a mere copy can go under them.
  if (!factors.core) start_stream();
#pragma unroll 1
  for (int k = 0; k < num_rank_tiles; ++k)
    fill_mid_tile<typename Traits::Mid>(mid_tile(k), stages, params.left, factors, first_row,
                                        k * Traits::kRankTile, thread);
  if (factors.core) start_stream();
  output.load(params, warp_col);

  detail::expand_column_tiles<Traits>(params, params.right, mid_tile, stream, staging, output,
                                      num_col_tiles, num_rank_tiles, warp_col, thread);
}

// ---- plan

struct ExpandPlan {
  int block_rows;  // 128, 64 or 16
  int rank_tile;
  int col_tiles_per_block;
  int64_t num_row_blocks, num_col_blocks;
  int64_t shared_bytes;
};

namespace detail {

// A block may have this much on every architecture from sm_80 on (sm_86, sm_89 and sm_120 set it).
constexpr int64_t kMaxBlockSharedBytes = 99 * 1024;

// f(shape) with the shape that is compiled for the plan. Few ranks get a rank tile of their own
// size, since products with zeros cost time where rows are many; all others go by tiles of 64.
// For registers, TF32 goes by 32 where rows are 128, and products without tensor cores by 16.
template <class Compute, class F>
void with_expand_shape(const ExpandPlan& plan, F f) {
  if constexpr (!Compute::kTensorCores) {
    if (plan.block_rows == 16) return f(ExpandShape<1, 2, 16>{});
    return f(ExpandShape<8, 1, 16>{});
  } else {
    if (plan.block_rows == 16) return f(ExpandShape<1, 2, 64>{});
    if (plan.block_rows == 64) return f(ExpandShape<4, 1, 64>{});
    if (plan.rank_tile == 16) return f(ExpandShape<8, 1, 16>{});
    if constexpr (sizeof(typename Compute::scalar_t) == 2) {
      if (plan.rank_tile == 64) return f(ExpandShape<8, 1, 64>{});
    }
    return f(ExpandShape<8, 1, 32>{});
  }
}

// Column tiles per block such that the blocks, `slots` at a time, are done soonest, in units of one
// tile's time; the start of a block (mid, and its first loads have nothing to hide under) counts as
// one more. At most four waves are looked at: from there on the last one's idle slots are few.
inline int choose_col_tiles(int64_t num_row_blocks, int64_t num_col_tiles, int64_t slots) {
  int64_t best_tiles = num_col_tiles, best_time = -1;
  for (int64_t waves = 1; waves <= 4; ++waves) {
    const int64_t blocks_per_row = std::max<int64_t>(waves * slots / num_row_blocks, 1);
    const int64_t tiles = (num_col_tiles + blocks_per_row - 1) / blocks_per_row;
    const int64_t num_blocks = num_row_blocks * ((num_col_tiles + tiles - 1) / tiles);
    const int64_t time = (num_blocks + slots - 1) / slots * (tiles + 1);
    if (best_time < 0 || time < best_time) best_tiles = tiles, best_time = time;
  }
  return static_cast<int>(best_tiles);
}

}  // namespace detail

// The numbers are reasoned, not measured. Up to 64 rows (decode) the weights are the traffic and
// blocks of 16 rows and few columns spread them over all SMs. Otherwise right, which comes from L2
// once per block of rows, should weigh little beside base and out: 128 rows, while mid of all ranks
// fits beside it (as it always does up to rank 64); above, 64 rows, and 16 for the widest.
template <class Compute, class Op>
ExpandPlan plan_expand(int64_t num_rows, int64_t num_cols, int64_t rank, int num_sms) {
  constexpr int kFewRows = 64;
  const auto fits = [&]<class Shape>(Shape) {
    return ExpandTraits<Compute, Shape, Op>::shared_bytes(rank) <= detail::kMaxBlockSharedBytes;
  };
  ExpandPlan plan{};
  plan.block_rows = 16;
  if constexpr (Compute::kTensorCores) {
    plan.rank_tile = 64;
    if (num_rows > kFewRows && rank <= 64) {
      plan.block_rows = 128;
      plan.rank_tile = rank <= 16                                              ? 16
                       : rank <= 32 || sizeof(typename Compute::scalar_t) == 4 ? 32
                                                                               : 64;
    } else if (num_rows > kFewRows && fits(ExpandShape<4, 1, 64>{})) {
      plan.block_rows = 64;
    }
  } else {
    plan.rank_tile = 16;
    if (num_rows > kFewRows && fits(ExpandShape<8, 1, 16>{})) plan.block_rows = 128;
  }
  plan.num_row_blocks = (num_rows + plan.block_rows - 1) / plan.block_rows;
  detail::with_expand_shape<Compute>(plan, [&](auto shape) {
    using Traits = ExpandTraits<Compute, decltype(shape), Op>;
    const int64_t num_col_tiles = (num_cols + Traits::kBlockCols - 1) / Traits::kBlockCols;
    plan.shared_bytes = Traits::shared_bytes(rank);
    if (num_rows == 0 || num_cols == 0) return;
    plan.col_tiles_per_block = detail::choose_col_tiles(plan.num_row_blocks, num_col_tiles,
                                                        int64_t{num_sms} * Traits::kMinBlocks);
    plan.num_col_blocks = (num_col_tiles + plan.col_tiles_per_block - 1) / plan.col_tiles_per_block;
  });
  return plan;
}

// launch(Traits{}, shape of the launch, params) for the kernel that the plan names.
template <class Compute, class Op, class F>
void launch_expand(ExpandParams<Compute> params, int num_sms, F launch) {
  const int64_t rank = params.left.num_cols;
  const ExpandPlan plan =
      plan_expand<Compute, Op>(params.out.num_rows, params.out.num_cols, rank, num_sms);
  params.col_tiles_per_block = plan.col_tiles_per_block;
  detail::with_expand_shape<Compute>(plan, [&](auto shape) {
    using Traits = ExpandTraits<Compute, decltype(shape), Op>;
    launch(Traits{},
           LaunchShape{static_cast<unsigned>(plan.num_row_blocks),
                       static_cast<unsigned>(plan.num_col_blocks), 1, Traits::kThreads,
                       static_cast<size_t>(plan.shared_bytes)},
           params);
  });
}

}  // namespace lowrank_ext::cuda
