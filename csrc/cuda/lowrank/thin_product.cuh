// C [outer, r] = scale · L R: a large matrix L, streamed once, times a thin one of r columns:
//     lowrank_down         h [M, r] = drop(x) lora_aᵀ              L = drop(x),   R = lora_aᵀ
//     lowrank_up_backward  G [M, r] = dout (out_scale ⊙ lora_b)    L = dout,      R = out_scale ⊙ lora_b
//     outer sums           P [N, r] = doutᵀ mid(h)                 L = doutᵀ,     R = mid(h)
//                          dlora_aᵀ [K, r] = drop(x)ᵀ dh           L = drop(x)ᵀ,  R = dh
// A block owns kBlockOuter rows and kRankTile columns of C and one split of the contraction, which
// it walks in steps of kDepth elements (128 bytes): tiles of L and R come through kStages stages of
// cp.async. A thread drops or scales the chunks that it copied itself, before the barrier that
// publishes them. Blocks of the same rows and another rank tile are neighbors and find L in the
// L2.
//
// Shared memory: kStages · 128 (kBlockOuter + kRankTile) bytes: 40, 48, 64, 72 KiB for rank tiles
// 16, 32, 64, 128; 16 KiB where rows are few. Sums are in acc_t and leave through shared memory in
// whole 16-byte chunks: rounded into C, or as a split's partial sums, which another kernel adds in
// order. What lies outside the matrices is zero in shared memory and never stored.
#pragma once

#include <algorithm>

#include "common/dispatch.h"
#include "common/dropout.cuh"
#include "lowrank/row_scale.cuh"

namespace lowrank_ext::cuda {

// How the two matrices lie in memory, and what happens to them on the way.
struct DownOp {  // x [M, K], lora_a [r, K]
  static constexpr Contraction kLarge = Contraction::kAlongColumns;
  static constexpr Contraction kThin = Contraction::kAlongColumns;
  static constexpr bool kHasDropout = true, kHasThinScale = false, kHasTransposedSums = false,
                        kMayBeFiniteOnly = false;
  static constexpr const char *kLargeName = "x", *kThinName = "lora_a";
  static constexpr bool kMayBeSmall = true;  // blocks, where rows are few (decoding)
};
struct UpBackwardOp {  // dout [M, N], lora_b [N, r]
  static constexpr Contraction kLarge = Contraction::kAlongColumns;
  static constexpr Contraction kThin = Contraction::kAlongRows;
  static constexpr bool kHasDropout = false, kHasThinScale = true, kHasTransposedSums = false,
                        kMayBeFiniteOnly = false;
  static constexpr const char *kLargeName = "dout", *kThinName = "lora_b";
  static constexpr bool kMayBeSmall = false;
};
struct OuterSumOp {  // dout [M, N], mid(h) [M, r]; x [M, K], dh [M, r]
  static constexpr Contraction kLarge = Contraction::kAlongRows;
  static constexpr Contraction kThin = Contraction::kAlongRows;
  static constexpr bool kHasDropout = true, kHasThinScale = false, kHasTransposedSums = true,
                        kMayBeFiniteOnly = true;
  static constexpr const char *kLargeName = "source", *kThinName = "left";
  static constexpr bool kMayBeSmall = false;
};

// ---- plan

constexpr int kThinProductStepBytes = 128;

// How a product is cut into blocks: num_outer_tiles x num_rank_tiles x num_splits of them.
struct ThinProductPlan {
  int block_outer, rank_tile;
  int64_t num_outer_tiles;
  int num_rank_tiles, num_splits;
  int64_t steps_per_split;

