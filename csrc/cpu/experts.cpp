#include "experts.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "outer_sum.h"
#include "row_blocks.h"

namespace lowrank_ext::cpu {
namespace {

// Rows per task where one row costs about a microsecond.
constexpr int64_t kRowGrain = 16;
// Experts whose router rows stay in registers or L1 while a block of tokens goes over them.
constexpr int64_t kRouterExperts = 8;

const int64_t* ids_of(const Tensor& tensor) {
  return static_cast<const int64_t*>(tensor.data_ptr());
}

}  // namespace

ExpertForm plan_experts(ScalarType compute, int64_t rank) {
  const int64_t most = compute == ScalarType::BFloat16 ? 16 : 8;
  return rank <= most ? ExpertForm::kByRow : ExpertForm::kByGroup;
}

ExpertOperands prepare_experts(const ExpertArgs& args, ScalarType input) {
  const ScalarType accumulate = statistics_dtype(input);
  const bool in_bf16 = input == ScalarType::BFloat16 && has_outer_sum();
  const Dtypes dtypes{input, in_bf16 ? input : accumulate, accumulate};
  return {dtypes,
          dropout_of(args.dropout_p, args.seed),
          args.shared_dropout,
          args.scaling,
          args.num_experts(),
          args.rank(),
          args.in_features(),
          args.out_features(),
          args.top_k,
          operand(as_matrix(args.router_weight), dtypes),
          operand(as_matrix(args.lora_a), dtypes),
          operand(as_matrix(args.lora_b), dtypes),
          plan_experts(dtypes.compute, args.rank())};
}

template <typename storage_t>
void route_tokens(const ExpertOperands& ops, const Tensor& x, int64_t first, int64_t count,
                  const ExpertOutputs& out) {
  using acc_t = acc_of<storage_t>;
  const int64_t num_cols = ops.in_features, num_experts = ops.num_experts;
  const auto* router = static_cast<const storage_t*>(ops.router_weight.data_ptr());
  std::vector<storage_t> scratch(ops.converts() ? count * num_cols : 0);
  std::vector<const storage_t*> rows(count);
  for (int64_t m = 0; m < count; ++m)
    rows[m] = load_row(row_at(x, first + m), ops.compute, num_cols, nullptr,
                       scratch.data() + (ops.converts() ? m * num_cols : 0));
  std::vector<acc_t> logits(count * num_experts);
  for (int64_t i = 0; i < num_experts; i += kRouterExperts)
    for (int64_t m = 0; m < count; ++m)
      dot_rows(logits.data() + m * num_experts + i, rows[m], router + i * num_cols,
               std::min(kRouterExperts, num_experts - i), num_cols);
  auto* probs = static_cast<acc_t*>(out.router_probs.data_ptr());
  auto* weights = static_cast<acc_t*>(out.topk_weights.data_ptr());
  auto* ids = static_cast<int64_t*>(out.topk_ids.data_ptr());
  for (int64_t m = 0; m < count; ++m) {
    const int64_t t = first + m;
    route_row(logits.data() + m * num_experts, probs + t * num_experts, weights + t * ops.top_k,
              ids + t * ops.top_k, num_experts, ops.top_k);
  }
}

Tensor gated_h(const ExpertOperands& ops, const SlotOrder& order, const Tensor& h,
               const Tensor& topk_ids, const Tensor& topk_weights) {
  const int64_t rank = ops.rank, num_slots = topk_ids.numel();
  const Tensor z = empty({num_slots, rank}, ops.compute);
  const int64_t* ids = ids_of(topk_ids);
  const int64_t* positions = ids_of(order.slot_positions);
  visit_accumulator(topk_weights, [&](const auto* weights) {
    torch::stable::parallel_for(0, num_slots, 8 * kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        convert(row_at(z, positions[slot]), row_at(h, slot / ops.top_k, ids[slot] * rank),
                ops.scaling * weights[slot], 1, rank);
    });
  });
  return z;
}

template <typename acc_t>
void gate_backward(const ExpertBackward& call, const ExpertGradients& gradients, int64_t token,
                   acc_t* g, acc_t* dlogits) {
  const ExpertOperands& ops = call.ops;
  const int64_t rank = ops.rank, top_k = ops.top_k, num_experts = ops.num_experts;
  const int64_t* ids = ids_of(call.topk_ids) + token * top_k;
  const auto* weights = static_cast<const acc_t*>(call.topk_weights.data_ptr()) + token * top_k;
  if (call.needs.gates()) {
    std::vector<acc_t> h(rank), dweights(top_k, 0);
    for (int64_t j = 0; j < top_k; ++j) {
      convert({h.data(), ops.accumulate, rank}, row_at(*call.h, token, ids[j] * rank), 1.0, 1,
              rank);
      for (int64_t r = 0; r < rank; ++r) dweights[j] += g[j * rank + r] * h[r];
    }
    const auto* probs = static_cast<const acc_t*>(call.router_probs.data_ptr());
    route_row_backward(probs + token * num_experts, weights, ids, dweights.data(), call.balance,
                       token, num_experts, top_k, dlogits);
    convert(row_at(*gradients.dlogits, token), {dlogits, ops.accumulate, num_experts}, 1.0, 1,
            num_experts);
  }
  if (!gradients.dh) return;
  const int64_t* positions = ids_of(call.order.slot_positions) + token * top_k;
  for (int64_t j = 0; j < top_k; ++j) {
    acc_t* dh = g + j * rank;
    const acc_t factor = weights[j] * static_cast<acc_t>(ops.dropout_scale());
    for (int64_t r = 0; r < rank; ++r) dh[r] *= factor;
    convert(row_at(*gradients.dh, positions[j]), {dh, ops.accumulate, rank}, 1.0, 1, rank);
  }
}

