// dw [R, K] = dzᵀ x of the dense form without dropout, as partial sums: outer_sum.cuh's.
#include "experts/kernels.h"

namespace lowrank_ext::cuda {

PartialSumsSize dense_outer_packed_workspace(ComputeType compute_type, int64_t num_rows,
                                             int64_t in_features, int64_t num_cols, int num_sms) {
  return outer_sum_size(compute_type, num_rows, in_features, num_cols, /*transposed=*/true,
                        num_sms);
}

void dense_outer_packed(ComputeType compute_type, const MatrixRef& dz, const MatrixRef& x,
                        void* workspace, const Device& device) {
  outer_sum(compute_type, x, dz, DropoutArgs{}, 1.0, /*transposed=*/true, workspace, device,
            /*finite_only=*/true);
}

}  // namespace lowrank_ext::cuda
