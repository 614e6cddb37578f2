// Scratch memory and the order of the kernels of one call. All of them run on torch's
// current stream, without a wait on the host, so a CUDA graph can capture a call.
#include "lowrank/branch.h"

#include "common/tensors.h"
#include "lowrank/kernels.h"

namespace lowrank_ext::cuda {
namespace {

// The adapter tensors as the kernels read them: in x's dtype, with dense rows. Those that are not
// so are copied into scratch memory.
class Adapters {
 public:
  MatrixRef lora_a, lora_b, out_scale;
  Mid mid;

  Adapters(const BranchArgs& args, ScalarType input, bool with_lora_a, Workspace& workspace)
      : input_(input), copies_(input, workspace) {
    if (with_lora_a) take(args.lora_a, lora_a);
    take(args.lora_b, lora_b);
    if (args.core) take(*args.core, mid.core);
    if (args.rank_scale) take(*args.rank_scale, mid.rank_scale);
    if (args.out_scale) take(*args.out_scale, out_scale);
  }
  Adapters(const Adapters&) = delete;  // copies_ points into this object

  // Once the workspace is allocated.
  void round(const Device& device) { copies_.round(device); }

 private:
  void take(const Tensor& tensor, MatrixRef& operand) {
    operand = ref(tensor);
    const int64_t col_stride = tensor.stride(tensor.dim() - 1);
    const bool dense = col_stride == 1 || operand.num_cols <= 1;
    if (tensor.numel() == 0 || (dense && tensor.scalar_type() == input_)) return;
    copies_.add(operand, col_stride, operand);
  }

  const ScalarType input_;
  AdapterCopies copies_;
};

// A bias is a matrix whose rows are all the same one.
MatrixRef base_rows(const std::optional<Tensor>& base, int64_t num_rows) {
  MatrixRef rows = ref(base);
  if (base && base->dim() == 1) rows.num_rows = num_rows;
  return rows;
}

std::optional<Tensor> with_dense_bias(const std::optional<Tensor>& base) {
  const bool strided = base && base->dim() == 1 && !base->is_contiguous();
  return strided ? std::optional(torch::stable::contiguous(*base)) : base;
}

MatrixRef needed(bool is_needed, const Tensor& gradient) {
  return is_needed ? ref(gradient) : MatrixRef{};
}

// dx = dout weight + drop'(dh lora_a), in the order that seed_base_output says.
void input_gradient(ComputeType compute_type, const Tensor& dx, const Tensor& dout,
                    const std::optional<Tensor>& weight, const MatrixRef& dh,
                    const MatrixRef& lora_a, const DropoutArgs& dropout, const Device& device) {
  const bool seeded = seed_base_output(dx.size(0), dx.size(1), element_size(dx.scalar_type()));
  if (weight && !seeded) multiply(dx, dout, *weight);
  const MatrixRef base = weight && !seeded ? ref(dx) : MatrixRef{};
  lowrank_down_backward_x(compute_type, base, dh, lora_a, dropout, ref(dx), device);
  if (weight && seeded) multiply_add(dx, dx, dout, *weight);
}

}  // namespace

void branch_forward(const BranchArgs& args, const Tensor& x, const std::optional<Tensor>& base,
                    const Tensor& y, const Tensor& h) {
  const int64_t num_rows = x.size(0);
  const Device device = device_of_kernels(x);
  const ComputeType compute_type = compute_type_of(x.scalar_type(), args.allow_tf32);

  Workspace workspace;
  Adapters adapters(args, x.scalar_type(), /*with_lora_a=*/true, workspace);
  const int64_t down = workspace.reserve(lowrank_down_workspace_bytes(
      compute_type, num_rows, args.in_features(), args.rank(), device.num_sms));
  workspace.allocate(x);

  adapters.round(device);
  lowrank_down(compute_type, ref(x), adapters.lora_a, ref(h), dropout_of(args.dropout_p, args.seed),
               workspace.at(down), device);
  const std::optional<Tensor> rows = with_dense_bias(base);
  lowrank_up(compute_type, base_rows(rows, num_rows), ref(h), adapters.mid, adapters.lora_b,
             adapters.out_scale, args.scaling, ref(y), device);
}

void branch_backward(const BranchArgs& args, const BranchNeeds& needs, const Tensor& dout,
                     const std::optional<Tensor>& x, const std::optional<Tensor>& h,
                     const std::optional<Tensor>& weight, const BranchGradients& gradients) {
  const int64_t num_rows = dout.size(0), rank = args.rank();
  const bool need_g = needs.mid_gradient(), need_p = needs.dlora_b || needs.dout_scale;
  if (!need_g && !need_p) return;
  const Device device = device_of_kernels(dout);
  const ScalarType input = dout.scalar_type();
  const ComputeType compute_type = compute_type_of(input, args.allow_tf32);
  const DropoutArgs dropout = dropout_of(args.dropout_p, args.seed);

  Workspace workspace;
  Adapters adapters(args, input, /*with_lora_a=*/needs.dx, workspace);
  const UpBackwardWorkspace up = lowrank_up_backward_workspace(
      compute_type, num_rows, args.out_features(), rank, need_g, need_p, device.num_sms);
  const int64_t accumulator_size = compute_type == ComputeType::kFp64 ? 8 : 4;
  const int64_t g_offset =
      workspace.reserve(need_g ? up.num_g_splits * num_rows * rank * accumulator_size : 0);
  const int64_t p_offset = workspace.reserve(up.p_bytes);
  const bool need_dh = needs.dx || needs.dlora_a;
  const ScratchMatrix dh_scratch = reserve_matrix(workspace, input, need_dh ? num_rows : 0, rank);
  const int64_t mid_offset = workspace.reserve(
      need_g ? lowrank_mid_backward_workspace_bytes(compute_type, num_rows, rank, needs.dcore,
                                                    needs.drank_scale, device.num_sms)
             : 0);
  const int64_t down_offset = workspace.reserve(
      needs.dlora_a ? lowrank_down_backward_workspace_bytes(
                          compute_type, num_rows, args.in_features(), rank, device.num_sms)
                    : 0);
  workspace.allocate(dout);
  const MatrixRef dh = need_dh ? placed(dh_scratch, workspace) : MatrixRef{};
  const GPartials g = need_g ? GPartials{workspace.at(g_offset), up.num_g_splits} : GPartials{};

  adapters.round(device);
  lowrank_up_backward(compute_type, ref(dout), ref(h), adapters.mid, adapters.lora_b,
                      adapters.out_scale, args.scaling, g, workspace.at(p_offset),
                      needed(needs.dlora_b, gradients.dlora_b),
                      needed(needs.dout_scale, gradients.dout_scale), device);
  if (!need_g) return;
  lowrank_mid_backward(compute_type, g, ref(h), adapters.mid, num_rows, rank, dh,
                       needed(needs.dcore, gradients.dcore),
                       needed(needs.drank_scale, gradients.drank_scale), workspace.at(mid_offset),
                       device);
  if (needs.dlora_a)
    lowrank_down_backward_lora_a(compute_type, dh, ref(*x), dropout, ref(gradients.dlora_a),
                                 workspace.at(down_offset), device);
  if (needs.dx)
    input_gradient(compute_type, gradients.dx, dout, weight, dh, adapters.lora_a, dropout, device);
}

}  // namespace lowrank_ext::cuda
