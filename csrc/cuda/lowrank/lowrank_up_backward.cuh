// Both contractions of dout [M, N] in one pass over it:
//     G [M, r] = scaling · dout (out_scale ⊙ lora_b),   P [N, r] = scaling · doutᵀ mid(h).
//
// A block owns a region: up to kRowTiles tiles of 64 rows, by a run of column tiles of 128 bytes.
// It walks through the run column tile by column tile, and in each row tile by row tile. The sums
// of G for all its rows stay in registers to the end; those of P, for one column tile, leave after
// its last row tile. So each region writes its rows of G once per column split and its columns of P
// once per row region: partial sums in acc_t, which lowrank_mid_backward (G) and
// lora_b_gradients_kernel (P) add in a fixed order. The plan chooses the shape of regions that
// writes the fewest, or, where they would cost more than dout, two passes of thin_product.cuh.
//
// Shared memory: kStages tiles of dout (8 KiB each, cp.async) and of lora_b (128 · kRankTile bytes,
// with the first row tile of a column tile; its rows are scaled by out_scale in place), and mid(h)
// of the region (at most 32 KiB): 56, 80, 96 KiB for rank tiles 16, 32, 64. One rank tile holds all
// ranks. Tails: what lies outside is zero in shared memory and not stored.
#pragma once

#include "common/partial_sums.cuh"
#include "lowrank/mid.cuh"
#include "lowrank/thin_product.cuh"

namespace lowrank_ext::cuda {

// ---- plan

// The largest region, in row tiles: mid(h) of it takes at most 32 KiB of shared memory, and the
// sums of G at most 64 registers a thread.
constexpr int max_region_row_tiles(int64_t element_bytes, int rank_tile) {
  return static_cast<int>(std::min<int64_t>(8, 32 * 1024 / (64 * element_bytes * rank_tile)));
}

struct UpBackwardPlan {
  bool one_pass;
  int rank_tile, row_tiles_per_region;  // of one pass,
  int64_t num_regions;
  int64_t col_tiles_per_split;
  int num_col_splits;
  ThinProductPlan g, p;  // or of a pass for each
  double cost;           // bytes moved, times how much longer a part of the GPU takes

