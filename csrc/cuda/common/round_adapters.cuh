// rounded[i, j] = source[i, j] for up to five adapter tensors in one launch: fp32 adapters beside a
// half-size x are rounded to its type (to nearest even) once per call, and rows that are not dense
// become so. Row y of the grid owns one tensor, its blocks stride over the elements; no shared
// memory, no tails: an element is one thread's. The tensors are [r, K], [N, r] and smaller, so what
// a source with strided columns costs does not show.
#pragma once

#include <algorithm>

#include "common/dispatch.h"
#include "common/kernels.h"

namespace lowrank_ext::cuda {

template <class scalar_t>
struct AdapterCopyParams {
  Matrix<const float> wide;     // [num_rows, extent of a row]; where absent, the source is
  Matrix<const scalar_t> same;  // this one
  int64_t col_stride;
  Matrix<scalar_t> rounded;  // [num_rows, num_cols]
};

template <class scalar_t>
struct RoundAdaptersParams {
  AdapterCopyParams<scalar_t> copies[kMaxAdapterCopies];

  template <class F>
  void each_tensor(F&& f) const {
    for (const auto& copy : copies) {
      f("adapter", copy.wide);
      f("adapter", copy.same);
      f("rounded", copy.rounded);
    }
  }
};

struct RoundAdaptersPlan {
  static constexpr unsigned kThreads = 256;
  static constexpr int64_t kMaxBlocks = 1024;  // of one tensor: enough to fill any GPU
};

template <class scalar_t>
__global__ void __launch_bounds__(RoundAdaptersPlan::kThreads)
    round_adapters_kernel(RoundAdaptersParams<scalar_t> params) {
  const AdapterCopyParams<scalar_t>& copy = params.copies[blockIdx.y];
  const int64_t num_cols = copy.rounded.num_cols;
  const int64_t num_elements = copy.rounded.num_rows * num_cols;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < num_elements; i += step) {
    const int64_t row = i / num_cols, col = i % num_cols;
    *copy.rounded.at(row, col) = copy.wide
                                     ? convert<scalar_t>(*copy.wide.at(row, col * copy.col_stride))
                                     : *copy.same.at(row, col * copy.col_stride);
  }
}

template <class scalar_t>
void launch_round_adapters(const AdapterCopy* copies, int num_copies, const Device& device) {
  RoundAdaptersParams<scalar_t> params;
  int64_t most_elements = 0;
  for (int i = 0; i < num_copies; ++i) {
    const AdapterCopy& copy = copies[i];
    MatrixRef source = copy.source;
    most_elements = std::max(most_elements, source.num_rows * source.num_cols);
    source.num_cols = (source.num_cols - 1) * copy.col_stride + 1;
    const bool wide = source.type != copy.rounded.type;
    params.copies[i] = {matrix_of<const float>(wide ? source : MatrixRef{}),
                        matrix_of<const scalar_t>(wide ? MatrixRef{} : source), copy.col_stride,
                        matrix_of<scalar_t>(copy.rounded)};
  }
  const int64_t num_blocks =
      std::min((most_elements + RoundAdaptersPlan::kThreads - 1) / RoundAdaptersPlan::kThreads,
               RoundAdaptersPlan::kMaxBlocks);
  const LaunchShape shape{static_cast<unsigned>(num_blocks), static_cast<unsigned>(num_copies), 1,
                          RoundAdaptersPlan::kThreads, 0};
  launch_kernel("round_adapters", round_adapters_kernel<scalar_t>, shape, params, device.stream);
}

}  // namespace lowrank_ext::cuda
