// One pass over the rows of x (forward) or of dout (backward): a token is routed, multiplied with
// the rows of its own experts and written while its row is in L1. lora_b is read transposed, so
// that both of its products run along N; rows of a weighted sum are packed (row_products.h).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "experts.h"

namespace lowrank_ext::cpu {
namespace {

constexpr int64_t kRowGrain = 16;    // rows per task, about 20 us
constexpr int64_t kRouterRows = 16;  // tokens routed at a time, while the router's rows are in L1

// The experts' half of one token's forward. Scratch rows belong to one thread.
template <typename storage_t>
class TokenForward {
 public:
  using acc_t = acc_of<storage_t>;

  TokenForward(const ExpertForward& call, const Matrix& packed_b)
      : call_(call),
        ops_(call.ops),
        packed_b_(packed_b),
        mask_(ops_, ops_.in_features),
        input_(ops_.in_features),
        output_(ops_.out_features),
        h_(ops_.rank) {}

  void run(int64_t token) {
    const int64_t num_out = ops_.out_features, rank = ops_.rank;
    const Rows output{output_.data(), ops_.accumulate, num_out};
    convert_row(output, row_at(call_.base_out, token), 1.0, num_out);
    std::memset(row_at(call_.h, token).data, 0, ops_.num_experts * rank * size_of(call_.h.dtype));
    const auto* ids = call_.topk_ids.as<int64_t>() + token * ops_.top_k;
    const auto* weights = call_.topk_weights.as<acc_t>() + token * ops_.top_k;
    const auto* b = packed_b_.as<packed_of<storage_t>>();
    const bool one_input = ops_.shared_dropout || !ops_.dropout.active();
    const storage_t* input = nullptr;
    for (int64_t j = 0; j < ops_.top_k; ++j) {
      if (j == 0 || !one_input)
        input = load_row(row_at(call_.x, token), ops_.compute, ops_.in_features,
                         mask_.draw(ids[j], token, 0, ops_.in_features), input_.data());
      down(ids[j], input, row_at(call_.h, token, ids[j] * rank));
      const auto factor = static_cast<acc_t>(ops_.scaling) * weights[j];
      for (acc_t& h : h_) h *= factor;
      add_rows(output_.data(), h_.data(), b + ids[j] * packed_rows<storage_t>(rank) * num_out, rank,
               num_out);
    }
    convert_row(row_at(call_.y, token), output, 1.0, num_out);
  }

 private:
  // h_ = scale · lora_a[expert] input, rounded as it is kept for backward.
  void down(int64_t expert, const storage_t* input, Rows kept) {
    const int64_t rank = ops_.rank;
    const auto* a = ops_.lora_a.as<storage_t>();
    dot_rows(h_.data(), input, a + expert * rank * ops_.in_features, rank, ops_.in_features);
    const Rows h{h_.data(), ops_.accumulate, rank};
    convert_row(kept, h, ops_.dropout.scale(), rank);
    convert_row(h, kept, 1.0, rank);
  }

  const ExpertForward& call_;
  const ExpertOperands& ops_;
  const Matrix& packed_b_;
  ExpertMask mask_;
  std::vector<storage_t> input_;
  std::vector<acc_t> output_, h_;
};

// The weights as the backward reads them.
struct BackwardWeights {
  Matrix b;                        // [E r_e, N], for dot products
  Matrix packed_a, packed_router;  // for weighted sums, into dx
};

// The backward of one token, without the sums over tokens.
template <typename storage_t>
class TokenBackward {
 public:
  using acc_t = acc_of<storage_t>;

  TokenBackward(const ExpertBackward& call, const BackwardWeights& weights)
      : call_(call),
        weights_(weights),
        mask_(call.ops, call.ops.in_features),
        dout_(call.ops.converts() ? call.ops.out_features : 0),
        g_(call.ops.top_k * call.ops.rank),
        dlogits_(call.ops.num_experts),
        dx_(call.ops.in_features) {}

