// The kernel interface of routing: top-k of logits, and orders of slots and tokens by their
// experts. Defined in the .cu files beside it.
#pragma once

#include "common/arguments.h"

namespace lowrank_ext::cuda {

// Slots stably ordered by their group: ids [S], an expert or an adapter each, 0 … n - 1. With
// extra_groups two more groups follow: n has the slots with id -1, n + 1 those with any other
// invalid id; without, every id must be valid. One launch where that pays, else three.
struct SlotOrder {
  int64_t* sorted_slots;  // [S]
  int64_t* offsets;       // [groups + 1]: group g's are sorted_slots[offsets[g] … offsets[g + 1]]
  int64_t* positions;     // [S]: the inverse permutation, or null
};
int64_t order_slots_workspace_bytes(int64_t num_slots, int64_t num_groups, int num_sms);
void order_slots(const int64_t* ids, int64_t num_slots, int64_t num_groups, bool extra_groups,
                 const SlotOrder& order, void* workspace, const Device& device);

// Tokens with ids [T, k], ordered such that neighbors chose the same experts, or most of the same.
int64_t order_tokens_workspace_bytes(int64_t num_tokens, int64_t num_experts, int num_sms);
void order_tokens(const int64_t* ids, int64_t num_tokens, int64_t top_k, int64_t num_experts,
                  int64_t* tokens, void* workspace, const Device& device);

// Top-k routing of logits [T, E]; token_mask [T] or null. Statistics are fp32, fp64 beside fp64.
struct Routing {
  MatrixRef topk_weights;  // [T, k]
  int64_t* topk_ids;       // [T, k]
  int64_t* expert_counts;  // [E]
  MatrixRef balance_loss;  // one element
  SlotOrder order;         // of the T k slots, by expert
};
int64_t route_workspace_bytes(const MatrixRef& logits, int64_t top_k, int num_sms);
void route(const MatrixRef& logits, int64_t top_k, const bool* token_mask, const Routing& routing,
           void* workspace, const Device& device);

// dlogits [T, E] from dtopk_weights [T, k] and dbalance_loss, of which either may be absent.
void route_backward(const MatrixRef& dtopk_weights, const MatrixRef& dbalance_loss,
                    const MatrixRef& logits, const int64_t* topk_ids, int64_t top_k,
                    const int64_t* expert_counts, const bool* token_mask, const MatrixRef& dlogits,
                    const Device& device);

}  // namespace lowrank_ext::cuda