  int64_t num_blocks() const { return num_outer_tiles * num_rank_tiles * num_splits; }
};

// What a plan asks of a compute type.
struct ComputeTraits {
  int64_t element_bytes, acc_bytes;
};

template <class Compute>
constexpr ComputeTraits compute_traits() {
  return {sizeof(typename Compute::scalar_t), sizeof(typename Compute::acc_t)};
}

// Row strides of partial sums: whole sectors.
constexpr int64_t padded_to_sector(int64_t size) { return (size + 7) / 8 * 8; }

// Blocks of 256 threads that keep the memory busy. One block has about 20 KiB in flight; three
// quarters of the SMs with one block each have what a round trip to memory takes at full rate (by
// Little's law with 700 ns and 3 TB/s: 2.1 MB on 132 SMs). Reasoned, not measured.
constexpr int64_t blocks_to_fill(int num_sms) { return (3 * int64_t{num_sms} + 3) / 4; }

// The splits of a plan that knows its tiles. They cost: each writes and rereads a C of partial
// sums. So there are as few as make the `wanted` blocks that fill the GPU, and none with less than
// four steps, which the pipeline needs to get going.
inline void plan_splits(ThinProductPlan& plan, int64_t outer, int64_t depth, int64_t rank,
                        const ComputeTraits& compute, int64_t wanted) {
  constexpr int64_t kMinSteps = 4;
  const auto tiles = [](int64_t size, int64_t tile) { return (size + tile - 1) / tile; };
  plan.num_outer_tiles = tiles(outer, plan.block_outer);
  plan.num_rank_tiles = static_cast<int>(tiles(rank, plan.rank_tile));
  const int64_t num_steps = tiles(depth, kThinProductStepBytes / compute.element_bytes);
  const int64_t num_tiles = std::max(int64_t{1}, plan.num_outer_tiles * plan.num_rank_tiles);
  const int64_t most_splits = std::max(int64_t{1}, num_steps / kMinSteps);
  plan.steps_per_split = tiles(num_steps, std::min(tiles(wanted, num_tiles), most_splits));
  plan.num_splits = static_cast<int>(
      std::max(int64_t{1}, tiles(num_steps, std::max(int64_t{1}, plan.steps_per_split))));
}

// Few rows (decoding) take small blocks: two per SM, of 16 ranks each, as R is then what is
// streamed. Rank tiles of 128 fit into the registers with elements of 2 bytes.
inline ThinProductPlan plan_thin_product(int64_t outer, int64_t depth, int64_t rank,
                                         const ComputeTraits& compute, bool small_blocks,
                                         int num_sms) {
  ThinProductPlan plan;
  plan.block_outer = small_blocks ? 16 : 64;
  plan.rank_tile = 16;
  const int max_rank_tile = small_blocks ? 16 : compute.element_bytes == 2 ? 128 : 64;
  while (plan.rank_tile < rank && plan.rank_tile < max_rank_tile) plan.rank_tile *= 2;
  plan_splits(plan, outer, depth, rank, compute,
              small_blocks ? 2 * int64_t{num_sms} : blocks_to_fill(num_sms));
  return plan;
}

// ---- kernel

template <class Compute, class Op>
struct ThinProductParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  Matrix<const scalar_t> large;       // [outer, depth] or, along rows, [depth, outer]
  Matrix<const scalar_t> thin;        // [r, depth] or, along rows, [depth, r]
  Matrix<const scalar_t> thin_scale;  // [1, depth] or absent
  Matrix<scalar_t> out;               // [outer, r], or absent: then the sums go to
  Matrix<acc_t> partials;             // [num_splits · outer, r] or, transposed,
  bool transposed_sums;               // [num_splits · r, outer]; columns may be padded
  int64_t rows_per_split;             // of partials: outer or r
  acc_t scale;
  Dropout dropout;   // of large
  bool finite_only;  // of large: NaN and infinities count as zero
  int num_rank_tiles;
  int64_t steps_per_split;

  template <class F>
  void each_tensor(F&& f) const {
    f(Op::kLargeName, large);
    f(Op::kThinName, thin);
    f("out_scale", thin_scale);
    f("out", out);
    f("partials", partials);
    f("seed", Matrix<const int64_t>{dropout.seed, 1, 1, 1});
  }
};

template <class Compute_, class Op_, int kBlockOuter_, int kRankTile_>
struct ThinProductTraits {
  using Compute = Compute_;
  using Op = Op_;
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  using Params = ThinProductParams<Compute, Op>;
  static constexpr int kBlockOuter = kBlockOuter_;
  static constexpr int kRankTile = kRankTile_;
  static constexpr int kDepth = kThinProductStepBytes / sizeof(scalar_t);
  static constexpr bool kLargeAlongRows = Op::kLarge == Contraction::kAlongRows;
  static constexpr bool kThinAlongRows = Op::kThin == Contraction::kAlongRows;

