// csrc/cuda/lowrank/kernels.h for Python, and the family's plans.
#include "bind_arguments.h"
#include "bind_kernels.h"
#include "lowrank/expand.cuh"
#include "lowrank/kernels.h"
#include "lowrank/lowrank_mid_backward.cuh"
#include "lowrank/lowrank_up_backward.cuh"
#include "lowrank/thin_product.cuh"

namespace {

Mid mid_of(const py::object& rank_scale, const py::object& core) {
  return {ref_of(rank_scale), ref_of(core)};
}

py::dict as_dict(const ThinProductPlan& plan) {
  using py::literals::operator""_a;
  return py::dict("block_outer"_a = plan.block_outer, "rank_tile"_a = plan.rank_tile,
                  "num_outer_tiles"_a = plan.num_outer_tiles,
                  "num_rank_tiles"_a = plan.num_rank_tiles, "num_splits"_a = plan.num_splits,
                  "steps_per_split"_a = plan.steps_per_split, "num_blocks"_a = plan.num_blocks());
}

py::dict as_dict(const UpBackwardPlan& plan) {
  using py::literals::operator""_a;
  return py::dict(
      "one_pass"_a = plan.one_pass, "rank_tile"_a = plan.rank_tile,
      "row_tiles_per_region"_a = plan.row_tiles_per_region, "num_regions"_a = plan.num_regions,
      "col_tiles_per_split"_a = plan.col_tiles_per_split, "num_col_splits"_a = plan.num_col_splits,
      "g"_a = as_dict(plan.g), "p"_a = as_dict(plan.p), "cost"_a = plan.cost,
      "num_g_splits"_a = plan.num_g_splits(), "num_p_parts"_a = plan.num_p_parts());
}

py::dict as_dict(const ExpandPlan& plan) {
  using py::literals::operator""_a;
  return py::dict("block_rows"_a = plan.block_rows, "rank_tile"_a = plan.rank_tile,
                  "col_tiles_per_block"_a = plan.col_tiles_per_block,
                  "num_row_blocks"_a = plan.num_row_blocks,
                  "num_col_blocks"_a = plan.num_col_blocks, "shared_bytes"_a = plan.shared_bytes);
}

py::dict bound_plan_thin_product(const std::string& compute_type, int64_t outer, int64_t depth,
                                 int64_t rank, bool small_blocks, int num_sms) {
  return as_dict(plan_thin_product(outer, depth, rank,
                                   compute_traits_of(compute_type_named(compute_type)),
                                   small_blocks, num_sms));
}

py::dict bound_plan_up_backward(const std::string& compute_type, int64_t num_rows,
                                int64_t out_features, int64_t rank, bool need_g, bool need_p,
                                int num_sms) {
  return as_dict(plan_up_backward(num_rows, out_features, rank, need_g, need_p,
                                  compute_traits_of(compute_type_named(compute_type)), num_sms));
}

// Both expansions have the same plan: their tiles of lora_a and lora_b are equally large.
py::dict bound_plan_expand(const std::string& compute_type, int64_t num_rows, int64_t num_cols,
                           int64_t rank, int num_sms) {
  return dispatch(compute_type_named(compute_type), [&](auto compute) {
    return as_dict(plan_expand<decltype(compute), UpOp>(num_rows, num_cols, rank, num_sms));
  });
}

py::dict bound_plan_mid_backward(const std::string& compute_type, int64_t num_rows, bool need_sums,
                                 int num_sms) {
  using py::literals::operator""_a;
  return dispatch(compute_type_named(compute_type), [&](auto compute) {
    const auto plan = plan_mid_backward<decltype(compute)>(num_rows, need_sums, num_sms);
    return py::dict("num_row_groups"_a = plan.num_row_groups,
                    "row_tiles_per_group"_a = plan.row_tiles_per_group);
  });
}

void bound_lowrank_down(const std::string& compute_type, const py::object& x,
                        const py::object& lora_a, const py::object& h, uint32_t threshold,
                        uintptr_t seed, int num_sms) {
  const MatrixRef x_ = ref_of(x), lora_a_ = ref_of(lora_a);
  const Workspace workspace(lowrank_down_workspace_bytes(
      compute_type_named(compute_type), x_.num_rows, x_.num_cols, lora_a_.num_rows, num_sms));
  lowrank_down(compute_type_named(compute_type), x_, lora_a_, ref_of(h),
               dropout_of(threshold, seed), workspace.data(), {num_sms, {}});
}

int bound_num_g_splits(const std::string& compute_type, int64_t num_rows, int64_t out_features,
                       int64_t rank, bool need_p, int num_sms) {
  return lowrank_up_backward_workspace(compute_type_named(compute_type), num_rows, out_features,
                                       rank, true, need_p, num_sms)
      .num_g_splits;
}

void bound_lowrank_up_backward(const std::string& compute_type, const py::object& dout,
                               const py::object& h, const py::object& rank_scale,
                               const py::object& core, const py::object& lora_b,
                               const py::object& out_scale, double scaling, uintptr_t g,
                               const py::object& dlora_b, const py::object& dout_scale,
                               int num_sms) {
  const MatrixRef dout_ = ref_of(dout), lora_b_ = ref_of(lora_b);
  const bool need_p = !dlora_b.is_none() || !dout_scale.is_none();
  const auto sizes =
      lowrank_up_backward_workspace(compute_type_named(compute_type), dout_.num_rows,
                                    lora_b_.num_rows, lora_b_.num_cols, g != 0, need_p, num_sms);
  const Workspace workspace(sizes.p_bytes);
  lowrank_up_backward(compute_type_named(compute_type), dout_, ref_of(h), mid_of(rank_scale, core),
                      lora_b_, ref_of(out_scale), scaling,
                      {reinterpret_cast<void*>(g), sizes.num_g_splits}, workspace.data(),
                      ref_of(dlora_b), ref_of(dout_scale), {num_sms, {}});
}

void bound_lowrank_down_backward_lora_a(const std::string& compute_type, const py::object& dh,
                                        const py::object& x, uint32_t threshold, uintptr_t seed,
                                        const py::object& dlora_a, int num_sms) {
  const MatrixRef dh_ = ref_of(dh), x_ = ref_of(x);
  const Workspace workspace(lowrank_down_backward_workspace_bytes(
      compute_type_named(compute_type), x_.num_rows, x_.num_cols, dh_.num_cols, num_sms));
  lowrank_down_backward_lora_a(compute_type_named(compute_type), dh_, x_,
                               dropout_of(threshold, seed), ref_of(dlora_a), workspace.data(),
                               {num_sms, {}});
}

void bound_lowrank_up(const std::string& compute_type, const py::object& base, const py::object& h,
                      const py::object& rank_scale, const py::object& core,
                      const py::object& lora_b, const py::object& out_scale, double scaling,
                      const py::object& y, int num_sms) {
  lowrank_up(compute_type_named(compute_type), ref_of(base), ref_of(h), mid_of(rank_scale, core),
             ref_of(lora_b), ref_of(out_scale), scaling, ref_of(y), {num_sms, {}});
}

void bound_lowrank_down_backward_x(const std::string& compute_type, const py::object& base,
                                   const py::object& dh, const py::object& lora_a,
                                   uint32_t threshold, uintptr_t seed, const py::object& dx,
                                   int num_sms) {
  lowrank_down_backward_x(compute_type_named(compute_type), ref_of(base), ref_of(dh),
                          ref_of(lora_a), dropout_of(threshold, seed), ref_of(dx), {num_sms, {}});
}

void bound_lowrank_mid_backward(const std::string& compute_type, uintptr_t g, int num_splits,
                                const py::object& h, const py::object& rank_scale,
                                const py::object& core, int64_t num_rows, int64_t rank,
                                const py::object& dh, const py::object& dcore,
                                const py::object& drank_scale, int num_sms) {
  const Workspace workspace(lowrank_mid_backward_workspace_bytes(compute_type_named(compute_type),
                                                                 num_rows, rank, !dcore.is_none(),
                                                                 !drank_scale.is_none(), num_sms));
  lowrank_mid_backward(compute_type_named(compute_type), {reinterpret_cast<void*>(g), num_splits},
                       ref_of(h), mid_of(rank_scale, core), num_rows, rank, ref_of(dh),
                       ref_of(dcore), ref_of(drank_scale), workspace.data(), {num_sms, {}});
}

}  // namespace

