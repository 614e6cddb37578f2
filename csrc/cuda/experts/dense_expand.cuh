// dx [M, K] = Σ_g drop'_g(dz_g w_g), over the groups of columns of dropout_groups.h. The router's
// part is added as it is, every other one scaled and through its group's dropout mask, drawn again.
//
// A block owns 128 rows and a line of 128 bytes of columns of dx, a warp 16 of the rows. It walks
// over the units of dz and w: tiles of dz (128 x 16) and of w (16 x the columns) come through four
// stages of cp.async. Two sums lie in registers, in acc_t: the group's and that of all groups
// before it. At a group's end the warp draws the mask of its tile and adds what is kept
// (dropout_sum.cuh). Rows where dz_g is zero, as it is where the expert was not chosen, draw
// nothing; a unit that is zero in all the warp's rows is not multiplied.
//
// Shared memory: four stages of 128 · 16 elements of dz and 2 KiB of w; 24, 40 and 72 KiB for
// elements of 2, 4 and 8 bytes; the result, rounded once, leaves through them. What lies outside is
// zero in shared memory and not stored.
#pragma once

#include "common/launch.h"
#include "experts/dropout_groups.h"
#include "experts/dropout_sum.cuh"

namespace lowrank_ext::cuda {

template <class Compute>
struct DenseExpandParams {
  using scalar_t = typename Compute::scalar_t;

  Matrix<const scalar_t> dz;  // [M, R]
  Matrix<const scalar_t> w;   // [R, K]
  Matrix<scalar_t> dx;        // [M, K]
  DropoutGroups groups;
  typename Compute::acc_t scale;  // of the experts' sums
  Dropout dropout;
  int64_t num_col_tiles;

  template <class F>
  void each_tensor(F&& f) const {
    f("dz", dz);
    f("w", w);
    f("seed", Matrix<const int64_t>{dropout.seed, 1, 1, 1});
    f("dx", dx);
  }
};

template <class Compute_>
struct DenseExpandTraits {
  using Compute = Compute_;
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  using Params = DenseExpandParams<Compute>;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarpSize * kWarps;
  static constexpr int kBlockRows = 16 * kWarps;
  static constexpr int kBlockCols = 128 / sizeof(scalar_t);
  // Two sums, of two registers each with fp64.
  static constexpr int kMinBlocks = sizeof(acc_t) == 8 ? 1 : 2;

  using DzTile = Tile<scalar_t, kBlockRows, kUnitCols>;
  using WTile = Tile<scalar_t, kUnitCols, kBlockCols>;
  using OutTile = Tile<scalar_t, kBlockRows, kBlockCols>;
  using DzStream = TileStream<kThreads, DzTile, const scalar_t, /*kAlongRows=*/false>;
  using WStream = TileStream<kThreads, WTile, const scalar_t, /*kAlongRows=*/true>;
  using Sum = Accumulator<Compute, kBlockRows, kBlockCols, kWarps, 1>;

