// The grouped form of moe_lowrank_add: slots (token m's choice j is slot m k + j) sorted by expert,
// on the device, and the products of segment_*.cuh over each expert's segment, gathered. Its
// numbers of tokens are never seen by the host, so there is no capacity and nothing waits; an
// expert without tokens is not read and gets zeros for gradients.
//
// On the way back to features, in y and dx, a token's experts meet. There a block owns tokens, not
// slots, and adds up their experts in ascending order (grouped_expand.cuh): y and dx are written
// once, no [M k, N] product exists, and the order of a sum depends on its token only. Tokens are
// taken in an order in which neighbours chose the same experts, so that a block meets few.
//
// x is read once by the router and once for each choice, in the forward and for the gradients of
// the weights; dout twice for each choice, or, where all experts' ranks together are few, once, by
// lowrank_add's kernel, as in the dense form: without a mask the others' columns cost nothing
// there.
//
// Forward: router, gate, balance, orders, down, slots, up. Backward: orders, slots' h, dlora_b, G,
// gate backward, dlora_a, router's gradient, dx.
#include <tuple>

#include "experts/experts.h"
#include "lowrank/kernels.h"
#include "routing/kernels.h"
#include "segments/kernels.h"

namespace lowrank_ext::cuda {
namespace {

// lora_a or lora_b, or their gradients: a matrix for each expert.
StackRef stack_of_experts(const MatrixRef& rows, int64_t num_experts) {
  StackRef stack{rows, num_experts, 0};
  stack.first.num_rows = rows.num_rows / num_experts;
  stack.group_stride = stack.first.num_rows * rows.row_stride;
  return stack;
}

// A dense [E, rows, cols] tensor.
StackRef stack_of_experts(const Tensor& tensor) {
  MatrixRef rows = rows_of(tensor);
  rows.num_rows = tensor.size(0) * tensor.size(1);  // also where it has no columns
  return stack_of_experts(rows, tensor.size(0));
}

// The weights as the kernels read them: in x's type, rows from 16 bytes to 16 bytes. Others, also
// lora_b of ranks that are too small for that, are copied as a whole, since the experts in use are
// not known here.
class Weights {
 public:
  MatrixRef router_weight;
  StackRef lora_a, lora_b;

  // Only those asked for.
  Weights(const ExpertCall& call, bool router, bool a, bool b, Workspace& workspace)
      : call_(call), copies_(call.input, workspace) {
    if (router) take(call.router_weight, router_weight);
    if (a) take(call.lora_a, lora_a);
    if (b) take(call.lora_b, lora_b);
  }
  Weights(const Weights&) = delete;  // copies_ points into this object

  // Once the workspace is allocated.
  void round() { copies_.round(call_.device); }

 private:
  bool is_readable(const Tensor& tensor) const {
    const int64_t row_bytes = tensor.size(tensor.dim() - 1) * element_size(call_.input);
    return tensor.numel() == 0 || (tensor.scalar_type() == call_.input && row_bytes % 16 == 0);
  }
  void take(const Tensor& tensor, MatrixRef& matrix) {
    matrix = ref(tensor);
    if (!is_readable(tensor)) copies_.add(MatrixRef{matrix}, 1, matrix);
  }
  void take(const Tensor& tensor, StackRef& stack) {
    stack = stack_of_experts(tensor);
    if (is_readable(tensor)) return;
    copies_.add(rows_of(tensor), 1, stack.first);
    stack = stack_of_experts(stack.first, call_.num_experts);
  }

  const ExpertCall& call_;
  AdapterCopies copies_;
};

// Slots by expert and tokens by experts.
class Orders {
 public:
  RowGroups groups;
  TokenChoices choices;

