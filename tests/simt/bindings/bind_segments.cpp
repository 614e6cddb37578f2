// csrc/cuda/segments/kernels.h for Python, and the family's plans.
#include "bind_arguments.h"
#include "bind_kernels.h"
#include "segments/kernels.h"
#include "segments/segment_down.cuh"
#include "segments/segment_up.cuh"

namespace {

RowGroups row_groups_of(const py::object& groups) {
  const auto pointer = [&](const char* name) {
    return reinterpret_cast<const int64_t*>(groups[name].cast<uintptr_t>());
  };
  return {pointer("rows"),
          pointer("offsets"),
          pointer("ranks"),
          groups["num_rows"].cast<int64_t>(),
          groups["num_groups"].cast<int64_t>(),
          groups["slots_per_row"].cast<int>(),
          groups["shared_dropout"].cast<bool>()};
}

py::dict bound_plan_segment_down(const std::string& compute_type, int64_t num_rows,
                                 int64_t num_groups, int64_t depth, int64_t rank, int num_sms) {
  using py::literals::operator""_a;
  return dispatch(compute_type_named(compute_type), [&](auto compute) {
    const auto plan =
        plan_segment_down<decltype(compute)>(num_rows, num_groups, depth, rank, num_sms);
    return py::dict("block_rows"_a = plan.block_outer, "rank_tile"_a = plan.rank_tile,
                    "max_tiles"_a = plan.max_tiles, "num_rank_tiles"_a = plan.num_rank_tiles,
                    "num_splits"_a = plan.num_splits, "steps_per_split"_a = plan.steps_per_split);
  });
}

py::dict bound_plan_segment_up(const std::string& compute_type, int64_t num_rows,
                               int64_t num_groups, int64_t num_cols, int64_t rank, int num_sms) {
  using py::literals::operator""_a;
  return dispatch(compute_type_named(compute_type), [&](auto compute) {
    const auto plan =
        plan_segment_up<decltype(compute), UpOp>(num_rows, num_groups, num_cols, rank, num_sms);
    return py::dict("block_rows"_a = plan.block_rows,
                    "col_tiles_per_block"_a = plan.col_tiles_per_block,
                    "max_tiles"_a = plan.max_tiles, "num_col_blocks"_a = plan.num_col_blocks,
                    "shared_bytes"_a = plan.shared_bytes);
  });
}

void bound_segment_down(const std::string& compute_type, const py::object& groups,
                        const py::object& x, const py::object& lora_a, const py::object& h,
                        uint32_t threshold, uintptr_t seed, int num_sms) {
  const RowGroups groups_ = row_groups_of(groups);
  const MatrixRef x_ = ref_of(x), h_ = ref_of(h);
  const Workspace workspace(segment_down_workspace_bytes(compute_type_named(compute_type),
                                                         groups_.num_rows, groups_.num_groups,
                                                         x_.num_cols, h_.num_cols, num_sms));
  segment_down(compute_type_named(compute_type), groups_, x_, stack_of(lora_a), h_,
               dropout_of(threshold, seed), workspace.data(), {num_sms, {}});
}

void bound_segment_up_backward(const std::string& compute_type, const py::object& groups,
                               const py::object& dout, const py::object& lora_b,
                               const py::object& scaling, const py::object& dh, int num_sms) {
  const RowGroups groups_ = row_groups_of(groups);
  const MatrixRef dout_ = ref_of(dout), dh_ = ref_of(dh);
  const Workspace workspace(segment_down_workspace_bytes(compute_type_named(compute_type),
                                                         groups_.num_rows, groups_.num_groups,
                                                         dout_.num_cols, dh_.num_cols, num_sms));
  segment_up_backward(compute_type_named(compute_type), groups_, dout_, stack_of(lora_b),
                      ref_of(scaling), dh_, workspace.data(), {num_sms, {}});
}

void bound_segment_up(const std::string& compute_type, const py::object& groups,
                      const py::object& base, const py::object& h, const py::object& lora_b,
                      const py::object& scaling, const py::object& y, int num_sms) {
  segment_up(compute_type_named(compute_type), row_groups_of(groups), ref_of(base), ref_of(h),
             stack_of(lora_b), ref_of(scaling), ref_of(y), {num_sms, {}});
}

void bound_segment_down_backward_x(const std::string& compute_type, const py::object& groups,
                                   const py::object& dh, const py::object& lora_a,
                                   uint32_t threshold, uintptr_t seed, const py::object& dx,
                                   int num_sms) {
  segment_down_backward_x(compute_type_named(compute_type), row_groups_of(groups), ref_of(dh),
                          stack_of(lora_a), dropout_of(threshold, seed), ref_of(dx), {num_sms, {}});
}

void bound_segment_up_backward_lora_b(const std::string& compute_type, const py::object& groups,
                                      const py::object& dout, const py::object& h,
                                      const py::object& scaling, const py::object& dlora_b) {
  segment_up_backward_lora_b(compute_type_named(compute_type), row_groups_of(groups), ref_of(dout),
                             ref_of(h), ref_of(scaling), /*scale=*/1.0, stack_of(dlora_b), {});
}

void bound_segment_down_backward_lora_a(const std::string& compute_type, const py::object& groups,
                                        const py::object& dh, const py::object& x,
                                        uint32_t threshold, uintptr_t seed,
                                        const py::object& dlora_a) {
  segment_down_backward_lora_a(compute_type_named(compute_type), row_groups_of(groups), ref_of(dh),
                               ref_of(x), dropout_of(threshold, seed), stack_of(dlora_a), {});
}

}  // namespace