  int num_g_splits() const { return one_pass ? num_col_splits : g.num_splits; }
  int64_t num_p_parts() const { return one_pass ? num_regions : p.num_splits; }
};

namespace detail {

// Bytes of dout and of partial sums, written and read, over the share of the GPU that is busy.
inline double pass_cost(double dout_bytes, double num_partials, int64_t acc_bytes,
                        int64_t num_blocks, int num_sms) {
  const double busy = std::min(1.0, static_cast<double>(num_blocks) / blocks_to_fill(num_sms));
  return (dout_bytes + 2 * num_partials * acc_bytes) / busy;
}

}  // namespace detail

inline UpBackwardPlan plan_up_backward_two_passes(int64_t num_rows, int64_t out_features,
                                                  int64_t rank, bool need_g, bool need_p,
                                                  const ComputeTraits& compute, int num_sms) {
  UpBackwardPlan plan{};
  const double dout_bytes = static_cast<double>(num_rows * out_features * compute.element_bytes);
  plan.g = plan_thin_product(num_rows, out_features, rank, compute, false, num_sms);
  plan.p = plan_thin_product(out_features, num_rows, rank, compute, false, num_sms);
  const double g_sums = static_cast<double>(plan.g.num_splits * num_rows * rank);
  const double p_sums = static_cast<double>(plan.p.num_splits * out_features * rank);
  if (need_g)
    plan.cost +=
        detail::pass_cost(dout_bytes, g_sums, compute.acc_bytes, plan.g.num_blocks(), num_sms);
  if (need_p)
    plan.cost +=
        detail::pass_cost(dout_bytes, p_sums, compute.acc_bytes, plan.p.num_blocks(), num_sms);
  return plan;
}

// Regions of every height, each with as few column splits as fill the GPU.
inline UpBackwardPlan plan_up_backward_one_pass(int64_t num_rows, int64_t out_features,
                                                int64_t rank, const ComputeTraits& compute,
                                                int num_sms) {
  const auto tiles = [](int64_t size, int64_t tile) { return (size + tile - 1) / tile; };
  const double dout_bytes = static_cast<double>(num_rows * out_features * compute.element_bytes);
  const int64_t num_col_tiles = tiles(out_features, kThinProductStepBytes / compute.element_bytes);
  UpBackwardPlan best{};
  int rank_tile = compute.element_bytes == 2 ? 16 : 32;
  while (rank_tile < rank) rank_tile *= 2;
  const int most = max_region_row_tiles(compute.element_bytes, rank_tile);
  for (int row_tiles = 1; row_tiles <= most; ++row_tiles) {
    UpBackwardPlan plan{};
    plan.one_pass = true;
    plan.rank_tile = rank_tile;
    plan.row_tiles_per_region = row_tiles;
    plan.num_regions = tiles(num_rows, 64 * row_tiles);
    const int64_t splits = std::min(
        num_col_tiles, tiles(blocks_to_fill(num_sms), std::max(int64_t{1}, plan.num_regions)));
    plan.col_tiles_per_split = tiles(num_col_tiles, splits);
    plan.num_col_splits = static_cast<int>(tiles(num_col_tiles, plan.col_tiles_per_split));
    const int64_t sums = (plan.num_col_splits * num_rows + plan.num_regions * out_features) * rank;
    plan.cost = detail::pass_cost(dout_bytes, static_cast<double>(sums), compute.acc_bytes,
                                  plan.num_regions * plan.num_col_splits, num_sms);
    if (row_tiles == 1 || plan.cost < best.cost) best = plan;
  }
  return best;
}

// One pass where both G and P are asked for and cheaper that way. With m rows, n columns and b
// blocks the least that regions write and read is 16 r √(m n b) bytes of partial sums in fp32: at
// m = 8192, n = 4096, b = 100 it passes the bytes of dout (2 m n) at r = 73. So larger ranks than
// 64 are not compiled; nor is fp64, which is there for gradcheck.
inline UpBackwardPlan plan_up_backward(int64_t num_rows, int64_t out_features, int64_t rank,
                                       bool need_g, bool need_p, const ComputeTraits& compute,
                                       int num_sms) {
  const auto two =
      plan_up_backward_two_passes(num_rows, out_features, rank, need_g, need_p, compute, num_sms);
  const bool can = need_g && need_p && rank <= 64 && compute.element_bytes <= 4;
  if (!can || num_rows == 0 || out_features == 0) return two;
  const auto one = plan_up_backward_one_pass(num_rows, out_features, rank, compute, num_sms);
  return one.cost < two.cost ? one : two;
}

// ---- kernel

template <class Compute>
struct UpBackwardParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  Matrix<const scalar_t> dout;       // [M, N]
  Matrix<const scalar_t> h;          // [M, r]
  MidFactors<scalar_t> mid;          // of h
  Matrix<const scalar_t> lora_b;     // [N, r]
  Matrix<const scalar_t> out_scale;  // [1, N] or absent
  Matrix<acc_t> g;                   // [num_col_splits · M, r]
  Matrix<acc_t> p;                   // [num_regions · N, r], columns padded
  acc_t scaling;
  int row_tiles_per_region, col_tiles_per_split;

  template <class F>
  void each_tensor(F&& f) const {
    f("dout", dout);
    f("h", h);
    mid.each_tensor(f);
    f("lora_b", lora_b);
    f("out_scale", out_scale);
    f("g", g);
    f("p", p);
  }
};

template <class Compute_, int kRankTile_>
struct UpBackwardTraits {
  using Compute = Compute_;
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  static constexpr int kRankTile = kRankTile_;
  static constexpr int kRows = 64;                      // of a row tile
  static constexpr int kCols = 128 / sizeof(scalar_t);  // of a column tile
  static constexpr int kRowTiles = max_region_row_tiles(sizeof(scalar_t), kRankTile);
  static constexpr int kStages = 4;

