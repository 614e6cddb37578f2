// dlora_a [r, K] = dhᵀ drop(x): one pass over x, whose partial sums are written as rows of dlora_a,
// then added in order.
#include "common/partial_sums.cuh"
#include "lowrank/kernels.h"

namespace lowrank_ext::cuda {

int64_t lowrank_down_backward_workspace_bytes(ComputeType compute_type, int64_t num_rows,
                                              int64_t in_features, int64_t rank, int num_sms) {
  return outer_sum_size(compute_type, num_rows, in_features, rank, /*transposed=*/true, num_sms)
      .bytes;
}

void lowrank_down_backward_lora_a(ComputeType compute_type, const MatrixRef& dh, const MatrixRef& x,
                                  const DropoutArgs& dropout, const MatrixRef& dlora_a,
                                  void* workspace, const Device& device) {
  const int64_t rank = dh.num_cols, in_features = x.num_cols;
  const PartialSumsSize sums = outer_sum_size(compute_type, x.num_rows, in_features, rank,
                                              /*transposed=*/true, device.num_sms);
  outer_sum(compute_type, x, dh, dropout, dropout.scale, /*transposed=*/true, workspace, device);
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using acc_t = typename Compute::acc_t;
    launch_partial_sums<Compute>({static_cast<const acc_t*>(workspace), sums.num_splits * rank,
                                  in_features, sums.row_stride, true},
                                 sums.num_splits, output_of<Compute>(dlora_a), rank, in_features,
                                 device.stream);
  });
}

}  // namespace lowrank_ext::cuda