  Orders(const ExpertCall& call, int64_t num_tokens, Workspace& workspace)
      : call_(call), workspace_(workspace) {
    const int64_t num_slots = num_tokens * call.top_k, num_sms = call.device.num_sms;
    slots_ = workspace.reserve(num_slots * 8);
    offsets_ = workspace.reserve((call.num_experts + 3) * 8);
    tokens_ = workspace.reserve(if_needed(call.top_k > 1, num_tokens * 8));
    scratch_ = workspace.reserve(
        std::max(order_slots_workspace_bytes(num_slots, call.num_experts, num_sms),
                 order_tokens_workspace_bytes(num_tokens, call.num_experts, num_sms)));
    groups = {nullptr,
              nullptr,
              nullptr,
              num_slots,
              call.num_experts,
              static_cast<int>(call.top_k),
              call.shared_dropout};
    choices = {nullptr, nullptr, num_tokens, call.top_k};
  }

  // Once the workspace is allocated; ids [M, k].
  void order_slots_of(const int64_t* ids) {
    const SlotOrder order{at(slots_), at(offsets_), nullptr};
    order_slots(ids, groups.num_rows, groups.num_groups, /*extra_groups=*/true, order,
                workspace_.at(scratch_), call_.device);
    groups.rows = order.sorted_slots;
    groups.offsets = order.offsets;
  }
  // After the slots: with one choice they are the tokens.
  void order_tokens_of(const int64_t* ids) {
    choices.ids = ids;
    choices.tokens = groups.rows;
    if (call_.top_k == 1) return;
    order_tokens(ids, choices.num_tokens, call_.top_k, call_.num_experts, at(tokens_),
                 workspace_.at(scratch_), call_.device);
    choices.tokens = at(tokens_);
  }

 private:
  int64_t* at(int64_t offset) const { return static_cast<int64_t*>(workspace_.at(offset)); }

  const ExpertCall& call_;
  const Workspace& workspace_;
  int64_t slots_, offsets_, tokens_, scratch_;
};

PartialSums placed(const PartialSumsSize& sums, int64_t offset, const Workspace& workspace) {
  return {workspace.at(offset), sums.num_splits, sums.row_stride};
}

}  // namespace

void forward_grouped(const ExpertCall& call, const ExpertForward& pass, const Tensor& like) {
  const auto& [compute_type, device] = std::tie(call.compute_type, call.device);
  const int64_t num_rows = pass.x.num_rows, num_slots = num_rows * call.top_k;
  const PartialSumsSize z_sizes = lowrank_down_partials_workspace(
      compute_type, num_rows, call.in_features, call.num_experts, device.num_sms);
  const PartialSumsSize h_sizes = segment_down_partials_workspace(
      compute_type, num_slots, call.num_experts, call.in_features, call.rank, device.num_sms);
  const auto logits = DenseColumns::packed(static_cast<int>(call.num_experts), /*rank=*/0);

  Workspace workspace;
  Weights weights(call, true, true, true, workspace);
  Orders orders(call, num_rows, workspace);
  const int64_t z_offset = workspace.reserve(z_sizes.bytes);
  const int64_t gate_offset =
      workspace.reserve(moe_gate_workspace_bytes(num_rows, logits.num_experts));
  const int64_t h_offset = workspace.reserve(h_sizes.bytes);
  const ScratchMatrix gated_scratch = reserve_matrix(workspace, call.input, num_slots, call.rank);
  workspace.allocate(like);
  const PartialSums z = placed(z_sizes, z_offset, workspace);
  const PartialSums h = placed(h_sizes, h_offset, workspace);
  const MatrixRef gated = placed(gated_scratch, workspace);

  if (num_rows > 0) {
    weights.round();
    lowrank_down_partials(compute_type, pass.x, weights.router_weight, z, device);
  }
  // Without rows too: then counts and loss are zero.
  moe_gate(compute_type, logits, z, pass.routing, pass.balance_loss, MatrixRef{}, MatrixRef{},
           workspace.at(gate_offset), device);
  if (num_rows == 0) return;
  orders.order_slots_of(pass.routing.ids);
  orders.order_tokens_of(pass.routing.ids);
  segment_down_partials(compute_type, orders.groups, pass.x, weights.lora_a, call.dropout, h,
                        device);
  grouped_gate(compute_type, h, pass.routing, pass.h, gated, device);
  grouped_up(compute_type, orders.choices, pass.base, gated, weights.lora_b, call.scaling, pass.y,
             device);
}

namespace {

// G and dlora_b, from each expert's own rows of dout.
class GroupedUpBackward {
 public:
  GroupedUpBackward(const ExpertCall& call, const ExpertBackward& pass, Workspace& workspace)
      : call_(call),
        pass_(pass),
        workspace_(workspace),
        g_sizes_(segment_down_partials_workspace(call.compute_type, num_slots(), call.num_experts,
                                                 call.out_features, call.rank,
                                                 call.device.num_sms)),
        gated_(reserve_matrix(workspace, call.input, if_needed(pass.needs.dlora_b, num_slots()),
                              call.rank)),
        g_offset_(workspace.reserve(if_needed(pass.need_g(), g_sizes_.bytes))) {}

