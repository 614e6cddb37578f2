// moe_lowrank_add on the GPU, in one of two forms (experts.h).
#include "ops/moe_lowrank_add.h"

#include "experts/experts.h"

namespace lowrank_ext::cuda {
namespace {

void moe_lowrank_add_cuda(const ExpertArgs& args, const Tensor& base_out, const Tensor& x,
                          const ExpertOutputs& out) {
  const DeviceGuard guard(x.get_device_index());
  const ExpertCall call(args, x);
  const ExpertForward pass{
      ref(x),     ref(base_out), call.routing(out.routing), scalar_ref(out.balance_loss),
      ref(out.y), ref(out.h)};
  const auto forward = call.plan().grouped ? forward_grouped : forward_dense;
  forward(call, pass, x);
}

void moe_lowrank_add_backward_cuda(const ExpertArgs& args, const ExpertNeeds& needs,
                                   const Tensor& dout, const std::optional<Tensor>& dbalance_loss,
                                   const ExpertSaved& saved, const ExpertGradients& gradients) {
  const DeviceGuard guard(dout.get_device_index());
  const ExpertCall call(args, dout);
  const auto needed = [](bool is_needed, const Tensor& gradient) {
    return is_needed ? rows_of(gradient) : MatrixRef{};
  };
  const ExpertBackward pass{needs,
                            ref(dout),
                            ref(saved.x),
                            ref(saved.h),
                            call.routing(saved.routing),
                            dbalance_loss ? scalar_ref(*dbalance_loss) : MatrixRef{},
                            needed(needs.dx, gradients.dx),
                            needed(needs.drouter_weight, gradients.drouter_weight),
                            needed(needs.dlora_a, gradients.dlora_a),
                            needed(needs.dlora_b, gradients.dlora_b)};
  const auto backward = call.plan().grouped ? backward_grouped : backward_dense;
  backward(call, pass, dout);
}

}  // namespace

LOWRANK_EXT_CUDA_IMPL(m) {
  m.impl("moe_lowrank_add", TORCH_BOX(unpacked<moe_lowrank_add<moe_lowrank_add_cuda>>));
  m.impl("moe_lowrank_add_backward",
         TORCH_BOX(unpacked<moe_lowrank_add_backward<moe_lowrank_add_backward_cuda>>));
}

}  // namespace lowrank_ext::cuda
