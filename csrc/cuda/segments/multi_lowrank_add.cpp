// multi_lowrank_add on the GPU: an adapter per row. order_slots sorts the rows by adapter, on the
// device, and the kernels of segment_*.cuh walk the segments where they lie: one launch for all
// adapters' down projections and one for all up projections. The host does not look at the values
// of ids and ranks: rows whose id or rank is out of range become NaN.
#include "ops/multi_lowrank_add.h"

#include <vector>

#include "common/tensors.h"
#include "routing/kernels.h"
#include "segments/kernels.h"

namespace lowrank_ext::cuda {
namespace {

// A stack whose matrices have dense rows.
StackRef stack_ref(const Tensor& stack) {
  const MatrixRef first{strided_data(stack), element_type(stack.scalar_type()), stack.size(1),
                        stack.size(2), stack.stride(1)};
  return {first, stack.size(0), stack.stride(0)};
}

// The rows by adapter, in scratch memory.
struct Rows {
  RowGroups groups{};
  SlotOrder order{};
  void* order_workspace = nullptr;

  Rows() = default;
  Rows(int64_t num_rows, int64_t num_adapters, const int64_t* ranks, int num_sms,
       Scratch& scratch) {
    order = {scratch.array<int64_t>(num_rows), scratch.array<int64_t>(num_adapters + 3), nullptr};
    order_workspace = scratch.bytes(order_slots_workspace_bytes(num_rows, num_adapters, num_sms));
    groups = {order.sorted_slots, order.offsets, ranks, num_rows, num_adapters};
  }

  void sort(const int64_t* adapter_ids, const Device& device) const {
    order_slots(adapter_ids, groups.num_rows, groups.num_groups, /*extra_groups=*/true, order,
                order_workspace, device);
  }
};

// A stack as the kernels read it: in x's dtype, with dense rows. One that is so is used where it
// lies; another is copied as a whole, since the adapters in use are not known here.
class Stack {
 public:
  Stack(const Tensor& tensor, ScalarType input) : input_(input), tensor_(tensor) {
    const int64_t n = tensor.size(0), num_rows = tensor.size(1), num_cols = tensor.size(2);
    const bool dense_rows = tensor.stride(2) == 1 && tensor.stride(1) >= num_cols &&
                            (n == 1 || tensor.stride(0) >= num_rows * tensor.stride(1));
    readable_ = tensor.numel() == 0 || (dense_rows && tensor.scalar_type() == input);
    const bool one_matrix = n == 1 || tensor.stride(0) == num_rows * tensor.stride(1);
    if (!readable_ && !one_matrix) tensor_ = torch::stable::contiguous(tensor);
  }

  StackRef placed(AdapterCopies& copies, Scratch& scratch) const {
    if (readable_) return stack_ref(tensor_);
    const int64_t n = tensor_.size(0), num_rows = tensor_.size(1);
    const MatrixRef source{strided_data(tensor_), element_type(tensor_.scalar_type()), n * num_rows,
                           tensor_.size(2), tensor_.stride(1)};
    StackRef stack{copies.add(source, tensor_.stride(2), element_type(input_), scratch), n};
    stack.first.num_rows = num_rows;
    stack.group_stride = num_rows * stack.first.row_stride;
    return stack;
  }

