// Routing of logits [T, E] (topk.cuh finds a row's k experts; softmax and sums in acc_t):
//     weights [T, k]   softmax over the chosen logits
//     counts [E]       choices of each expert by the tokens that count (token_mask)
//     loss []          E Σ_i f_i P_i,  f_i = counts[i] / tokens,  P_i = mean of softmax(row)[i]
// and the order of the slots by expert (slot_order.cuh). moe_route_kernel is one block that does
// all of it for few tokens: its warps take turns over the tokens, their sums meet in shared memory
// and are added in the order of the warps, then the slots are sorted in the same memory (48 KiB at
// most). For more tokens route_tokens_kernel (route_many_experts_kernel beyond 256 experts, whose
// rows it reads again for each choice) leaves the warps' sums in the workspace, balance.cuh adds
// them and order_slots sorts. Backward, one launch, with w and p the two softmaxes of a row again,
//     dlogits[i] = p_i (d_i - Σ p d)  +  (if i is choice j)  w_j (dw_j - Σ w dw)
// where d_i = dloss · E · counts[i] / tokens². Lanes without a token or an expert take part in the
// shuffles and store nothing.
#pragma once

#include <algorithm>

#include "routing/balance.cuh"
#include "routing/slot_order.cuh"
#include "routing/topk.cuh"

namespace lowrank_ext::cuda {

template <class scalar_t>
using statistics_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

constexpr int64_t kMaxExpertsInRegisters = kExpertsPerLane * kWarpSize;

// Few enough to need few shuffles, enough to read whole sectors of 32 bytes.
inline int lanes_of_row(int64_t num_experts, int64_t element_bytes) {
  int lanes = 1;
  while (lanes < kWarpSize && (lanes * kExpertsPerLane < num_experts ||
                               (lanes < num_experts && lanes * element_bytes < 32)))
    lanes *= 2;
  return lanes;
}

template <class scalar_t>
struct RouteParams {
  using acc_t = statistics_t<scalar_t>;

  Matrix<const scalar_t> logits;  // [T, E]
  Matrix<const bool> token_mask;  // [1, T], or absent: every token counts
  int top_k, lanes;               // lanes of a row
  Matrix<acc_t> topk_weights;     // [T, k]
  Matrix<int64_t> topk_ids;       // [T, k]
  Matrix<acc_t> prob_sums;        // [num_warps, E], in many blocks
  Matrix<int> choices;            // [num_warps, E], in many blocks
  Matrix<int64_t> expert_counts;  // [1, E]
  Matrix<acc_t> balance_loss;     // [1, 1]
  // In one block.
  Matrix<int64_t> sorted_slots, expert_offsets, slot_positions;  // [1, T k], [1, E + 1], [1, T k]

  __host__ __device__ __forceinline__ int num_experts() const {
    return static_cast<int>(logits.num_cols);
  }
  __device__ __forceinline__ bool counts(int64_t token) const {
    return token < logits.num_rows && (!token_mask || *token_mask.at(0, token));
  }

  template <class F>
  void each_tensor(F&& f) const {
    f("logits", logits);
    f("token_mask", token_mask);
    f("topk_weights", topk_weights);
    f("topk_ids", topk_ids);
    f("prob_sums", prob_sums);
    f("choices", choices);
    f("expert_counts", expert_counts);
    f("balance_loss", balance_loss);
    f("sorted_slots", sorted_slots);
    f("expert_offsets", expert_offsets);
    f("slot_positions", slot_positions);
  }
};

namespace detail {

// The tokens of one warp, and the sums over them.
template <class scalar_t>
struct WarpRouter {
  using acc_t = statistics_t<scalar_t>;

  const RouteParams<scalar_t>& params;
  const LaneGroup group;
  acc_t prob_sums[kExpertsPerLane] = {};
  int choices[kExpertsPerLane] = {};

  explicit __device__ __forceinline__ WarpRouter(const RouteParams<scalar_t>& params)
      : params(params), group(LaneGroup::of(threadIdx.x % kWarpSize, params.lanes)) {}

  __device__ __forceinline__ void route(int64_t token) {
    const int num_experts = params.num_experts();
    const bool inside = token < params.logits.num_rows;
    RoutedRow<acc_t> row(group, num_experts);
#pragma unroll
    for (int slot = 0; slot < kExpertsPerLane; ++slot) {
      const int expert = row.expert(slot);
      row.logits[slot] =
          inside && expert < num_experts ? convert<acc_t>(*params.logits.at(token, expert)) : 0;
    }
    row.route(params.top_k);
    const bool counts = params.counts(token);
#pragma unroll
    for (int slot = 0; slot < kExpertsPerLane; ++slot) {
      if (row.expert(slot) >= num_experts || !inside) continue;
      const int rank = row.ranks[slot];
      if (counts) {
        prob_sums[slot] += row.prob(slot);
        if (rank >= 0) ++choices[slot];
      }
      if (rank < 0) continue;
      *params.topk_weights.at(token, rank) = row.weight(slot);
      *params.topk_ids.at(token, rank) = row.expert(slot);
    }
  }

