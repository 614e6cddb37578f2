// From ranks to features in the grouped form, summed over the experts e_j that each token chose:
//     y [M, N]  = base + scaling Σ_j gated[m k + j] lora_b[e_j]ᵀ
//     dx [M, K] = dlogits router_weight + scale Σ_j drop'_{e_j}(dh[m k + j] lora_a[e_j])
//
// A block owns a tile of tokens in the order of order_tokens, a warp 16 of them, and a share of the
// columns. It lists the experts that its tokens chose (the router first). For each line of 128
// bytes of columns and each expert of the list, tiles of left [tokens, 16] and of right [16,
// columns] come through four stages of cp.async. A token that did not choose the expert has zeros
// in left. Two sums lie in registers, in acc_t: the expert's, and that of all before it, to which
// only the tokens that chose the expert add it, through their mask (dropout_sum.cuh). The epilogue
// is segment_up.cuh's.
//
// Shared memory: four stages of 16 elements for each token and 2 KiB of right for each 128 bytes of
// columns, 2 KiB for each warp, and 4 bytes for each token, choice, word of 32 experts and place of
// the list: 42, 58 and 90 KiB for elements of 2, 4, 8 bytes with 128 tokens, k = 2 and 8 experts.
#pragma once

#include "experts/dropout_sum.cuh"
#include "lowrank/expand.cuh"
#include "segments/segment_up.cuh"

namespace lowrank_ext::cuda {

struct GroupedUpOp {  // right is lora_b [E, N, r]
  static constexpr Contraction kRightContraction = Contraction::kAlongColumns;
  static constexpr bool kIsBackward = false;
};
struct GroupedDownBackwardXOp {  // right is lora_a [E, r, K], and the router's [E, K]
  static constexpr Contraction kRightContraction = Contraction::kAlongRows;
  static constexpr bool kIsBackward = true;  // masks and a router, no base
};

template <class Compute>
struct GroupedExpandParams {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  Matrix<const int64_t> tokens;          // [1, M]
  Matrix<const int64_t> ids;             // [M, k]
  Matrix<const scalar_t> base;           // [M, C] or absent
  Matrix<const scalar_t> dlogits;        // [M, E] or absent
  Matrix<const scalar_t> router_weight;  // [E, C] or absent
  Matrix<const scalar_t> left;           // [M k, r]
  Stack<const scalar_t> right;           // [E, C, r] or, along rows, [E, r, C]
  Matrix<scalar_t> out;                  // [M, C]
  acc_t part_scale;                      // of an expert's part
  acc_t scale;                           // of the sum
  Dropout dropout;
  bool shared_dropout;
  int col_tiles_per_block;

  __host__ __device__ __forceinline__ int top_k() const { return static_cast<int>(ids.num_cols); }
  __host__ __device__ __forceinline__ int num_experts() const {
    return static_cast<int>(right.num_groups);
  }

  template <class F>
  void each_tensor(F&& f) const {
    f("tokens", tokens);
    f("topk_ids", ids);
    f("base", base);
    f("dlogits", dlogits);
    f("router_weight", router_weight);
    f("left", left);
    f("right", right.span());
    f("seed", Matrix<const int64_t>{dropout.seed, 1, 1, 1});
    f("out", out);
  }
};

template <class Compute, class Shape, class Op>
struct GroupedExpandTraits : ExpandTraits<Compute, Shape, Op> {
  using Base = ExpandTraits<Compute, Shape, Op>;
  using Params = GroupedExpandParams<Compute>;
  using scalar_t = typename Compute::scalar_t;
  using RightTile = typename Base::RightTile;
  using Base::kBlockRows, Base::kRankTile, Base::kStagingBytes, Base::kThreads;
  static_assert(kRankTile == 16);
  static constexpr bool kLanesAddBase = !Op::kIsBackward;
  static constexpr bool kLanesDrop = false;  // masks are the experts'

  // Two sums: 128 registers a thread; more where tokens are few, which do not fill the SMs.
  static constexpr int kMinBlocks = kBlockRows == 128 ? 2 : 4;
  using LeftTile = Tile<scalar_t, kBlockRows, kRankTile>;
  static constexpr int kStages = 4;
  static constexpr int kStepBytes = LeftTile::kBytes + RightTile::kBytes;
  static constexpr int kTilesBytes = kStages * kStepBytes + kStagingBytes;

  // Words of each expert's bit, and places of the list.
  static __host__ __device__ __forceinline__ int num_words(int num_experts) {
    return (num_experts + 31) / 32;
  }
  static __host__ __device__ __forceinline__ int list_size(int num_experts, int top_k) {
    return num_experts < kBlockRows * top_k ? num_experts : kBlockRows * top_k;
  }
  static constexpr int64_t shared_bytes(int num_experts, int top_k) {
    const int64_t num_ints =
        kBlockRows + kBlockRows * top_k + num_words(num_experts) + list_size(num_experts, top_k);
    return kTilesBytes + 4 * num_ints;
  }
};

namespace detail {

// A block's tokens, their choices, and the experts among these in ascending order.
template <class Traits>
struct ChosenExperts {
  static constexpr int kRows = Traits::kBlockRows, kThreads = Traits::kThreads;

