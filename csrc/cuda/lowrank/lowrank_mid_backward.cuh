// The part of the backward pass on [M, r]. With u = mid(h) = (h ⊙ rank_scale) coreᵀ:
//     du [M, r]        = Σ_s g[s]                      (the splits of G, in the order of s)
//     dh [M, r]        = (du core) ⊙ rank_scale
//     dcore [r, r]     = duᵀ (h ⊙ rank_scale)
//     drank_scale [r]  = Σ_m (du core)[m] ⊙ h[m]
// Absent factors are ones. Where both are absent only the sum is left (partial_sums.cuh).
//
// Block (x, y, z) walks over the row tiles (64 rows) of group x. z = 0 computes the columns of rank
// tile y of du core, hence of dh and of drank_scale; block z also sums rows j of rank tile z,
// columns i of rank tile y of dcore. The parts of the row groups are added in order by
// partial_sums.
//
// Shared memory: du, h ⊙ rank_scale [64, rank tile] and core [rank tile, rank tile] in scalar_t, du
// core (or du) [64, rank tile] in acc_t: 64 KiB at most. Sums are in acc_t, operands of products
// are rounded to scalar_t. What lies outside is zero in shared memory and not stored.
#pragma once

#include <algorithm>

#include "common/partial_sums.cuh"
#include "lowrank/mid.cuh"

namespace lowrank_ext::cuda {

template <class Compute>
struct MidBackwardParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  Matrix<const acc_t> g;  // [num_splits · M, r]
  int num_splits;
  int64_t num_rows;          // M
  Matrix<const scalar_t> h;  // [M, r], absent without the two sums
  MidFactors<scalar_t> mid;
  Matrix<scalar_t> dh;        // [M, r] or absent
  Matrix<acc_t> dcore;        // [num_row_groups · r, r] or absent: only with core
  Matrix<acc_t> drank_scale;  // [num_row_groups, r] or absent: only with rank_scale
  int row_tiles_per_group;

  template <class F>
  void each_tensor(F&& f) const {
    f("g", g);
    f("h", h);
    mid.each_tensor(f);
    f("dh", dh);
    f("dcore", dcore);
    f("drank_scale", drank_scale);
  }
};

template <class Compute_>
struct MidBackwardTraits {
  using Compute = Compute_;
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  using Params = MidBackwardParams<Compute>;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;  // M x r is small: there is hardly a block for every SM
  static constexpr int kRowTile = 64;
  static constexpr int kRankTile = Compute::kTensorCores ? 64 : 32;

  using RowsTile = Tile<scalar_t, kRowTile, kRankTile>;
  using CoreTile = Tile<scalar_t, kRankTile, kRankTile>;
  using ResultTile = Tile<acc_t, kRowTile, kRankTile>;
  using RowsSum = Accumulator<Compute, kRowTile, kRankTile, 4, 2>;
  using CoreSum =
      Accumulator<Compute, kRankTile, kRankTile, kRankTile / 16, kThreads / 2 / kRankTile>;
  static_assert(RowsSum::kThreads == kThreads && CoreSum::kThreads == kThreads);

  // A thread's chunks of a RowsTile lie below one another, so its sums over rows are one chunk.
  static constexpr int kPerChunk = RowsTile::kPerChunk;
  static constexpr int kChunksPerRow = RowsTile::kChunksPerRow;
  static constexpr int kColumnSumRows = kThreads / kChunksPerRow;
  static_assert(kColumnSumRows <= kRowTile, "the threads' sums pass through the result's tile");

  static constexpr size_t kSharedBytes =
      2 * RowsTile::kBytes + CoreTile::kBytes + ResultTile::kBytes;
  static_assert(kSharedBytes <= 64 * 1024);
};

namespace detail {

template <class Traits>
struct MidBackwardBlock {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  using Compute = typename Traits::Compute;
  using RowsTile = typename Traits::RowsTile;
  using CoreTile = typename Traits::CoreTile;
  using ResultTile = typename Traits::ResultTile;
  static constexpr int kThreads = Traits::kThreads;
  static constexpr int kRankTile = Traits::kRankTile;
  static constexpr int kPerChunk = Traits::kPerChunk;

  const typename Traits::Params& params;
  const int thread = threadIdx.x;
  // First of the block's columns, and of its rows of dcore.
  const int64_t first_i = int64_t{blockIdx.y} * kRankTile;
  const int64_t first_j = int64_t{blockIdx.z} * kRankTile;
  const bool rows_wanted = blockIdx.z == 0 && (params.dh || params.drank_scale);  // du core
  unsigned char* next = dynamic_shared_memory();
  const RowsTile du_tile = take_tile<RowsTile>(next);
  const RowsTile scaled_h_tile = take_tile<RowsTile>(next);
  const CoreTile core_tile = take_tile<CoreTile>(next);
  const ResultTile result_tile = take_tile<ResultTile>(next);
  // Both at this thread's columns; the sum is over its rows.
  const Chunk<scalar_t> rank_scale =
      load_factors(params.mid.rank_scale, first_i + own_col<RowsTile, kThreads>(thread));
  acc_t drank_scale[kPerChunk] = {};