  using LargeTile = Tile<scalar_t, kLargeAlongRows ? kDepth : kBlockOuter,
                         kLargeAlongRows ? kBlockOuter : kDepth>;
  using ThinTile =
      Tile<scalar_t, kThinAlongRows ? kDepth : kRankTile, kThinAlongRows ? kRankTile : kDepth>;
  using Sum = Accumulator<Compute, kBlockOuter, kRankTile, kBlockOuter / 16, 2>;
  using LargeStream = TileStream<Sum::kThreads, LargeTile, const scalar_t, kLargeAlongRows>;
  using ThinStream = TileStream<Sum::kThreads, ThinTile, const scalar_t, kThinAlongRows>;
  using Scale = RowScale<Compute, ThinTile, Sum::kThreads>;
  template <class T>
  using OutTile = Tile<T, kBlockOuter, kRankTile>;
  template <class T>
  using TransposedTile = Tile<T, kRankTile, kBlockOuter>;

  static constexpr int kThreads = Sum::kThreads;
  // 128 registers a thread, except where sums take two each.
  static constexpr int kMinBlocks = sizeof(acc_t) == 8 ? 1 : 512 / kThreads;
  static constexpr int kStages = kRankTile == 128 ? 3 : 4;
  static constexpr int kStageBytes = LargeTile::kBytes + ThinTile::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kStageBytes == 128 * (kBlockOuter + kRankTile));
  static_assert(OutTile<acc_t>::kBytes <= kSharedBytes, "the sums leave through the stages");
  static_assert(kSharedBytes <= 99 * 1024, "every GPU since sm_80 gives a block this much");
};

namespace detail {

// The block's place in the product.
template <class Traits>
struct ThinProductBlock {
  using Params = typename Traits::Params;

  int64_t first_outer, first_depth;
  int first_rank, split, num_steps;

  __device__ __forceinline__ explicit ThinProductBlock(const Params& params) {
    split = static_cast<int>(blockIdx.y);
    first_outer = int64_t{blockIdx.x} / params.num_rank_tiles * Traits::kBlockOuter;
    first_rank = static_cast<int>(blockIdx.x % params.num_rank_tiles) * Traits::kRankTile;
    const int64_t depth = Traits::kLargeAlongRows ? params.large.num_rows : params.large.num_cols;
    const int64_t all_steps = (depth + Traits::kDepth - 1) / Traits::kDepth;
    const int64_t first_step = split * params.steps_per_split;
    const int64_t rest = all_steps - first_step;
    first_depth = first_step * Traits::kDepth;
    num_steps = static_cast<int>(rest < params.steps_per_split ? rest : params.steps_per_split);
  }
  __device__ __forceinline__ int64_t depth(int step) const {
    return first_depth + int64_t{step} * Traits::kDepth;
  }
  __device__ __forceinline__ int64_t large_row(int step) const {
    return Traits::kLargeAlongRows ? depth(step) : first_outer;
  }
  __device__ __forceinline__ int64_t large_col(int step) const {
    return Traits::kLargeAlongRows ? first_outer : depth(step);
  }
};

template <class Traits>
struct ThinProductStages {
  using LargeTile = typename Traits::LargeTile;
  using ThinTile = typename Traits::ThinTile;
  using scalar_t = typename Traits::scalar_t;

  unsigned char* bytes;