  int* tokens;          // [kRows]: negative beyond the end
  int* ids;             // [kRows, k]: negative beyond the end, and where no expert is meant
  unsigned* is_chosen;  // a bit for each expert
  int* list;
  int top_k, size;

  // All threads; ends with a barrier.
  __device__ __forceinline__ ChosenExperts(const typename Traits::Params& params,
                                           unsigned char* shared, int64_t first, int thread)
      : top_k(params.top_k()) {
    const int num_experts = params.num_experts(), num_words = Traits::num_words(num_experts);
    tokens = reinterpret_cast<int*>(shared);
    ids = tokens + kRows;
    is_chosen = reinterpret_cast<unsigned*>(ids + kRows * top_k);
    list = ids + kRows * top_k + num_words;
    for (int row = thread; row < kRows; row += kThreads)
      tokens[row] = first + row < params.tokens.num_cols
                        ? static_cast<int>(*params.tokens.at(0, first + row))
                        : -1;
    for (int word = thread; word < num_words; word += kThreads) is_chosen[word] = 0;
    __syncthreads();
    for (int i = thread; i < kRows * top_k; i += kThreads) {
      const int token = tokens[i / top_k];
      const int64_t id = token < 0 ? -1 : *params.ids.at(token, i % top_k);
      const bool valid = id >= 0 && id < num_experts;
      ids[i] = valid ? static_cast<int>(id) : -1;
      if (valid) atomicOr(&is_chosen[id / 32], 1u << id % 32);
    }
    __syncthreads();
    size = 0;
    const int lane = thread % kWarpSize;
    for (int word = 0; word < num_words; ++word) {  // every warp counts, the first one writes
      const unsigned bits = is_chosen[word];
      if (thread < kWarpSize && (bits >> lane & 1))
        list[size + __popc(bits & ((1u << lane) - 1))] = 32 * word + lane;
      size += __popc(bits);
    }
    if (size == 0) {  // only ids outside [0, E): the walk needs a place, which adds nothing
      if (thread == 0) list[0] = 0;
      size = 1;
    }
    __syncthreads();
  }

  // Which of a token's choices an expert is, -1 where it is none.
  __device__ __forceinline__ int find(int row, int expert) const {
    for (int j = 0; j < top_k; ++j)
      if (ids[row * top_k + j] == expert) return j;
    return -1;
  }
};

// Where a block is in its walk: column tile by column tile, expert by expert (the router is -1),
// 16 ranks at a time.
struct ExpertStep {
  int col_tile, place;  // of the list; -1: the router
  int unit = 0;

  __device__ __forceinline__ bool last_unit(int num_units) const { return unit + 1 == num_units; }
  __device__ __forceinline__ void advance(int num_units, int first_place, int size) {
    if (++unit < num_units) return;
    unit = 0;
    if (++place < size) return;
    place = first_place;
    ++col_tile;
  }
};

template <class Traits>
struct ExpertWalk {
  using Params = typename Traits::Params;
  using scalar_t = typename Traits::scalar_t;
  using LeftTile = typename Traits::LeftTile;
  using RightTile = typename Traits::RightTile;
  using Op = typename Traits::Op;

  const Params& params;
  const ChosenExperts<Traits>& chosen;
  unsigned char* stages;
  int64_t first_col;  // of the block
  int num_col_tiles;
  int first_place;  // -1 with a router

  __device__ __forceinline__ int num_units(int place) const {
    const int64_t depth = place < 0 ? params.dlogits.num_cols : params.left.num_cols;
    return static_cast<int>((depth + Traits::kRankTile - 1) / Traits::kRankTile);
  }
  __device__ __forceinline__ LeftTile left(int slot) const {
    return {reinterpret_cast<scalar_t*>(stages + slot * Traits::kStepBytes)};
  }
  __device__ __forceinline__ RightTile right(int slot) const {
    return {reinterpret_cast<scalar_t*>(stages + slot * Traits::kStepBytes + LeftTile::kBytes)};
  }

