// Rows that share a group (an adapter) form a segment: order_slots has sorted the rows by group, in
// their order within each, group n being the rows without an adapter and group n + 1 those of an
// invalid id. A kernel over segments works on tiles of neighbors in that order, which never cross
// a segment's end. The host knows only how many tiles there are at most; a block finds its own from
// the offsets: each warp by itself, 32 groups at a time, by a scan of their numbers of tiles.
// Blocks beyond the last tile return at once. No shared memory.
//
// Where a row has several groups (a token its experts) the sorted numbers are those of its slots,
// slots_per_row to a row in their order: thin matrices have a row for each slot, large ones for
// each row, which is gathered once for each of its slots.
//
// What differs between groups (the thin operand, its rank, its scaling) is read where it lies in
// the stacks. Nothing of a group without rows is read, nor what is padding beyond a group's rank.
#pragma once

#include <algorithm>

#include "common/dispatch.h"
#include "common/dropout.cuh"
#include "segments/kernels.h"

namespace lowrank_ext::cuda {

// A matrix for each group, group_stride elements apart.
template <class T>
struct Stack {
  T* data = nullptr;
  int64_t num_groups = 0, num_rows = 0, num_cols = 0;
  int64_t group_stride = 0, row_stride = 0;
  bool vectorized = false;  // every row starts on 16 bytes

  __device__ __forceinline__ Matrix<T> at(int64_t group) const {
    return {data + group * group_stride, num_rows, num_cols, row_stride, vectorized};
  }
  // A row for each group, from its first to its last element.
  Matrix<T> span() const {
    const bool empty = num_rows == 0 || num_cols == 0;
    return {data, num_groups, empty ? 0 : (num_rows - 1) * row_stride + num_cols, group_stride,
            vectorized};
  }
};

template <class T>
Stack<T> stack_of(const StackRef& ref) {
  const Matrix<T> first = matrix_of<T>(ref.first);
  const int64_t group_bytes = ref.group_stride * static_cast<int64_t>(sizeof(T));
  return {first.data,
          ref.num_groups,
          first.num_rows,
          first.num_cols,
          ref.group_stride,
          first.row_stride,
          first.vectorized && group_bytes % 16 == 0};
}

// A factor for each group, fp32 or fp64; ones where absent.
template <class acc_t>
struct GroupScaling {
  Matrix<const float> narrow;  // [1, n]
  Matrix<const double> wide;   // [1, n]

  __device__ __forceinline__ acc_t at(int64_t group) const {
    if (narrow) return static_cast<acc_t>(*narrow.at(0, group));
    return wide ? static_cast<acc_t>(*wide.at(0, group)) : acc_t(1);
  }
  template <class F>
  void each_tensor(F&& f) const {
    f("scaling", narrow);
    f("scaling", wide);
  }
};

template <class acc_t>
GroupScaling<acc_t> group_scaling(const MatrixRef& ref) {
  if (ref.type == ElementType::kFp64) return {{}, matrix_of<const double>(ref)};
  return {matrix_of<const float>(ref), {}};
}

struct Segments {
  Matrix<const int64_t> rows;     // [1, M]: the rows' numbers, sorted by group
  Matrix<const int64_t> offsets;  // [1, n + 3]: the groups' first places in that
  Matrix<const int64_t> ranks;    // [1, n] or absent
  int64_t num_groups;             // n
  int max_rank;
  unsigned slots_per_row;
  bool shared_dropout;  // one dropout mask for all groups, else one for each

  __device__ __forceinline__ int64_t slot(int64_t place) const { return *rows.at(0, place); }
  // Of a slot; slots are less than 2^31 (order_slots.cu).
  __device__ __forceinline__ int row_of(int64_t slot) const {
    return static_cast<int>(static_cast<unsigned>(slot) / slots_per_row);
  }
  __device__ __forceinline__ uint32_t mask_of(int64_t group) const {
    return shared_dropout ? 0 : static_cast<uint32_t>(group);
  }

