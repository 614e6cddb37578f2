// Slots stably sorted by their group, in three steps: the slots are cut into ranges, one for each
// warp; counts[key][range] is how many of a range's slots have a key; an exclusive prefix sum over
// all of it, in that order, is where each range's slots of each key begin; and each warp walks over
// its range once more and puts its slots there. A warp takes 32 slots at a time; lanes with equal
// keys find one another by a vote, so nothing is added atomically and the order is that of the
// slots.
//
// In one block the counts lie in shared memory, [num_keys][num_ranges | 1] ints (an odd stride
// keeps the warps' counters of different keys in different banks), 48 KiB at most with 32 ints for
// the prefix sum. Otherwise they are in the workspace and each step is a launch. Lanes behind the
// end of a range take part in the votes only.
//
// What is sorted may be tokens, with their k experts: by the lowest of their ids, and by the next
// one as far as the number of keys allows. Then neighbors have most of their experts in common.
#pragma once

#include <cstdint>

#include "common/tile.cuh"
#include "routing/kernels.h"

namespace lowrank_ext::cuda {

struct SlotGroups {
  const int64_t* ids;  // [S], or [S, ids_per_slot] where those are tokens
  int64_t num_slots;
  int num_groups;
  bool extra_groups;
  int ids_per_slot = 1;
  int keys_per_group = 1;  // with several ids

  __host__ __device__ __forceinline__ int num_keys() const {
    return num_groups * keys_per_group + (extra_groups ? 2 : 0);
  }
  // Without extra groups every id must be a group's; another one counts as the last group.
  __device__ __forceinline__ int key(int64_t slot) const {
    if (ids_per_slot > 1) return key_of_token(slot);
    const int64_t id = ids[slot];
    if (id >= 0 && id < num_groups) return static_cast<int>(id);
    return extra_groups ? num_groups + (id == -1 ? 0 : 1) : num_groups - 1;
  }
  __device__ __forceinline__ int key_of_token(int64_t token) const {
    int lowest = num_groups - 1, next = num_groups - 1;  // also of ids outside [0, num_groups)
    for (int j = 0; j < ids_per_slot; ++j) {
      const int64_t id = ids[token * ids_per_slot + j];
      if (id < 0 || id >= next) continue;
      next = static_cast<int>(id);
      if (next >= lowest) continue;
      next = lowest;
      lowest = static_cast<int>(id);
    }
    return lowest * keys_per_group + static_cast<int>(int64_t{next} * keys_per_group / num_groups);
  }
};

// counts[key · key_stride + range]
struct SlotCounts {
  int* data;
  int key_stride, num_ranges;
  int64_t slots_per_range;  // a multiple of 32
};

// f(slot, position) for the slots of a range, by one warp: position is the counter of the slot's
// key, which is raised by one for each of them.
template <class F>
__device__ __forceinline__ void walk_range(const SlotGroups& groups, const SlotCounts& counts,
                                           int range, int lane, F f) {
  const int64_t first = range * counts.slots_per_range;
  const int64_t end = first + counts.slots_per_range;
  const int64_t last = end < groups.num_slots ? end : groups.num_slots;
  for (int64_t base = first; base < last; base += kWarpSize) {
    const int64_t slot = base + lane;
    const bool inside = slot < last;
    const int key = inside ? groups.key(slot) : -1;
    const unsigned peers = __match_any_sync(0xFFFFFFFFu, key);
    const int rank = __popc(peers & ((1u << lane) - 1));
    int* const counter = counts.data + int64_t{key} * counts.key_stride + range;
    const int before = inside ? *counter : 0;
    __syncwarp();  // every peer has read it
    if (inside && rank == 0) *counter = before + __popc(peers);
    __syncwarp();
    if (inside) f(slot, before + rank);
  }
}

__device__ __forceinline__ void count_range(const SlotGroups& groups, const SlotCounts& counts,
                                            int range, int lane) {
  walk_range(groups, counts, range, lane, [](int64_t, int) {});
}

__device__ __forceinline__ void scatter_range(const SlotGroups& groups, const SlotCounts& counts,
                                              const SlotOrder& order, int range, int lane) {
  walk_range(groups, counts, range, lane, [&](int64_t slot, int position) {
    order.sorted_slots[position] = slot;
    if (order.positions) order.positions[slot] = position;
  });
}

// values [n] become their exclusive prefix sums, by the whole block; warp_sums is shared [32].
// Begins without a barrier and ends with one.
__device__ __forceinline__ void exclusive_scan(int* values, int64_t n, int* warp_sums) {
  constexpr int kPerLane = 4;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  int carry = 0;  // of the tiles before
  for (int64_t first = 0; first < n; first += int64_t{kPerLane} * blockDim.x) {
    const int64_t own = first + warp * kPerLane * kWarpSize + lane;
    int before[kPerLane], sum = 0;
#pragma unroll
    for (int q = 0; q < kPerLane; ++q) {
      const int64_t i = own + q * kWarpSize;
      const int value = i < n ? values[i] : 0;
      int inclusive = value;
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, inclusive, distance);
        if (lane >= distance) inclusive += other;
      }
      before[q] = sum + inclusive - value;
      sum += __shfl_sync(0xFFFFFFFFu, inclusive, kWarpSize - 1);
    }
    if (lane == 0) warp_sums[warp] = sum;
    __syncthreads();
    int start = carry;
    for (int w = 0; w < num_warps; ++w) {
      if (w == warp) start = carry;
      carry += warp_sums[w];
    }
#pragma unroll
    for (int q = 0; q < kPerLane; ++q) {
      const int64_t i = own + q * kWarpSize;
      if (i < n) values[i] = start + before[q];
    }
    __syncthreads();  // warp_sums has been read
  }
}

// Prefix sums of the counts and the groups' offsets, by one block. Ends with a barrier.
__device__ __forceinline__ void scan_counts(const SlotGroups& groups, const SlotCounts& counts,
                                            int64_t* offsets, int* warp_sums) {
  const int num_keys = groups.num_keys();
  exclusive_scan(counts.data, int64_t{num_keys} * counts.key_stride, warp_sums);
  if (offsets) {
    for (int key = threadIdx.x; key < num_keys; key += blockDim.x)
      offsets[key] = counts.data[int64_t{key} * counts.key_stride];
    if (threadIdx.x == 0) offsets[num_keys] = groups.num_slots;
  }
  __syncthreads();
}

constexpr int kScanInts = 32;  // warp_sums

// Ints of shared memory for order_in_block by so many warps.
inline int64_t order_in_block_ints(int64_t num_keys, int num_warps) {
  return kScanInts + num_keys * (num_warps | 1);
}

// All of it by one block, a range for each warp. The shared memory must be free and the ids visible
// (a barrier before).
__device__ __forceinline__ void order_in_block(const SlotGroups& groups, const SlotOrder& order,
                                               int* shared) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  const int64_t per_warp = (groups.num_slots + num_warps - 1) / num_warps;
  const SlotCounts counts{shared + kScanInts, num_warps | 1, num_warps,
                          (per_warp + kWarpSize - 1) / kWarpSize * kWarpSize};
  const int num_counts = groups.num_keys() * counts.key_stride;
  for (int i = threadIdx.x; i < num_counts; i += blockDim.x) counts.data[i] = 0;
  __syncthreads();
  count_range(groups, counts, warp, lane);
  __syncthreads();
  scan_counts(groups, counts, order.offsets, shared);
  scatter_range(groups, counts, order, warp, lane);
}

}  // namespace lowrank_ext::cuda
