// Sums over the rows of each group i's segment:
//     dlora_b[i] [N, r] = scaling[i] · Σ dout[m]ᵀ h[m],   dlora_a[i] [r, K] = Σ dh[m]ᵀ drop(x[m]).
// A block owns 64 columns of the large matrix (dout or x) and kRankTile ranks of one group, and
// walks over the segment's rows in their order, kDepth (128 bytes of them) a step: tiles
// [kDepth, 64] and [kDepth, kRankTile], gathered by cp.async, in kStages stages; one barrier a
// step, sums in acc_t, a thread drops the chunks that it copied itself, as in thin_product.cuh. The
// numbers of a step's rows (and slots) pass through shared memory, loaded two steps before they are
// used.
// Nothing is split, so each sum has one order, and the result leaves in the gradient's own type, by
// whole chunks.
//
// A group without rows gets zeros, as do columns of padding ranks, whose operands are not read; one
// whose rank is invalid gets NaN, as its rows do. Shared memory: the stages of thin_product.cuh (40
// KiB at rank tile 16, 64 KiB at 64) and 8 kDepth kStages bytes of row numbers (2 KiB or less).
#pragma once

#include "common/partial_sums.cuh"
#include "lowrank/thin_product.cuh"
#include "segments/segments.cuh"

namespace lowrank_ext::cuda {

template <class Compute>
struct SegmentOuterParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  Segments segments;
  Matrix<const scalar_t> large;  // [rows, C]
  Matrix<const scalar_t> thin;   // [M, r]
  GroupScaling<acc_t> scaling;
  Stack<scalar_t> narrow;  // [n, C, r] or, transposed, [n, r, C]; one of the two
  Stack<acc_t> wide;
  bool transposed;
  acc_t scale;
  Dropout dropout;  // of large
  int64_t num_col_tiles;
  int num_rank_tiles;

  template <class F>
  void each_tensor(F&& f) const {
    segments.each_tensor(f);
    f("source", large);
    f("left", thin);
    scaling.each_tensor(f);
    f("out", narrow.span());
    f("out", wide.span());
    f("seed", Matrix<const int64_t>{dropout.seed, 1, 1, 1});
  }
};

template <class Compute, int kRankTile>
struct SegmentOuterTraits : ThinProductTraits<Compute, OuterSumOp, 64, kRankTile> {
  using Base = ThinProductTraits<Compute, OuterSumOp, 64, kRankTile>;
  using Params = SegmentOuterParams<Compute>;
  static constexpr int kRowsBytes = Base::kStages * Base::kDepth * 8;
  static constexpr int kSharedBytes = Base::kSharedBytes + kRowsBytes;
  static_assert(Base::kDepth <= Base::kThreads, "a thread loads one row compute");
  static_assert(kRowsBytes <= 2048 && kSharedBytes <= 99 * 1024);
};

namespace detail {

// Both negative beyond the segment's end.
struct RowAndSlot {
  int row, slot;
};

template <class Traits>
__device__ __forceinline__ void segment_outer_sum(typename Traits::Sum& sum,
                                                  const ThinProductStages<Traits>& stages,
                                                  const typename Traits::Params& params,
                                                  int64_t group, int64_t first, int64_t num_rows,
                                                  int rank, int64_t first_col, int first_rank,
                                                  int thread) {
  constexpr int kStages = Traits::kStages, kThreads = Traits::kThreads, kDepth = Traits::kDepth;
  int* const rows = reinterpret_cast<int*>(stages.bytes + kStages * Traits::kStageBytes);
  int* const slots = rows + kStages * kDepth;
  auto thin = params.thin;
  thin.num_cols = rank;
  const bool drops = params.dropout.threshold != 0;
  const uint64_t seed = drops ? static_cast<uint64_t>(*params.dropout.seed) : 0;
  const int num_steps = static_cast<int>((num_rows + kDepth - 1) / kDepth);
  const auto fetch_row = [&](int step) -> RowAndSlot {
    const int64_t place = int64_t{step} * kDepth + thread;
    if (thread >= kDepth || place >= num_rows) return {-1, -1};
    const int64_t slot = params.segments.slot(first + place);
    return {params.segments.row_of(slot), static_cast<int>(slot)};
  };
  const auto publish_row = [&](int stage, const RowAndSlot& row) {
    if (thread >= kDepth) return;
    rows[stage * kDepth + thread] = row.row;
    slots[stage * kDepth + thread] = row.slot;
  };
  const auto rows_of = [&](int stage) {
    return [=](int tile_row, int) { return rows[stage * kDepth + tile_row]; };
  };
  const auto slots_of = [&](int stage) {
    return [=](int tile_row, int) { return slots[stage * kDepth + tile_row]; };
  };
  const auto load = [&](int, int stage) {
    copy_gathered_tile_async<kThreads>(stages.large(stage), params.large, rows_of(stage), first_col,
                                       thread);
    copy_gathered_tile_async<kThreads>(stages.thin(stage), thin, slots_of(stage), first_rank,
                                       thread);
  };

#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) publish_row(step, fetch_row(step));
  RowAndSlot next_row = fetch_row(kStages - 1);
  __syncthreads();
  const auto prepare = [&](int step, int stage) {
    if (drops)
      drop_gathered_chunks<kThreads>(stages.large(stage), params.dropout, seed, rows_of(stage),
                                     first_col, params.segments.mask_of(group), thread);
    publish_row(slot_before<kStages>(stage), next_row);  // for the load behind the barrier
    next_row = fetch_row(step + kStages);
  };
  run_pipeline<kStages>(num_steps, load, prepare, [&](int, int stage) {
    multiply_add<Contraction::kAlongRows, Contraction::kAlongRows, kDepth>(
        sum, stages.large(stage), stages.thin(stage), thread);
  });
  __syncthreads();  // the stages have been read
}

// f(column of the tile, value) scales, or says what a padding rank has instead.
template <class Traits, class T, class F>
__device__ __forceinline__ void store_outer_sum(typename Traits::Sum& sum, unsigned char* shared,
                                                const Matrix<T>& out, bool transposed,
                                                int64_t first_col, int first_rank, F f,
                                                int thread) {
  if (transposed) {
    store_transposed_sum<Traits>(sum, shared, f, out, first_rank, first_col, thread);
  } else {
    store_sum<Traits>(sum, shared, f, out, first_col, first_rank, thread);
  }
}

}  // namespace detail

