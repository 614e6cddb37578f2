// The grouped form of moe_lowrank_add: slots (token m's choice j is slot m k + j) sorted by expert,
// on the device, and the products of segment_*.cuh over each expert's segment. The host never sees
// how many tokens an expert has, so there is no capacity and nothing waits. An expert without
// tokens is not read and its gradients are zeros.
//
// y and dx add up a token's experts in ascending order, in blocks that own tokens
// (grouped_expand.cuh), so no [M k, N] product exists. dout is read twice for each choice or, where
// all experts' ranks together are few, once, by lowrank_add's kernel as in the dense form.
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

// The weights as the kernels read them: in x's type, rows from 16 bytes to 16 bytes. Others, also
// lora_b of ranks that are too small for that, are copied as a whole, since the experts in use are
// not known here.
struct Weights {
  MatrixRef router_weight;
  StackRef lora_a, lora_b;
  AdapterCopies copies;

  Weights() = default;
  // Only those asked for.
  Weights(const ExpertCall& call, bool router, bool a, bool b, Scratch& scratch) {
    const auto rows = [&](const Tensor& tensor) {
      const MatrixRef given = rows_of(tensor);
      const int64_t row_bytes = tensor.size(tensor.dim() - 1) * element_size(call.input);
      if (tensor.numel() == 0 || (tensor.scalar_type() == call.input && row_bytes % 16 == 0))
        return given;
      return copies.add(given, 1, element_type(call.input), scratch);
    };
    const auto stack = [&](const Tensor& tensor) {
      MatrixRef matrix = rows(tensor);
      matrix.num_rows = tensor.size(0) * tensor.size(1);  // also where it has no columns
      return stack_of_experts(matrix, call.num_experts);
    };
    if (router) {
      router_weight = rows(call.router_weight);
      router_weight.num_rows = call.num_experts;  // also where it has no columns
    }
    if (a) lora_a = stack(call.lora_a);
    if (b) lora_b = stack(call.lora_b);
  }
};

// Slots by expert and tokens by experts, in scratch memory.
struct Orders {
  RowGroups groups{};
  TokenChoices choices{};

  Orders() = default;
  Orders(const ExpertCall& call, int64_t num_tokens, Scratch& scratch) {
    const int64_t num_slots = num_tokens * call.top_k;
    const int num_sms = call.device.num_sms;
    slots_ = {scratch.array<int64_t>(num_slots), scratch.array<int64_t>(call.num_experts + 3),
              nullptr};
    tokens_ = call.top_k > 1 ? scratch.array<int64_t>(num_tokens) : slots_.sorted_slots;
    order_workspace_ = scratch.bytes(
        std::max(order_slots_workspace_bytes(num_slots, call.num_experts, num_sms),
                 order_tokens_workspace_bytes(num_tokens, call.num_experts, num_sms)));
    groups.rows = slots_.sorted_slots;
    groups.offsets = slots_.offsets;
    groups.num_rows = num_slots;
    groups.num_groups = call.num_experts;
    groups.slots_per_row = static_cast<int>(call.top_k);
    groups.shared_dropout = call.shared_dropout;
    choices = {tokens_, nullptr, num_tokens, call.top_k};
  }

  // ids [M, k].
  void order_slots_of(const int64_t* ids, const Device& device) const {
    order_slots(ids, groups.num_rows, groups.num_groups, /*extra_groups=*/true, slots_,
                order_workspace_, device);
  }
  // After the slots: with one choice they are the tokens.
  void order_tokens_of(const int64_t* ids, const Device& device) {
    choices.ids = ids;
    if (choices.top_k > 1)
      order_tokens(ids, choices.num_tokens, choices.top_k, groups.num_groups, tokens_,
                   order_workspace_, device);
  }

 private:
  SlotOrder slots_{};
  int64_t* tokens_ = nullptr;
  void* order_workspace_ = nullptr;
};

}  // namespace