  // Starts a step's copies, if there is one, and closes their group in any case: the waits count
  // groups.
  __device__ __forceinline__ void issue(ExpertStep& step, int slot, int thread) const {
    if (step.col_tile < num_col_tiles) {
      const int rank = step.unit * Traits::kRankTile;
      const int64_t col = first_col + int64_t{step.col_tile} * Traits::kBlockCols;
      if (step.place < 0) {
        copy_gathered_tile_async<Traits::kThreads>(
            left(slot), params.dlogits, [&](int row, int) { return chosen.tokens[row]; }, rank,
            thread);
        copy_right(slot, params.router_weight, rank, col, thread);
      } else {
        const int expert = chosen.list[step.place];
        const auto slot_of = [&](int row, int) {
          const int j = chosen.find(row, expert);
          return j < 0 ? int64_t{-1} : int64_t{chosen.tokens[row]} * chosen.top_k + j;
        };
        copy_gathered_tile_async<Traits::kThreads>(left(slot), params.left, slot_of, rank, thread);
        copy_right(slot, params.right.at(expert), rank, col, thread);
      }
      step.advance(num_units(step.place), first_place, chosen.size);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void copy_right(int slot, const Matrix<const scalar_t>& matrix,
                                             int rank, int64_t col, int thread) const {
    copy_tile_async<Traits::kThreads>(right(slot), matrix, Traits::kAlongRows ? rank : col,
                                      Traits::kAlongRows ? col : rank, thread);
  }

  // Bits of the warp's 16 rows that a place of the list concerns.
  __device__ __forceinline__ uint32_t rows_of(int place, int warp_row, int lane) const {
    if (place < 0) return 0xFFFFu;
    const int expert = chosen.list[place];
    const bool has = lane < 16 && chosen.find(warp_row + lane, expert) >= 0;
    return __ballot_sync(0xFFFFFFFFu, has);
  }

  // Adds the part of one place of the list to the sum of all.
  __device__ __forceinline__ void add_part(typename Traits::Sum& sum,
                                           const typename Traits::Sum& part, int place,
                                           uint32_t rows, int warp_row, int64_t warp_col,
                                           uint64_t seed, int lane) const {
    using Sum = typename Traits::Sum;
    using acc_t = typename Traits::acc_t;
    if constexpr (Op::kIsBackward) {
      if (place >= 0 && params.dropout.threshold != 0) {
        const auto row_of = [&](int row) { return chosen.tokens[warp_row + row]; };
        const uint32_t mask = params.shared_dropout ? 0 : static_cast<uint32_t>(chosen.list[place]);
        const uint32_t word =
            draw_tile<Sum>(params.dropout, seed, row_of, warp_col, mask, rows, lane);
        return add_kept(sum, part, params.part_scale, word, lane);
      }
    }
    add_rows(sum, part, acc_t(1), rows, lane);
  }
};

}  // namespace detail

// Block (x, y): tokens x · kBlockRows … of the order, column tiles y · col_tiles_per_block ….
template <class Traits>
__device__ __forceinline__ void grouped_expand(const typename Traits::Params& params) {
  using Sum = typename Traits::Sum;
  using Staging = typename Traits::Staging;
  using Op = typename Traits::Op;
  constexpr int kStages = Traits::kStages;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int64_t block_cols = int64_t{params.col_tiles_per_block} * Traits::kBlockCols;
  const int64_t first_col = blockIdx.y * block_cols, cols_left = params.out.num_cols - first_col;
  const int64_t num_cols = cols_left < block_cols ? cols_left : block_cols;
  unsigned char* const shared = dynamic_shared_memory();
  const detail::ChosenExperts<Traits> chosen(params, shared + Traits::kTilesBytes,
                                             int64_t{blockIdx.x} * Traits::kBlockRows, thread);
  const detail::ExpertWalk<Traits> walk{
      params,
      chosen,
      shared,
      first_col,
      static_cast<int>((num_cols + Traits::kBlockCols - 1) / Traits::kBlockCols),
      Op::kIsBackward && params.dlogits ? -1 : 0};
  const Staging staging{reinterpret_cast<typename Traits::acc_t*>(
      shared + kStages * Traits::kStepBytes + thread / kWarpSize * Staging::kBytes)};

  detail::ExpertStep next{0, walk.first_place};  // to issue
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) walk.issue(next, stage, thread);

  const int warp_row = Sum::first_row(thread);
  detail::SegmentOutputLane<Traits> output;
  output.lane = lane;
  output.scale = params.scale;
#pragma unroll
  for (int i = 0; i < Traits::kChunksPerLane; ++i)
    output.rows[i] = chosen.tokens[warp_row + output.row(i)];
  output.load(params, first_col + Sum::first_col(thread));
  uint64_t seed = 0;
  if constexpr (Op::kIsBackward) {
    if (params.dropout.threshold != 0) seed = static_cast<uint64_t>(*params.dropout.seed);
  }

