// out_scale ⊙ lora_b, formed in shared memory: the rows of a tile of lora_b are multiplied by their
// elements of out_scale, in acc_t and rounded once, by the threads that copied them, before the
// barrier that publishes the tile. The factors of the next tile are fetched a step ahead, so that
// no thread waits for them.
#pragma once

#include "common/tile.cuh"

namespace lowrank_ext::cuda {

template <class Compute, class TileT, int kThreads>
struct RowScale {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  static constexpr int kOwnChunks = (TileT::kChunks + kThreads - 1) / kThreads;

  scalar_t factors[kOwnChunks] = {};  // of this thread's chunks of the next tile

  // scale is [1, number of rows]; rows outside are zero in the tile and get factor zero.
  __device__ __forceinline__ void fetch(const Matrix<const scalar_t>& scale, int64_t first_row,
                                        int thread) {
    int i = 0;
    for_each_own_chunk<TileT, kThreads>(thread, [&](int row, int) {
      const bool inside = first_row + row < scale.num_cols;
      factors[i++] = inside ? *scale.at(0, first_row + row) : scalar_t(0.0f);
    });
  }

  __device__ __forceinline__ void apply(const TileT& tile, int thread) const {
    int i = 0;
    for_each_own_chunk<TileT, kThreads>(thread, [&](int row, int chunk) {
      const acc_t factor = convert<acc_t>(factors[i++]);
      Chunk<scalar_t> values = read_chunk(tile, row, chunk);
#pragma unroll
      for (int e = 0; e < values.kSize; ++e)
        values.elements[e] = convert<scalar_t>(convert<acc_t>(values.elements[e]) * factor);
      write_chunk(tile, row, chunk, values);
    });
  }
};

}  // namespace lowrank_ext::cuda