  explicit __device__ __forceinline__ MidBackwardBlock(const typename Traits::Params& params)
      : params(params) {}

  // Σ_s g[s][row, col …].
  __device__ __forceinline__ Chunk<acc_t> sum_splits(int64_t row, int64_t col) const {
    Chunk<acc_t> sum = {};
    if (row >= params.num_rows) return sum;
#pragma unroll 4  // several loads in flight; the order of the additions stays
    for (int s = 0; s < params.num_splits; ++s) {
      const Chunk<acc_t> split = load_chunk<acc_t>(params.g, s * params.num_rows + row, col);
#pragma unroll
      for (int e = 0; e < Chunk<acc_t>::kSize; ++e) sum.elements[e] += split.elements[e];
    }
    return sum;
  }

  // f(row, col, Σ_s g[s][first_row + row, first_rank + col …]) for the chunks of sums that belong
  // to this thread.
  template <class F>
  __device__ __forceinline__ void for_each_sum(int64_t first_row, int64_t first_rank, F f) const {
    for_each_own_chunk<ResultTile, kThreads>(thread, [&](int row, int chunk) {
      const int col = chunk * ResultTile::kPerChunk;
      f(row, col, sum_splits(first_row + row, first_rank + col));
    });
  }

  __device__ __forceinline__ void fill_du(int64_t first_row, int64_t first_rank) const {
    for_each_sum(first_row, first_rank, [&](int row, int col, const Chunk<acc_t>& sum) {
      constexpr int kSize = Chunk<acc_t>::kSize;
      struct alignas(kSize * sizeof(scalar_t)) Rounded {
        scalar_t elements[kSize];
      } rounded;
#pragma unroll
      for (int e = 0; e < kSize; ++e) rounded.elements[e] = convert<scalar_t>(sum.elements[e]);
      store_vector<sizeof(Rounded)>(du_tile.at(row, col), &rounded);
    });
  }

  // From du core at (row, chunk) to dh, and to the sum over rows for drank_scale.
  __device__ __forceinline__ void finish(int64_t row, int chunk, const acc_t (&values)[kPerChunk]) {
    const int64_t col = first_i + chunk * kPerChunk;
    if (params.drank_scale) {
      const Chunk<scalar_t> h = load_chunk<scalar_t>(params.h, row, col);
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e)
        drank_scale[e] += values[e] * convert<acc_t>(h.elements[e]);
    }
    if (!params.dh) return;
    Chunk<scalar_t> dh;
#pragma unroll
    for (int e = 0; e < kPerChunk; ++e)
      dh.elements[e] = convert<scalar_t>(values[e] * convert<acc_t>(rank_scale.elements[e]));
    store_chunk(params.dh, row, col, dh);
  }

  // The same for all of result_tile, which the block has written.
  __device__ __forceinline__ void finish_rows(int64_t first_row) {
    constexpr int kParts = kPerChunk / ResultTile::kPerChunk;
    __syncthreads();
    for_each_own_chunk<RowsTile, kThreads>(thread, [&](int row, int chunk) {
      acc_t values[kPerChunk];
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        load_vector<16>(values + part * ResultTile::kPerChunk,
                        result_tile.chunk(row, chunk * kParts + part));
      finish(first_row + row, chunk, values);
    });
  }

  __device__ __forceinline__ void without_core(int64_t first_row) {
    __syncthreads();  // the result of the row tile before has been read
    for_each_sum(first_row, first_i, [&](int row, int col, const Chunk<acc_t>& sum) {
      write_chunk(result_tile, row, col / ResultTile::kPerChunk, sum);
    });
    finish_rows(first_row);
  }

  // One step j of du core, and of dcore where the step is the block's own. Tiles are filled between
  // two barriers: the ones of the step before have been read, these are complete.
  __device__ __forceinline__ void step(int64_t first_row, int64_t rank,
                                       typename Traits::RowsSum& rows,
                                       typename Traits::CoreSum& dcore) const {
    const bool dcore_wanted = params.dcore && rank == first_j;
    __syncthreads();
    if (rows_wanted) copy_tile_async<kThreads>(core_tile, params.mid.core, rank, first_i, thread);
    if (dcore_wanted)
      copy_tile_async<kThreads>(scaled_h_tile, params.h, first_row, first_i, thread);
    copy_async_commit();
    fill_du(first_row, rank);
    copy_async_wait<0>();
    if (dcore_wanted && params.mid.rank_scale)
      scale_own_chunks<acc_t, kThreads>(scaled_h_tile, rank_scale, thread);
    __syncthreads();
    if (rows_wanted)
      multiply_add<Contraction::kAlongColumns, Contraction::kAlongRows, kRankTile>(
          rows, du_tile, core_tile, thread);
    if (dcore_wanted)
      multiply_add<Contraction::kAlongRows, Contraction::kAlongRows, Traits::kRowTile>(
          dcore, du_tile, scaled_h_tile, thread);
  }