  Sum sum, part;
  sum.clear();
  part.clear();
  int slot = 0;
  uint32_t rows = 0;
  detail::ExpertStep step{0, walk.first_place};
#pragma unroll 1
  while (step.col_tile < walk.num_col_tiles) {
    const int now = opaque(thread);  // registers: addresses are not kept across steps
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this step's stage is complete, and the one before it has been read
    walk.issue(next, slot == 0 ? kStages - 1 : slot - 1, now);
    if (step.unit == 0) rows = walk.rows_of(step.place, Sum::first_row(now), now % kWarpSize);
    if (rows != 0)
      multiply_add<Contraction::kAlongColumns, Op::kRightContraction, Traits::kRankTile>(
          part, walk.left(slot), walk.right(slot), now);
    slot = slot == kStages - 1 ? 0 : slot + 1;
    const int num_units = walk.num_units(step.place), col_tile = step.col_tile;
    const int64_t tile_col =
        first_col + Sum::first_col(now) + int64_t{col_tile} * Traits::kBlockCols;
    if (step.last_unit(num_units) && rows != 0) {
      walk.add_part(sum, part, step.place, rows, Sum::first_row(now), tile_col, seed,
                    now % kWarpSize);
      part.clear();
    }
    step.advance(num_units, walk.first_place, chosen.size);
    if (step.col_tile == col_tile) continue;
    output.lane = now % kWarpSize;
    output.finish(params, sum, staging, tile_col,
                  step.col_tile < walk.num_col_tiles ? tile_col + Traits::kBlockCols : -1);
    sum.clear();
  }
}

// y in the forward.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    grouped_up_kernel(const typename Traits::Params params) {
  grouped_expand<Traits>(params);
}

// dx in the backward.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    grouped_down_backward_x_kernel(const typename Traits::Params params) {
  grouped_expand<Traits>(params);
}

// ---- plan

struct GroupedExpandPlan {
  int block_rows;  // 128 or 16
  int col_tiles_per_block;
  int64_t num_row_blocks, num_col_blocks;
  int64_t shared_bytes;
};

namespace detail {

template <class F>
void with_grouped_expand_shape(int block_rows, F f) {
  if (block_rows == 16) return f(ExpandShape<1, 2, 16>{});
  return f(ExpandShape<8, 1, 16>{});
}

}  // namespace detail

// As plan_expand: few tokens (decoding), and so many choices that those of 128 tokens have no room,
// take blocks of 16.
template <class Compute, class Op>
GroupedExpandPlan plan_grouped_expand(int64_t num_tokens, int64_t num_cols, int num_experts,
                                      int top_k, int num_sms) {
  constexpr int64_t kFewTokens = 64;
  GroupedExpandPlan plan{};
  plan.block_rows = num_tokens <= kFewTokens ? 16 : 128;
  detail::with_grouped_expand_shape(128, [&](auto shape) {
    using Traits = GroupedExpandTraits<Compute, decltype(shape), Op>;
    if (Traits::shared_bytes(num_experts, top_k) > detail::kMaxBlockSharedBytes)
      plan.block_rows = 16;
  });
  plan.num_row_blocks = (num_tokens + plan.block_rows - 1) / plan.block_rows;
  detail::with_grouped_expand_shape(plan.block_rows, [&](auto shape) {
    using Traits = GroupedExpandTraits<Compute, decltype(shape), Op>;
    const int64_t num_col_tiles = (num_cols + Traits::kBlockCols - 1) / Traits::kBlockCols;
    plan.shared_bytes = Traits::shared_bytes(num_experts, top_k);
    if (num_tokens == 0 || num_cols == 0) return;
    plan.col_tiles_per_block = detail::choose_col_tiles(plan.num_row_blocks, num_col_tiles,
                                                        int64_t{num_sms} * Traits::kMinBlocks);
    plan.num_col_blocks = (num_col_tiles + plan.col_tiles_per_block - 1) / plan.col_tiles_per_block;
  });
  return plan;
}

template <class Compute, class Op>
void launch_grouped_expand(GroupedExpandParams<Compute> params, int num_sms, Stream stream) {
  const GroupedExpandPlan plan = plan_grouped_expand<Compute, Op>(
      params.out.num_rows, params.out.num_cols, params.num_experts(), params.top_k(), num_sms);
  params.col_tiles_per_block = plan.col_tiles_per_block;
  detail::with_grouped_expand_shape(plan.block_rows, [&](auto shape) {
    using Traits = GroupedExpandTraits<Compute, decltype(shape), Op>;
    const LaunchShape launch_shape{static_cast<unsigned>(plan.num_row_blocks),
                                   static_cast<unsigned>(plan.num_col_blocks), 1, Traits::kThreads,
                                   static_cast<size_t>(plan.shared_bytes)};
    if constexpr (Op::kIsBackward) {
      launch_kernel("grouped_down_backward_x", &grouped_down_backward_x_kernel<Traits>,
                    launch_shape, params, stream);
    } else {
      launch_kernel("grouped_up", &grouped_up_kernel<Traits>, launch_shape, params, stream);
    }
  });
}

}  // namespace lowrank_ext::cuda
