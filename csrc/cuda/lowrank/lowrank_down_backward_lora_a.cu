// dlora_a [r, K] = dhᵀ drop(x): one pass over x, whose partial sums are written as rows of dlora_a,
// then added in order.
#include "lowrank/outer_sum.h"
#include "common/partial_sums.cuh"

namespace lowrank_ext::cuda {

int64_t lowrank_down_backward_workspace_bytes(NumberKind kind, int64_t num_rows,
                                              int64_t in_features, int64_t rank, int num_sms) {
  return outer_sum_bytes(kind, num_rows, in_features, rank, /*transposed=*/true, num_sms);
}

void lowrank_down_backward_lora_a(NumberKind kind, const Any& dh, const Any& x,
                                  const DropoutArgs& dropout, const Any& dlora_a, void* workspace,
                                  const Device& device) {
  const int64_t rank = dh.num_cols, in_features = x.num_cols;
  const int num_splits =
      plan_outer_sum(kind, x.num_rows, in_features, rank, device.num_sms).num_splits;
  outer_sum("lowrank_down_backward_lora_a", kind, x, dh, dropout, dropout.scale,
            /*transposed=*/true, workspace, device);
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using acc_t = typename Number::acc_t;
    launch_partial_sums<Number>({static_cast<const acc_t*>(workspace), num_splits * rank,
                                 in_features, padded_to_sector(in_features), true},
                                num_splits, output_of<Number>(dlora_a), rank, in_features,
                                device.stream);
  });
}

PartialSumsWorkspace moe_down_backward_workspace(NumberKind kind, int64_t num_rows,
                                                 int64_t in_features, int64_t num_cols,
                                                 int num_sms) {
  return {plan_outer_sum(kind, num_rows, in_features, num_cols, num_sms).num_splits,
          padded_to_sector(in_features),
          outer_sum_bytes(kind, num_rows, in_features, num_cols, /*transposed=*/true, num_sms)};
}

void moe_down_backward_w(NumberKind kind, const Any& dz, const Any& x, void* workspace,
                         const Device& device) {
  outer_sum("moe_down_backward_w", kind, x, dz, DropoutArgs{}, 1.0, /*transposed=*/true, workspace,
            device, /*finite_only=*/true);
}

}  // namespace lowrank_ext::cuda
