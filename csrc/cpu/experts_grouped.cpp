// Tokens are gathered by expert, the vendor multiplies each group, and every token sums its choices in
// their order, whatever the order of the groups. The [T k, N] products exist for a strip of columns at
// a time.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "experts.h"

namespace lowrank_ext::cpu {
namespace {

constexpr int64_t kRowGrain = 16;
constexpr int64_t kRouterRows = 16;
// Columns of a strip: wide enough for the vendor's product; a multiple of kMaskColumns.
constexpr int64_t kStripColumns = 1024;
static_assert(kStripColumns % kMaskColumns == 0);

// product [T k, width] = left [T k, r_e] times right(expert) [r_e, width] of each row's expert.
template <typename Right>
void multiply_groups(const ExpertOperands& ops, const SlotOrder& order, const Tensor& product,
                     const Tensor& left, const Right& right) {
  const int64_t* offsets = ids_of(order.expert_offsets);
  for (int64_t i = 0; i < ops.num_experts; ++i) {
    const int64_t count = offsets[i + 1] - offsets[i];
    if (count == 0) continue;
    multiply(row_block(product, offsets[i], count), row_block(left, offsets[i], count), right(i));
  }
}

template <typename Body>  // body(first_col, num_cols)
void for_each_strip(int64_t num_cols, const Body& body) {
  for (int64_t first = 0; first < num_cols; first += kStripColumns)
    body(first, std::min(kStripColumns, num_cols - first));
}

Tensor columns(const Tensor& matrix, int64_t first, int64_t count) {
  return strided_view(matrix, first, matrix.size(0), count, matrix.stride(0), matrix.stride(1));
}

// h [T, E r_e] from slots_h [T k, r_e], zeros for experts that were not chosen.
void scatter_h(const ExpertForward& call, const SlotOrder& order, const Matrix& slots_h) {
  const ExpertOperands& ops = call.ops;
  const auto* ids = call.topk_ids.as<int64_t>();
  const int64_t* positions = ids_of(order.slot_positions);
  const int64_t row_bytes = ops.num_experts * ops.rank * size_of(call.h.dtype);
  torch::stable::parallel_for(0, call.num_tokens(), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      std::memset(row_at(call.h, token).data, 0, row_bytes);
      for (int64_t slot = token * ops.top_k; slot < (token + 1) * ops.top_k; ++slot)
        convert_row(row_at(call.h, token, ids[slot] * ops.rank), row_at(slots_h, positions[slot]),
                    1.0, ops.rank);
    }
  });
}

// y = base_out + Σ_j z of token t's j-th slot times its expert's lora_bᵀ, z [T k, r_e].
void up(const ExpertForward& call, const SlotOrder& order, const Tensor& z) {
  const ExpertOperands& ops = call.ops;
  const int64_t* positions = ids_of(order.slot_positions);
  const int64_t num_tokens = call.num_tokens(), num_out = ops.out_features;
  const Tensor product =
      empty({num_tokens * ops.top_k, std::min(kStripColumns, num_out)}, ops.compute);
  for_each_strip(num_out, [&](int64_t first, int64_t width) {
    const Matrix strip = columns(product, 0, width);
    multiply_groups(ops, order, strip.tensor, z, [&](int64_t i) {
      return transposed(row_block(ops.lora_b.tensor, i * num_out + first, width));
    });
    torch::stable::parallel_for(0, num_tokens, kRowGrain, [&](int64_t begin, int64_t end) {
      const Tensor scratch = empty({1, width}, ops.accumulate);
      const Rows sum = rows_of(scratch);
      for (int64_t token = begin; token < end; ++token) {
        convert_row(sum, row_at(call.base_out, token, first), 1.0, width);
        for (int64_t slot = token * ops.top_k; slot < (token + 1) * ops.top_k; ++slot)
          accumulate_row(sum, row_at(strip, positions[slot]), 1.0, width);
        convert_row(row_at(call.y, token, first), sum, 1.0, width);
      }
    });
  });
}

// g [T k, r_e] = scaling · dout lora_b, and dlora_b from the same gathered rows.
void up_backward(const ExpertBackward& call, const std::optional<Tensor>& g,
                 const std::optional<Tensor>& z, const std::optional<Tensor>& dlora_b) {
  const ExpertOperands& ops = call.ops;
  const BlockBody multiply_block = [&](int64_t i, int64_t first, const Tensor& rows) {
    if (g)
      multiply(row_block(*g, first, rows.size(0)), rows,
               row_block(ops.lora_b.tensor, i * ops.out_features, ops.out_features), 0.0,
               ops.scaling);
  };
  if (dlora_b) {
    sum_groups(ops, call.order, *z, {call.dout}, *dlora_b, /*transpose=*/true, multiply_block);
  } else if (g) {
    for_each_group(ops, call.order, {call.dout}, multiply_block);
  }
}

