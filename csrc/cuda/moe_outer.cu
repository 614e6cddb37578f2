// dW [R, K] = dz_gᵀ drop_g(x) per group of columns: one pass over x, whose partial sums are written
// as rows of dW (masked_product.cuh), then added in order.
#include "masked_product.cuh"
#include "partial_sums.cuh"

namespace lowrank_ext::cuda {

int64_t moe_outer_workspace_bytes(NumberKind kind, int64_t num_rows, int64_t in_features,
                                  const ExpertColumns& columns, int num_sms) {
  return dispatch(kind, [&](auto number) -> int64_t {
    using Number = decltype(number);
    const ThinProductPlan plan =
        plan_masked_product<Number>(in_features, num_rows, columns.num_cols, num_sms);
    return plan.num_splits * columns.num_cols * padded_to_sector(in_features) *
           number_traits<Number>().acc_bytes;
  });
}

void moe_outer(NumberKind kind, const Any& dz, const Any& x, const ExpertColumns& columns,
               bool shared_dropout, const DropoutArgs& dropout, const Any& dw, void* workspace,
               const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using scalar_t = typename Number::scalar_t;
    using acc_t = typename Number::acc_t;
    const int64_t num_cols = columns.num_cols, stride = padded_to_sector(x.num_cols);
    const ThinProductPlan plan =
        plan_masked_product<Number>(x.num_cols, x.num_rows, columns.num_cols, device.num_sms);
    MaskedProductParams<Number, MoeOuterOp> params{};
    params.large = matrix_of<const scalar_t>(x);
    params.thin = matrix_of<const scalar_t>(dz);
    params.partials = {static_cast<acc_t*>(workspace), plan.num_splits * num_cols, stride, stride,
                       true};
    params.rows_per_split = num_cols;
    params.groups = MaskGroups::of(columns, shared_dropout);
    params.scale = static_cast<acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_masked_product("moe_outer", plan, params, device.stream);
    launch_partial_sums<Number>(
        {params.partials.data, plan.num_splits * num_cols, x.num_cols, stride, true},
        plan.num_splits, output_of<Number>(dw), num_cols, x.num_cols, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
