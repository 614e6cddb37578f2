// From arguments to the kernels of lowrank_up_backward.cuh: one pass over dout for G and P, or one
// for each of them.
#include "lowrank/lowrank_up_backward.cuh"

#include "common/scratch.h"
#include "lowrank/kernels.h"

namespace lowrank_ext::cuda {
namespace {

UpBackwardPlan plan_of(ComputeType compute_type, int64_t num_rows, int64_t out_features,
                       int64_t rank, bool need_g, bool need_p, int num_sms) {
  return dispatch(compute_type, [&](auto compute) {
    return plan_up_backward(num_rows, out_features, rank, need_g, need_p,
                            compute_traits<decltype(compute)>(), num_sms);
  });
}

// P's workspace: its partial sums and, where P has a pass of its own, mid(h) [M, r].
template <class Compute>
struct PWorkspace {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  Matrix<acc_t> sums;
  MatrixRef mid;

  PWorkspace(const UpBackwardPlan& plan, int64_t num_rows, int64_t out_features, int64_t rank,
             Scratch& scratch) {
    const int64_t stride = padded_to_sector(rank), sum_rows = plan.num_p_parts() * out_features;
    sums = {scratch.array<acc_t>(sum_rows * stride), sum_rows, stride, stride, true};
    if (!plan.one_pass)
      mid = {scratch.array<scalar_t>(num_rows * stride), element_type<scalar_t>(), num_rows, rank,
             stride};
  }
};

template <class Compute>
struct UpBackwardCall {
  using scalar_t = typename Compute::scalar_t;
  using acc_t = typename Compute::acc_t;

  const MatrixRef &dout, &h;
  const Mid& mid;
  const MatrixRef &lora_b, &out_scale;
  acc_t scaling;
  const GPartials& g;
  void* p_workspace;
  Stream stream;

  int64_t num_rows() const { return dout.num_rows; }
  int64_t out_features() const { return lora_b.num_rows; }
  int64_t rank() const { return lora_b.num_cols; }

  Matrix<acc_t> g_sums() const {
    return matrix_of<acc_t>(
        {g.data, element_type<acc_t>(), g.num_splits * num_rows(), rank(), rank()});
  }
  PWorkspace<Compute> p(const UpBackwardPlan& plan) const {
    Scratch scratch(p_workspace);
    return {plan, num_rows(), out_features(), rank(), scratch};
  }
  MidFactors<scalar_t> mid_factors() const {
    return {matrix_of<const scalar_t>(mid.rank_scale), matrix_of<const scalar_t>(mid.core)};
  }

  void one_pass(const UpBackwardPlan& plan) const {
    UpBackwardParams<Compute> params{};
    params.dout = matrix_of<const scalar_t>(dout);
    params.h = matrix_of<const scalar_t>(h);
    params.mid = mid_factors();
    params.lora_b = matrix_of<const scalar_t>(lora_b);
    params.out_scale = matrix_of<const scalar_t>(out_scale);
    params.g = g_sums();
    params.p = p(plan).sums;
    params.scaling = scaling;
    launch_lowrank_up_backward(plan, params, stream);
  }

  void pass_for_g(const UpBackwardPlan& plan) const {
    ThinProductParams<Compute, UpBackwardOp> params{};
    params.large = matrix_of<const scalar_t>(dout);
    params.thin = matrix_of<const scalar_t>(lora_b);
    params.thin_scale = matrix_of<const scalar_t>(out_scale);
    params.partials = g_sums();
    params.rows_per_split = num_rows();
    params.scale = scaling;
    launch_lowrank_up_backward_g(plan.g, params, stream);
  }

  void pass_for_p(const UpBackwardPlan& plan, ComputeType compute_type,
                  const Device& device) const {
    MatrixRef left = h;
    if (mid.rank_scale || mid.core) {
      left = p(plan).mid;
      launch_mid_rows<Compute>(
          {matrix_of<const scalar_t>(h), mid_factors(), matrix_of<scalar_t>(left)}, stream);
    }
    outer_sum(compute_type, dout, left, DropoutArgs{}, scaling,
              /*transposed=*/false, p_workspace, device);
  }

  void finish_p(const UpBackwardPlan& plan, const MatrixRef& dlora_b,
                const MatrixRef& dout_scale) const {
    const Matrix<acc_t> sums = p(plan).sums;
    LoraBGradientsParams<Compute> params{};
    params.p = {sums.data, sums.num_rows, rank(), sums.row_stride, true};
    params.num_partials = static_cast<int>(plan.num_p_parts());
    params.lora_b = matrix_of<const scalar_t>(lora_b);
    params.out_scale = matrix_of<const scalar_t>(out_scale);
    params.dlora_b = output_of<Compute>(dlora_b);
    params.dout_scale = output_of<Compute>(dout_scale);
    launch_lora_b_gradients(params, stream);
  }
};

}  // namespace

UpBackwardWorkspace lowrank_up_backward_workspace(ComputeType compute_type, int64_t num_rows,
                                                  int64_t out_features, int64_t rank, bool need_g,
                                                  bool need_p, int num_sms) {
  const UpBackwardPlan plan =
      plan_of(compute_type, num_rows, out_features, rank, need_g, need_p, num_sms);
  Scratch scratch;
  if (need_p)
    dispatch(compute_type, [&](auto compute) {
      PWorkspace<decltype(compute)>(plan, num_rows, out_features, rank, scratch);
    });
  return {plan.num_g_splits(), scratch.num_bytes()};
}

void lowrank_up_backward(ComputeType compute_type, const MatrixRef& dout, const MatrixRef& h,
                         const Mid& mid, const MatrixRef& lora_b, const MatrixRef& out_scale,
                         double scaling, const GPartials& g, void* p_workspace,
                         const MatrixRef& dlora_b, const MatrixRef& dout_scale,
                         const Device& device) {
  const bool need_g = g.data != nullptr, need_p = dlora_b || dout_scale;
  const UpBackwardPlan plan = plan_of(compute_type, dout.num_rows, lora_b.num_rows, lora_b.num_cols,
                                      need_g, need_p, device.num_sms);
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    const UpBackwardCall<Compute> call{
        dout,   h,           mid,
        lora_b, out_scale,   static_cast<typename Compute::acc_t>(scaling),
        g,      p_workspace, device.stream};
    if constexpr (sizeof(typename Compute::scalar_t) <= 4) {
      if (plan.one_pass) call.one_pass(plan);
    }
    if (!plan.one_pass && need_g) call.pass_for_g(plan);
    if (!plan.one_pass && need_p) call.pass_for_p(plan, compute_type, device);
    if (need_p) call.finish_p(plan, dlora_b, dout_scale);
  });
}

}  // namespace lowrank_ext::cuda
