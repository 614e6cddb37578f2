// out[i, j] = Σ_s partials[s][i, j], added in the order of s, so that a sum that was split over
// blocks has the same bits in every run. A thread owns one element (i, j); neighboring threads own
// neighboring j, so loads are coalesced. No shared memory. Sums are in acc_t and rounded once, to
// the output's type. The last block's threads beyond the end return.
#pragma once

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/tile.cuh"

namespace lowrank_ext::cuda {

// A gradient in its adapter tensor's own type: x's, or the accumulator's beside a narrower x. At
// most one of the two is there.
template <class Compute>
struct Output {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  Matrix<scalar_t> narrow;
  Matrix<acc_t> wide;

  __host__ __device__ __forceinline__ explicit operator bool() const { return narrow || wide; }

  __device__ __forceinline__ void store(int64_t row, int64_t col, acc_t value) const {
    if (narrow) *narrow.at(row, col) = convert<scalar_t>(value);
    if (wide) *wide.at(row, col) = value;
  }
  template <class F>
  void each_tensor(const char* name, F&& f) const {
    f(name, narrow);
    f(name, wide);
  }
};

template <class Compute>
Output<Compute> output_of(const MatrixRef& ref) {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  if (ref.type == element_type<scalar_t>()) return {matrix_of<scalar_t>(ref), {}};
  return {{}, matrix_of<acc_t>(ref)};
}

// The sum for one element of partials [num_partials · num_rows, …].
template <class acc_t>
__device__ __forceinline__ acc_t sum_partials(const Matrix<const acc_t>& partials, int num_partials,
                                              int64_t num_rows, int64_t row, int64_t col) {
  acc_t sum = 0;
#pragma unroll 4  // several loads in flight; the order of the additions stays
  for (int s = 0; s < num_partials; ++s) sum += *partials.at(s * num_rows + row, col);
  return sum;
}

template <class Compute>
struct PartialSumsParams {
  Matrix<const typename Compute::acc_t> partials;  // [num_partials · num_rows, num_cols]
  int num_partials;
  int64_t num_rows, num_cols;
  Output<Compute> out;  // [num_rows, num_cols]

  template <class F>
  void each_tensor(F&& f) const {
    f("partials", partials);
    out.each_tensor("out", f);
  }
};

constexpr int kPartialSumsThreads = 256;

template <class Compute>
__global__ void __launch_bounds__(kPartialSumsThreads)
    partial_sums_kernel(PartialSumsParams<Compute> params) {
  const int64_t i = int64_t{blockIdx.x} * kPartialSumsThreads + threadIdx.x;
  if (i >= params.num_rows * params.num_cols) return;
  const int64_t row = i / params.num_cols, col = i % params.num_cols;
  params.out.store(row, col,
                   sum_partials(params.partials, params.num_partials, params.num_rows, row, col));
}

// partials: row s · num_rows + i, column j holds partials[s][i, j].
template <class Compute>
void launch_partial_sums(const Matrix<const typename Compute::acc_t>& partials, int num_partials,
                         const Output<Compute>& out, int64_t num_rows, int64_t num_cols,
                         Stream stream) {
  const int64_t num_blocks = (num_rows * num_cols + kPartialSumsThreads - 1) / kPartialSumsThreads;
  launch_kernel("partial_sums", partial_sums_kernel<Compute>,
                {static_cast<unsigned>(num_blocks), 1, 1, kPartialSumsThreads, 0},
                PartialSumsParams<Compute>{partials, num_partials, num_rows, num_cols, out},
                stream);
}

}  // namespace lowrank_ext::cuda
