#include "lowrank/lowrank_mid_backward.cuh"

#include "common/dispatch.h"
#include "common/scratch.h"
#include "lowrank/kernels.h"

namespace lowrank_ext::cuda {

namespace {

// The workspace: a part for each group of row tiles, of dcore and of drank_scale where asked for.
template <class Compute>
struct Parts {
  using acc_t = typename Compute::acc_t;

  acc_t *dcore = nullptr, *drank_scale = nullptr;

  Parts(const MidBackwardPlan& plan, int64_t rank, bool need_dcore, bool need_drank_scale,
        Scratch& scratch) {
    if (need_dcore) dcore = scratch.array<acc_t>(plan.num_row_groups * rank * rank);
    if (need_drank_scale) drank_scale = scratch.array<acc_t>(plan.num_row_groups * rank);
  }
};

}  // namespace

int64_t lowrank_mid_backward_workspace_bytes(ComputeType compute_type, int64_t num_rows,
                                             int64_t rank, bool need_dcore, bool need_drank_scale,
                                             int num_sms) {
  return dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    const auto plan = plan_mid_backward<Compute>(num_rows, need_dcore || need_drank_scale, num_sms);
    Scratch scratch;
    Parts<Compute>(plan, rank, need_dcore, need_drank_scale, scratch);
    return scratch.num_bytes();
  });
}

void lowrank_mid_backward(ComputeType compute_type, const GPartials& g, const MatrixRef& h,
                          const Mid& mid, int64_t num_rows, int64_t rank, const MatrixRef& dh,
                          const MatrixRef& dcore, const MatrixRef& drank_scale, void* workspace,
                          const Device& device) {
  dispatch(compute_type, [&](auto compute) {
    using Compute = decltype(compute);
    using scalar_t = typename Compute::scalar_t;
    using acc_t = typename Compute::acc_t;
    const auto dense = [&](void* data, int64_t rows) {
      const bool vectorized = rank * sizeof(acc_t) % 16 == 0;
      return Matrix<acc_t>{static_cast<acc_t*>(data), rows, rank, rank, vectorized};
    };
    const auto read_only = [](const Matrix<acc_t>& m) {
      return Matrix<const acc_t>{m.data, m.num_rows, m.num_cols, m.row_stride, m.vectorized};
    };
    const Matrix<const acc_t> g_matrix = read_only(dense(g.data, g.num_splits * num_rows));
    if (!mid.core && !mid.rank_scale) {
      launch_partial_sums<Compute>(g_matrix, g.num_splits, output_of<Compute>(dh), num_rows, rank,
                                   device.stream);
      return;
    }
    const bool need_dcore = static_cast<bool>(dcore), need_drank = static_cast<bool>(drank_scale);
    const MidBackwardPlan plan =
        plan_mid_backward<Compute>(num_rows, need_dcore || need_drank, device.num_sms);
    Scratch scratch(workspace);
    const Parts<Compute> parts(plan, rank, need_dcore, need_drank, scratch);
    MidBackwardParams<Compute> params{};
    params.g = g_matrix;
    params.num_splits = g.num_splits;
    params.num_rows = num_rows;
    params.h = matrix_of<const scalar_t>(h);
    params.mid = {matrix_of<const scalar_t>(mid.rank_scale), matrix_of<const scalar_t>(mid.core)};
    params.dh = matrix_of<scalar_t>(dh);
    if (need_dcore) params.dcore = dense(parts.dcore, plan.num_row_groups * rank);
    if (need_drank) params.drank_scale = dense(parts.drank_scale, plan.num_row_groups);
    params.row_tiles_per_group = plan.row_tiles_per_group;
    launch_lowrank_mid_backward<Compute>(params, plan, device.stream);
    const int num_parts = static_cast<int>(plan.num_row_groups);
    if (need_dcore)
      launch_partial_sums<Compute>(read_only(params.dcore), num_parts, output_of<Compute>(dcore),
                                   rank, rank, device.stream);
    if (need_drank)
      launch_partial_sums<Compute>(read_only(params.drank_scale), num_parts,
                                   output_of<Compute>(drank_scale), 1, rank, device.stream);
  });
}

}  // namespace lowrank_ext::cuda
