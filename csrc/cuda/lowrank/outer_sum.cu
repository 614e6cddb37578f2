#include "lowrank/outer_sum.h"

namespace lowrank_ext::cuda {
namespace {

template <class Compute>
void launch_outer_sum(const char* name, const ThinProductPlan& plan, const MatrixRef& source,
                      const MatrixRef& thin, const DropoutArgs& dropout, double scale,
                      bool transposed, void* partials, bool finite_only, Stream stream) {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;
  ThinProductParams<Compute, OuterSumOp> params{};
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

ThinProductPlan plan_outer_sum(ComputeType compute_type, int64_t num_rows, int64_t num_cols,
                               int64_t rank, int num_sms) {
  return dispatch(compute_type, [&](auto compute) {
    return plan_thin_product(num_cols, num_rows, rank, compute_traits<decltype(compute)>(), false,
                             num_sms);
  });
}

int64_t outer_sum_bytes(ComputeType compute_type, int64_t num_rows, int64_t num_cols, int64_t rank,
                        bool transposed, int num_sms) {
  const ThinProductPlan plan = plan_outer_sum(compute_type, num_rows, num_cols, rank, num_sms);
  const int64_t num_sums =
      transposed ? rank * padded_to_sector(num_cols) : num_cols * padded_to_sector(rank);
  return dispatch(compute_type, [&](auto compute) -> int64_t {
    return plan.num_splits * num_sums * compute_traits<decltype(compute)>().acc_bytes;
  });
}

void outer_sum(const char* name, ComputeType compute_type, const MatrixRef& source,
               const MatrixRef& thin, const DropoutArgs& dropout, double scale, bool transposed,
               void* partials, const Device& device, bool finite_only) {
  const ThinProductPlan plan =
      plan_outer_sum(compute_type, source.num_rows, source.num_cols, thin.num_cols, device.num_sms);
  dispatch(compute_type, [&](auto compute) {
    launch_outer_sum<decltype(compute)>(name, plan, source, thin, dropout, scale, transposed,
                                        partials, finite_only, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
