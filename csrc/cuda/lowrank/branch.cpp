// Scratch memory and the order of the kernels of one call. All of them run on torch's
// current stream, without a wait on the host, so a CUDA graph can capture a call.
#include "lowrank/branch.h"

#include "common/tensors.h"
#include "lowrank/kernels.h"

namespace lowrank_ext::cuda {
namespace {

// The adapter tensors as the kernels read them: in x's dtype, with dense rows. Those that are not
// so are copied into scratch memory.
struct Adapters {
  MatrixRef lora_a, lora_b, out_scale;
  Mid mid;
  AdapterCopies copies;

  Adapters() = default;
  Adapters(const BranchArgs& args, ScalarType input, bool with_lora_a, Scratch& scratch) {
    const auto take = [&](const Tensor& tensor) {
      const MatrixRef given = strided_ref(tensor);
      const int64_t col_stride = tensor.stride(tensor.dim() - 1);
      const bool dense = col_stride == 1 || given.num_cols <= 1;
      if (tensor.numel() == 0 || (dense && tensor.scalar_type() == input)) return given;
      return copies.add(given, col_stride, element_type(input), scratch);
    };
    if (with_lora_a) lora_a = take(args.lora_a);
    lora_b = take(args.lora_b);
    if (args.core) mid.core = take(*args.core);
    if (args.rank_scale) mid.rank_scale = take(*args.rank_scale);
    if (args.out_scale) out_scale = take(*args.out_scale);
  }
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

  Adapters adapters;
  void* down = nullptr;
  const Workspace workspace(x, [&](Scratch& scratch) {
    adapters = Adapters(args, x.scalar_type(), /*with_lora_a=*/true, scratch);
    down = scratch.bytes(lowrank_down_workspace_bytes(compute_type, num_rows, args.in_features(),
                                                      args.rank(), device.num_sms));
  });

  adapters.copies.round(device);
  lowrank_down(compute_type, ref(x), adapters.lora_a, ref(h), dropout_of(args.dropout_p, args.seed),
               down, device);
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

  const UpBackwardWorkspace up = lowrank_up_backward_workspace(
      compute_type, num_rows, args.out_features(), rank, need_g, need_p, device.num_sms);
  const int64_t accumulator_size = compute_type == ComputeType::kFp64 ? 8 : 4;
  Adapters adapters;
  GPartials g;
  MatrixRef dh;
  void *p = nullptr, *mid = nullptr, *down = nullptr;
  const Workspace workspace(dout, [&](Scratch& scratch) {
    adapters = Adapters(args, input, /*with_lora_a=*/needs.dx, scratch);
    if (need_g)
      g = {scratch.bytes(up.num_g_splits * num_rows * rank * accumulator_size), up.num_g_splits};
    p = scratch.bytes(up.p_bytes);
    if (needs.dx || needs.dlora_a) dh = scratch.matrix(element_type(input), num_rows, rank);
    if (need_g)
      mid = scratch.bytes(lowrank_mid_backward_workspace_bytes(
          compute_type, num_rows, rank, needs.dcore, needs.drank_scale, device.num_sms));
    if (needs.dlora_a)
      down = scratch.bytes(lowrank_down_backward_workspace_bytes(
          compute_type, num_rows, args.in_features(), rank, device.num_sms));
  });

  adapters.copies.round(device);
  lowrank_up_backward(compute_type, ref(dout), ref(h), adapters.mid, adapters.lora_b,
                      adapters.out_scale, args.scaling, g, p,
                      needed(needs.dlora_b, gradients.dlora_b),
                      needed(needs.dout_scale, gradients.dout_scale), device);
  if (!need_g) return;
  lowrank_mid_backward(compute_type, g, ref(h), adapters.mid, num_rows, rank, dh,
                       needed(needs.dcore, gradients.dcore),
                       needed(needs.drank_scale, gradients.drank_scale), mid, device);
  if (needs.dlora_a)
    lowrank_down_backward_lora_a(compute_type, dh, ref(*x), dropout, ref(gradients.dlora_a), down,
                                 device);
  if (needs.dx)
    input_gradient(compute_type, gradients.dx, dout, weight, dh, adapters.lora_a, dropout, device);
}

}  // namespace lowrank_ext::cuda
