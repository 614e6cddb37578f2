// h [M, r] = drop(x) lora_aᵀ: see thin_product.cuh. Where the contraction is split,
// partial_sums.cuh adds the parts.
#include "common/partial_sums.cuh"
#include "lowrank/thin_product.cuh"

namespace lowrank_ext::cuda {
namespace {

// Up to 16 rows, lora_a is what streams (decoding).
template <class Number>
ThinProductPlan plan_lowrank_down(int64_t num_rows, int64_t in_features, int64_t rank,
                                  int num_sms) {
  return plan_thin_product(num_rows, in_features, rank, number_traits<Number>(), num_rows <= 16,
                           num_sms);
}

template <class Number>
ThinProductParams<Number, DownOp> params_of(const Any& x, const Any& lora_a,
                                            const DropoutArgs& dropout) {
  ThinProductParams<Number, DownOp> params{};
  params.large = matrix_of<const typename Number::scalar_t>(x);
  params.thin = matrix_of<const typename Number::scalar_t>(lora_a);
  params.rows_per_split = x.num_rows;
  params.scale = static_cast<typename Number::acc_t>(dropout.scale);
  params.dropout = {dropout.threshold, dropout.seed};
  return params;
}

template <class Number>
void launch_lowrank_down(const Any& x, const Any& lora_a, const Any& h, const DropoutArgs& dropout,
                         void* workspace, const Device& device) {
  using scalar_t = typename Number::scalar_t;
  using acc_t = typename Number::acc_t;
  const int64_t num_rows = x.num_rows, rank = lora_a.num_rows;
  const ThinProductPlan plan =
      plan_lowrank_down<Number>(num_rows, x.num_cols, rank, device.num_sms);
  ThinProductParams<Number, DownOp> params = params_of<Number>(x, lora_a, dropout);
  if (plan.num_splits == 1) {
    params.out = matrix_of<scalar_t>(h);
    return launch_thin_product("lowrank_down", plan, params, device.stream);
  }
  const int64_t stride = padded_to_sector(rank);
  params.partials = {static_cast<acc_t*>(workspace), plan.num_splits * num_rows, stride, stride,
                     true};
  launch_thin_product("lowrank_down", plan, params, device.stream);
  const Matrix<acc_t>& partials = params.partials;
  launch_partial_sums<Number>({partials.data, partials.num_rows, rank, stride, true},
                              plan.num_splits, {matrix_of<scalar_t>(h), {}}, num_rows, rank,
                              device.stream);
}

}  // namespace

int64_t lowrank_down_workspace_bytes(NumberKind kind, int64_t num_rows, int64_t in_features,
                                     int64_t rank, int num_sms) {
  return dispatch(kind, [&](auto number) -> int64_t {
    using Number = decltype(number);
    const auto plan = plan_lowrank_down<Number>(num_rows, in_features, rank, num_sms);
    if (plan.num_splits == 1) return 0;
    return plan.num_splits * num_rows * padded_to_sector(rank) * sizeof(typename Number::acc_t);
  });
}

void lowrank_down(NumberKind kind, const Any& x, const Any& lora_a, const Any& h,
                  const DropoutArgs& dropout, void* workspace, const Device& device) {
  dispatch(kind, [&](auto number) {
    launch_lowrank_down<decltype(number)>(x, lora_a, h, dropout, workspace, device);
  });
}

PartialSumsWorkspace lowrank_down_partials_workspace(NumberKind kind, int64_t num_rows,
                                                     int64_t in_features, int64_t num_cols,
                                                     int num_sms) {
  return dispatch(kind, [&](auto number) -> PartialSumsWorkspace {
    using Number = decltype(number);
    const int num_splits =
        plan_lowrank_down<Number>(num_rows, in_features, num_cols, num_sms).num_splits;
    const int64_t stride = padded_to_sector(num_cols), element = sizeof(typename Number::acc_t);
    return {num_splits, stride, num_splits * num_rows * stride * element};
  });
}

void lowrank_down_partials(NumberKind kind, const Any& x, const Any& w, const ZPartials& z,
                           const Device& device) {
  dispatch(kind, [&](auto number) {
    using Number = decltype(number);
    auto params = params_of<Number>(x, w, DropoutArgs{});
    params.partials = {static_cast<typename Number::acc_t*>(z.data), z.num_splits * x.num_rows,
                       z.row_stride, z.row_stride, true};
    const auto plan = plan_lowrank_down<Number>(x.num_rows, x.num_cols, w.num_rows, device.num_sms);
    launch_thin_product("lowrank_down", plan, params, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