Tensor transposed_experts(const ExpertOperands& ops) {
  const int64_t num_rows = ops.out_features, rank = ops.rank;
  Tensor result = empty({ops.num_experts * rank, num_rows}, ops.compute);
  visit_storage(ops.compute, [&](auto* type) {
    using storage_t = std::remove_pointer_t<decltype(type)>;
    const auto* in = static_cast<const storage_t*>(ops.lora_b.data_ptr());
    auto* out = static_cast<storage_t*>(result.data_ptr());
    torch::stable::parallel_for(0, ops.num_experts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t r = 0; r < rank; ++r)
          for (int64_t n = 0; n < num_rows; ++n)
            out[(i * rank + r) * num_rows + n] = in[(i * num_rows + n) * rank + r];
    });
  });
  return result;
}

void for_each_group(const ExpertOperands& ops, const SlotOrder& order, const Tensor& matrix,
                    bool masked, const BlockBody& body) {
  const int64_t num_cols = matrix.size(1);
  const int64_t* offsets = ids_of(order.expert_offsets);
  const int64_t* slots = ids_of(order.sorted_slots);
  int64_t most = 0;
  for (int64_t i = 0; i < ops.num_experts; ++i) most = std::max(most, offsets[i + 1] - offsets[i]);
  const int64_t element_size = ops.compute == ScalarType::Double  ? 8
                               : ops.compute == ScalarType::Float ? 4
                                                                  : 2;
  const Tensor scratch =
      empty({std::min(most, block_rows(num_cols, element_size)), num_cols}, ops.compute);
  for (int64_t i = 0; i < ops.num_experts; ++i) {
    for (int64_t first = offsets[i]; first < offsets[i + 1]; first += scratch.size(0)) {
      const Tensor rows = row_block(scratch, 0, std::min(scratch.size(0), offsets[i + 1] - first));
      torch::stable::parallel_for(0, rows.size(0), kRowGrain, [&](int64_t begin, int64_t end) {
        ExpertMask mask(ops, masked ? num_cols : 0);
        for (int64_t m = begin; m < end; ++m) {
          const int64_t token = slots[first + m] / ops.top_k;
          convert(row_at(rows, m), row_at(matrix, token), 1.0, 1, num_cols,
                  masked ? mask.draw(i, token, 0, num_cols) : nullptr);
        }
      });
      body(i, first, rows);
    }
  }
}

void sum_groups(const ExpertOperands& ops, const SlotOrder& order, const Tensor& left,
                const Tensor& matrix, bool masked, const Tensor& gradient, bool transpose,
                const BlockBody& also) {
  const int64_t num_cols = matrix.size(1), rank = ops.rank;
  const int64_t* offsets = ids_of(order.expert_offsets);
  zero(gradient);
  if (num_cols == 0) return;
  std::optional<BlockSum> sum;
  for_each_group(ops, order, matrix, masked, [&](int64_t i, int64_t first, const Tensor& rows) {
    if (also) also(i, first, rows);
    if (first == offsets[i]) sum.emplace(ops, rank, num_cols);
    sum->add(row_block(left, first, rows.size(0)), rows, nullptr);
    if (first + rows.size(0) < offsets[i + 1]) return;
    const Tensor total = transpose ? transposed_copy(sum->result()) : sum->result();
    Rows target = row_at(as_matrix(gradient), i * total.size(0));
    convert(target, rows_of(total), 1.0, total.size(0), total.size(1));
  });
}

template void route_tokens<BFloat16>(const ExpertOperands&, const Tensor&, int64_t, int64_t,
                                     const ExpertOutputs&);
template void route_tokens<float>(const ExpertOperands&, const Tensor&, int64_t, int64_t,
                                  const ExpertOutputs&);
template void route_tokens<double>(const ExpertOperands&, const Tensor&, int64_t, int64_t,
                                   const ExpertOutputs&);
template void gate_backward<float>(const ExpertBackward&, const ExpertGradients&, int64_t, float*,
                                   float*);
template void gate_backward<double>(const ExpertBackward&, const ExpertGradients&, int64_t, double*,
                                    double*);

}  // namespace lowrank_ext::cpu