  // Every num_warps-th step of the call's tokens, a step being as many rows as the warp has groups.
  __device__ __forceinline__ void route_all(int64_t warp, int64_t num_warps) {
    const int per_step = kWarpSize / group.lanes;
    const int own = threadIdx.x % kWarpSize / group.lanes;
    for (int64_t first = warp * per_step; first < params.logits.num_rows;
         first += num_warps * per_step)
      route(first + own);
  }

  // Adds the groups' sums and stores them.
  __device__ __forceinline__ void store_sums(acc_t* to_prob_sums, int* to_choices) {
    const bool first_group = static_cast<int>(threadIdx.x % kWarpSize) < group.lanes;
#pragma unroll
    for (int slot = 0; slot < kExpertsPerLane; ++slot) {
      for (int distance = group.lanes; distance < kWarpSize; distance *= 2) {
        prob_sums[slot] += __shfl_xor_sync(0xFFFFFFFFu, prob_sums[slot], distance);
        choices[slot] += __shfl_xor_sync(0xFFFFFFFFu, choices[slot], distance);
      }
      const int expert = slot * group.lanes + group.lane;
      if (!first_group || expert >= params.num_experts()) continue;
      to_prob_sums[expert] = prob_sums[slot];
      to_choices[expert] = choices[slot];
    }
  }
};

}  // namespace detail

// ---- few tokens: one block

template <class scalar_t>
constexpr int kRouteThreads = sizeof(scalar_t) == 8 ? 512 : 768;  // as the registers allow

template <class scalar_t>
__global__ void __launch_bounds__(kRouteThreads<scalar_t>)
    moe_route_kernel(const RouteParams<scalar_t> params) {
  using acc_t = statistics_t<scalar_t>;
  const int num_experts = params.num_experts();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  unsigned char* const shared = dynamic_shared_memory();
  acc_t* const prob_sums = reinterpret_cast<acc_t*>(shared);
  int* const choices = reinterpret_cast<int*>(prob_sums + num_warps * num_experts);

  detail::WarpRouter<scalar_t> router(params);
  router.route_all(warp, num_warps);
  router.store_sums(prob_sums + warp * num_experts, choices + warp * num_experts);
  __syncthreads();
  if (warp == 0) {
    BalanceSum<acc_t, acc_t> balance{params.expert_counts, params.balance_loss, params.top_k};
    for (int expert = lane; expert < num_experts; expert += kWarpSize)
      balance.add(expert, prob_sums + expert, choices + expert, num_warps, num_experts);
    balance.store_loss(lane);
  }
  __syncthreads();  // the sums have been read
  order_in_block({params.topk_ids.data, params.logits.num_rows * params.top_k, num_experts, false},
                 {params.sorted_slots.data, params.expert_offsets.data, params.slot_positions.data},
                 reinterpret_cast<int*>(shared));
}

// ---- many tokens or experts

constexpr int kRouteTokensThreads = 256;

template <class scalar_t>
__global__ void __launch_bounds__(kRouteTokensThreads, 2)
    route_tokens_kernel(const RouteParams<scalar_t> params) {
  constexpr int kWarps = kRouteTokensThreads / kWarpSize;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  detail::WarpRouter<scalar_t> router(params);
  router.route_all(warp, int64_t{gridDim.x} * kWarps);
  router.store_sums(params.prob_sums.at(warp, 0), params.choices.at(warp, 0));
}

template <class scalar_t>
__global__ void __launch_bounds__(kRouteTokensThreads, sizeof(scalar_t) == 8 ? 3 : 4)
    route_many_experts_kernel(const RouteParams<scalar_t> params) {
  using acc_t = statistics_t<scalar_t>;
  constexpr int kWarps = kRouteTokensThreads / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const LaneGroup group{lane, kWarpSize};
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  acc_t* const prob_sums = params.prob_sums.at(warp, 0);
  int* const choices = params.choices.at(warp, 0);
  for (int expert = lane; expert < params.num_experts(); expert += kWarpSize)
    prob_sums[expert] = 0, choices[expert] = 0;

  for (int64_t token = warp; token < params.logits.num_rows; token += int64_t{gridDim.x} * kWarps) {
    const RowInMemory<acc_t, scalar_t> row{params.logits.at(token, 0), group, params.num_experts()};
    const bool counts = params.counts(token);
    // Choice j waits in the output for the sum, with the lane that wrote it.
    acc_t* const weights = params.topk_weights.at(token, 0);
    const auto chosen =
        choose<acc_t>(row, group, params.top_k, [&](int j, const Choice<acc_t>& choice) {
          if (counts && choice.expert % kWarpSize == lane) ++choices[choice.expert];
          if (j % kWarpSize != lane) return;
          weights[j] = choice.logit;
          *params.topk_ids.at(token, j) = choice.expert;
        });
    for (int j = lane; j < params.top_k; j += kWarpSize)
      weights[j] = exponential(weights[j] - chosen.max) / chosen.sum;
    if (!counts) continue;
    const acc_t sum = sum_exponentials(row, group, chosen.max);
    row.each([&](acc_t logit, int expert) {
      prob_sums[expert] += exponential(logit - chosen.max) / sum;
    });
  }
}

// ---- backward

template <class scalar_t>
struct RouteBackwardParams {
  using acc_t = statistics_t<scalar_t>;

