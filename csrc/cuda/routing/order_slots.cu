#include "routing/order_slots.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "routing/kernels.h"

namespace lowrank_ext::cuda {
namespace {

// One block as long as its passes take about as long as the two launches that it saves. Many
// ranges fill the GPU, few keep the prefix sum short, which walks over 4096 counts at a time.
// Reasoned, not measured.
struct OrderSlotsPlan {
  bool one_block;
  int num_ranges;

  OrderSlotsPlan(int64_t num_slots, int64_t num_keys, int num_sms) {
    constexpr int64_t kMaxBlockSlots = 16384, kMinSlotsPerWarp = 128, kMinSlotsPerRange = 256;
    constexpr int64_t kMaxSharedBytes = 48 * 1024, kMaxCounts = 1 << 17;
    const auto ranges = [&](int64_t slots, int64_t most) {
      return static_cast<int>(std::clamp<int64_t>((num_slots + slots - 1) / slots, 1, most));
    };
    num_ranges = ranges(kMinSlotsPerWarp, kMaxThreads / kWarpSize);
    const int64_t shared_bytes = order_in_block_ints(num_keys, num_ranges) * 4;
    one_block = num_slots <= kMaxBlockSlots && shared_bytes <= kMaxSharedBytes;
    if (!one_block)
      num_ranges = ranges(kMinSlotsPerRange,
                          std::clamp<int64_t>(kMaxCounts / num_keys, 1, 2 * int64_t{num_sms}));
  }
};

int64_t workspace_bytes(int64_t num_slots, int64_t num_keys, int num_sms) {
  const OrderSlotsPlan plan(num_slots, num_keys, num_sms);
  return num_keys * plan.num_ranges * static_cast<int64_t>(sizeof(int));
}

// Up to 1024 keys, or one for each expert.
int keys_per_expert(int64_t num_experts) {
  return static_cast<int>(std::clamp<int64_t>(1024 / num_experts, 1, num_experts));
}

void launch_order(const SlotGroups& groups, const SlotOrder& order, void* workspace,
                  const Device& device) {
  constexpr int64_t kMaxSlots = 0x7FFFFFFF;  // counts are ints
  const int64_t num_slots = groups.num_slots;
  if (num_slots > kMaxSlots)
    throw std::runtime_error("order_slots: at most 2^31 - 1 slots, got " +
                             std::to_string(num_slots));
  OrderSlotsParams params{groups, {}, order};
  const int64_t num_keys = params.groups.num_keys();
  const OrderSlotsPlan plan(num_slots, num_keys, device.num_sms);
  const unsigned num_ranges = plan.num_ranges;
  if (plan.one_block) {
    const int64_t shared_bytes = order_in_block_ints(num_keys, plan.num_ranges) * 4;
    launch_kernel("order_slots", &order_slots_kernel,
                  {1, 1, 1, num_ranges * kWarpSize, static_cast<size_t>(shared_bytes)}, params,
                  device.stream);
    return;
  }
  const int64_t per_range = (num_slots + num_ranges - 1) / num_ranges;
  params.counts = {static_cast<int*>(workspace), plan.num_ranges, plan.num_ranges,
                   (per_range + kWarpSize - 1) / kWarpSize * kWarpSize};
  launch_kernel("count_slots", &count_slots_kernel, {num_ranges, 1, 1, kWarpSize, 0}, params,
                device.stream);
  launch_kernel("scan_slot_counts", &scan_slot_counts_kernel,
                {1, 1, 1, kMaxThreads, kScanInts * sizeof(int)}, params, device.stream);
  launch_kernel("scatter_slots", &scatter_slots_kernel, {num_ranges, 1, 1, kWarpSize, 0}, params,
                device.stream);
}

}  // namespace

int64_t order_slots_workspace_bytes(int64_t num_slots, int64_t num_groups, int num_sms) {
  return workspace_bytes(num_slots, num_groups + 2, num_sms);  // as with extra groups
}

void order_slots(const int64_t* ids, int64_t num_slots, int64_t num_groups, bool extra_groups,
                 const SlotOrder& order, void* workspace, const Device& device) {
  launch_order({ids, num_slots, static_cast<int>(num_groups), extra_groups}, order, workspace,
               device);
}

int64_t order_tokens_workspace_bytes(int64_t num_tokens, int64_t num_experts, int num_sms) {
  return workspace_bytes(num_tokens, num_experts * keys_per_expert(num_experts), num_sms);
}

void order_tokens(const int64_t* ids, int64_t num_tokens, int64_t top_k, int64_t num_experts,
                  int64_t* tokens, void* workspace, const Device& device) {
  const int experts = static_cast<int>(num_experts);
  launch_order({ids, num_tokens, experts, /*extra_groups=*/false, static_cast<int>(top_k),
                top_k > 1 ? keys_per_expert(num_experts) : 1},
               {tokens, nullptr, nullptr}, workspace, device);
}

}  // namespace lowrank_ext::cuda