  __device__ __forceinline__ LargeTile large(int slot) const {
    return {reinterpret_cast<scalar_t*>(bytes + slot * Traits::kStageBytes)};
  }
  __device__ __forceinline__ ThinTile thin(int slot) const {
    return {reinterpret_cast<scalar_t*>(bytes + slot * Traits::kStageBytes + LargeTile::kBytes)};
  }
};

template <class Traits>
__device__ __forceinline__ void drop_own_chunks(const typename Traits::LargeTile& tile,
                                                const Dropout& dropout, uint64_t seed,
                                                int64_t first_row, int64_t first_col, int thread) {
  using LargeTile = typename Traits::LargeTile;
  for_each_own_chunk<LargeTile, Traits::kThreads>(thread, [&](int row, int chunk) {
    auto values = read_chunk(tile, row, chunk);
    drop(values.elements, dropout, seed, first_row + row, first_col + chunk * LargeTile::kPerChunk);
    write_chunk(tile, row, chunk, values);
  });
}

template <class acc_t, class scalar_t>
__device__ __forceinline__ void clear_nonfinite(Chunk<scalar_t>& chunk) {
#pragma unroll
  for (scalar_t& element : chunk.elements) {
    const acc_t value = convert<acc_t>(element);
    if (!(value - value == acc_t(0))) element = scalar_t(0.0f);
  }
}

template <class Traits>
__device__ __forceinline__ void clear_own_nonfinite(const typename Traits::LargeTile& tile,
                                                    int thread) {
  for_each_own_chunk<typename Traits::LargeTile, Traits::kThreads>(thread, [&](int row, int chunk) {
    auto values = read_chunk(tile, row, chunk);
    clear_nonfinite<typename Traits::acc_t>(values);
    write_chunk(tile, row, chunk, values);
  });
}

// f(column of the tile, sum), as a tile at (first_row, first_col) of out, by way of shared memory,
// which is free again.
template <class Traits, class T, class F>
__device__ __forceinline__ void store_sum(typename Traits::Sum& sum, unsigned char* shared, F f,
                                          const Matrix<T>& out, int64_t first_row,
                                          int64_t first_col, int thread) {
  using OutTile = typename Traits::template OutTile<T>;
  const OutTile tile{reinterpret_cast<T*>(shared)};
  sum.for_each_pair(thread, [&](int row, int col, auto& left, auto& right) {
    write_pair(tile, row, col, f(col, left), f(col + 1, right));
  });
  __syncthreads();
  for_each_own_chunk<OutTile, Traits::kThreads>(thread, [&](int row, int chunk) {
    store_chunk(out, first_row + row, first_col + chunk * OutTile::kPerChunk,
                read_chunk(tile, row, chunk));
  });
}

// The same, turned: the sum's columns are out's rows, from first_row on.
template <class Traits, class T, class F>
__device__ __forceinline__ void store_transposed_sum(typename Traits::Sum& sum,
                                                     unsigned char* shared, F f,
                                                     const Matrix<T>& out, int64_t first_row,
                                                     int64_t first_col, int thread) {
  using OutTile = typename Traits::template TransposedTile<T>;
  const OutTile tile{reinterpret_cast<T*>(shared)};
  // The upper two lanes of four write their second rank first: so no two of the warp's lanes meet
  // in a bank.
  const int first = thread % 4 / 2;
  sum.for_each_pair(thread, [&](int row, int col, auto& left, auto& right) {
    *tile.at(col + first, row) = convert<T>(f(col + first, first == 0 ? left : right));
    *tile.at(col + 1 - first, row) = convert<T>(f(col + 1 - first, first == 0 ? right : left));
  });
  __syncthreads();
  for_each_own_chunk<OutTile, Traits::kThreads>(thread, [&](int row, int chunk) {
    store_chunk(out, first_row + row, first_col + chunk * OutTile::kPerChunk,
                read_chunk(tile, row, chunk));
  });
}

}  // namespace detail

