// The arithmetic of a top-k router on [T, E] tensors, in fp32 or fp64: for moe_route, which is
// given logits, and for moe_lowrank_add, which makes its own.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "matrix.h"

namespace lowrank_ext::cpu {

// One token. ids: the top_k experts in descending order of their logits; a tie goes to the lower id
// and NaN counts as greater than any number, so that any row gives distinct ids. weights: softmax
// over the chosen logits. probs: softmax over all.
template <typename acc_t>
void route_row(const acc_t* logits,                         // [E]
               acc_t* probs, acc_t* weights, int64_t* ids,  // [E], [k], [k]
               int64_t num_experts, int64_t top_k);

// The second half of route_row, for given ids.
template <typename acc_t>
void route_row_probabilities(const acc_t* logits, const int64_t* ids,  // [E], [k]
                             acc_t* probs, acc_t* weights,             // [E], [k]
                             int64_t num_experts, int64_t top_k);

// Tokens per expert and the loss E Σ_i f_i P_i that is least where they are even: f_i the share of
// the counted tokens that chose i, P_i the mean of their probs. `token_mask` names the counted
// tokens, all where absent. 0 where none is counted.
struct Balance {
  Tensor expert_counts;  // [E] int64
  Tensor loss;           // [], dtype of probs
};
Balance balance(const Tensor& probs, const Tensor& topk_ids,
                const std::optional<Tensor>& token_mask);

// d loss / d probs[t, i] = dloss · E f_i / counted tokens, the same for every counted token; f has
// no gradient. All zeros without dloss or counted tokens.
class BalanceGradient {
 public:
  BalanceGradient(const std::optional<Tensor>& dloss, const Tensor& expert_counts, int64_t top_k,
                  const std::optional<Tensor>& token_mask);

  bool counts(int64_t token) const { return active_ && (mask_ == nullptr || mask_[token]); }
  const double* dprobs() const { return dprobs_.data(); }  // [E]

 private:
  bool active_;
  std::vector<double> dprobs_;
  std::optional<Tensor> dense_mask_;
  const bool* mask_ = nullptr;
};

// dlogits [E] of one token from dweights [k] (null: zeros) and the balance loss.
template <typename acc_t>
void route_row_backward(const acc_t* probs, const acc_t* weights, const int64_t* ids,
                        const acc_t* dweights, const BalanceGradient& balance, int64_t token,
                        int64_t num_experts, int64_t top_k, acc_t* dlogits);

// Slots t k + j (token t's j-th choice), stably ordered by expert.
struct SlotOrder {
  Tensor sorted_slots;    // [T k]
  Tensor expert_offsets;  // [E + 1]: expert i's slots are sorted_slots[offsets[i] … offsets[i + 1]]
  Tensor slot_positions;  // [T k]: the inverse permutation
};
// Raises where an id is no expert's.
SlotOrder sort_slots(const char* op, const Tensor& topk_ids, int64_t num_experts);

}  // namespace lowrank_ext::cpu