void bind_segments(py::module_& m) {
  m.def("plan_segment_down", &bound_plan_segment_down, py::arg("compute_type"), py::arg("num_rows"),
        py::arg("num_groups"), py::arg("depth"), py::arg("rank"), py::kw_only(),
        py::arg("num_sms"));
  m.def("plan_segment_up", &bound_plan_segment_up, py::arg("compute_type"), py::arg("num_rows"),
        py::arg("num_groups"), py::arg("num_cols"), py::arg("rank"), py::kw_only(),
        py::arg("num_sms"));
  m.def("segment_down", &bound_segment_down, py::arg("compute_type"), py::arg("groups"),
        py::arg("x"), py::arg("lora_a"), py::arg("h"), py::kw_only(), py::arg("threshold"),
        py::arg("seed"), py::arg("num_sms"));
  m.def("segment_up_backward", &bound_segment_up_backward, py::arg("compute_type"),
        py::arg("groups"), py::arg("dout"), py::arg("lora_b"), py::arg("scaling"), py::arg("dh"),
        py::kw_only(), py::arg("num_sms"));
  m.def("segment_up", &bound_segment_up, py::arg("compute_type"), py::arg("groups"),
        py::arg("base"), py::arg("h"), py::arg("lora_b"), py::arg("scaling"), py::arg("y"),
        py::kw_only(), py::arg("num_sms"));
  m.def("segment_down_backward_x", &bound_segment_down_backward_x, py::arg("compute_type"),
        py::arg("groups"), py::arg("dh"), py::arg("lora_a"), py::kw_only(), py::arg("threshold"),
        py::arg("seed"), py::arg("dx"), py::arg("num_sms"));
  m.def("segment_up_backward_lora_b", &bound_segment_up_backward_lora_b, py::arg("compute_type"),
        py::arg("groups"), py::arg("dout"), py::arg("h"), py::arg("scaling"), py::arg("dlora_b"));
  m.def("segment_down_backward_lora_a", &bound_segment_down_backward_lora_a,
        py::arg("compute_type"), py::arg("groups"), py::arg("dh"), py::arg("x"), py::kw_only(),
        py::arg("threshold"), py::arg("seed"), py::arg("dlora_a"));
}
