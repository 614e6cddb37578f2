#include "lowrank/outer_sum.h"

namespace lowrank_ext::cuda {
namespace {

template <class Number>
void launch_outer_sum(const char* name, const ThinProductPlan& plan, const Any& source,
                      const Any& thin, const DropoutArgs& dropout, double scale, bool transposed,
                      void* partials, bool finite_only, Stream stream) {
  using scalar_t = typename Number::scalar_t;
  using acc_t = typename Number::acc_t;
  ThinProductParams<Number, OuterSumOp> params{};
  params.large = matrix_of<const scalar_t>(source);
  params.thin = matrix_of<const scalar_t>(thin);
  params.transposed_sums = transposed;
  params.rows_per_split = transposed ? thin.num_cols : source.num_cols;
  const int64_t stride = padded_to_sector(transposed ? source.num_cols : thin.num_cols);
  params.partials = {static_cast<acc_t*>(partials), plan.num_splits * params.rows_per_split, stride,
                     stride, true};
  params.scale = static_cast<acc_t>(scale);
  params.dropout = {dropout.threshold, dropout.seed};
  params.finite_only = finite_only;
  launch_thin_product(name, plan, params, stream);
}

}  // namespace

ThinProductPlan plan_outer_sum(NumberKind kind, int64_t num_rows, int64_t num_cols, int64_t rank,
                               int num_sms) {
  return dispatch(kind, [&](auto number) {
    return plan_thin_product(num_cols, num_rows, rank, number_traits<decltype(number)>(), false,
                             num_sms);
  });
}

int64_t outer_sum_bytes(NumberKind kind, int64_t num_rows, int64_t num_cols, int64_t rank,
                        bool transposed, int num_sms) {
  const ThinProductPlan plan = plan_outer_sum(kind, num_rows, num_cols, rank, num_sms);
  const int64_t num_sums =
      transposed ? rank * padded_to_sector(num_cols) : num_cols * padded_to_sector(rank);
  return dispatch(kind, [&](auto number) -> int64_t {
    return plan.num_splits * num_sums * number_traits<decltype(number)>().acc_bytes;
  });
}

void outer_sum(const char* name, NumberKind kind, const Any& source, const Any& thin,
               const DropoutArgs& dropout, double scale, bool transposed, void* partials,
               const Device& device, bool finite_only) {
  const ThinProductPlan plan =
      plan_outer_sum(kind, source.num_rows, source.num_cols, thin.num_cols, device.num_sms);
  dispatch(kind, [&](auto number) {
    launch_outer_sum<decltype(number)>(name, plan, source, thin, dropout, scale, transposed,
                                       partials, finite_only, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
