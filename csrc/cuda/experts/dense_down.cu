// z [M, R] = drop_g(x) W_gᵀ per group of columns, as partial sums: see masked_product.cuh.
#include "experts/dropout_product.cuh"

namespace lowrank_ext::cuda {

PartialSumsWorkspace moe_down_workspace(NumberKind kind, int64_t num_rows, int64_t in_features,
                                        int64_t num_cols, int num_sms) {
  return dispatch(kind, [&](auto number) -> PartialSumsWorkspace {
    using Number = decltype(number);
    const int num_splits =
        plan_masked_product<Number>(num_rows, in_features, num_cols, num_sms).num_splits;
    const int64_t stride = padded_to_sector(num_cols);
    return {num_splits, stride, num_splits * num_rows * stride * number_traits<Number>().acc_bytes};
  });
}

void moe_down(NumberKind kind, const Any& x, const Any& w, const ExpertColumns& columns,
              bool shared_dropout, const DropoutArgs& dropout, const ZPartials& z,
              const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    using scalar_t = typename Number::scalar_t;
    using acc_t = typename Number::acc_t;
    const ThinProductPlan plan =
        plan_masked_product<Number>(x.num_rows, x.num_cols, columns.num_cols, device.num_sms);
    MaskedProductParams<Number, MoeDownOp> params{};
    params.large = matrix_of<const scalar_t>(x);
    params.thin = matrix_of<const scalar_t>(w);
    params.partials = {static_cast<acc_t*>(z.data), z.num_splits * x.num_rows, z.row_stride,
                       z.row_stride, true};
    params.rows_per_split = x.num_rows;
    params.groups = MaskGroups::of(columns, shared_dropout);
    params.scale = static_cast<acc_t>(dropout.scale);
    params.dropout = {dropout.threshold, dropout.seed};
    launch_masked_product("moe_down", plan, params, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
