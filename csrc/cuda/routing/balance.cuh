// The last step of the balance loss, for everything that routes: from the sums over tokens that
// each part of a call has made (a warp of moe_route.cuh, a block of moe_gate.cuh)
//     counts[i] = Σ_part choices[part, i]
//     loss      = E Σ_i f_i P_i,  f_i = counts[i] / tokens,
//                                 P_i = Σ_part prob_sums[part, i] / tokens
// with tokens = Σ_i counts[i] / top_k, and 0 where there are none. Sums in sum_t, in a fixed order.
//
// One block of 1024 threads. Its warps share the parts, 32 experts at a time, and leave their sums
// in shared memory (1024 (sizeof(sum_t) + sizeof(count_t)) bytes), where the first warp adds them.
#pragma once

#include "common/launch.h"
#include "common/tile.cuh"
#include "routing/topk.cuh"

namespace lowrank_ext::cuda {

template <class sum_t, class count_t, class loss_t>
struct BalanceParams {
  Matrix<const sum_t> prob_sums;  // [parts, E]
  Matrix<const count_t> choices;  // [parts, E]
  int top_k;
  Matrix<int64_t> expert_counts;  // [1, E]
  Matrix<loss_t> balance_loss;    // [1, 1]

  template <class F>
  void each_tensor(F&& f) const {
    f("prob_sums", prob_sums);
    f("choices", choices);
    f("expert_counts", expert_counts);
    f("balance_loss", balance_loss);
  }
};

// What one warp makes of the parts' sums: a lane's experts are lane, lane + 32, ….
template <class sum_t, class loss_t>
struct BalanceSum {
  const Matrix<int64_t>& expert_counts;
  const Matrix<loss_t>& balance_loss;
  int top_k;
  sum_t products = 0;  // Σ_i counts[i] · (sum of probabilities of i)
  int64_t chosen = 0;  // Σ_i counts[i]

  // Rows of sums about `expert` (this lane's), stride elements apart.
  template <class count_t>
  __device__ __forceinline__ void add(int expert, const sum_t* prob_sums, const count_t* choices,
                                      int num_rows, int stride) {
    sum_t sum = 0;
    int64_t count = 0;
    for (int row = 0; row < num_rows; ++row) {
      sum += prob_sums[row * stride];
      count += choices[row * stride];
    }
    *expert_counts.at(0, expert) = count;
    products += static_cast<sum_t>(count) * sum;
    chosen += count;
  }

  __device__ __forceinline__ void store_loss(int lane) {
    const LaneGroup warp{lane, kWarpSize};
    products = warp.sum(products);
    chosen = warp.sum(chosen);
    if (lane != 0) return;
    const sum_t tokens = chosen > 0 ? static_cast<sum_t>(chosen) / top_k : 1;
    const sum_t num_experts = static_cast<sum_t>(expert_counts.num_cols);
    *balance_loss.at(0, 0) = static_cast<loss_t>(num_experts * (products / tokens / tokens));
  }
};

constexpr int kBalanceThreads = 1024;

template <class sum_t, class count_t, class loss_t>
__global__ void __launch_bounds__(kBalanceThreads)
    balance_kernel(BalanceParams<sum_t, count_t, loss_t> params) {
  constexpr int kWarps = kBalanceThreads / kWarpSize;
  const int num_experts = static_cast<int>(params.expert_counts.num_cols);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  sum_t* const shared_sums = reinterpret_cast<sum_t*>(dynamic_shared_memory());
  count_t* const shared_choices = reinterpret_cast<count_t*>(shared_sums + kBalanceThreads);
  BalanceSum<sum_t, loss_t> balance{params.expert_counts, params.balance_loss, params.top_k};
  for (int first = 0; first < num_experts; first += kWarpSize) {
    const int expert = first + lane;
    sum_t sum = 0;
    count_t count = 0;
    if (expert < num_experts) {
#pragma unroll 4  // several loads in flight
      for (int64_t part = warp; part < params.prob_sums.num_rows; part += kWarps) {
        sum += *params.prob_sums.at(part, expert);
        count += *params.choices.at(part, expert);
      }
    }
    shared_sums[threadIdx.x] = sum;
    shared_choices[threadIdx.x] = count;
    __syncthreads();
    if (warp == 0 && expert < num_experts)
      balance.add(expert, shared_sums + lane, shared_choices + lane, kWarps, kWarpSize);
    __syncthreads();
  }
  if (warp == 0) balance.store_loss(lane);
}

template <class sum_t, class count_t, class loss_t>
void launch_balance(const BalanceParams<sum_t, count_t, loss_t>& params, Stream stream) {
  launch_kernel("balance", balance_kernel<sum_t, count_t, loss_t>,
                {1, 1, 1, kBalanceThreads, kBalanceThreads * (sizeof(sum_t) + sizeof(count_t))},
                params, stream);
}

}  // namespace lowrank_ext::cuda