void forward_grouped(const ExpertCall& call, const ExpertForward& pass, const Tensor& like) {
  const auto& [compute_type, device] = std::tie(call.compute_type, call.device);
  const int64_t num_rows = pass.x.num_rows, num_slots = num_rows * call.top_k;
  const auto logits = DenseColumns::packed(static_cast<int>(call.num_experts), /*rank=*/0);

  Weights weights;
  Orders orders;
  PartialSums z, h;
  void* gate = nullptr;
  MatrixRef gated;
  const Workspace workspace(like, [&](Scratch& scratch) {
    weights = Weights(call, true, true, true, scratch);
    orders = Orders(call, num_rows, scratch);
    z = scratch.partial_sums(lowrank_down_partials_workspace(
        compute_type, num_rows, call.in_features, call.num_experts, device.num_sms));
    gate = scratch.bytes(moe_gate_workspace_bytes(num_rows, logits.num_experts));
    h = scratch.partial_sums(segment_down_partials_workspace(
        compute_type, num_slots, call.num_experts, call.in_features, call.rank, device.num_sms));
    gated = scratch.matrix(element_type(call.input), num_slots, call.rank);
  });

  if (num_rows > 0) {
    weights.copies.round(device);
    lowrank_down_partials(compute_type, pass.x, weights.router_weight, z, device);
  }
  // Without rows too: then counts and loss are zero.
  moe_gate(compute_type, logits, z, pass.routing, pass.balance_loss, MatrixRef{}, MatrixRef{}, gate,
           device);
  if (num_rows == 0) return;
  orders.order_slots_of(pass.routing.ids, device);
  orders.order_tokens_of(pass.routing.ids, device);
  segment_down_partials(compute_type, orders.groups, pass.x, weights.lora_a, call.dropout, h,
                        device);
  grouped_gate(compute_type, h, pass.routing, pass.h, gated, device);
  grouped_up(compute_type, orders.choices, pass.base, gated, weights.lora_b, call.scaling, pass.y,
             device);
}

namespace {

// G and dlora_b, from each expert's own rows of dout.
struct GroupedUpBackward {
  PartialSums g;
  MatrixRef gated;

  GroupedUpBackward() = default;
  GroupedUpBackward(const ExpertCall& call, const ExpertBackward& pass, Scratch& scratch) {
    const int64_t num_slots = pass.dout.num_rows * call.top_k;
    if (pass.needs.dlora_b) gated = scratch.matrix(element_type(call.input), num_slots, call.rank);
    if (pass.need_g())
      g = scratch.partial_sums(segment_down_partials_workspace(call.compute_type, num_slots,
                                                               call.num_experts, call.out_features,
                                                               call.rank, call.device.num_sms));
  }

  SlotGradient run(const ExpertCall& call, const ExpertBackward& pass, const RowGroups& groups,
                   const StackRef& lora_b) const {
    if (pass.needs.dlora_b) {
      grouped_apply_gates(call.compute_type, pass.routing, pass.h, gated, call.device);
      segment_up_backward_lora_b(call.compute_type, groups, pass.dout, gated, MatrixRef{},
                                 call.scaling, stack_of_experts(pass.dlora_b, call.num_experts),
                                 call.device);
    }
    if (pass.need_g())
      segment_up_backward_partials(call.compute_type, groups, pass.dout, lora_b, call.scaling, g,
                                   call.device);
    return {g, /*by_slot=*/true};
  }
};

// G and dlora_b from one pass over dout, with all experts side by side.
struct DenseUpBackward {
  MatrixRef up, gated, dup;
  GPartials g;
  void* p = nullptr;

  DenseUpBackward() = default;
  DenseUpBackward(const ExpertCall& call, const ExpertBackward& pass, Scratch& scratch) {
    const int64_t num_rows = pass.dout.num_rows, num_h_cols = call.num_h_cols();
    const ElementType input = element_type(call.input);
    const ElementType accumulator = element_type(statistics_dtype(call.input));
    const UpBackwardWorkspace sizes =
        lowrank_up_backward_workspace(call.compute_type, num_rows, call.out_features, num_h_cols,
                                      pass.need_g(), pass.needs.dlora_b, call.device.num_sms);
    up = scratch.matrix(input, call.out_features, num_h_cols);
    if (pass.needs.dlora_b) {
      gated = scratch.matrix(input, num_rows, num_h_cols);
      dup = scratch.matrix(accumulator, call.out_features, num_h_cols);
    }
    if (pass.need_g())
      g = {scratch.bytes(sizes.num_g_splits * num_rows * num_h_cols * element_bytes(accumulator)),
           sizes.num_g_splits};
    p = scratch.bytes(sizes.p_bytes);
  }