template <class Traits>
__device__ __forceinline__ void thin_product(const typename Traits::Params& params) {
  using Op = typename Traits::Op;
  const int thread = static_cast<int>(threadIdx.x);
  const detail::ThinProductBlock<Traits> block(params);
  const detail::ThinProductStages<Traits> stages{dynamic_shared_memory()};
  const bool drops = Op::kHasDropout && params.dropout.threshold != 0;
  const uint64_t seed = drops ? static_cast<uint64_t>(*params.dropout.seed) : 0;
  [[maybe_unused]] typename Traits::Scale thin_scale;
  if constexpr (Op::kHasThinScale) {
    if (params.thin_scale) thin_scale.fetch(params.thin_scale, block.depth(0), thread);
  }

  typename Traits::LargeStream large(params.large, block.large_row(0), block.large_col(0), thread);
  typename Traits::ThinStream thin(
      params.thin, Traits::kThinAlongRows ? block.depth(0) : block.first_rank,
      Traits::kThinAlongRows ? block.first_rank : block.depth(0), thread);

  const auto load = [&](int step, int slot) {
    const int now = opaque(thread);  // registers: addresses are not kept across steps
    large.copy_async_to(stages.large(slot), step, now);
    thin.copy_async_to(stages.thin(slot), step, now);
  };
  const auto transform_own_chunks = [&](int step, int slot) {
    if constexpr (Op::kHasDropout) {
      if (drops)
        detail::drop_own_chunks<Traits>(stages.large(slot), params.dropout, seed,
                                        block.large_row(step), block.large_col(step), thread);
    }
    if constexpr (Op::kMayBeFiniteOnly) {
      if (params.finite_only) detail::clear_own_nonfinite<Traits>(stages.large(slot), thread);
    }
    if constexpr (Op::kHasThinScale) {
      if (params.thin_scale) thin_scale.apply(stages.thin(slot), thread);
    }
  };

  typename Traits::Sum sum;
  sum.clear();
  run_pipeline<Traits::kStages>(
      block.num_steps, load, transform_own_chunks, [&](int step, int slot) {
        if constexpr (Op::kHasThinScale) {
          if (params.thin_scale) thin_scale.fetch(params.thin_scale, block.depth(step + 1), thread);
        }
        multiply_add<Op::kLarge, Op::kThin, Traits::kDepth>(sum, stages.large(slot),
                                                            stages.thin(slot), thread);
      });
  __syncthreads();  // the stages have been read

  const auto scaled = [&](int, typename Traits::acc_t value) { return value * params.scale; };
  if (params.out) {
    detail::store_sum<Traits>(sum, stages.bytes, scaled, params.out, block.first_outer,
                              block.first_rank, thread);
    return;
  }
  auto partials = params.partials;  // of this split
  partials.data = partials.at(block.split * params.rows_per_split, 0);
  partials.num_rows = params.rows_per_split;
  if constexpr (Op::kHasTransposedSums) {
    if (params.transposed_sums) {
      detail::store_transposed_sum<Traits>(sum, stages.bytes, scaled, partials, block.first_rank,
                                           block.first_outer, thread);
      return;
    }
  }
  detail::store_sum<Traits>(sum, stages.bytes, scaled, partials, block.first_outer,
                            block.first_rank, thread);
}

// ---- launch

namespace detail {

template <class Compute, class Op, int kBlockOuter, int kRankTile, class F>
void launch_thin_product_as(const ThinProductPlan& plan,
                            const ThinProductParams<Compute, Op>& params, F launch) {
  using Traits = ThinProductTraits<Compute, Op, kBlockOuter, kRankTile>;
  launch(Traits{},
         LaunchShape{static_cast<unsigned>(plan.num_outer_tiles * plan.num_rank_tiles),
                     static_cast<unsigned>(plan.num_splits), 1, Traits::kThreads,
                     Traits::kSharedBytes},
         params);
}

}  // namespace detail

// launch(Traits{}, shape of the launch, params) for the kernel that the plan names.
template <class Compute, class Op, class F>
void launch_thin_product(const ThinProductPlan& plan, ThinProductParams<Compute, Op> params,
                         F launch) {
  params.num_rank_tiles = plan.num_rank_tiles;
  params.steps_per_split = plan.steps_per_split;
  if constexpr (Op::kMayBeSmall) {
    if (plan.block_outer == 16)
      return detail::launch_thin_product_as<Compute, Op, 16, 16>(plan, params, launch);
  }
  if constexpr (sizeof(typename Compute::scalar_t) == 2) {
    if (plan.rank_tile == 128)
      return detail::launch_thin_product_as<Compute, Op, 64, 128>(plan, params, launch);
  }
  if (plan.rank_tile == 16)
    return detail::launch_thin_product_as<Compute, Op, 64, 16>(plan, params, launch);
  if (plan.rank_tile == 32)
    return detail::launch_thin_product_as<Compute, Op, 64, 32>(plan, params, launch);
  detail::launch_thin_product_as<Compute, Op, 64, 64>(plan, params, launch);
}

}  // namespace lowrank_ext::cuda
