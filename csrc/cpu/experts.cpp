#include "experts.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "row_blocks.h"

namespace lowrank_ext::cpu {
namespace {

// Rows per task where one row costs about a microsecond.
constexpr int64_t kRowGrain = 16;
// Experts whose router rows stay in registers or L1 while a block of tokens goes over them.
constexpr int64_t kRouterExperts = 8;

void gather_row(Rows target, Rows source, int64_t num_cols, const uint64_t* bits) {
  if (source.dtype != target.dtype) return convert_row(target, source, 1.0, num_cols, bits);
  const int64_t size = size_of(source.dtype);
  if (bits == nullptr) {
    std::memcpy(target.data, source.data, num_cols * size);
  } else {
    copy_row_kept(target.data, source.data, size, bits, num_cols);
  }
}

}  // namespace

ExpertForm plan_experts(ScalarType compute, int64_t rank) {
  // Measured, forward and backward (M = 2048, K = N = 1024, E = 8, k = 2, dropout, one thread): the
  // per-token form takes 0.9, 0.95, 1.1 and 1.7 of the grouped form's time at ranks 8, 16, 32 and 64
  // in bf16, and 0.7, 1.0 and 1.2 at ranks 8, 16 and 32 in fp32.
  const int64_t most = compute == ScalarType::BFloat16 ? 16 : 8;
  return rank <= most ? ExpertForm::kPerToken : ExpertForm::kGrouped;
}

ExpertOperands prepare_experts(const ExpertArgs& args, ScalarType input) {
  const Dtypes dtypes = dtypes_for(input);
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
void route_tokens(const ExpertForward& call, int64_t first, int64_t count) {
  using acc_t = acc_of<storage_t>;
  const ExpertOperands& ops = call.ops;
  const int64_t num_cols = ops.in_features, num_experts = ops.num_experts;
  const auto* router = ops.router_weight.as<storage_t>();
  std::vector<storage_t> scratch(ops.converts() ? count * num_cols : 0);
  std::vector<const storage_t*> rows(count);
  for (int64_t m = 0; m < count; ++m)
    rows[m] = load_row(row_at(call.x, first + m), ops.compute, num_cols, nullptr,
                       scratch.data() + (ops.converts() ? m * num_cols : 0));
  std::vector<acc_t> logits(count * num_experts);
  for (int64_t i = 0; i < num_experts; i += kRouterExperts)
    for (int64_t m = 0; m < count; ++m)
      dot_rows(logits.data() + m * num_experts + i, rows[m], router + i * num_cols,
               std::min(kRouterExperts, num_experts - i), num_cols);
  auto* probs = call.router_probs.as<acc_t>();
  auto* weights = call.topk_weights.as<acc_t>();
  auto* ids = call.topk_ids.as<int64_t>();
  for (int64_t m = 0; m < count; ++m) {
    const int64_t t = first + m;
    route_row(logits.data() + m * num_experts, probs + t * num_experts, weights + t * ops.top_k,
              ids + t * ops.top_k, num_experts, ops.top_k);
  }
}

Tensor gated_h(const ExpertOperands& ops, const SlotOrder& order, const Matrix& h,
               const Matrix& topk_ids, const Matrix& topk_weights) {
  const int64_t rank = ops.rank, num_slots = topk_ids.tensor.numel();
  const Matrix z = empty({num_slots, rank}, ops.compute);
  const auto* ids = topk_ids.as<int64_t>();
  const int64_t* positions = ids_of(order.slot_positions);
  visit_accumulator(topk_weights.tensor, [&](const auto* weights) {
    torch::stable::parallel_for(0, num_slots, 8 * kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        convert_row(row_at(z, positions[slot]), row_at(h, slot / ops.top_k, ids[slot] * rank),
                    ops.scaling * weights[slot], rank);
    });
  });
  return z.tensor;
}

template <typename acc_t>
void gate_backward(const ExpertBackward& call, const TokenGradients& gradients, int64_t token,
                   acc_t* g, acc_t* dlogits) {
  const ExpertOperands& ops = call.ops;
  const int64_t rank = ops.rank, top_k = ops.top_k, num_experts = ops.num_experts;
  const auto* ids = call.topk_ids.as<int64_t>() + token * top_k;
  const auto* weights = call.topk_weights.as<acc_t>() + token * top_k;
  if (call.needs.gates()) {
    std::vector<acc_t> h(rank), dweights(top_k, 0);
    for (int64_t j = 0; j < top_k; ++j) {
      convert_row({h.data(), ops.accumulate, rank}, row_at(*call.h, token, ids[j] * rank), 1.0,
                  rank);
      for (int64_t r = 0; r < rank; ++r) dweights[j] += g[j * rank + r] * h[r];
    }
    route_row_backward(call.router_probs.as<acc_t>() + token * num_experts, weights, ids,
                       dweights.data(), call.balance, token, num_experts, top_k, dlogits);
    convert_row(row_at(*gradients.dlogits, token), {dlogits, ops.accumulate, num_experts}, 1.0,
                num_experts);
  }
  if (!gradients.dh) return;
  const int64_t* positions = call.slot_positions + token * top_k;
  for (int64_t j = 0; j < top_k; ++j) {
    acc_t* dh = g + j * rank;
    const acc_t factor = weights[j] * static_cast<acc_t>(ops.dropout.scale());
    for (int64_t r = 0; r < rank; ++r) dh[r] *= factor;
    convert_row(row_at(*gradients.dh, positions[j]), {dh, ops.accumulate, rank}, 1.0, rank);
  }
}

Tensor transposed_experts(const ExpertOperands& ops) {
  const int64_t num_rows = ops.out_features, rank = ops.rank;
  Tensor result = empty({ops.num_experts * rank, num_rows}, ops.compute);
  visit_storage(ops.compute, [&](auto* type) {
    using storage_t = std::remove_pointer_t<decltype(type)>;
    const auto* in = ops.lora_b.as<storage_t>();
    auto* out = dense_data<storage_t>(result);
    torch::stable::parallel_for(0, ops.num_experts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t r = 0; r < rank; ++r)
          for (int64_t n = 0; n < num_rows; ++n)
            out[(i * rank + r) * num_rows + n] = in[(i * num_rows + n) * rank + r];
    });
  });
  return result;
}