 private:
  ScalarType input_;
  Tensor tensor_;
  bool readable_;
};

// The schema has no flag that allows TF32, so it is not used.
constexpr bool kAllowTf32 = false;

void multi_lowrank_add_cuda(const MultiBranchArgs& args, const Tensor& base_out, const Tensor& x,
                            const Tensor& y, const Tensor& h) {
  const int64_t num_rows = x.size(0);
  if (num_rows == 0) return;
  const DeviceGuard guard(x.get_device_index());
  const Device device = device_of_kernels(x);
  const ComputeType compute_type = compute_type_of(x.scalar_type(), kAllowTf32);
  const Tensor ids = dense(args.adapter_ids), scaling = dense(args.scaling);
  const std::optional<Tensor> ranks = dense(args.ranks);
  const Stack lora_a_stack(args.lora_a, x.scalar_type()),
      lora_b_stack(args.lora_b, x.scalar_type());

  Rows rows;
  AdapterCopies copies;
  StackRef lora_a, lora_b;
  void* down = nullptr;
  const Workspace workspace(x, [&](Scratch& scratch) {
    rows = Rows(num_rows, args.num_adapters(), dense_data<const int64_t>(ranks), device.num_sms,
                scratch);
    copies = {};
    lora_a = lora_a_stack.placed(copies, scratch);
    lora_b = lora_b_stack.placed(copies, scratch);
    down = scratch.bytes(segment_down_workspace_bytes(compute_type, num_rows, args.num_adapters(),
                                                      args.in_features(), args.rank(),
                                                      device.num_sms));
  });

  rows.sort(dense_data<const int64_t>(ids), device);
  copies.round(device);
  segment_down(compute_type, rows.groups, ref(x), lora_a, ref(h),
               dropout_of(args.dropout_p, args.seed), down, device);
  segment_up(compute_type, rows.groups, ref(base_out), ref(h), lora_b, ref(scaling), ref(y),
             device);
}

void multi_lowrank_add_backward_cuda(const MultiBranchArgs& args, const MultiBranchNeeds& needs,
                                     const Tensor& dout, const std::optional<Tensor>& x,
                                     const std::optional<Tensor>& h,
                                     const MultiBranchGradients& gradients) {
  const int64_t num_rows = dout.size(0);
  if (num_rows == 0 || !(needs.g() || needs.dlora_b)) return;
  const DeviceGuard guard(dout.get_device_index());
  const Device device = device_of_kernels(dout);
  const ScalarType input = dout.scalar_type();
  const ComputeType compute_type = compute_type_of(input, kAllowTf32);
  const DropoutArgs dropout = dropout_of(args.dropout_p, args.seed);
  const Tensor ids = dense(args.adapter_ids), scaling = dense(args.scaling);
  const std::optional<Tensor> ranks = dense(args.ranks);
  std::optional<Stack> lora_a_stack, lora_b_stack;
  if (needs.dx) lora_a_stack.emplace(args.lora_a, input);
  if (needs.g()) lora_b_stack.emplace(args.lora_b, input);

  Rows rows;
  AdapterCopies copies;
  StackRef lora_a, lora_b;
  MatrixRef dh;
  void* up_backward = nullptr;
  const Workspace workspace(dout, [&](Scratch& scratch) {
    rows = Rows(num_rows, args.num_adapters(), dense_data<const int64_t>(ranks), device.num_sms,
                scratch);
    copies = {};
    if (lora_a_stack) lora_a = lora_a_stack->placed(copies, scratch);
    if (lora_b_stack) lora_b = lora_b_stack->placed(copies, scratch);
    if (!needs.g()) return;
    dh = scratch.matrix(element_type(input), num_rows, args.rank());
    up_backward = scratch.bytes(
        segment_down_workspace_bytes(compute_type, num_rows, args.num_adapters(),
                                     args.out_features(), args.rank(), device.num_sms));
  });

  rows.sort(dense_data<const int64_t>(ids), device);
  copies.round(device);
  if (needs.dlora_b)
    segment_up_backward_lora_b(compute_type, rows.groups, ref(dout), ref(h), ref(scaling),
                               /*scale=*/1.0, stack_ref(gradients.dlora_b), device);
  if (!needs.g()) return;
  segment_up_backward(compute_type, rows.groups, ref(dout), lora_b, ref(scaling), dh, up_backward,
                      device);
  if (needs.dlora_a)
    segment_down_backward_lora_a(compute_type, rows.groups, dh, ref(x), dropout,
                                 stack_ref(gradients.dlora_a), device);
  if (needs.dx)
    segment_down_backward_x(compute_type, rows.groups, dh, lora_a, dropout, ref(gradients.dx),
                            device);
}

}  // namespace

LOWRANK_EXT_CUDA_IMPL(m) {
  m.impl("multi_lowrank_add", TORCH_BOX(unpacked<multi_lowrank_add<multi_lowrank_add_cuda>>));
  m.impl("multi_lowrank_add_backward",
         TORCH_BOX(unpacked<multi_lowrank_add_backward<multi_lowrank_add_backward_cuda>>));
}

}  // namespace lowrank_ext::cuda
