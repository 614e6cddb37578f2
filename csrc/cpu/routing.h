// The arithmetic of a top-k router on [T, E] tensors, in fp32 or fp64: of moe_route, whose logits are
// given, and of moe_lowrank_add, which computes them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "matrix.h"

namespace lowrank_ext::cpu {

inline int64_t* ids_of(const Tensor& tensor) { return dense_data<int64_t>(tensor); }

// One token. ids: the top_k experts in descending order of their logits. A tie goes to the lower id,
// and NaN is greater than any number, so any row gives distinct ids. weights: softmax over the chosen
// logits. probs: softmax over all.
template <typename acc_t>
void route_row(const acc_t* logits,                         // [E]
               acc_t* probs, acc_t* weights, int64_t* ids,  // [E], [k], [k]
               int64_t num_experts, int64_t top_k);

// The probs and weights of route_row, for given ids.
template <typename acc_t>
void route_row_probabilities(const acc_t* logits, const int64_t* ids,  // [E], [k]
                             acc_t* probs, acc_t* weights,             // [E], [k]
                             int64_t num_experts, int64_t top_k);

// expert_counts [E] int64: tokens per expert. loss []: E Σ_i f_i P_i, least where the counts are even;
// f_i is the share of the counted tokens that chose i, P_i the mean of their probs [T, E].
// token_mask names the counted tokens, all where absent. The loss of no counted token is 0.
void balance(const Tensor& probs, const Tensor& topk_ids, const std::optional<Tensor>& token_mask,
             const Tensor& expert_counts, const Tensor& loss);

// d loss / d probs[t, i] = dloss · E f_i / counted tokens, the same for every counted token; f has
// no gradient. All zeros without dloss or counted tokens. expert_counts and token_mask are dense.
class BalanceGradient {
 public:
  BalanceGradient(const std::optional<Tensor>& dloss, const Tensor& expert_counts, int64_t top_k,
                  const std::optional<Tensor>& token_mask);

  bool counts(int64_t token) const { return active_ && (mask_ == nullptr || mask_[token]); }
  const double* dprobs() const { return dprobs_.data(); }  // [E]

 private:
  bool active_;
  std::vector<double> dprobs_;
  std::optional<Tensor> mask_tensor_;
  const bool* mask_;
};

// dlogits [E] of one token from dweights [k] (null: zeros) and the balance loss.
template <typename acc_t>
void route_row_backward(const acc_t* probs, const acc_t* weights, const int64_t* ids,
                        const acc_t* dweights, const BalanceGradient& balance, int64_t token,
                        int64_t num_experts, int64_t top_k, acc_t* dlogits);

// Slots t k + j (token t's j-th choice), stably sorted by expert; all int64.
struct SlotOrder {
  Tensor sorted_slots;    // [T k]
  Tensor expert_offsets;  // [E + 1]: expert i's slots are sorted_slots[offsets[i] … offsets[i + 1]]
  Tensor slot_positions;  // [T k]: the inverse permutation

  static SlotOrder allocate(int64_t num_slots, int64_t num_experts);
};
void sort_slots(const Tensor& topk_ids, const SlotOrder& order);

// Raises where an id is not between 0 and E - 1.
void check_topk_ids(const char* op, const Tensor& topk_ids, int64_t num_experts);

}  // namespace lowrank_ext::cpu