  SlotGradient run(const ExpertCall& call, const ExpertBackward& pass) const {
    const auto columns =
        DenseColumns::packed(static_cast<int>(call.num_experts), static_cast<int>(call.rank));
    const bool need_p = pass.needs.dlora_b;
    dense_stack(call.compute_type, columns, rows_of(call.router_weight), rows_of(call.lora_a),
                rows_of(call.lora_b), MatrixRef{}, up, call.device);
    if (need_p)
      dense_apply_gates(call.compute_type, columns, pass.routing, pass.h, gated, call.device);
    lowrank_up_backward(call.compute_type, pass.dout, gated, Mid{}, up, MatrixRef{}, call.scaling,
                        g, p, dup, MatrixRef{}, call.device);
    if (need_p)
      dense_unstack(call.compute_type, columns, MatrixRef{}, 0, dup, MatrixRef{}, MatrixRef{},
                    pass.dlora_b, call.device);
    return {{g.data, g.num_splits, call.num_h_cols()}, /*by_slot=*/false};
  }
};

// From G: dlogits and dh, then dlora_a, drouter_weight and dx.
struct DownBackward {
  MatrixRef dlogits, dh;
  void* router = nullptr;

  DownBackward() = default;
  DownBackward(const ExpertCall& call, const ExpertBackward& pass, Scratch& scratch) {
    const int64_t num_rows = pass.dout.num_rows;
    const ElementType input = element_type(call.input);
    if (pass.needs.gates()) dlogits = scratch.matrix(input, num_rows, call.num_experts);
    dh = scratch.matrix(input, num_rows * call.top_k, call.rank);
    if (pass.needs.drouter_weight)
      router = scratch.bytes(lowrank_down_backward_workspace_bytes(
          call.compute_type, num_rows, call.in_features, call.num_experts, call.device.num_sms));
  }

  void run(const ExpertCall& call, const ExpertBackward& pass, const SlotGradient& g,
           const Orders& orders, const Weights& weights) const {
    const auto& [compute_type, device, needs] =
        std::tie(call.compute_type, call.device, pass.needs);
    grouped_gate_backward(compute_type, g, pass.routing, pass.dbalance_loss, pass.h, dlogits, dh,
                          device);
    if (needs.dlora_a)
      segment_down_backward_lora_a(compute_type, orders.groups, dh, pass.x, call.dropout,
                                   stack_of_experts(pass.dlora_a, call.num_experts), device);
    if (needs.drouter_weight)
      lowrank_down_backward_lora_a(compute_type, dlogits, pass.x, DropoutArgs{},
                                   pass.drouter_weight, router, device);
    if (needs.dx)
      grouped_down_backward_x(compute_type, orders.choices, dlogits, weights.router_weight, dh,
                              weights.lora_a, call.shared_dropout, call.dropout, pass.dx, device);
  }
};

}  // namespace

void backward_grouped(const ExpertCall& call, const ExpertBackward& pass, const Tensor& like) {
  const bool dense_up = call.plan().dense_up_backward, needs_dx = pass.needs.dx;
  Weights weights;
  Orders orders;
  DenseUpBackward dense;
  GroupedUpBackward grouped;
  DownBackward down;
  const Workspace workspace(like, [&](Scratch& scratch) {
    weights = Weights(call, needs_dx, needs_dx, pass.need_g() && !dense_up, scratch);
    orders = Orders(call, pass.dout.num_rows, scratch);
    if (dense_up) {
      dense = DenseUpBackward(call, pass, scratch);
    } else {
      grouped = GroupedUpBackward(call, pass, scratch);
    }
    if (pass.need_g()) down = DownBackward(call, pass, scratch);
  });

  weights.copies.round(call.device);
  orders.order_slots_of(pass.routing.ids, call.device);
  if (needs_dx) orders.order_tokens_of(pass.routing.ids, call.device);
  const SlotGradient g =
      dense_up ? dense.run(call, pass) : grouped.run(call, pass, orders.groups, weights.lora_b);
  if (pass.need_g()) down.run(call, pass, g, orders, weights);
}

}  // namespace lowrank_ext::cuda
