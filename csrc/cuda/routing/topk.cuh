// The top-k of a row of logits by a group of lanes of one warp, in registers. Expert i of E is the
// (i / lanes)-th of lane i % lanes of its group; `lanes` is a power of two, 32 at most, and a warp
// works on 32 / lanes rows at once. Choices come in descending order of their logits; a tie goes to
// the lower id and NaN counts as greater than any number, so that any row gives distinct ids. A
// choice is the first expert behind the one before it in that order, found by the lanes for their
// own experts and then by shuffles; nothing has to be marked as taken. All of it is in acc_t. Every
// lane of the warp takes part in every call. No shared memory.
#pragma once

#include <climits>

#include "common/mma.cuh"

namespace lowrank_ext::cuda {

// The lanes that share a row.
struct LaneGroup {
  int lane;   // this thread's, of the group
  int lanes;  // of the group

  static __device__ __forceinline__ LaneGroup of(int thread, int lanes) {
    return {thread & (lanes - 1), lanes};
  }

  // Σ over the group, with the same bits in all of its lanes.
  template <class T>
  __device__ __forceinline__ T sum(T value) const {
    for (int distance = 1; distance < lanes; distance *= 2)
      value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
    return value;
  }
};

template <class acc_t>
struct Choice {
  acc_t logit;
  int expert;

  // Before and behind every expert.
  static __device__ __forceinline__ Choice first() { return {acc_t(NAN), -1}; }
  static __device__ __forceinline__ Choice last() { return {acc_t(-INFINITY), INT_MAX}; }

  __device__ __forceinline__ bool before(const Choice& other) const {
    const bool nan = logit != logit, other_nan = other.logit != other.logit;
    if (nan != other_nan) return nan;
    if (nan || logit == other.logit) return expert < other.expert;
    return logit > other.logit;
  }
};

// The first expert of the row behind `previous`, the same in all lanes of the group. row.each(f)
// calls f(logit, expert) for the lane's own experts.
template <class acc_t, class Row>
__device__ __forceinline__ Choice<acc_t> next_choice(const Row& row, const LaneGroup& group,
                                                     const Choice<acc_t>& previous) {
  Choice<acc_t> best = Choice<acc_t>::last();
  row.each([&](acc_t logit, int expert) {
    const Choice<acc_t> candidate{logit, expert};
    if (previous.before(candidate) && candidate.before(best)) best = candidate;
  });
  for (int distance = 1; distance < group.lanes; distance *= 2) {
    const Choice<acc_t> other{__shfl_xor_sync(0xFFFFFFFFu, best.logit, distance),
                              __shfl_xor_sync(0xFFFFFFFFu, best.expert, distance)};
    if (other.before(best)) best = other;
  }
  return best;
}

// The largest logit of a row, and Σ exp(logit - max) over its choices.
template <class acc_t>
struct ChosenSum {
  acc_t max = 0, sum = 0;
};

// f(j, choice) in all lanes for each of a row's top_k choices.
template <class acc_t, class Row, class F>
__device__ __forceinline__ ChosenSum<acc_t> choose(const Row& row, const LaneGroup& group,
                                                   int top_k, F f) {
  ChosenSum<acc_t> chosen;
  Choice<acc_t> choice = Choice<acc_t>::first();
  for (int j = 0; j < top_k; ++j) {
    choice = next_choice(row, group, choice);
    if (j == 0) chosen.max = choice.logit;
    chosen.sum += exponential(choice.logit - chosen.max);
    f(j, choice);
  }
  return chosen;
}

// Σ exp(logit - max) over a row.
template <class acc_t, class Row>
__device__ __forceinline__ acc_t sum_exponentials(const Row& row, const LaneGroup& group,
                                                  acc_t max) {
  acc_t sum = 0;
  row.each([&](acc_t logit, int) { sum += exponential(logit - max); });
  return group.sum(sum);
}

// A row of any number of logits where they lie; a lane's experts are its own number, plus multiples
// of its group's lanes.
template <class acc_t, class scalar_t>
struct RowInMemory {
  const scalar_t* logits;
  LaneGroup group;
  int num_experts;

  template <class F>
  __device__ __forceinline__ void each(F f) const {
    for (int expert = group.lane; expert < num_experts; expert += group.lanes)
      f(convert<acc_t>(logits[expert]), expert);
  }
};

// A row of up to kExpertsPerLane · lanes logits. Fill `logits` (what lies beyond the row's end is
// not looked at), then call route; ranks, prob and weight are about the same experts as `logits`.
constexpr int kExpertsPerLane = 8;

template <class acc_t>
struct RoutedRow {
  acc_t logits[kExpertsPerLane];
  int ranks[kExpertsPerLane];  // j where the expert is the row's j-th choice, else -1
  acc_t max, sum, chosen_sum;  // the largest logit, Σ exp(logit - max) over all and the chosen
  LaneGroup group;
  int num_experts;

  __device__ __forceinline__ RoutedRow(const LaneGroup& group, int num_experts)
      : group(group), num_experts(num_experts) {}

  __device__ __forceinline__ int expert(int slot) const { return slot * group.lanes + group.lane; }
  __device__ __forceinline__ acc_t prob(int slot) const {
    return exponential(logits[slot] - max) / sum;
  }
  // Of an expert that was chosen.
  __device__ __forceinline__ acc_t weight(int slot) const {
    return exponential(logits[slot] - max) / chosen_sum;
  }

  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int slot = 0; slot < kExpertsPerLane; ++slot)
      if (expert(slot) < num_experts) f(logits[slot], expert(slot));
  }

  __device__ __forceinline__ void route(int top_k) {
#pragma unroll
    for (int slot = 0; slot < kExpertsPerLane; ++slot) ranks[slot] = -1;
    const auto chosen = choose<acc_t>(*this, group, top_k, [&](int j, const Choice<acc_t>& choice) {
#pragma unroll
      for (int slot = 0; slot < kExpertsPerLane; ++slot)
        if (expert(slot) == choice.expert) ranks[slot] = j;
    });
    max = chosen.max;
    chosen_sum = chosen.sum;
    sum = sum_exponentials(*this, group, max);
  }
};

}  // namespace lowrank_ext::cuda
