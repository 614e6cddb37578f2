// dW [R, K] = dz_gᵀ drop_g(x) per group of columns, as partial sums: see masked_product.cuh.
#include "experts/dropout_product.cuh"

namespace lowrank_ext::cuda {

PartialSumsWorkspace moe_outer_workspace(NumberKind kind, int64_t num_rows, int64_t in_features,
                                         int64_t num_cols, int num_sms) {
  return dispatch(kind, [&](auto number) -> PartialSumsWorkspace {
    using Number = decltype(number);
    const int num_splits =
        plan_masked_product<Number>(in_features, num_rows, num_cols, num_sms).num_splits;
    const int64_t stride = padded_to_sector(in_features);
    return {num_splits, stride, num_splits * num_cols * stride * number_traits<Number>().acc_bytes};
  });
}

void moe_outer(NumberKind kind, const Any& dz, const Any& x, const ExpertColumns& columns,
               bool shared_dropout, const DropoutArgs& dropout, void* dw, const Device& device) {
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
    params.partials = {static_cast<acc_t*>(dw), plan.num_splits * num_cols, stride, stride, true};
    params.rows_per_split = num_cols;
    params.groups = MaskGroups::of(columns, shared_dropout);
    params.scale = static_cast<acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_masked_product("moe_outer", plan, params, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