  using DoutTile = Tile<scalar_t, kRows, kCols>;
  using LoraBTile = Tile<scalar_t, kCols, kRankTile>;
  using GSum = Accumulator<Compute, kRows, kRankTile, 4, 2>;
  using PSum = Accumulator<Compute, kCols, kRankTile, kCols / 16, 8 * 16 / kCols>;
  using Mid = MidProduct<Compute, kRows, kRankTile, 4, 2>;
  using MidTile = typename Mid::Result;
  using OutScale = RowScale<Compute, LoraBTile, GSum::kThreads>;

  static constexpr int kThreads = GSum::kThreads;
  static constexpr int kSharedBytes =
      kStages * (DoutTile::kBytes + LoraBTile::kBytes) + kRowTiles * MidTile::kBytes;
  static_assert(kThreads == 256 && PSum::kThreads == kThreads);
  static_assert(kRowTiles >= 1 && kRowTiles * MidTile::kBytes <= 32 * 1024);
  static_assert(kRowTiles * sizeof(typename GSum::acc_t) * kRows * kRankTile <= 64 * 4 * kThreads);
  static_assert(kSharedBytes <= 99 * 1024, "every GPU since sm_80 gives a block this much");
  // While the pipeline starts, its last slots are free for mid's prologue: they lie side by side.
  static_assert(Mid::kScratchBytes == DoutTile::kBytes + LoraBTile::kBytes);
};

namespace detail {

// Shared memory: dout's slots 0 to kStages - 1, lora_b's last slot and then its others, mid(h).
template <class Traits>
struct UpBackwardShared {
  using scalar_t = typename Traits::scalar_t;
  using DoutTile = typename Traits::DoutTile;
  using LoraBTile = typename Traits::LoraBTile;
  using MidTile = typename Traits::MidTile;
  static constexpr int kStages = Traits::kStages;

  unsigned char* bytes;

  __device__ __forceinline__ DoutTile dout(int slot) const {
    return {reinterpret_cast<scalar_t*>(bytes + slot * DoutTile::kBytes)};
  }
  __device__ __forceinline__ LoraBTile lora_b(int slot) const {
    const int place = (slot + 1) % kStages;
    return {reinterpret_cast<scalar_t*>(bytes + kStages * DoutTile::kBytes +
                                        place * LoraBTile::kBytes)};
  }
  __device__ __forceinline__ MidTile mid(int row_tile) const {
    return {reinterpret_cast<scalar_t*>(bytes + kStages * (DoutTile::kBytes + LoraBTile::kBytes) +
                                        row_tile * MidTile::kBytes)};
  }
  __device__ __forceinline__ unsigned char* mid_scratch() const {
    return bytes + (kStages - 1) * DoutTile::kBytes;
  }
};

// The stream of tiles: all row tiles of a column tile, then the next column tile. lora_b's slots
// turn with the column tiles: there are as many as stages, so the slot that is filled was read
// before the last barrier even where every column tile has one row tile.
template <class Traits>
struct UpBackwardStream {
  using Params = UpBackwardParams<typename Traits::Compute>;
  static constexpr int kStages = Traits::kStages;

  UpBackwardShared<Traits> shared;
  int64_t first_row, first_col;  // of the region
  int num_row_tiles, num_col_tiles;
  int row_tile = 0, col_tile = 0;  // next to issue
  int slot = 0;                    // of dout, to fill