template <typename acc_t>
void mid_backward(const ExpertBackward& call, const Matrix& g, const TokenGradients& gradients) {
  const ExpertOperands& ops = call.ops;
  const int64_t* positions = call.slot_positions;
  torch::stable::parallel_for(0, call.num_tokens(), kRowGrain, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> token_g(ops.top_k * ops.rank), dlogits(ops.num_experts);
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t j = 0; j < ops.top_k; ++j)
        convert_row({token_g.data() + j * ops.rank, ops.accumulate, ops.rank},
                    row_at(g, positions[token * ops.top_k + j]), 1.0, ops.rank);
      gate_backward(call, gradients, token, token_g.data(), dlogits.data());
    }
  });
}

// Columns [first, first + width) of dx = dlogits router_weight + Σ_j drop_j'(dh_j lora_a[ids[j]]) from
// product [T k, width], these columns of dh lora_a.
template <typename storage_t>
void write_strip_of_dx(const ExpertBackward& call, const TokenGradients& gradients,
                       const Matrix& product, int64_t first, int64_t width) {
  using acc_t = acc_of<storage_t>;
  const ExpertOperands& ops = call.ops;
  const int64_t top_k = ops.top_k;
  const auto* ids = call.topk_ids.as<int64_t>();
  const Tensor router = empty({ops.num_experts, width}, ops.compute);
  convert(rows_of(router), row_at(ops.router_weight, 0, first), 1.0, ops.num_experts, width);
  const Tensor packed_router = pack_rows(router, ops.num_experts);
  const auto* router_rows = dense_data<const packed_of<storage_t>>(packed_router);
  torch::stable::parallel_for(0, call.num_tokens(), kRowGrain, [&](int64_t begin, int64_t end) {
    ExpertMask mask(ops, width);
    std::vector<acc_t> sum(width), dlogits(ops.num_experts);
    const Rows sum_row{sum.data(), ops.accumulate, width};
    for (int64_t token = begin; token < end; ++token) {
      std::fill(sum.begin(), sum.end(), acc_t{0});
      convert_row({dlogits.data(), ops.accumulate, ops.num_experts},
                  row_at(*gradients.dlogits, token), 1.0, ops.num_experts);
      add_rows(sum.data(), dlogits.data(), router_rows, ops.num_experts, width);
      for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot)
        accumulate_row(sum_row, row_at(product, call.slot_positions[slot]), 1.0, width,
                       mask.draw(ids[slot], token, first, width));
      convert_row(row_at(*gradients.dx, token, first), sum_row, 1.0, width);
    }
  });
}

template <typename storage_t>
void down_backward(const ExpertBackward& call, const TokenGradients& gradients) {
  const ExpertOperands& ops = call.ops;
  const int64_t num_in = ops.in_features, num_slots = call.num_tokens() * ops.top_k;
  const Tensor product = empty({num_slots, std::min(kStripColumns, num_in)}, ops.compute);
  for_each_strip(num_in, [&](int64_t first, int64_t width) {
    const Matrix strip = columns(product, 0, width);
    multiply_groups(ops, call.order, strip.tensor, gradients.dh->tensor, [&](int64_t i) {
      return columns(row_block(ops.lora_a.tensor, i * ops.rank, ops.rank), first, width);
    });
    write_strip_of_dx<storage_t>(call, gradients, strip, first, width);
  });
}

}  // namespace

void forward_grouped(const ExpertForward& call) {
  const ExpertOperands& ops = call.ops;
  const int64_t num_tokens = call.num_tokens(), num_slots = num_tokens * ops.top_k;
  visit_storage(ops.compute, [&](auto* type) {
    using storage_t = std::remove_pointer_t<decltype(type)>;
    torch::stable::parallel_for(0, num_tokens, kRowGrain, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kRouterRows)
        route_tokens<storage_t>(call, first, std::min(kRouterRows, end - first));
    });
  });
  const SlotOrder order = SlotOrder::allocate(num_slots, ops.num_experts);
  sort_slots(call.topk_ids.tensor, order);
  const Tensor h = empty({num_slots, ops.rank}, ops.compute);
  for_each_group(ops, order, {call.x, /*masked=*/true},
                 [&](int64_t i, int64_t first, const Tensor& rows) {
                   multiply(row_block(h, first, rows.size(0)), rows,
                            transposed(row_block(ops.lora_a.tensor, i * ops.rank, ops.rank)), 0.0,
                            ops.dropout.scale());
                 });
  scatter_h(call, order, h);
  up(call, order, gated_h(ops, order, call.h, call.topk_ids, call.topk_weights));
}

void backward_grouped(const ExpertBackward& call, const TokenGradients& gradients,
                      const std::optional<Tensor>& z, const std::optional<Tensor>& dlora_b) {
  const ExpertOperands& ops = call.ops;
  std::optional<Tensor> g;
  if (call.gradient_of_h()) g = empty({call.num_tokens() * ops.top_k, ops.rank}, ops.compute);
  up_backward(call, g, z, dlora_b);
  if (!g) return;
  visit_storage(ops.compute, [&](auto* type) {
    using storage_t = std::remove_pointer_t<decltype(type)>;
    mid_backward<acc_of<storage_t>>(call, *g, gradients);
    if (gradients.dx) down_backward<storage_t>(call, gradients);
  });
}

}  // namespace lowrank_ext::cpu