  // Of a group's thin operand: 0 where there is nothing to add, -1 where the rows become NaN (an
  // invalid id, or an adapter whose rank is out of range; the host cannot look at either).
  __device__ __forceinline__ int rank(int64_t group) const {
    if (group >= num_groups) return group == num_groups ? 0 : -1;
    if (!ranks) return max_rank;
    const int64_t rank = *ranks.at(0, group);
    return rank < 0 || rank > max_rank ? -1 : static_cast<int>(rank);
  }
  template <class F>
  void each_tensor(F&& f) const {
    f("rows", rows);
    f("offsets", offsets);
    f("ranks", ranks);
  }
};

inline Segments segments_of(const RowGroups& groups, int64_t max_rank) {
  return {dense_matrix(groups.rows, 1, groups.num_rows),
          dense_matrix(groups.offsets, 1, groups.num_groups + 3),
          dense_matrix(groups.ranks, 1, groups.num_groups),
          groups.num_groups,
          static_cast<int>(max_rank),
          static_cast<unsigned>(groups.slots_per_row),
          groups.shared_dropout};
}

// Σ ⌈c / tile⌉ over k segments is Σ (⌊(c - 1) / tile⌋ + 1), at most ⌊(M - k) / tile⌋ + k, which
// grows with k.
inline int64_t max_segment_tiles(int64_t num_rows, int64_t num_groups, int tile_rows) {
  const int64_t num_segments = std::min(num_rows, num_groups + 2);
  return (num_rows - num_segments) / tile_rows + num_segments;
}

struct SegmentTile {
  int64_t group, first;  // first: place in the sorted rows
  int num_rows;          // 0 where there is no such tile
};

// All lanes of a warp call it and get the same.
__device__ __forceinline__ SegmentTile find_segment_tile(const Segments& segments, int tile_rows,
                                                         int64_t tile, int lane) {
  constexpr unsigned kAllLanes = 0xFFFFFFFFu;
  const int64_t num_keys = segments.num_groups + 2;
  int64_t tiles_before = 0;
#pragma unroll 1  // registers; most calls find it in the first 32 groups
  for (int64_t first_key = 0; first_key < num_keys; first_key += kWarpSize) {
    const int64_t key = first_key + lane;
    const bool inside = key < num_keys;
    const int64_t begin = inside ? *segments.offsets.at(0, key) : 0;
    const int64_t end = inside ? *segments.offsets.at(0, key + 1) : 0;
    const int64_t own_tiles = (end - begin + tile_rows - 1) / tile_rows;
    int64_t tiles = own_tiles;  // of this lane's group and those before, from first_key on
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int64_t others = __shfl_up_sync(kAllLanes, tiles, step);
      if (lane >= step) tiles += others;
    }
    const unsigned reached = __ballot_sync(kAllLanes, tile < tiles_before + tiles);
    if (reached != 0) {
      const int owner = __ffs(static_cast<int>(reached)) - 1;
      const int64_t index = tile - tiles_before - __shfl_sync(kAllLanes, tiles - own_tiles, owner);
      const int64_t first = __shfl_sync(kAllLanes, begin, owner) + index * tile_rows;
      const int64_t left = __shfl_sync(kAllLanes, end, owner) - first;
      return {first_key + owner, first, static_cast<int>(left < tile_rows ? left : tile_rows)};
    }
    tiles_before += __shfl_sync(kAllLanes, tiles, kWarpSize - 1);
  }
  return {0, 0, 0};
}

// copy_tile_async of rows that are no neighbors: row_of(tile_row, i) is the source's row for the
// thread's i-th own chunk, or negative for zeros.
template <int kThreads, class TileT, class T, class RowOf>
__device__ __forceinline__ void copy_gathered_tile_async(const TileT& tile, const Matrix<T>& source,
                                                         RowOf row_of, int64_t first_col,
                                                         int thread) {
  int i = 0;
  for_each_own_chunk<TileT, kThreads>(thread, [&](int tile_row, int chunk) {
    const int64_t row = row_of(tile_row, i++), col = first_col + chunk * TileT::kPerChunk;
    const int inside = row < 0 ? 0 : elements_inside(source, row, col, TileT::kPerChunk);
    const T* from = inside > 0 ? source.at(row, col) : source.data;
    if (source.vectorized) {
      copy_async<16>(tile.chunk(tile_row, chunk), from, inside * static_cast<int>(sizeof(T)));
    } else {
      copy_unaligned_chunk_async(tile.chunk(tile_row, chunk), from, inside);
    }
  });
}

// Dropout of the same tile, by the thread that copied the chunk: a mask belongs to a row of the
// whole batch, wherever the row lies in the tile.
template <int kThreads, class TileT, class RowOf>
__device__ __forceinline__ void drop_gathered_chunks(const TileT& tile, const Dropout& dropout,
                                                     uint64_t seed, RowOf row_of, int64_t first_col,
                                                     uint32_t mask, int thread) {
  int i = 0;
  for_each_own_chunk<TileT, kThreads>(thread, [&](int tile_row, int chunk) {
    const int64_t row = row_of(tile_row, i++);
    if (row < 0) return;
    auto values = read_chunk(tile, tile_row, chunk);
    drop(values.elements, dropout, seed, row, first_col + chunk * TileT::kPerChunk, mask);
    write_chunk(tile, tile_row, chunk, values);
  });
}

template <class acc_t>
__device__ __forceinline__ acc_t not_a_number() {
  return static_cast<acc_t>(nanf(""));
}

}  // namespace lowrank_ext::cuda