  // Closes a group even when nothing is left: the waits count groups.
  __device__ __forceinline__ void issue(const Params& params, int thread) {
    if (col_tile < num_col_tiles) {
      const int64_t col = first_col + int64_t{col_tile} * Traits::kCols;
      if (row_tile == 0)
        copy_tile_async<Traits::kThreads>(shared.lora_b(col_tile % kStages), params.lora_b, col, 0,
                                          thread);
      copy_tile_async<Traits::kThreads>(shared.dout(slot), params.dout,
                                        first_row + row_tile * Traits::kRows, col, thread);
      slot = (slot + 1) % kStages;
      if (++row_tile == num_row_tiles) {
        row_tile = 0;
        ++col_tile;
      }
    }
    copy_async_commit();
  }
};

template <class Sum, class acc_t>
__device__ __forceinline__ void store_pairs(Sum& sum, acc_t scale, const Matrix<acc_t>& out,
                                            int64_t first_row, int thread) {
  sum.for_each_pair(thread, [&](int row, int col, auto& left, auto& right) {
    store_pair(out, first_row + row, col, left * scale, right * scale);
  });
}

// Part `index` of a stack of matrices with num_rows rows each.
template <class T>
__device__ __forceinline__ Matrix<T> part_of(Matrix<T> stack, int64_t index, int64_t num_rows) {
  stack.data = stack.at(index * num_rows, 0);
  stack.num_rows = num_rows;
  return stack;
}

}  // namespace detail

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    lowrank_up_backward_kernel(UpBackwardParams<typename Traits::Compute> params) {
  constexpr int kStages = Traits::kStages, kRows = Traits::kRows, kCols = Traits::kCols;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t num_rows = params.dout.num_rows, num_cols = params.dout.num_cols;
  const int64_t first_row = int64_t{blockIdx.x} * params.row_tiles_per_region * kRows;
  const int64_t first_col = int64_t{blockIdx.y} * params.col_tiles_per_split * kCols;
  const auto tiles_of = [](int64_t rest, int tile, int most) {
    const int64_t tiles = (rest + tile - 1) / tile;
    return static_cast<int>(tiles < most ? tiles : most);
  };
  const int num_row_tiles = tiles_of(num_rows - first_row, kRows, params.row_tiles_per_region);
  const int num_col_tiles = tiles_of(num_cols - first_col, kCols, params.col_tiles_per_split);

  const detail::UpBackwardShared<Traits> shared{dynamic_shared_memory()};
  typename Traits::OutScale out_scale;
  if (params.out_scale) out_scale.fetch(params.out_scale, first_col, thread);
  detail::UpBackwardStream<Traits> stream{shared, first_row, first_col, num_row_tiles,
                                          num_col_tiles};
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) stream.issue(params, thread);
#pragma unroll 1
  for (int row_tile = 0; row_tile < num_row_tiles; ++row_tile)
    fill_mid_tile<typename Traits::Mid>(shared.mid(row_tile), shared.mid_scratch(), params.h,
                                        params.mid, first_row + row_tile * kRows, 0, thread);

  typename Traits::GSum g[Traits::kRowTiles];
#pragma unroll
  for (int row_tile = 0; row_tile < Traits::kRowTiles; ++row_tile) g[row_tile].clear();
  const auto p_out = detail::part_of(params.p, blockIdx.x, num_cols);
  int slot = 0;
#pragma unroll 1  // the row tiles inside are unrolled
  for (int col_tile = 0; col_tile < num_col_tiles; ++col_tile) {
    const int64_t col = first_col + int64_t{col_tile} * kCols;
    const auto lora_b = shared.lora_b(col_tile % kStages);
    typename Traits::PSum p;
    p.clear();
#pragma unroll  // so that the sums of G are registers
    for (int row_tile = 0; row_tile < Traits::kRowTiles; ++row_tile) {
      if (row_tile >= num_row_tiles) continue;
      copy_async_wait<kStages - 2>();
      if (row_tile == 0 && params.out_scale) {
        out_scale.apply(lora_b, thread);
        out_scale.fetch(params.out_scale, col + kCols, thread);
      }
      __syncthreads();  // this step's tiles are complete, and the ones before have been read
      stream.issue(params, thread);
      const auto dout = shared.dout(slot);
      multiply_add<Contraction::kAlongColumns, Contraction::kAlongRows, kCols>(g[row_tile], dout,
                                                                               lora_b, thread);
      multiply_add<Contraction::kAlongRows, Contraction::kAlongRows, kRows>(
          p, dout, shared.mid(row_tile), thread);
      slot = (slot + 1) % kStages;
    }
    detail::store_pairs(p, params.scaling, p_out, col, thread);
  }

  const auto g_out = detail::part_of(params.g, blockIdx.y, num_rows);
