// multi_lowrank_add on the GPU: an adapter per row. order_slots sorts the rows by adapter, on the
// device, and the kernels of segment_*.cuh walk the segments where they lie: one launch for all
// adapters' down projections and one for all up projections. The host does not look at the values of
// ids and ranks: rows whose id or rank is out of range become NaN.
#include "ops/multi_lowrank_add.h"

#include <vector>

#include "common/tensors.h"
#include "routing/kernels.h"
#include "segments/kernels.h"

namespace lowrank_ext::cuda {
namespace {

// A stack whose matrices have dense rows.
StackRef stack_ref(const Tensor& stack) {
  const MatrixRef first{stack.data_ptr(), element_type(stack.scalar_type()), stack.size(1),
                        stack.size(2), stack.stride(1)};
  return {first, stack.size(0), stack.stride(0)};
}

// The rows by adapter.
class Rows {
 public:
  RowGroups groups;

  Rows(const MultiBranchArgs& args, int64_t num_rows, Workspace& workspace, const Device& device)
      : ids_(dense(args.adapter_ids)), ranks_(dense(args.ranks)), workspace_(workspace) {
    const int64_t n = args.num_adapters();
    rows_offset_ = workspace.reserve(num_rows * 8);
    offsets_offset_ = workspace.reserve((n + 3) * 8);
    scratch_offset_ = workspace.reserve(order_slots_workspace_bytes(num_rows, n, device.num_sms));
    groups = {nullptr, nullptr, nullptr, num_rows, n};
    groups.ranks = data_of<const int64_t>(ranks_);
  }

  // Once the workspace is allocated.
  void order(const Device& device) {
    const SlotOrder order{static_cast<int64_t*>(workspace_.at(rows_offset_)),
                          static_cast<int64_t*>(workspace_.at(offsets_offset_)), nullptr};
    order_slots(data_of<const int64_t>(ids_), groups.num_rows, groups.num_groups,
                /*extra_groups=*/true, order, workspace_.at(scratch_offset_), device);
    groups.rows = order.sorted_slots;
    groups.offsets = order.offsets;
  }

 private:
  const Tensor ids_;
  const std::optional<Tensor> ranks_;
  const Workspace& workspace_;
  int64_t rows_offset_, offsets_offset_, scratch_offset_;
};

// The stacks as the kernels read them: in x's dtype, with dense rows. One that is so is used where
// it lies; another is copied as a whole, since the adapters in use are not known here.
class Stacks {
 public:
  StackRef lora_a, lora_b;

  Stacks(const MultiBranchArgs& args, ScalarType input, bool with_lora_a, bool with_lora_b,
         Workspace& workspace)
      : input_(input), copies_(input, workspace) {
    if (with_lora_a) take(args.lora_a, lora_a);
    if (with_lora_b) take(args.lora_b, lora_b);
  }
  Stacks(const Stacks&) = delete;  // copies_ points into this object

  // Once the workspace is allocated.
  void round(const Device& device) { copies_.round(device); }

 private:
  void take(const Tensor& tensor, StackRef& stack) {
    const int64_t n = tensor.size(0), num_rows = tensor.size(1), num_cols = tensor.size(2);
    const bool dense_rows = tensor.stride(2) == 1 && tensor.stride(1) >= num_cols &&
                            (n == 1 || tensor.stride(0) >= num_rows * tensor.stride(1));
    if (tensor.numel() == 0 || (dense_rows && tensor.scalar_type() == input_)) {
      stack = stack_ref(tensor);
      return;
    }
    const bool one_matrix = n == 1 || tensor.stride(0) == num_rows * tensor.stride(1);
    kept_.push_back(one_matrix ? tensor : torch::stable::contiguous(tensor));
    const Tensor& source = kept_.back();
    copies_.add({source.data_ptr(), element_type(source.scalar_type()), n * num_rows, num_cols,
                 source.stride(1)},
                source.stride(2), stack.first);
    stack.first.num_rows = num_rows;
    stack.num_groups = n;
    stack.group_stride = num_rows * stack.first.row_stride;
  }

  const ScalarType input_;
  AdapterCopies copies_;
  std::vector<Tensor> kept_;
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
  const Tensor scaling = dense(args.scaling);

  Workspace workspace;
  Rows rows(args, num_rows, workspace, device);
  Stacks stacks(args, x.scalar_type(), true, true, workspace);
  const int64_t down = workspace.reserve(
      segment_down_workspace_bytes(compute_type, num_rows, args.num_adapters(), args.in_features(),
                                   args.rank(), device.num_sms));
  workspace.allocate(x);

  rows.order(device);
  stacks.round(device);
  segment_down(compute_type, rows.groups, ref(x), stacks.lora_a, ref(h),
               dropout_of(args.dropout_p, args.seed), workspace.at(down), device);
  segment_up(compute_type, rows.groups, ref(base_out), ref(h), stacks.lora_b, ref(scaling), ref(y),
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
  const Tensor scaling = dense(args.scaling);

  Workspace workspace;
  Rows rows(args, num_rows, workspace, device);
  Stacks stacks(args, input, needs.dx, needs.g(), workspace);
  const ScratchMatrix dh_scratch =
      reserve_matrix(workspace, input, needs.g() ? num_rows : 0, args.rank());
  const int64_t up_backward = workspace.reserve(
      needs.g() ? segment_down_workspace_bytes(compute_type, num_rows, args.num_adapters(),
                                               args.out_features(), args.rank(), device.num_sms)
                : 0);
  workspace.allocate(dout);
  const MatrixRef dh = placed(dh_scratch, workspace);

  rows.order(device);
  stacks.round(device);
  if (needs.dlora_b)
    segment_up_backward_lora_b(compute_type, rows.groups, ref(dout), ref(h), ref(scaling),
                               /*scale=*/1.0, stack_ref(gradients.dlora_b), device);
  if (!needs.g()) return;
  segment_up_backward(compute_type, rows.groups, ref(dout), stacks.lora_b, ref(scaling), dh,
                      workspace.at(up_backward), device);
  if (needs.dlora_a)
    segment_down_backward_lora_a(compute_type, rows.groups, dh, ref(x), dropout,
                                 stack_ref(gradients.dlora_a), device);
  if (needs.dx)
    segment_down_backward_x(compute_type, rows.groups, dh, stacks.lora_a, dropout,
                            ref(gradients.dx), device);
}

}  // namespace

LOWRANK_EXT_CUDA_IMPL(m) {
  m.impl("multi_lowrank_add", TORCH_BOX(unpacked<multi_lowrank_add<multi_lowrank_add_cuda>>));
  m.impl("multi_lowrank_add_backward",
         TORCH_BOX(unpacked<multi_lowrank_add_backward<multi_lowrank_add_backward_cuda>>));
}

}  // namespace lowrank_ext::cuda