  Matrix<const acc_t> dweights;         // [T, k] or absent
  Matrix<const acc_t> dloss;            // [1, 1] or absent
  Matrix<const scalar_t> logits;        // [T, E]
  Matrix<const int64_t> topk_ids;       // [T, k]
  Matrix<const int64_t> expert_counts;  // [1, E]
  Matrix<const bool> token_mask;        // [1, T] or absent
  int top_k, lanes;
  Matrix<scalar_t> dlogits;  // [T, E]

  template <class F>
  void each_tensor(F&& f) const {
    f("dweights", dweights);
    f("dloss", dloss);
    f("logits", logits);
    f("topk_ids", topk_ids);
    f("expert_counts", expert_counts);
    f("token_mask", token_mask);
    f("dlogits", dlogits);
  }
};

namespace detail {

template <class scalar_t>
struct RouteBackward {
  using acc_t = statistics_t<scalar_t>;

  const RouteBackwardParams<scalar_t>& params;
  const LaneGroup group;
  const int num_experts, num_pieces;
  acc_t dprob_factor = 0;  // d_i = dprob_factor · counts[i]
  bool has_dprobs = false;

  // One piece of a row.
  int first = 0;
  acc_t logits[kExpertsPerLane], dprobs[kExpertsPerLane];
  acc_t dweights[kExpertsPerLane];
  unsigned chosen;  // bit by slot

  explicit __device__ __forceinline__ RouteBackward(const RouteBackwardParams<scalar_t>& params)
      : params(params),
        group(LaneGroup::of(threadIdx.x % kWarpSize, params.lanes)),
        num_experts(static_cast<int>(params.logits.num_cols)),
        num_pieces((num_experts + kExpertsPerLane * params.lanes - 1) /
                   (kExpertsPerLane * params.lanes)) {
    if (params.dloss) find_dprob_factor();
    if (num_pieces == 1) load_dprobs();
  }

  __device__ __forceinline__ void find_dprob_factor() {
    const LaneGroup warp{static_cast<int>(threadIdx.x % kWarpSize), kWarpSize};
    acc_t choices = 0;
    for (int i = warp.lane; i < num_experts; i += kWarpSize)
      choices += static_cast<acc_t>(*params.expert_counts.at(0, i));
    choices = warp.sum(choices);
    has_dprobs = choices > 0;
    const acc_t tokens = has_dprobs ? choices / params.top_k : 1;
    dprob_factor = *params.dloss.at(0, 0) * num_experts / tokens / tokens;
  }

  __device__ __forceinline__ int expert(int slot) const {
    return first + slot * group.lanes + group.lane;
  }

  // f(slot) for the lane's experts of the piece.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int slot = 0; slot < kExpertsPerLane; ++slot)
      if (expert(slot) < num_experts) f(slot);
  }

  __device__ __forceinline__ void load_dprobs() {
    each([&](int slot) {
      dprobs[slot] =
          has_dprobs ? dprob_factor * static_cast<acc_t>(*params.expert_counts.at(0, expert(slot)))
                     : 0;
    });
  }