void bind_lowrank(py::module_& m) {
  m.def("plan_thin_product", &bound_plan_thin_product, py::arg("compute_type"), py::arg("outer"),
        py::arg("depth"), py::arg("rank"), py::kw_only(), py::arg("small_blocks") = false,
        py::arg("num_sms"));
  m.def("plan_up_backward", &bound_plan_up_backward, py::arg("compute_type"), py::arg("num_rows"),
        py::arg("out_features"), py::arg("rank"), py::kw_only(), py::arg("need_g") = true,
        py::arg("need_p") = true, py::arg("num_sms"));
  m.def("lowrank_down", &bound_lowrank_down, py::arg("compute_type"), py::arg("x"),
        py::arg("lora_a"), py::arg("h"), py::kw_only(), py::arg("threshold"), py::arg("seed"),
        py::arg("num_sms"));
  m.def("num_g_splits", &bound_num_g_splits, py::arg("compute_type"), py::arg("num_rows"),
        py::arg("out_features"), py::arg("rank"), py::kw_only(), py::arg("need_p"),
        py::arg("num_sms"));
  m.def("lowrank_up_backward", &bound_lowrank_up_backward, py::arg("compute_type"), py::arg("dout"),
        py::arg("h"), py::arg("rank_scale"), py::arg("core"), py::arg("lora_b"),
        py::arg("out_scale"), py::arg("scaling"), py::arg("g"), py::arg("dlora_b"),
        py::arg("dout_scale"), py::kw_only(), py::arg("num_sms"),
        "g is the address of [num_g_splits · M, r] sums, or 0.");
  m.def("lowrank_down_backward_lora_a", &bound_lowrank_down_backward_lora_a,
        py::arg("compute_type"), py::arg("dh"), py::arg("x"), py::kw_only(), py::arg("threshold"),
        py::arg("seed"), py::arg("dlora_a"), py::arg("num_sms"));
  m.def("plan_expand", &bound_plan_expand, py::arg("compute_type"), py::arg("num_rows"),
        py::arg("num_cols"), py::arg("rank"), py::kw_only(), py::arg("num_sms"));
  m.def("plan_mid_backward", &bound_plan_mid_backward, py::arg("compute_type"), py::arg("num_rows"),
        py::kw_only(), py::arg("need_sums"), py::arg("num_sms"));
  m.def("lowrank_up", &bound_lowrank_up, py::arg("compute_type"), py::arg("base"), py::arg("h"),
        py::arg("rank_scale"), py::arg("core"), py::arg("lora_b"), py::arg("out_scale"),
        py::arg("scaling"), py::arg("y"), py::kw_only(), py::arg("num_sms"));
  m.def("lowrank_down_backward_x", &bound_lowrank_down_backward_x, py::arg("compute_type"),
        py::arg("base"), py::arg("dh"), py::arg("lora_a"), py::kw_only(), py::arg("threshold"),
        py::arg("seed"), py::arg("dx"), py::arg("num_sms"));
  m.def("lowrank_mid_backward", &bound_lowrank_mid_backward, py::arg("compute_type"), py::arg("g"),
        py::arg("num_splits"), py::arg("h"), py::arg("rank_scale"), py::arg("core"),
        py::arg("num_rows"), py::arg("rank"), py::arg("dh"), py::arg("dcore"),
        py::arg("drank_scale"), py::kw_only(), py::arg("num_sms"),
        "g is the address of [num_splits · num_rows, rank] sums.");
}
