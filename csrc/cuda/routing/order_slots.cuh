// The kernels that sort slots by their group: all of it in one block, or counts, their prefix sum
// and the slots' places in a launch each. Steps, shared memory and tails are described in
// slot_order.cuh. Included by order_slots.cu only, since the kernels are no templates.
#pragma once

#include "common/dispatch.h"
#include "routing/slot_order.cuh"

namespace lowrank_ext::cuda {

struct OrderSlotsParams {
  SlotGroups groups;
  SlotCounts counts;  // of the workspace; no data in one block
  SlotOrder order;

  template <class F>
  void each_tensor(F&& f) const {
    const int64_t num_slots = groups.num_slots, num_keys = groups.num_keys();
    f("ids", dense_matrix(groups.ids, num_slots, groups.ids_per_slot));
    f("counts", dense_matrix(counts.data, 1, num_keys * counts.key_stride));
    f("sorted_slots", dense_matrix(order.sorted_slots, 1, num_slots));
    f("offsets", dense_matrix(order.offsets, 1, num_keys + 1));
    f("positions", dense_matrix(order.positions, 1, num_slots));
  }
};

constexpr int kMaxThreads = 1024;  // of one block that does all, and of the prefix sum

__global__ void __launch_bounds__(kMaxThreads) order_slots_kernel(OrderSlotsParams params) {
  order_in_block(params.groups, params.order, reinterpret_cast<int*>(dynamic_shared_memory()));
}

// A block is one warp, a range's.
__global__ void __launch_bounds__(kWarpSize) count_slots_kernel(OrderSlotsParams params) {
  const int lane = threadIdx.x, range = blockIdx.x;
  for (int key = lane; key < params.groups.num_keys(); key += kWarpSize)
    params.counts.data[int64_t{key} * params.counts.key_stride + range] = 0;
  __syncwarp();
  count_range(params.groups, params.counts, range, lane);
}

__global__ void __launch_bounds__(kMaxThreads) scan_slot_counts_kernel(OrderSlotsParams params) {
  scan_counts(params.groups, params.counts, params.order.offsets,
              reinterpret_cast<int*>(dynamic_shared_memory()));
}

__global__ void __launch_bounds__(kWarpSize) scatter_slots_kernel(OrderSlotsParams params) {
  scatter_range(params.groups, params.counts, params.order, blockIdx.x, threadIdx.x);
}

}  // namespace lowrank_ext::cuda