  SlotGradient run(const RowGroups& groups, const StackRef& lora_b) const {
    if (pass_.needs.dlora_b) {
      const MatrixRef gated = cuda::placed(gated_, workspace_);
      grouped_apply_gates(call_.compute_type, pass_.routing, pass_.h, gated, call_.device);
      segment_up_backward_lora_b(call_.compute_type, groups, pass_.dout, gated, MatrixRef{},
                                 call_.scaling, stack_of_experts(pass_.dlora_b, call_.num_experts),
                                 call_.device);
    }
    const SlotGradient g{placed(g_sizes_, g_offset_, workspace_), /*by_slot=*/true};
    if (pass_.need_g())
      segment_up_backward_partials(call_.compute_type, groups, pass_.dout, lora_b, call_.scaling,
                                   g.sums, call_.device);
    return g;
  }

 private:
  int64_t num_slots() const { return pass_.dout.num_rows * call_.top_k; }

  const ExpertCall& call_;
  const ExpertBackward& pass_;
  const Workspace& workspace_;
  const PartialSumsSize g_sizes_;
  const ScratchMatrix gated_;
  const int64_t g_offset_;
};

// The same from one pass over dout, with all experts side by side.
class DenseUpBackward {
 public:
  DenseUpBackward(const ExpertCall& call, const ExpertBackward& pass, Workspace& workspace)
      : call_(call),
        pass_(pass),
        workspace_(workspace),
        columns_(
            DenseColumns::packed(static_cast<int>(call.num_experts), static_cast<int>(call.rank))),
        sizes_(lowrank_up_backward_workspace(call.compute_type, num_rows(), call.out_features,
                                             call.num_h_cols(), pass.need_g(), pass.needs.dlora_b,
                                             call.device.num_sms)),
        up_(reserve_matrix(workspace, call.input, call.out_features, call.num_h_cols())),
        gated_(reserve_matrix(workspace, call.input, if_needed(pass.needs.dlora_b, num_rows()),
                              call.num_h_cols())),
        dup_(reserve_matrix(workspace, accumulator(),
                            if_needed(pass.needs.dlora_b, call.out_features), call.num_h_cols())),
        g_offset_(workspace.reserve(if_needed(
            pass.need_g(),
            sizes_.num_g_splits * num_rows() * call.num_h_cols() * element_size(accumulator())))),
        p_offset_(workspace.reserve(sizes_.p_bytes)) {}

  SlotGradient run() const {
    const bool need_p = pass_.needs.dlora_b;
    const MatrixRef up = cuda::placed(up_, workspace_);
    const MatrixRef gated = need_p ? cuda::placed(gated_, workspace_) : MatrixRef{};
    const MatrixRef dup = need_p ? cuda::placed(dup_, workspace_) : MatrixRef{};
    const GPartials g{pass_.need_g() ? workspace_.at(g_offset_) : nullptr, sizes_.num_g_splits};
    dense_stack(call_.compute_type, columns_, rows_of(call_.router_weight), rows_of(call_.lora_a),
                rows_of(call_.lora_b), MatrixRef{}, up, call_.device);
    if (need_p)
      dense_apply_gates(call_.compute_type, columns_, pass_.routing, pass_.h, gated, call_.device);
    lowrank_up_backward(call_.compute_type, pass_.dout, gated, Mid{}, up, MatrixRef{},
                        call_.scaling, g, workspace_.at(p_offset_), dup, MatrixRef{}, call_.device);
    if (need_p)
      dense_unstack(call_.compute_type, columns_, MatrixRef{}, 0, dup, MatrixRef{}, MatrixRef{},
                    pass_.dlora_b, call_.device);
    return {{g.data, g.num_splits, call_.num_h_cols()}, /*by_slot=*/false};
  }