// Block x: group x / (num_col_tiles · num_rank_tiles), column tile, rank tile.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    segment_outer_kernel(const typename Traits::Params params) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tile = blockIdx.x / params.num_rank_tiles;
  const int64_t group = tile / params.num_col_tiles;
  const int64_t first_col = tile % params.num_col_tiles * Traits::kBlockOuter;
  const int first_rank = static_cast<int>(blockIdx.x % params.num_rank_tiles) * Traits::kRankTile;
  const int64_t first = *params.segments.offsets.at(0, group);
  const int64_t num_rows = *params.segments.offsets.at(0, group + 1) - first;
  const int rank = num_rows == 0 ? 0 : params.segments.rank(group);

  const detail::ThinProductStages<Traits> stages{dynamic_shared_memory()};
  typename Traits::Sum sum;
  sum.clear();
  if (first_rank < rank)
    detail::segment_outer_sum<Traits>(sum, stages, params, group, first, num_rows, rank, first_col,
                                      first_rank, thread);
  const acc_t scale = rank > 0 ? params.scale * params.scaling.at(group) : acc_t(0);
  const acc_t padding = rank < 0 ? not_a_number<acc_t>() : acc_t(0);
  const auto finished = [&](int col, acc_t value) {
    return first_rank + col < rank ? value * scale : padding;
  };
  if constexpr (!std::is_same_v<scalar_t, acc_t>) {
    if (params.wide.data) {
      detail::store_outer_sum<Traits>(sum, stages.bytes, params.wide.at(group), params.transposed,
                                      first_col, first_rank, finished, thread);
      return;
    }
  }
  detail::store_outer_sum<Traits>(sum, stages.bytes, params.narrow.at(group), params.transposed,
                                  first_col, first_rank, finished, thread);
}

// ---- launch

template <class Compute, int kRankTile>
void launch_segment_outer_as(SegmentOuterParams<Compute> params, Stream stream) {
  using Traits = SegmentOuterTraits<Compute, kRankTile>;
  params.num_col_tiles = (params.large.num_cols + Traits::kBlockOuter - 1) / Traits::kBlockOuter;
  params.num_rank_tiles = (params.segments.max_rank + kRankTile - 1) / kRankTile;
  const int64_t num_blocks =
      params.segments.num_groups * params.num_col_tiles * params.num_rank_tiles;
  launch_kernel("segment_outer", segment_outer_kernel<Traits>,
                {static_cast<unsigned>(num_blocks), 1, 1, Traits::kThreads, Traits::kSharedBytes},
                params, stream);
}

template <class Compute>
void launch_segment_outer(const SegmentOuterParams<Compute>& params, Stream stream) {
  if constexpr (Compute::kTensorCores) {
    if (params.segments.max_rank <= 16) return launch_segment_outer_as<Compute, 16>(params, stream);
    launch_segment_outer_as<Compute, 64>(params, stream);
  } else {
    launch_segment_outer_as<Compute, 32>(params, stream);
  }
}

}  // namespace lowrank_ext::cuda