#pragma unroll
  for (int row_tile = 0; row_tile < Traits::kRowTiles; ++row_tile)
    if (row_tile < num_row_tiles)
      detail::store_pairs(g[row_tile], params.scaling, g_out, first_row + row_tile * kRows, thread);
}

template <class Compute>
void launch_lowrank_up_backward(const UpBackwardPlan& plan, UpBackwardParams<Compute> params,
                                Stream stream) {
  params.row_tiles_per_region = plan.row_tiles_per_region;
  params.col_tiles_per_split = static_cast<int>(plan.col_tiles_per_split);
  const auto launch = [&]<int kRankTile>(std::integral_constant<int, kRankTile>) {
    using Traits = UpBackwardTraits<Compute, kRankTile>;
    launch_kernel(
        "lowrank_up_backward", lowrank_up_backward_kernel<Traits>,
        {static_cast<unsigned>(plan.num_regions), static_cast<unsigned>(plan.num_col_splits), 1,
         Traits::kThreads, Traits::kSharedBytes},
        params, stream);
  };
  if constexpr (sizeof(typename Compute::scalar_t) == 2) {
    if (plan.rank_tile == 16) return launch(std::integral_constant<int, 16>{});
  }
  if (plan.rank_tile == 32) return launch(std::integral_constant<int, 32>{});
  launch(std::integral_constant<int, 64>{});
}

// ---- what is left to do with P

// From partial sums of P [N, r]: dlora_b = out_scale ⊙ P and dout_scale = rowsum(lora_b ⊙ P). Half
// a warp owns a row n: its lanes own neighboring ranks, in turns of 16; no shared memory.
template <class Compute>
struct LoraBGradientsParams {
  using scalar_t = typename Compute::scalar_t;

  Matrix<const typename Compute::acc_t> p;  // [num_partials · N, r]
  int num_partials;
  Matrix<const scalar_t> lora_b;     // [N, r]
  Matrix<const scalar_t> out_scale;  // [1, N] or absent
  Output<Compute> dlora_b;           // [N, r] or absent
  Output<Compute> dout_scale;        // [1, N] or absent

  template <class F>
  void each_tensor(F&& f) const {
    f("p", p);
    f("lora_b", lora_b);
    f("out_scale", out_scale);
    dlora_b.each_tensor("dlora_b", f);
    dout_scale.each_tensor("dout_scale", f);
  }
};

constexpr int kLoraBGradientsThreads = 256;
constexpr int kLanesPerRow = 16;

template <class Compute>
__global__ void __launch_bounds__(kLoraBGradientsThreads)
    lora_b_gradients_kernel(LoraBGradientsParams<Compute> params) {
  using acc_t = typename Compute::acc_t;
  constexpr int kRowsPerBlock = kLoraBGradientsThreads / kLanesPerRow;
  const int64_t num_rows = params.lora_b.num_rows, rank = params.lora_b.num_cols;
  const int lane = static_cast<int>(threadIdx.x) % kLanesPerRow;
  const int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kLanesPerRow;
  const bool inside = row < num_rows;  // the others stay for the shuffles
  const acc_t scale =
      inside && params.out_scale ? convert<acc_t>(*params.out_scale.at(0, row)) : acc_t(1);
  acc_t row_sum = 0;
  for (int64_t j = lane; inside && j < rank; j += kLanesPerRow) {
    const acc_t p = sum_partials(params.p, params.num_partials, num_rows, row, j);
    params.dlora_b.store(row, j, p * scale);
    if (params.dout_scale) row_sum += p * convert<acc_t>(*params.lora_b.at(row, j));
  }
  if (!params.dout_scale) return;
#pragma unroll
  for (int distance = kLanesPerRow / 2; distance > 0; distance /= 2)
    row_sum += __shfl_xor_sync(0xffffffffu, row_sum, distance);
  if (inside && lane == 0) params.dout_scale.store(0, row, row_sum);
}

