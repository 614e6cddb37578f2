// Two copies around the dense form of moe_lowrank_add, each one launch.
//
// dense_stack makes two matrices in x's type out of router_weight [E, K], lora_a [E, r, K] and
// lora_b [E, N, r]:
//     w [R, K]          row c is the router's or an expert's row that `columns` puts there, or zero
//     up [N, E r]       up[n, e r + j] = lora_b[e, n, j]
// dense_unstack takes the gradients of both apart: it adds the partial sums of dw in their order
// and rounds each element once, to the type of its own tensor.
//
// Row y of the grid is one part (w, up; drouter_weight, dlora_a, dlora_b), its blocks of 256
// threads stride over the part's elements, neighboring threads over neighboring columns of the
// stacked matrix. No shared memory; an element is one thread's, so there are no tails. What is next
// to each other in lora_b are runs of r elements: whole sectors from 32 bytes on.
#pragma once

#include <algorithm>

#include "common/partial_sums.cuh"
#include "experts/dense_columns.h"

namespace lowrank_ext::cuda {

// An adapter tensor in x's type, or in the accumulator's beside a narrower x.
template <class Compute>
struct Input {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  Matrix<const scalar_t> narrow;
  Matrix<const acc_t> wide;

  __device__ __forceinline__ scalar_t load(int64_t row, int64_t col) const {
    return wide ? convert<scalar_t>(*wide.at(row, col)) : *narrow.at(row, col);
  }
  template <class F>
  void each_tensor(const char* name, F&& f) const {
    f(name, narrow);
    f(name, wide);
  }
};

template <class Compute>
Input<Compute> input_of(const MatrixRef& ref) {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  if (ref.type == element_type<scalar_t>()) return {matrix_of<const scalar_t>(ref), {}};
  return {{}, matrix_of<const acc_t>(ref)};
}

template <class Compute>
struct DenseStackParams {
  using scalar_t = typename Compute::scalar_t;

  DenseColumns columns;
  Input<Compute> router_weight, lora_a, lora_b;  // [E, K], [E r, K], [E N, r]
  Matrix<scalar_t> w, up;                        // either may be absent

  template <class F>
  void each_tensor(F&& f) const {
    router_weight.each_tensor("router_weight", f);
    lora_a.each_tensor("lora_a", f);
    lora_b.each_tensor("lora_b", f);
    f("w", w);
    f("up", up);
  }
};

template <class Compute>
struct DenseUnstackParams {
  using acc_t = typename Compute::acc_t;

  DenseColumns columns;
  Matrix<const acc_t> dw;   // [num_partials · R, K]
  Matrix<const acc_t> dup;  // [N, E r]
  int num_partials;
  Output<Compute> drouter_weight, dlora_a, dlora_b;  // as above; each may be absent

  template <class F>
  void each_tensor(F&& f) const {
    f("dw", dw);
    f("dup", dup);
    drouter_weight.each_tensor("drouter_weight", f);
    dlora_a.each_tensor("dlora_a", f);
    dlora_b.each_tensor("dlora_b", f);
  }
};

struct DenseStackPlan {
  static constexpr unsigned kThreads = 256;
  static constexpr int64_t kMaxBlocks = 1024;  // of one part: enough to fill any GPU
};

namespace detail {

// f(row, col) for this thread's elements of a part.
template <class F>
__device__ __forceinline__ void for_each_element(int64_t num_rows, int64_t num_cols, F f) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < num_rows * num_cols;
       i += step)
    f(i / num_cols, i % num_cols);
}

}  // namespace detail

template <class Compute>
__global__ void __launch_bounds__(DenseStackPlan::kThreads)
    dense_stack_kernel(DenseStackParams<Compute> params) {
  using scalar_t = typename Compute::scalar_t;
  const DenseColumns& columns = params.columns;
  if (blockIdx.y == 0) {
    detail::for_each_element(params.w.num_rows, params.w.num_cols, [&](int64_t row, int64_t col) {
      const int stacked = static_cast<int>(row);
      scalar_t value = scalar_t(0.0f);
      if (row < columns.num_experts) value = params.router_weight.load(row, col);
      if (columns.expert_of(stacked) >= 0)
        value = params.lora_a.load(columns.place_of(stacked), col);
      *params.w.at(row, col) = value;
    });
  } else {
    const int64_t num_rows = params.up.num_rows;
    detail::for_each_element(num_rows, params.up.num_cols, [&](int64_t row, int64_t col) {
      const int64_t expert = col / columns.rank;
      *params.up.at(row, col) = params.lora_b.load(expert * num_rows + row, col % columns.rank);
    });
  }
}

template <class Compute>
__global__ void __launch_bounds__(DenseStackPlan::kThreads)
    dense_unstack_kernel(DenseUnstackParams<Compute> params) {
  const DenseColumns& columns = params.columns;
  const int num_experts = columns.num_experts, rank = columns.rank;
  const auto sum = [&](int64_t row, int64_t col) {
    return sum_partials(params.dw, params.num_partials, columns.num_cols, row, col);
  };
  if (blockIdx.y == 0) {
    if (!params.drouter_weight) return;
    detail::for_each_element(num_experts, params.dw.num_cols, [&](int64_t row, int64_t col) {
      params.drouter_weight.store(row, col, sum(row, col));
    });
  } else if (blockIdx.y == 1) {
    if (!params.dlora_a) return;
    detail::for_each_element(int64_t{num_experts} * rank, params.dw.num_cols,
                             [&](int64_t row, int64_t col) {
                               const int stacked = columns.col_of(static_cast<int>(row));
                               params.dlora_a.store(row, col, sum(stacked, col));
                             });
  } else {
    if (!params.dlora_b) return;
    const int64_t num_rows = params.dup.num_rows;
    detail::for_each_element(num_rows, params.dup.num_cols, [&](int64_t row, int64_t col) {
      params.dlora_b.store(col / rank * num_rows + row, col % rank, *params.dup.at(row, col));
    });
  }
}

inline LaunchShape stack_shape(int64_t most_elements, unsigned num_parts) {
  constexpr int64_t kThreads = DenseStackPlan::kThreads;
  const int64_t num_blocks =
      std::min((most_elements + kThreads - 1) / kThreads, DenseStackPlan::kMaxBlocks);
  return {static_cast<unsigned>(num_blocks), num_parts, 1, DenseStackPlan::kThreads, 0};
}

template <class Compute>
void launch_dense_stack(const DenseStackParams<Compute>& params, Stream stream) {
  const int64_t most =
      std::max(params.w.num_rows * params.w.num_cols, params.up.num_rows * params.up.num_cols);
  launch_kernel("dense_stack", dense_stack_kernel<Compute>, stack_shape(most, 2), params, stream);
}

template <class Compute>
void launch_dense_unstack(const DenseUnstackParams<Compute>& params, Stream stream) {
  const int64_t most = std::max(params.columns.num_cols * params.dw.num_cols,
                                params.dup.num_rows * params.dup.num_cols);
  launch_kernel("dense_unstack", dense_unstack_kernel<Compute>, stack_shape(most, 3), params,
                stream);
}

}  // namespace lowrank_ext::cuda