  static constexpr int kStages = 4;
  static constexpr int kStageBytes = DzTile::kBytes + WTile::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(WTile::kBytes == 2048 && OutTile::kBytes <= kSharedBytes);
};

namespace detail {

// Bit r is 1 where row first_row + r of the tile is not zero, for 16 rows: lanes r and r + 16 read
// half a row each.
template <class TileT>
__device__ __forceinline__ uint32_t nonzero_rows(const TileT& tile, int first_row, int lane) {
  constexpr int kHalf = TileT::kChunksPerRow / 2;
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const auto values = read_chunk(tile, first_row + lane % 16, lane / 16 * kHalf + i);
    uint32_t words[4];
    memcpy(words, values.elements, sizeof(words));
    bits |= words[0] | words[1] | words[2] | words[3];
  }
  const uint32_t lanes = __ballot_sync(0xFFFFFFFFu, bits != 0);
  return (lanes | lanes >> 16) & 0xFFFFu;
}

}  // namespace detail

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    dense_expand_kernel(const typename Traits::Params params) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  using DzTile = typename Traits::DzTile;
  using WTile = typename Traits::WTile;
  using Sum = typename Traits::Sum;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int64_t first_row = int64_t{blockIdx.x} / params.num_col_tiles * Traits::kBlockRows;
  const int64_t first_col = int64_t{blockIdx.x} % params.num_col_tiles * Traits::kBlockCols;
  const int warp_row = Sum::first_row(thread);
  const int num_units = params.groups.num_cols / kUnitCols;
  const uint64_t seed = static_cast<uint64_t>(*params.dropout.seed);
  unsigned char* const stages = dynamic_shared_memory();
  const auto dz_tile = [&](int slot) {
    return DzTile{reinterpret_cast<scalar_t*>(stages + slot * Traits::kStageBytes)};
  };
  const auto w_tile = [&](int slot) {
    return WTile{reinterpret_cast<scalar_t*>(stages + slot * Traits::kStageBytes + DzTile::kBytes)};
  };

  typename Traits::DzStream dz(params.dz, first_row, 0, thread);
  typename Traits::WStream w(params.w, 0, first_col, thread);
  const auto load = [&](int unit, int slot) {
    const int now = opaque(thread);  // registers: addresses are not kept across steps
    dz.copy_async_to(dz_tile(slot), unit, now);
    w.copy_async_to(w_tile(slot), unit, now);
  };
  const auto as_copied = [](int, int) {};

  Sum sum, part;
  sum.clear();
  part.clear();
  uint32_t rows = 0;  // of the warp's, where the group's dz is not zero
  int mask = -1, group_end = params.groups.num_router_cols;
  run_pipeline<Traits::kStages>(num_units, load, as_copied, [&](int unit, int slot) {
    const uint32_t unit_rows = detail::nonzero_rows(dz_tile(slot), warp_row, lane);
    if (unit_rows != 0)
      multiply_add<Contraction::kAlongColumns, Contraction::kAlongRows, kUnitCols>(
          part, dz_tile(slot), w_tile(slot), thread);
    rows |= unit_rows;
    if ((unit + 1) * kUnitCols < group_end) return;

    if (mask < 0) {
      sum = part;
    } else if (rows != 0) {
      const auto row_of = [&](int row) { return first_row + warp_row + row; };
      const uint32_t word = draw_tile<Sum>(params.dropout, seed, row_of, first_col,
                                           static_cast<uint32_t>(mask), rows, lane);
      add_kept(sum, part, params.scale, word, lane);
    }
    part.clear();
    rows = 0;
    ++mask;
    group_end += params.groups.group_cols;
  });
  __syncthreads();  // the stages have been read

  const typename Traits::OutTile out{reinterpret_cast<scalar_t*>(stages)};
  sum.for_each_pair(thread, [&](int row, int col, acc_t& left, acc_t& right) {
    write_pair(out, row, col, left, right);
  });
  __syncthreads();
  for_each_own_chunk<typename Traits::OutTile, Traits::kThreads>(thread, [&](int row, int chunk) {
    store_chunk(params.dx, first_row + row, first_col + chunk * Traits::OutTile::kPerChunk,
                read_chunk(out, row, chunk));
  });
}

template <class Compute>
void launch_dense_expand(DenseExpandParams<Compute> params, Stream stream) {
  using Traits = DenseExpandTraits<Compute>;
  const auto tiles = [](int64_t size, int64_t tile) { return (size + tile - 1) / tile; };
  params.num_col_tiles = tiles(params.dx.num_cols, Traits::kBlockCols);
  const int64_t num_blocks = tiles(params.dx.num_rows, Traits::kBlockRows) * params.num_col_tiles;
  launch_kernel("dense_expand", dense_expand_kernel<Traits>,
                {static_cast<unsigned>(num_blocks), 1, 1, Traits::kThreads, Traits::kSharedBytes},
                params, stream);
}

}  // namespace lowrank_ext::cuda