template <class Compute>
void launch_lora_b_gradients(const LoraBGradientsParams<Compute>& params, Stream stream) {
  constexpr int kRowsPerBlock = kLoraBGradientsThreads / kLanesPerRow;
  const int64_t num_blocks = (params.lora_b.num_rows + kRowsPerBlock - 1) / kRowsPerBlock;
  launch_kernel("lora_b_gradients", lora_b_gradients_kernel<Compute>,
                {static_cast<unsigned>(num_blocks), 1, 1, kLoraBGradientsThreads, 0}, params,
                stream);
}

// ---- mid(h) by itself, for the second of two passes

template <class Compute>
struct MidRowsParams {
  using scalar_t = typename Compute::scalar_t;

  Matrix<const scalar_t> h;  // [M, r]
  MidFactors<scalar_t> mid;
  Matrix<scalar_t> out;  // [M, r], columns padded

  template <class F>
  void each_tensor(F&& f) const {
    f("h", h);
    mid.each_tensor(f);
    f("out", out);
  }
};

// A block owns 64 x 64 elements of out. Shared memory: the tile (8 to 32 KiB) and 16 KiB of mid's
// scratch.
template <class Compute>
struct MidRowsTraits {
  using Mid = MidProduct<Compute, 64, 64, 4, 2>;
  using MidTile = typename Mid::Result;
  static constexpr int kSharedBytes = MidTile::kBytes + Mid::kScratchBytes;
};

template <class Compute>
__global__ void __launch_bounds__(MidRowsTraits<Compute>::Mid::kThreads)
    mid_rows_kernel(MidRowsParams<Compute> params) {
  using Mid = typename MidRowsTraits<Compute>::Mid;
  using MidTile = typename Mid::Result;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first_row = int64_t{blockIdx.x} * MidTile::kRows;
  const int first_rank = static_cast<int>(blockIdx.y) * MidTile::kCols;
  unsigned char* next = dynamic_shared_memory();
  const MidTile tile = take_tile<MidTile>(next);
  fill_mid_tile<Mid>(tile, next, params.h, params.mid, first_row, first_rank, thread);
  for_each_own_chunk<MidTile, Mid::kThreads>(thread, [&](int row, int chunk) {
    store_chunk(params.out, first_row + row, first_rank + chunk * MidTile::kPerChunk,
                read_chunk(tile, row, chunk));
  });
}

template <class Compute>
void launch_mid_rows(const MidRowsParams<Compute>& params, Stream stream) {
  using Traits = MidRowsTraits<Compute>;
  const auto tiles = [](int64_t size) { return static_cast<unsigned>((size + 63) / 64); };
  launch_kernel("mid_rows", mid_rows_kernel<Compute>,
                {tiles(params.h.num_rows), tiles(params.h.num_cols), 1, Traits::Mid::kThreads,
                 Traits::kSharedBytes},
                params, stream);
}

// ---- G in a pass of its own: the product of thin_product.cuh with L = dout

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    lowrank_up_backward_g_kernel(const typename Traits::Params params) {
  thin_product<Traits>(params);
}

template <class Compute>
void launch_lowrank_up_backward_g(const ThinProductPlan& plan,
                                  const ThinProductParams<Compute, UpBackwardOp>& params,
                                  Stream stream) {
  launch_thin_product(
      plan, params, [&](auto traits, const LaunchShape& shape, const auto& planned) {
        launch_kernel("lowrank_up_backward_g", &lowrank_up_backward_g_kernel<decltype(traits)>,
                      shape, planned, stream);
      });
}

}  // namespace lowrank_ext::cuda