void for_each_group(const ExpertOperands& ops, const SlotOrder& order, const GroupSource& source,
                    const BlockBody& body) {
  const int64_t num_cols = source.matrix.tensor.size(1);
  const int64_t* offsets = ids_of(order.expert_offsets);
  const int64_t* slots = ids_of(order.sorted_slots);
  int64_t most = 0;
  for (int64_t i = 0; i < ops.num_experts; ++i) most = std::max(most, offsets[i + 1] - offsets[i]);
  const Matrix scratch =
      empty({std::min(most, block_rows(num_cols, size_of(ops.compute))), num_cols}, ops.compute);
  const auto bits_of = [&](ExpertMask& mask, int64_t expert, int64_t position) -> const uint64_t* {
    if (!source.masked) return nullptr;
    if (source.keep_bits)
      return source.keep_bits->as<uint64_t>() + position * source.keep_bits->stride;
    return mask.draw(expert, slots[position] / ops.top_k, 0, num_cols);
  };
  for (int64_t i = 0; i < ops.num_experts; ++i) {
    for (int64_t first = offsets[i]; first < offsets[i + 1]; first += scratch.tensor.size(0)) {
      const int64_t count = std::min(scratch.tensor.size(0), offsets[i + 1] - first);
      torch::stable::parallel_for(0, count, kRowGrain, [&](int64_t begin, int64_t end) {
        ExpertMask mask(ops, source.masked ? num_cols : 0);
        for (int64_t m = begin; m < end; ++m)
          gather_row(row_at(scratch, m), row_at(source.matrix, slots[first + m] / ops.top_k),
                     num_cols, bits_of(mask, i, first + m));
      });
      body(i, first, row_block(scratch.tensor, 0, count));
    }
  }
}

void sum_groups(const ExpertOperands& ops, const SlotOrder& order, const Tensor& left,
                const GroupSource& source, const Tensor& gradient, bool transpose,
                const BlockBody& on_block) {
  const int64_t num_cols = source.matrix.tensor.size(1), rank = ops.rank;
  const int64_t* offsets = ids_of(order.expert_offsets);
  zero(gradient);
  std::optional<BlockSum> sum;
  for_each_group(ops, order, source, [&](int64_t i, int64_t first, const Tensor& rows) {
    if (on_block) on_block(i, first, rows);
    if (first == offsets[i]) sum.emplace(ops, rank, num_cols);
    sum->add(row_block(left, first, rows.size(0)), rows, nullptr);
    if (first + rows.size(0) < offsets[i + 1]) return;
    const Tensor total = transpose ? transposed_copy(sum->result()) : sum->result();
    convert(row_at(rows_of(as_matrix(gradient)), i * total.size(0)), rows_of(total), 1.0,
            total.size(0), total.size(1));
  });
}

template void route_tokens<BFloat16>(const ExpertForward&, int64_t, int64_t);
template void route_tokens<float>(const ExpertForward&, int64_t, int64_t);
template void route_tokens<double>(const ExpertForward&, int64_t, int64_t);
template void gate_backward<float>(const ExpertBackward&, const TokenGradients&, int64_t, float*,
                                   float*);
template void gate_backward<double>(const ExpertBackward&, const TokenGradients&, int64_t, double*,
                                    double*);

}  // namespace lowrank_ext::cpu
