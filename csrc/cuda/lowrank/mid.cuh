// mid(h) = (h ⊙ rank_scale) coreᵀ, the small operation between the two projections, as a prologue
// of the kernels that contract mid(h): fill_mid_tile writes
//     tile[m, j] = mid(h)[first_row + m, first_rank + j]
// rounded to scalar_t once, into a [kRows, kRankTile] tile of shared memory; outside h it is zero.
// Absent factors are ones; without core it is an element-wise copy.
//
// With core, h ⊙ rank_scale (rounded to scalar_t, as an operand of a product must be) and core pass
// through `scratch` in steps of 64 bytes of their columns, double-buffered: 128 (kRows + kRankTile)
// bytes. The sum is kept in acc_t. The block's kWarpsM x kWarpsN warps share the tile as they would
// share any product.
#pragma once

#include "common/tile.cuh"

namespace lowrank_ext::cuda {

template <class scalar_t>
struct MidFactors {
  Matrix<const scalar_t> rank_scale;  // [1, r]
  Matrix<const scalar_t> core;        // [r, r]

  template <class F>
  void each_tensor(F&& f) const {
    f("rank_scale", rank_scale);
    f("core", core);
  }
};

template <class Compute, int kRows, int kRankTile, int kWarpsM, int kWarpsN>
struct MidProduct {
  using scalar_t = typename Compute::scalar_t;
  static constexpr int kThreads = kWarpSize * kWarpsM * kWarpsN;
  static constexpr int kStepBytes = 64;  // of the columns of h and core
  static constexpr int kDepth = kStepBytes / sizeof(scalar_t);
  static constexpr int kStages = 2;
  using Result = Tile<scalar_t, kRows, kRankTile>;
  using HTile = Tile<scalar_t, kRows, kDepth>;
  using CoreTile = Tile<scalar_t, kRankTile, kDepth>;
  using Sum = Accumulator<Compute, kRows, kRankTile, kWarpsM, kWarpsN>;
  static constexpr int kScratchBytes = kStages * (HTile::kBytes + CoreTile::kBytes);
  static_assert(kScratchBytes == 128 * (kRows + kRankTile));
};

// vector[col …] of a [1, n] factor, or ones where it is absent.
template <class scalar_t>
__device__ __forceinline__ Chunk<scalar_t> load_factors(const Matrix<const scalar_t>& vector,
                                                        int64_t col) {
  if (vector) return load_chunk<scalar_t>(vector, 0, col);
  Chunk<scalar_t> ones;
#pragma unroll
  for (int i = 0; i < ones.kSize; ++i) ones.elements[i] = convert<scalar_t>(1.0f);
  return ones;
}

// The first column of the chunks of a tile that belong to `thread`: they lie below one another.
template <class TileT, int kThreads>
__device__ __forceinline__ int own_col(int thread) {
  static_assert(kThreads % TileT::kChunksPerRow == 0);
  return thread % TileT::kChunksPerRow * TileT::kPerChunk;
}

// tile[m, own_col + i] *= factors[i], rounded, by the thread that copied the chunk.
template <class acc_t, int kThreads, class TileT, class scalar_t>
__device__ __forceinline__ void scale_own_chunks(const TileT& tile, const Chunk<scalar_t>& factors,
                                                 int thread) {
  for_each_own_chunk<TileT, kThreads>(thread, [&](int row, int chunk) {
    Chunk<scalar_t> values = read_chunk(tile, row, chunk);
#pragma unroll
    for (int i = 0; i < values.kSize; ++i)
      values.elements[i] = convert<scalar_t>(convert<acc_t>(values.elements[i]) *
                                             convert<acc_t>(factors.elements[i]));
    write_chunk(tile, row, chunk, values);
  });
}

namespace detail {

// This thread's chunks of a tile of h whose first column is first_rank times rank_scale.
template <class Product, class TileT>
__device__ __forceinline__ void apply_rank_scale(
    const TileT& tile, const MidFactors<typename Product::scalar_t>& factors, int first_rank,
    int thread) {
  if (!factors.rank_scale) return;
  constexpr int kThreads = Product::kThreads;
  scale_own_chunks<typename Product::Sum::acc_t, kThreads>(
      tile, load_factors(factors.rank_scale, first_rank + own_col<TileT, kThreads>(thread)),
      thread);
}

template <class Product>
__device__ __forceinline__ void copy_mid_tile(const typename Product::Result& tile,
                                              const Matrix<const typename Product::scalar_t>& h,
                                              const MidFactors<typename Product::scalar_t>& factors,
                                              int64_t first_row, int first_rank, int thread) {
  copy_tile_async<Product::kThreads>(tile, h, first_row, first_rank, thread);
  copy_async_commit();
  copy_async_wait<0>();
  apply_rank_scale<Product>(tile, factors, first_rank, thread);
}

// Σ_i (h ⊙ rank_scale)[m, i] core[j, i], i in steps of kDepth.
template <class Product>
__device__ __forceinline__ void multiply_mid_tile(
    const typename Product::Result& tile, unsigned char* scratch,
    const Matrix<const typename Product::scalar_t>& h,
    const MidFactors<typename Product::scalar_t>& factors, int64_t first_row, int first_rank,
    int thread) {
  using scalar_t = typename Product::scalar_t;
  using HTile = typename Product::HTile;
  using CoreTile = typename Product::CoreTile;
  constexpr int kThreads = Product::kThreads, kDepth = Product::kDepth;
  constexpr int kStageBytes = HTile::kBytes + CoreTile::kBytes;
  const auto h_tile = [&](int slot) {
    return HTile{reinterpret_cast<scalar_t*>(scratch + slot * kStageBytes)};
  };
  const auto core_tile = [&](int slot) {
    return CoreTile{reinterpret_cast<scalar_t*>(scratch + slot * kStageBytes + HTile::kBytes)};
  };
  const int num_steps = static_cast<int>((h.num_cols + kDepth - 1) / kDepth);
  const auto load = [&](int step, int slot) {
    copy_tile_async<kThreads>(h_tile(slot), h, first_row, step * kDepth, thread);
    copy_tile_async<kThreads>(core_tile(slot), factors.core, first_rank, step * kDepth, thread);
  };
  const auto prepare = [&](int step, int slot) {
    thread = opaque(thread);  // registers: the addresses of a step are not kept for the next
    apply_rank_scale<Product>(h_tile(slot), factors, step * kDepth, thread);
  };
  typename Product::Sum sum;
  sum.clear();
  run_pipeline<Product::kStages>(num_steps, load, prepare, [&](int, int slot) {
    multiply_add<Contraction::kAlongColumns, Contraction::kAlongColumns, kDepth>(
        sum, h_tile(slot), core_tile(slot), thread);
  });
  sum.for_each_pair(thread, [&](int row, int col, auto& left, auto& right) {
    write_pair(tile, row, col, left, right);
  });
}

}  // namespace detail

// All threads of the block call it. On entry the tile and, with core, Product::kScratchBytes of
// scratch (aligned to 128 bytes) are free; on return the tile is published and scratch is free
// again. All earlier copy_async groups of the thread are finished, too.
template <class Product>
__device__ __forceinline__ void fill_mid_tile(
    const typename Product::Result& tile, unsigned char* scratch,
    const Matrix<const typename Product::scalar_t>& h,  // [M, r]
    const MidFactors<typename Product::scalar_t>& factors, int64_t first_row, int first_rank,
    int thread) {
  if (factors.core) {
    detail::multiply_mid_tile<Product>(tile, scratch, h, factors, first_row, first_rank, thread);
  } else {
    detail::copy_mid_tile<Product>(tile, h, factors, first_row, first_rank, thread);
  }
  __syncthreads();
}

}  // namespace lowrank_ext::cuda
