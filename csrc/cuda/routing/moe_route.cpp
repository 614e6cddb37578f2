// moe_route on the GPU. Counts and orders stay on the device; the host does not look at the ids of
// a backward call, and an id outside [0, E) has no gradient.
#include "ops/moe_route.h"

#include "common/tensors.h"
#include "routing/kernels.h"

namespace lowrank_ext::cuda {
namespace {

void moe_route_cuda(const Tensor& router_logits, const std::optional<Tensor>& token_mask,
                    const RouteOutputs& out) {
  const DeviceGuard guard(router_logits.get_device_index());
  const Device device = device_of_kernels(router_logits);
  const MatrixRef logits = ref(router_logits);
  const int64_t top_k = out.topk_ids.size(1);
  void* route_workspace = nullptr;
  const Workspace workspace(router_logits, [&](Scratch& scratch) {
    route_workspace = scratch.bytes(route_workspace_bytes(logits, top_k, device.num_sms));
  });
  route(logits, top_k, dense_data<const bool>(token_mask),
        {ref(out.topk_weights),
         dense_data<int64_t>(out.topk_ids),
         dense_data<int64_t>(out.expert_counts),
         scalar_ref(out.balance_loss),
         {dense_data<int64_t>(out.sorted_slots), dense_data<int64_t>(out.expert_offsets),
          dense_data<int64_t>(out.slot_positions)}},
        route_workspace, device);
}

void moe_route_backward_cuda(const std::optional<Tensor>& dtopk_weights,
                             const std::optional<Tensor>& dbalance_loss,
                             const Tensor& router_logits, const Tensor& topk_ids,
                             const Tensor& expert_counts, const std::optional<Tensor>& token_mask,
                             const Tensor& drouter_logits) {
  const DeviceGuard guard(router_logits.get_device_index());
  route_backward(ref(dtopk_weights), dbalance_loss ? scalar_ref(*dbalance_loss) : MatrixRef{},
                 ref(router_logits), dense_data<int64_t>(topk_ids), topk_ids.size(1),
                 dense_data<int64_t>(expert_counts), dense_data<const bool>(token_mask),
                 ref(drouter_logits), device_of_kernels(router_logits));
}

}  // namespace

LOWRANK_EXT_CUDA_IMPL(m) {
  m.impl("moe_route", TORCH_BOX(unpacked<moe_route<moe_route_cuda>>));
  m.impl("moe_route_backward", TORCH_BOX(unpacked<moe_route_backward<moe_route_backward_cuda>>));
}

}  // namespace lowrank_ext::cuda
