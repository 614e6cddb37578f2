// Routing of given logits. What is counted and ordered stays on the device: ids of a backward call
// are not looked at by the host, and one that is no expert's has no gradient.
#include <tuple>

#include "ops/moe_lowrank_add.h"
#include "lowrank/branch.h"
#include "common/tensors.h"

namespace lowrank_ext::cuda {
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route_cuda(
    const Tensor& router_logits, int64_t top_k, const std::optional<Tensor>& token_mask) {
  constexpr const char* kOp = "moe_route";
  check_router_logits(kOp, router_logits);
  const int64_t num_experts = router_logits.size(router_logits.dim() - 1);
  check_top_k(kOp, top_k, num_experts);
  check_token_mask(kOp, token_mask, router_logits, "router_logits");
  const DeviceGuard guard(router_logits.get_device_index());
  const Device device = device_of_kernels(router_logits);

  const Tensor logits = as_matrix(router_logits);
  const std::optional<Tensor> mask = dense(token_mask);
  const ScalarType statistics = statistics_dtype(router_logits.scalar_type());
  const int64_t num_slots = logits.size(0) * top_k;
  const auto integers = [&](int64_t size) {
    return empty({size}, ScalarType::Long, router_logits);
  };
  const std::vector<int64_t> per_choice = with_last_dim(router_logits, top_k);
  const Tensor weights = empty(per_choice, statistics, router_logits);
  const Tensor ids = empty(per_choice, ScalarType::Long, router_logits);
  const Tensor counts = integers(num_experts), loss = empty({}, statistics, router_logits);
  const Tensor sorted = integers(num_slots), offsets = integers(num_experts + 1),
               positions = integers(num_slots);

  Workspace workspace;
  const int64_t scratch =
      workspace.reserve(route_workspace_bytes(any(logits), top_k, device.num_sms));
  workspace.allocate(router_logits);
  route(any(logits), top_k, data_of<const bool>(mask),
        {any(as_matrix(weights)),
         data_of<int64_t>(ids),
         data_of<int64_t>(counts),
         scalar_of(loss),
         {data_of<int64_t>(sorted), data_of<int64_t>(offsets), data_of<int64_t>(positions)}},
        workspace.at(scratch), device);
  return {weights, ids, counts, loss, sorted, offsets, positions};
}

Tensor moe_route_backward_cuda(const std::optional<Tensor>& dtopk_weights,
                               const std::optional<Tensor>& dbalance_loss,
                               const Tensor& router_logits, const Tensor& topk_ids,
                               const Tensor& expert_counts,
                               const std::optional<Tensor>& token_mask) {
  check_moe_route_backward(dtopk_weights, dbalance_loss, router_logits, topk_ids, expert_counts,
                           token_mask);
  const DeviceGuard guard(router_logits.get_device_index());
  const Tensor dlogits = dense_like(router_logits);
  const Tensor logits = as_matrix(router_logits);
  if (logits.size(0) == 0) return dlogits;
  const std::optional<Tensor> mask = dense(token_mask);
  const Tensor ids = dense(topk_ids), counts = dense(expert_counts);
  const std::optional<Tensor> dweights =
      dtopk_weights ? std::optional(as_matrix(*dtopk_weights)) : std::nullopt;
  route_backward(any(dweights), dbalance_loss ? scalar_of(*dbalance_loss) : Any{}, any(logits),
                 data_of<int64_t>(ids), topk_ids.size(topk_ids.dim() - 1), data_of<int64_t>(counts),
                 data_of<const bool>(mask), any(as_matrix(dlogits)),
                 device_of_kernels(router_logits));
  return dlogits;
}

}  // namespace lowrank_ext::cuda

LOWRANK_EXT_CUDA_IMPL(m) {
  m.impl("moe_route", TORCH_BOX(&lowrank_ext::cuda::moe_route_cuda));
  m.impl("moe_route_backward", TORCH_BOX(&lowrank_ext::cuda::moe_route_backward_cuda));
}
