#include "routing.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "small_matrix.h"

namespace lowrank_ext::cpu {
namespace {

// Order of the top-k: NaN first, then by value.
template <typename acc_t>
bool greater(acc_t left, acc_t right) {
  return std::isnan(left) ? !std::isnan(right) : left > right;
}

// weights[j] = exp(values[j] - max) / Σ exp, NaN everywhere if any value is NaN or all are -inf.
template <typename acc_t, typename Value>
void softmax(acc_t* out, int64_t n, acc_t max, const Value& value) {
  acc_t sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += out[j] = std::exp(value(j) - max);
  for (int64_t j = 0; j < n; ++j) out[j] /= sum;
}

}  // namespace

template <typename acc_t>
void route_row(const acc_t* logits, acc_t* probs, acc_t* weights, int64_t* ids, int64_t num_experts,
               int64_t top_k) {
  // Insertion into a sorted list of at most top_k; a later expert moves up only past smaller ones.
  int64_t count = 0;
  for (int64_t i = 0; i < num_experts; ++i) {
    if (count == top_k && !greater(logits[i], logits[ids[count - 1]])) continue;
    int64_t at = count < top_k ? count++ : top_k - 1;
    for (; at > 0 && greater(logits[i], logits[ids[at - 1]]); --at) ids[at] = ids[at - 1];
    ids[at] = i;
  }
  route_row_probabilities(logits, ids, probs, weights, num_experts, top_k);
}

template <typename acc_t>
void route_row_probabilities(const acc_t* logits, const int64_t* ids, acc_t* probs, acc_t* weights,
                             int64_t num_experts, int64_t top_k) {
  const acc_t max = logits[ids[0]];
  softmax(probs, num_experts, max, [&](int64_t i) { return logits[i]; });
  softmax(weights, top_k, max, [&](int64_t j) { return logits[ids[j]]; });
}

void balance(const Tensor& probs, const Tensor& topk_ids, const std::optional<Tensor>& token_mask,
             const Tensor& expert_counts, const Tensor& loss) {
  const int64_t num_tokens = probs.size(0), num_experts = probs.size(1), top_k = topk_ids.size(1);
  const bool* mask = dense_data<const bool>(token_mask);
  zero(expert_counts);
  int64_t* counts = ids_of(expert_counts);
  const int64_t* ids = ids_of(topk_ids);
  int64_t num_counted = 0;
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (mask != nullptr && !mask[t]) continue;
    ++num_counted;
    for (int64_t j = 0; j < top_k; ++j) ++counts[ids[t * top_k + j]];
  }
  visit_accumulator(probs, [&](const auto* p) {
    std::vector<double> sums(num_experts, 0.0);
    for (int64_t t = 0; t < num_tokens; ++t) {
      if (mask != nullptr && !mask[t]) continue;
      for (int64_t i = 0; i < num_experts; ++i) sums[i] += p[t * num_experts + i];
    }
    double sum = 0;
    const double tokens = static_cast<double>(std::max<int64_t>(1, num_counted));
    for (int64_t i = 0; i < num_experts; ++i) sum += counts[i] / tokens * (sums[i] / tokens);
    visit_accumulator(loss, [&](auto* out) { *out = num_experts * sum; });
  });
}

BalanceGradient::BalanceGradient(const std::optional<Tensor>& dloss, const Tensor& expert_counts,
                                 int64_t top_k, const std::optional<Tensor>& token_mask)
    : dprobs_(expert_counts.numel(), 0.0),
      mask_tensor_(token_mask),
      mask_(dense_data<const bool>(token_mask)) {
  const int64_t* counts = ids_of(expert_counts);
  const int64_t num_experts = expert_counts.numel();
  int64_t num_chosen = 0;
  for (int64_t i = 0; i < num_experts; ++i) num_chosen += counts[i];
  active_ = dloss.has_value() && num_chosen > 0;
  if (!active_) return;
  const double tokens = static_cast<double>(num_chosen) / static_cast<double>(top_k);
  visit_accumulator(*dloss, [&](const auto* value) {
    for (int64_t i = 0; i < num_experts; ++i)
      dprobs_[i] = *value * num_experts * (counts[i] / tokens) / tokens;
  });
}

template <typename acc_t>
void route_row_backward(const acc_t* probs, const acc_t* weights, const int64_t* ids,
                        const acc_t* dweights, const BalanceGradient& balance, int64_t token,
                        int64_t num_experts, int64_t top_k, acc_t* dlogits) {
  std::fill(dlogits, dlogits + num_experts, acc_t{0});
  if (balance.counts(token)) {
    const double* dprobs = balance.dprobs();
    double mean = 0;
    for (int64_t i = 0; i < num_experts; ++i) mean += double{probs[i]} * dprobs[i];
    for (int64_t i = 0; i < num_experts; ++i)
      dlogits[i] = static_cast<acc_t>(probs[i] * (dprobs[i] - mean));
  }
  if (dweights == nullptr) return;
  acc_t mean = 0;
  for (int64_t j = 0; j < top_k; ++j) mean += weights[j] * dweights[j];
  for (int64_t j = 0; j < top_k; ++j) dlogits[ids[j]] += weights[j] * (dweights[j] - mean);
}

SlotOrder SlotOrder::allocate(int64_t num_slots, int64_t num_experts) {
  return {empty({num_slots}, ScalarType::Long), empty({num_experts + 1}, ScalarType::Long),
          empty({num_slots}, ScalarType::Long)};
}

void sort_slots(const Tensor& topk_ids, const SlotOrder& order) {
  const int64_t num_slots = topk_ids.numel(), num_experts = order.expert_offsets.numel() - 1;
  const int64_t* ids = ids_of(topk_ids);
  int64_t* sorted = ids_of(order.sorted_slots);
  int64_t* offsets = ids_of(order.expert_offsets);
  int64_t* positions = ids_of(order.slot_positions);
  std::fill(offsets, offsets + num_experts + 1, 0);
  for (int64_t slot = 0; slot < num_slots; ++slot) ++offsets[ids[slot] + 1];
  for (int64_t i = 0; i < num_experts; ++i) offsets[i + 1] += offsets[i];
  std::vector<int64_t> next(offsets, offsets + num_experts);
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    positions[slot] = next[ids[slot]]++;
    sorted[positions[slot]] = slot;
  }
}

void check_topk_ids(const char* op, const Tensor& topk_ids, int64_t num_experts) {
  const int64_t* ids = ids_of(topk_ids);
  for (int64_t slot = 0; slot < topk_ids.numel(); ++slot)
    check(ids[slot] >= 0 && ids[slot] < num_experts, op,
          ": topk_ids must be between 0 and E - 1 = ", num_experts - 1, ", got ", ids[slot]);
}

template void route_row<float>(const float*, float*, float*, int64_t*, int64_t, int64_t);
template void route_row<double>(const double*, double*, double*, int64_t*, int64_t, int64_t);
template void route_row_probabilities<float>(const float*, const int64_t*, float*, float*, int64_t,
                                             int64_t);
template void route_row_probabilities<double>(const double*, const int64_t*, double*, double*,
                                              int64_t, int64_t);
template void route_row_backward<float>(const float*, const float*, const int64_t*, const float*,
                                        const BalanceGradient&, int64_t, int64_t, int64_t, float*);
template void route_row_backward<double>(const double*, const double*, const int64_t*,
                                         const double*, const BalanceGradient&, int64_t, int64_t,
                                         int64_t, double*);

}  // namespace lowrank_ext::cpu