  void run(int64_t token, const TokenGradients& gradients) {
    const ExpertOperands& ops = call_.ops;
    const storage_t* dout = load_row<storage_t>(row_at(call_.dout, token), ops.compute,
                                                ops.out_features, nullptr, dout_.data());
    const int64_t* ids = call_.topk_ids.as<int64_t>() + token * ops.top_k;
    const auto* b = weights_.b.as<storage_t>();
    for (int64_t j = 0; j < ops.top_k; ++j)
      dot_rows(g_.data() + j * ops.rank, dout, b + ids[j] * ops.rank * ops.out_features, ops.rank,
               ops.out_features);
    for (acc_t& g : g_) g *= static_cast<acc_t>(ops.scaling);
    gate_backward(call_, gradients, token, g_.data(), dlogits_.data());
    if (gradients.dx) down_backward(token, ids, gradients);
  }

 private:
  // dx = dlogits router_weight + Σ_j drop_j'(dh_j lora_a[ids[j]])
  void down_backward(int64_t token, const int64_t* ids, const TokenGradients& gradients) {
    const ExpertOperands& ops = call_.ops;
    const int64_t num_cols = ops.in_features, rank = ops.rank;
    std::fill(dx_.begin(), dx_.end(), acc_t{0});
    const auto* router = weights_.packed_router.as<packed_of<storage_t>>();
    add_rows(dx_.data(), dlogits_.data(), router, ops.num_experts, num_cols);
    const auto* a = weights_.packed_a.as<packed_of<storage_t>>();
    for (int64_t j = 0; j < ops.top_k; ++j)
      add_rows(dx_.data(), g_.data() + j * rank,
               a + ids[j] * packed_rows<storage_t>(rank) * num_cols, rank, num_cols,
               draw(token, ids, j, gradients));
    convert_row(row_at(*gradients.dx, token), {dx_.data(), ops.accumulate, num_cols}, 1.0,
                num_cols);
  }

  // Keep bits of the token's j-th choice, stored for dlora_a where it needs them.
  const uint64_t* draw(int64_t token, const int64_t* ids, int64_t j,
                       const TokenGradients& gradients) {
    const int64_t num_cols = call_.ops.in_features;
    if (!gradients.keep_bits) return mask_.draw(ids[j], token, 0, num_cols);
    uint64_t* bits =
        gradients.keep_bits->as<uint64_t>() +
        call_.slot_positions[token * call_.ops.top_k + j] * gradients.keep_bits->stride;
    mask_.draw(ids[j], token, 0, num_cols, bits);
    return bits;
  }

  const ExpertBackward& call_;
  const BackwardWeights& weights_;
  ExpertMask mask_;
  std::vector<storage_t> dout_;
  std::vector<acc_t> g_, dlogits_, dx_;
};

}  // namespace

void forward_per_token(const ExpertForward& call) {
  const Matrix packed_b = pack_rows(transposed_experts(call.ops), call.ops.rank);
  visit_storage(call.ops.compute, [&](auto* type) {
    using storage_t = std::remove_pointer_t<decltype(type)>;
    torch::stable::parallel_for(0, call.num_tokens(), kRowGrain, [&](int64_t begin, int64_t end) {
      TokenForward<storage_t> forward(call, packed_b);
      for (int64_t first = begin; first < end; first += kRouterRows) {
        const int64_t count = std::min(kRouterRows, end - first);
        route_tokens<storage_t>(call, first, count);
        for (int64_t token = first; token < first + count; ++token) forward.run(token);
      }
    });
  });
}

void backward_per_token(const ExpertBackward& call, const TokenGradients& gradients) {
  const ExpertOperands& ops = call.ops;
  visit_storage(ops.compute, [&](auto* type) {
    using Backward = TokenBackward<std::remove_pointer_t<decltype(type)>>;
    const bool dx = gradients.dx.has_value();
    const BackwardWeights weights{
        transposed_experts(ops), dx ? pack_rows(ops.lora_a.tensor, ops.rank) : ops.lora_a.tensor,
        dx ? pack_rows(ops.router_weight.tensor, ops.num_experts) : ops.router_weight.tensor};
    torch::stable::parallel_for(0, call.num_tokens(), kRowGrain, [&](int64_t begin, int64_t end) {
      Backward backward(call, weights);
      for (int64_t token = begin; token < end; ++token) backward.run(token, gradients);
    });
  });
}

}  // namespace lowrank_ext::cpu