  __device__ __forceinline__ void load_row(int64_t token) {
    each([&](int slot) {
      logits[slot] = convert<acc_t>(*params.logits.at(token, expert(slot)));
      dweights[slot] = 0;
    });
    chosen = 0;
    if (!params.dweights) return;
    for (int j = 0; j < params.top_k; ++j) {
      const int64_t id = *params.topk_ids.at(token, j);
      const acc_t dweight = *params.dweights.at(token, j);
      each([&](int slot) {
        if (expert(slot) != id) return;
        dweights[slot] = dweight;
        chosen |= 1u << slot;
      });
    }
  }

  // f() for each piece of the row; the only one stays in registers.
  template <class F>
  __device__ __forceinline__ void each_piece(int64_t token, bool inside, F f) {
    for (int piece = 0; piece < num_pieces; ++piece) {
      if (num_pieces > 1) {
        first = piece * kExpertsPerLane * group.lanes;
        load_dprobs();
        if (inside) load_row(token);
      }
      if (inside) f();
    }
  }

  __device__ __forceinline__ void run(int64_t token) {
    const bool inside = token < params.logits.num_rows;
    const bool counts =
        has_dprobs && inside && (!params.token_mask || *params.token_mask.at(0, token));
    if (num_pieces == 1 && inside) load_row(token);
    acc_t max = -INFINITY;  // a NaN shows in the sums
    each_piece(token, inside,
               [&] { each([&](int slot) { max = logits[slot] > max ? logits[slot] : max; }); });
    for (int distance = 1; distance < group.lanes; distance *= 2) {
      const acc_t other = __shfl_xor_sync(0xFFFFFFFFu, max, distance);
      max = other > max ? other : max;
    }
    // Over all experts, and over the chosen.
    acc_t sum = 0, mean = 0, chosen_sum = 0, chosen_mean = 0;
    each_piece(token, inside, [&] {
      each([&](int slot) {
        const acc_t power = exponential(logits[slot] - max);
        sum += power;
        mean += power * dprobs[slot];
        if (!(chosen >> slot & 1)) return;
        chosen_sum += power;
        chosen_mean += power * dweights[slot];
      });
    });
    sum = group.sum(sum);
    mean = group.sum(mean) / sum;
    chosen_sum = group.sum(chosen_sum);
    chosen_mean = group.sum(chosen_mean) / chosen_sum;
    each_piece(token, inside, [&] {
      each([&](int slot) {
        const acc_t power = exponential(logits[slot] - max);
        acc_t dlogit = counts ? power / sum * (dprobs[slot] - mean) : 0;
        if (chosen >> slot & 1) dlogit += power / chosen_sum * (dweights[slot] - chosen_mean);
        *params.dlogits.at(token, expert(slot)) = convert<scalar_t>(dlogit);
      });
    });
  }
};

}  // namespace detail

template <class scalar_t>
__global__ void __launch_bounds__(kRouteTokensThreads, 2)
    moe_route_backward_kernel(const RouteBackwardParams<scalar_t> params) {
  constexpr int kWarps = kRouteTokensThreads / kWarpSize;
  detail::RouteBackward<scalar_t> backward(params);
  const int per_step = kWarpSize / params.lanes;
  const int own = threadIdx.x % kWarpSize / params.lanes;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  for (int64_t first = warp * per_step; first < params.logits.num_rows;
       first += int64_t{gridDim.x} * kWarps * per_step)
    backward.run(first + own);
}

// ---- plan

// One block up to 8192 tokens: its passes then take about as long as the launches that it saves.
// Reasoned, not measured; as is the number of blocks otherwise, enough to fill every SM.
struct RoutePlan {
  bool one_block;
  int lanes;
  int64_t num_warps;  // of one block, or of the many

  RoutePlan(int64_t num_tokens, int64_t num_experts, int64_t element_bytes, int num_sms) {
    constexpr int64_t kMaxTokens = 8192;
    one_block = num_tokens <= kMaxTokens && num_experts <= kMaxExpertsInRegisters;
    lanes = lanes_of_row(num_experts, element_bytes);
    const int64_t steps = (num_tokens * lanes + kWarpSize - 1) / kWarpSize;
    const int64_t most_warps =
        (element_bytes == 8 ? kRouteThreads<double> : kRouteThreads<float>) / kWarpSize;
    num_warps = one_block ? std::clamp<int64_t>(steps, 1, most_warps)
                          : num_blocks(num_tokens, num_sms) * (kRouteTokensThreads / kWarpSize);
  }
  int64_t num_blocks(int64_t num_tokens, int num_sms) const {
    const int64_t tokens = int64_t{kRouteTokensThreads / lanes};
    return std::min<int64_t>((num_tokens + tokens - 1) / tokens, int64_t{2} * num_sms);
  }
};

}  // namespace lowrank_ext::cuda
