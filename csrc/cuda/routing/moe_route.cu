#include "routing/moe_route.cuh"

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/scratch.h"
#include "routing/kernels.h"

namespace lowrank_ext::cuda {
namespace {

// f(scalar_t{}) for the elements of logits.
template <class F>
auto dispatch_scalar(ElementType type, F f) {
  switch (type) {
    case ElementType::kBf16:
      return f(Bf16::scalar_t{});
    case ElementType::kFp16:
      return f(Fp16::scalar_t{});
    case ElementType::kFp32:
      return f(float{});
    default:
      return f(double{});
  }
}

RoutePlan plan_of(const MatrixRef& logits, int num_sms) {
  return {logits.num_rows, logits.num_cols, element_bytes(logits.type), num_sms};
}

// The sums of each warp's tokens, and what order_slots asks for; nothing in one block.
struct RouteWorkspace {
  void *prob_sums = nullptr, *order = nullptr;
  int* choices = nullptr;

  RouteWorkspace(const RoutePlan& plan, const MatrixRef& logits, int64_t top_k, int num_sms,
                 Scratch& scratch) {
    if (plan.one_block) return;
    const int64_t num_sums = plan.num_warps * logits.num_cols;
    prob_sums = scratch.bytes(num_sums * (logits.type == ElementType::kFp64 ? 8 : 4));
    choices = scratch.array<int>(num_sums);
    order = scratch.bytes(
        order_slots_workspace_bytes(logits.num_rows * top_k, logits.num_cols, num_sms));
  }
};

}  // namespace

int64_t route_workspace_bytes(const MatrixRef& logits, int64_t top_k, int num_sms) {
  Scratch scratch;
  RouteWorkspace(plan_of(logits, num_sms), logits, top_k, num_sms, scratch);
  return scratch.num_bytes();
}

void route(const MatrixRef& logits, int64_t top_k, const bool* token_mask, const Routing& routing,
           void* workspace, const Device& device) {
  const RoutePlan plan = plan_of(logits, device.num_sms);
  const int64_t num_tokens = logits.num_rows, num_experts = logits.num_cols;
  const int64_t num_slots = num_tokens * top_k;
  dispatch_scalar(logits.type, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    using acc_t = statistics_t<scalar_t>;
    RouteParams<scalar_t> params{};
    params.logits = matrix_of<const scalar_t>(logits);
    params.token_mask = dense_matrix(token_mask, 1, num_tokens);
    params.top_k = static_cast<int>(top_k);
    params.lanes = plan.lanes;
    params.topk_weights = matrix_of<acc_t>(routing.topk_weights);
    params.topk_ids = dense_matrix(routing.topk_ids, num_tokens, top_k);
    params.expert_counts = dense_matrix(routing.expert_counts, 1, num_experts);
    params.balance_loss = matrix_of<acc_t>(routing.balance_loss);
    if (plan.one_block) {
      params.sorted_slots = dense_matrix(routing.order.sorted_slots, 1, num_slots);
      params.expert_offsets = dense_matrix(routing.order.offsets, 1, num_experts + 1);
      params.slot_positions = dense_matrix(routing.order.positions, 1, num_slots);
      const int64_t sums_bytes = plan.num_warps * num_experts * (sizeof(acc_t) + sizeof(int));
      const int64_t order_bytes =
          order_in_block_ints(num_experts, static_cast<int>(plan.num_warps)) * sizeof(int);
      launch_kernel("moe_route", &moe_route_kernel<scalar_t>,
                    {1, 1, 1, static_cast<unsigned>(plan.num_warps * kWarpSize),
                     static_cast<size_t>(std::max(sums_bytes, order_bytes))},
                    params, device.stream);
      return;
    }
    Scratch scratch(workspace);
    const RouteWorkspace parts(plan, logits, top_k, device.num_sms, scratch);
    params.prob_sums =
        dense_matrix(static_cast<acc_t*>(parts.prob_sums), plan.num_warps, num_experts);
    params.choices = dense_matrix(parts.choices, plan.num_warps, num_experts);
    const LaunchShape shape{static_cast<unsigned>(plan.num_blocks(num_tokens, device.num_sms)), 1,
                            1, kRouteTokensThreads, 0};
    if (num_experts <= kMaxExpertsInRegisters) {
      launch_kernel("route_tokens", &route_tokens_kernel<scalar_t>, shape, params, device.stream);
    } else {
      launch_kernel("route_many_experts", &route_many_experts_kernel<scalar_t>, shape, params,
                    device.stream);
    }
    launch_balance<acc_t, int, acc_t>(
        {dense_matrix<const acc_t>(params.prob_sums.data, plan.num_warps, num_experts),
         dense_matrix<const int>(params.choices.data, plan.num_warps, num_experts), params.top_k,
         params.expert_counts, params.balance_loss},
        device.stream);
    order_slots(routing.topk_ids, num_slots, num_experts, /*extra_groups=*/false, routing.order,
                parts.order, device);
  });
}

void route_backward(const MatrixRef& dtopk_weights, const MatrixRef& dbalance_loss,
                    const MatrixRef& logits, const int64_t* topk_ids, int64_t top_k,
                    const int64_t* expert_counts, const bool* token_mask, const MatrixRef& dlogits,
                    const Device& device) {
  const int64_t num_tokens = logits.num_rows, num_experts = logits.num_cols;
  dispatch_scalar(logits.type, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    using acc_t = statistics_t<scalar_t>;
    RouteBackwardParams<scalar_t> params{};
    params.dweights = matrix_of<const acc_t>(dtopk_weights);
    params.dloss = matrix_of<const acc_t>(dbalance_loss);
    params.logits = matrix_of<const scalar_t>(logits);
    params.topk_ids = dense_matrix(topk_ids, num_tokens, top_k);
    params.expert_counts = dense_matrix(expert_counts, 1, num_experts);
    params.token_mask = dense_matrix(token_mask, 1, num_tokens);
    params.top_k = static_cast<int>(top_k);
    params.lanes = lanes_of_row(num_experts, sizeof(scalar_t));
    params.dlogits = matrix_of<scalar_t>(dlogits);
    constexpr int64_t kBlocksPerSm = 8;
    const int64_t per_block = kRouteTokensThreads / params.lanes;
    const int64_t num_blocks =
        std::min<int64_t>((num_tokens + per_block - 1) / per_block, kBlocksPerSm * device.num_sms);
    launch_kernel("moe_route_backward", &moe_route_backward_kernel<scalar_t>,
                  {static_cast<unsigned>(num_blocks), 1, 1, kRouteTokensThreads, 0}, params,
                  device.stream);
  });
}

}  // namespace lowrank_ext::cuda
