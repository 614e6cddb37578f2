// dlora_a [r, K] = dhᵀ drop(x): one pass over x, whose partial sums are written as rows of dlora_a,
// then added in order.
#include "common/partial_sums.cuh"
#include "lowrank/kernels.h"
#include "lowrank/outer_sum.h"

namespace lowrank_ext::cuda {

int64_t lowrank_down_backward_workspace_bytes(ComputeType compute_type, int64_t num_rows,
                                              int64_t in_features, int64_t rank, int num_sms) {
  return outer_sum_bytes(compute_type, num_rows, in_features, rank, /*transposed=*/true, num_sms);
}

void lowrank_down_backward_lora_a(ComputeType compute_type, const MatrixRef& dh, const MatrixRef& x,
                                  const DropoutArgs& dropout, const MatrixRef& dlora_a,
                                  void* workspace, const Device& device) {
  const int64_t rank = dh.num_cols, in_features = x.num_cols;
  const int num_splits =
      plan_outer_sum(compute_type, x.num_rows, in_features, rank, device.num_sms).num_splits;
  outer_sum("lowrank_down_backward_lora_a", compute_type, x, dh, dropout, dropout.scale,
            /*transposed=*/true, workspace, device);
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using acc_t = typename Compute::acc_t;
    launch_partial_sums<Compute>({static_cast<const acc_t*>(workspace), num_splits * rank,
                                  in_features, padded_to_sector(in_features), true},
                                 num_splits, output_of<Compute>(dlora_a), rank, in_features,
                                 device.stream);
  });
}

PartialSumsSize dense_outer_packed_workspace(ComputeType compute_type, int64_t num_rows,
                                             int64_t in_features, int64_t num_cols, int num_sms) {
  return {
      plan_outer_sum(compute_type, num_rows, in_features, num_cols, num_sms).num_splits,
      padded_to_sector(in_features),
      outer_sum_bytes(compute_type, num_rows, in_features, num_cols, /*transposed=*/true, num_sms)};
}

void dense_outer_packed(ComputeType compute_type, const MatrixRef& dz, const MatrixRef& x,
                        void* workspace, const Device& device) {
  outer_sum("dense_outer_packed", compute_type, x, dz, DropoutArgs{}, 1.0, /*transposed=*/true,
            workspace, device, /*finite_only=*/true);
}

}  // namespace lowrank_ext::cuda