  __device__ __forceinline__ void with_core(int64_t first_row, typename Traits::CoreSum& dcore) {
    typename Traits::RowsSum rows;
    rows.clear();
#pragma unroll 1
    for (int64_t rank = rows_wanted ? 0 : first_j; rank < params.g.num_cols; rank += kRankTile) {
      step(first_row, rank, rows, dcore);
      if (!rows_wanted) return;
    }
    // Two barriers since the result of the row tile before was read.
    rows.for_each_pair(thread, [&](int row, int col, acc_t& left, acc_t& right) {
      write_pair(result_tile, row, col, left, right);
    });
    finish_rows(first_row);
  }

  __device__ __forceinline__ void store_dcore(typename Traits::CoreSum& dcore) const {
    const int64_t rank = params.g.num_cols;
    dcore.for_each_pair(thread, [&](int row, int col, acc_t& left, acc_t& right) {
      const int64_t j = first_j + row, i = first_i + col;
      if (j >= rank) return;
      acc_t* const to = params.dcore.at(blockIdx.x * rank + j, i);
      if (i < rank) to[0] = left;
      if (i + 1 < rank) to[1] = right;
    });
  }

  // Adds the threads' sums over their rows in the order of the threads.
  __device__ __forceinline__ void store_drank_scale() const {
    constexpr int kParts = kPerChunk / ResultTile::kPerChunk;
    __syncthreads();  // the result has been read
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      store_vector<16>(result_tile.chunk(thread / Traits::kChunksPerRow,
                                         thread % Traits::kChunksPerRow * kParts + part),
                       drank_scale + part * ResultTile::kPerChunk);
    __syncthreads();
    if (thread >= kRankTile || first_i + thread >= params.g.num_cols) return;
    acc_t sum = 0;
    for (int row = 0; row < Traits::kColumnSumRows; ++row) sum += *result_tile.at(row, thread);
    *params.drank_scale.at(blockIdx.x, first_i + thread) = sum;
  }
};

}  // namespace detail

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    lowrank_mid_backward_kernel(const typename Traits::Params params) {
  detail::MidBackwardBlock<Traits> block(params);
  typename Traits::CoreSum dcore;
  dcore.clear();
  const int64_t num_row_tiles = (params.num_rows + Traits::kRowTile - 1) / Traits::kRowTile;
  const int64_t first = int64_t{blockIdx.x} * params.row_tiles_per_group;
  const int64_t last = first + params.row_tiles_per_group;
#pragma unroll 1
  for (int64_t tile = first; tile < last && tile < num_row_tiles; ++tile) {
    if (params.mid.core) {
      block.with_core(tile * Traits::kRowTile, dcore);
    } else {
      block.without_core(tile * Traits::kRowTile);
    }
  }
  if (params.dcore) block.store_dcore(dcore);
  if (params.drank_scale && blockIdx.z == 0) block.store_drank_scale();
}

// ---- plan

struct MidBackwardPlan {
  int64_t num_row_groups;
  int row_tiles_per_group;
};

// A group's parts of dcore and drank_scale are written and read again, one after the other by a
// thread: as few groups as keep half of the SMs busy. Without such sums a group is one row tile.
// Reasoned, not measured.
template <class Compute>
MidBackwardPlan plan_mid_backward(int64_t num_rows, bool need_sums, int num_sms) {
  constexpr int64_t kRowTile = MidBackwardTraits<Compute>::kRowTile;
  const int64_t num_row_tiles = (num_rows + kRowTile - 1) / kRowTile;
  if (!need_sums || num_row_tiles == 0) return {num_row_tiles, 1};
  const int64_t groups = std::min<int64_t>(num_row_tiles, std::max(num_sms / 2, 1));
  const int64_t tiles = (num_row_tiles + groups - 1) / groups;
  return {(num_row_tiles + tiles - 1) / tiles, static_cast<int>(tiles)};
}

template <class Compute>
void launch_lowrank_mid_backward(const MidBackwardParams<Compute>& params,
                                 const MidBackwardPlan& plan, Stream stream) {
  using Traits = MidBackwardTraits<Compute>;
  const unsigned num_rank_tiles =
      static_cast<unsigned>((params.g.num_cols + Traits::kRankTile - 1) / Traits::kRankTile);
  launch_kernel("lowrank_mid_backward", &lowrank_mid_backward_kernel<Traits>,
                {static_cast<unsigned>(plan.num_row_groups), num_rank_tiles,
                 params.dcore ? num_rank_tiles : 1, Traits::kThreads, Traits::kSharedBytes},
                params, stream);
}

}  // namespace lowrank_ext::cuda
