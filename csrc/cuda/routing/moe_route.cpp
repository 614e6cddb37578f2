// Routing of given logits. Counts and orders stay on the device; the host does not look at the ids
// of a backward call, and an id outside [0, E) has no gradient.
#include <tuple>

#include "common/tensors.h"
#include "lowrank/branch.h"
#include "moe_checks.h"
#include "routing/kernels.h"

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

  void* route_workspace = nullptr;
  const Workspace workspace(router_logits, [&](Scratch& scratch) {
    route_workspace = scratch.bytes(route_workspace_bytes(ref(logits), top_k, device.num_sms));
  });
  route(ref(logits), top_k, data_of<const bool>(mask),
        {ref(as_matrix(weights)),
         data_of<int64_t>(ids),
         data_of<int64_t>(counts),
         scalar_ref(loss),
         {data_of<int64_t>(sorted), data_of<int64_t>(offsets), data_of<int64_t>(positions)}},
        route_workspace, device);
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
  route_backward(ref(dweights), dbalance_loss ? scalar_ref(*dbalance_loss) : MatrixRef{},
                 ref(logits), data_of<int64_t>(ids), topk_ids.size(topk_ids.dim() - 1),
                 data_of<int64_t>(counts), data_of<const bool>(mask), ref(as_matrix(dlogits)),
                 device_of_kernels(router_logits));
  return dlogits;
}

}  // namespace lowrank_ext::cuda

LOWRANK_EXT_CUDA_IMPL(m) {
  m.impl("moe_route", TORCH_BOX(&lowrank_ext::cuda::moe_route_cuda));
  m.impl("moe_route_backward", TORCH_BOX(&lowrank_ext::cuda::moe_route_backward_cuda));
}