 private:
  int64_t num_rows() const { return pass_.dout.num_rows; }
  ScalarType accumulator() const { return statistics_dtype(call_.input); }

  const ExpertCall& call_;
  const ExpertBackward& pass_;
  const Workspace& workspace_;
  const DenseColumns columns_;
  const UpBackwardWorkspace sizes_;
  const ScratchMatrix up_, gated_, dup_;
  const int64_t g_offset_, p_offset_;
};

// From G to all that comes behind it.
class DownBackward {
 public:
  DownBackward(const ExpertCall& call, const ExpertBackward& pass, Workspace& workspace)
      : call_(call),
        pass_(pass),
        workspace_(workspace),
        dlogits_(reserve_matrix(workspace, call.input, if_needed(pass.needs.gates(), num_rows()),
                                call.num_experts)),
        dh_(reserve_matrix(workspace, call.input, num_rows() * call.top_k, call.rank)),
        router_offset_(workspace.reserve(if_needed(
            pass.needs.drouter_weight,
            lowrank_down_backward_workspace_bytes(call.compute_type, num_rows(), call.in_features,
                                                  call.num_experts, call.device.num_sms)))) {}

  void run(const SlotGradient& g, const Orders& orders, const Weights& weights) const {
    const auto& [compute_type, device, needs] =
        std::tie(call_.compute_type, call_.device, pass_.needs);
    const MatrixRef dh = cuda::placed(dh_, workspace_);
    const MatrixRef dlogits = needs.gates() ? cuda::placed(dlogits_, workspace_) : MatrixRef{};
    grouped_gate_backward(compute_type, g, pass_.routing, pass_.dbalance_loss, pass_.h, dlogits, dh,
                          device);
    if (needs.dlora_a)
      segment_down_backward_lora_a(compute_type, orders.groups, dh, pass_.x, call_.dropout,
                                   stack_of_experts(pass_.dlora_a, call_.num_experts), device);
    if (needs.drouter_weight)
      lowrank_down_backward_lora_a(compute_type, dlogits, pass_.x, DropoutArgs{},
                                   pass_.drouter_weight, workspace_.at(router_offset_), device);
    if (needs.dx)
      grouped_down_backward_x(compute_type, orders.choices, dlogits, weights.router_weight, dh,
                              weights.lora_a, call_.shared_dropout, call_.dropout, pass_.dx,
                              device);
  }

 private:
  int64_t num_rows() const { return pass_.dout.num_rows; }

  const ExpertCall& call_;
  const ExpertBackward& pass_;
  const Workspace& workspace_;
  const ScratchMatrix dlogits_, dh_;
  const int64_t router_offset_;
};

}  // namespace

void backward_grouped(const ExpertCall& call, const ExpertBackward& pass, const Tensor& like) {
  const bool dense_up = call.plan().dense_up_backward, needs_dx = pass.needs.dx;
  Workspace workspace;
  Weights weights(call, needs_dx, needs_dx, pass.need_g() && !dense_up, workspace);
  Orders orders(call, pass.dout.num_rows, workspace);
  std::optional<DenseUpBackward> dense;
  std::optional<GroupedUpBackward> grouped;
  if (dense_up) {
    dense.emplace(call, pass, workspace);
  } else {
    grouped.emplace(call, pass, workspace);
  }
  std::optional<DownBackward> down;
  if (pass.need_g()) down.emplace(call, pass, workspace);
  workspace.allocate(like);

  weights.round();
  orders.order_slots_of(pass.routing.ids);
  if (needs_dx) orders.order_tokens_of(pass.routing.ids);
  const SlotGradient g = dense ? dense->run() : grouped->run(orders.groups, weights.lora_b);
  if (down) down->run(g, orders, weights);
}

}  // namespace lowrank_ext::cuda
