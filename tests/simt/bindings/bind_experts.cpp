// csrc/cuda/experts/kernels.h for Python, and the family's plans.
#include "bind_arguments.h"
#include "bind_kernels.h"
#include "experts/grouped_expand.cuh"
#include "experts/kernels.h"

namespace {

// The directions' tiles are equally large.
py::dict bound_plan_grouped_expand(const std::string& compute_type, int64_t num_tokens,
                                   int64_t num_cols, int num_experts, int top_k, int num_sms) {
  using py::literals::operator""_a;
  return dispatch(compute_type_named(compute_type), [&](auto compute) {
    const auto plan = plan_grouped_expand<decltype(compute), GroupedUpOp>(
        num_tokens, num_cols, num_experts, top_k, num_sms);
    return py::dict("block_rows"_a = plan.block_rows,
                    "col_tiles_per_block"_a = plan.col_tiles_per_block,
                    "num_row_blocks"_a = plan.num_row_blocks,
                    "num_col_blocks"_a = plan.num_col_blocks, "shared_bytes"_a = plan.shared_bytes);
  });
}

// `columns` is (E, r, first_expert, expert_stride, R)

DenseColumns columns_of(const py::tuple& columns) {
  const auto at = [&](size_t i) { return columns[i].cast<int>(); };
  return {at(0), at(1), at(2), at(3), at(4)};
}

py::tuple bound_dense_columns(int num_experts, int rank, bool padded, bool shared_dropout) {
  const DenseColumns columns = padded ? DenseColumns::padded(num_experts, rank, shared_dropout)
                                      : DenseColumns::packed(num_experts, rank);
  return py::make_tuple(columns.num_experts, columns.rank, columns.first_expert,
                        columns.expert_stride, columns.num_cols);
}

template <class T>
T* address_of(const py::object& address) {
  return address.is_none() ? nullptr : reinterpret_cast<T*>(address.cast<uintptr_t>());
}

// `routing` is (probs, weights, addresses of ids, counts and token_mask).
ExpertRouting routing_of(const py::tuple& routing) {
  return {ref_of(routing[0]), ref_of(routing[1]), address_of<int64_t>(routing[2]),
          address_of<int64_t>(routing[3]), address_of<const bool>(routing[4])};
}

void bound_dense_stack(const std::string& compute_type, const py::tuple& columns,
                       const py::object& router_weight, const py::object& lora_a,
                       const py::object& lora_b, const py::object& w, const py::object& up) {
  dense_stack(compute_type_named(compute_type), columns_of(columns), ref_of(router_weight),
              ref_of(lora_a), ref_of(lora_b), ref_of(w), ref_of(up), {4, {}});
}

void bound_dense_unstack(const std::string& compute_type, const py::tuple& columns,
                         const py::object& dw, int num_partials, const py::object& dup,
                         const py::object& drouter_weight, const py::object& dlora_a,
                         const py::object& dlora_b) {
  dense_unstack(compute_type_named(compute_type), columns_of(columns), ref_of(dw), num_partials,
                ref_of(dup), ref_of(drouter_weight), ref_of(dlora_a), ref_of(dlora_b), {4, {}});
}

// z: [num_splits · M, R] with any row stride.
void bound_moe_gate(const std::string& compute_type, const py::tuple& columns, const py::object& z,
                    int num_splits, const py::tuple& routing, const py::object& balance_loss,
                    const py::object& h, const py::object& gated) {
  const MatrixRef z_ = ref_of(z);
  const ExpertRouting routing_ = routing_of(routing);
  const DenseColumns columns_ = columns_of(columns);
  const Workspace workspace(
      moe_gate_workspace_bytes(routing_.probs.num_rows, columns_.num_experts));
  moe_gate(compute_type_named(compute_type), columns_, {z_.data, num_splits, z_.row_stride},
           routing_, ref_of(balance_loss), ref_of(h), ref_of(gated), workspace.data(), {4, {}});
}

void bound_dense_apply_gates(const std::string& compute_type, const py::tuple& columns,
                             const py::tuple& routing, const py::object& h,
                             const py::object& gated) {
  dense_apply_gates(compute_type_named(compute_type), columns_of(columns), routing_of(routing),
                    ref_of(h), ref_of(gated), {4, {}});
}

void bound_dense_gate_backward(const std::string& compute_type, const py::tuple& columns,
                               uintptr_t g, int num_splits, const py::tuple& routing,
                               const py::object& dbalance_loss, const py::object& h, bool gates,
                               const py::object& dz) {
  dense_gate_backward(compute_type_named(compute_type), columns_of(columns),
                      {reinterpret_cast<void*>(g), num_splits}, routing_of(routing),
                      ref_of(dbalance_loss), ref_of(h), gates, ref_of(dz), {4, {}});
}

py::dict as_dict(const PartialSumsSize& workspace) {
  using py::literals::operator""_a;
  return py::dict("num_splits"_a = workspace.num_splits, "row_stride"_a = workspace.row_stride,
                  "bytes"_a = workspace.bytes);
}

py::dict bound_dense_down_workspace(const std::string& compute_type, int64_t num_rows,
                                    int64_t in_features, int64_t num_cols, int num_sms) {
  return as_dict(dense_down_workspace(compute_type_named(compute_type), num_rows, in_features,
                                      num_cols, num_sms));
}

void bound_dense_down(const std::string& compute_type, const py::object& x, const py::object& w,
                      const py::tuple& columns, bool shared_dropout, uint32_t threshold,
                      uintptr_t seed, uintptr_t z, int num_sms) {
  const MatrixRef x_ = ref_of(x), w_ = ref_of(w);
  const auto sizes = dense_down_workspace(compute_type_named(compute_type), x_.num_rows,
                                          x_.num_cols, w_.num_rows, num_sms);
  dense_down(compute_type_named(compute_type), x_, w_, columns_of(columns), shared_dropout,
             dropout_of(threshold, seed),
             {reinterpret_cast<void*>(z), sizes.num_splits, sizes.row_stride}, {num_sms, {}});
}

py::dict bound_dense_outer_workspace(const std::string& compute_type, int64_t num_rows,
                                     int64_t in_features, int64_t num_cols, int num_sms) {
  return as_dict(dense_outer_workspace(compute_type_named(compute_type), num_rows, in_features,
                                       num_cols, num_sms));
}

void bound_dense_outer(const std::string& compute_type, const py::object& dz, const py::object& x,
                       const py::tuple& columns, bool shared_dropout, uint32_t threshold,
                       uintptr_t seed, uintptr_t dw, int num_sms) {
  dense_outer(compute_type_named(compute_type), ref_of(dz), ref_of(x), columns_of(columns),
              shared_dropout, dropout_of(threshold, seed), reinterpret_cast<void*>(dw),
              {num_sms, {}});
}

void bound_dense_expand(const std::string& compute_type, const py::object& dz, const py::object& w,
                        const py::tuple& columns, bool shared_dropout, uint32_t threshold,
                        uintptr_t seed, const py::object& dx, int num_sms) {
  dense_expand(compute_type_named(compute_type), ref_of(dz), ref_of(w), columns_of(columns),
               shared_dropout, dropout_of(threshold, seed), ref_of(dx), {num_sms, {}});
}

// ---- the grouped form; sums are [num_splits · rows, columns] with any row stride

PartialSums partials_of(const py::object& sums, int num_splits) {
  const MatrixRef sums_ = ref_of(sums);
  return {sums_.data, num_splits, sums_.row_stride};
}

void bound_grouped_gate(const std::string& compute_type, const py::object& sums, int num_splits,
                        const py::tuple& routing, const py::object& h, const py::object& gated) {
  grouped_gate(compute_type_named(compute_type), partials_of(sums, num_splits), routing_of(routing),
               ref_of(h), ref_of(gated), {4, {}});
}

void bound_grouped_apply_gates(const std::string& compute_type, const py::tuple& routing,
                               const py::object& h, const py::object& gated) {
  grouped_apply_gates(compute_type_named(compute_type), routing_of(routing), ref_of(h),
                      ref_of(gated), {4, {}});
}

void bound_grouped_gate_backward(const std::string& compute_type, const py::object& g,
                                 int num_splits, bool by_slot, const py::tuple& routing,
                                 const py::object& dbalance_loss, const py::object& h,
                                 const py::object& dlogits, const py::object& dh) {
  grouped_gate_backward(compute_type_named(compute_type), {partials_of(g, num_splits), by_slot},
                        routing_of(routing), ref_of(dbalance_loss), ref_of(h), ref_of(dlogits),
                        ref_of(dh), {4, {}});
}

// `choices` is (addresses of tokens and ids, M, k).
TokenChoices choices_of(const py::tuple& choices) {
  return {address_of<const int64_t>(choices[0]), address_of<const int64_t>(choices[1]),
          choices[2].cast<int64_t>(), choices[3].cast<int64_t>()};
}

void bound_grouped_up(const std::string& compute_type, const py::tuple& choices,
                      const py::object& base, const py::object& gated, const py::object& lora_b,
                      double scaling, const py::object& y, int num_sms) {
  grouped_up(compute_type_named(compute_type), choices_of(choices), ref_of(base), ref_of(gated),
             stack_of(lora_b), scaling, ref_of(y), {num_sms, {}});
}

void bound_grouped_down_backward_x(const std::string& compute_type, const py::tuple& choices,
                                   const py::object& dlogits, const py::object& router_weight,
                                   const py::object& dh, const py::object& lora_a,
                                   bool shared_dropout, uint32_t threshold, uintptr_t seed,
                                   const py::object& dx, int num_sms) {
  grouped_down_backward_x(compute_type_named(compute_type), choices_of(choices), ref_of(dlogits),
                          ref_of(router_weight), ref_of(dh), stack_of(lora_a), shared_dropout,
                          dropout_of(threshold, seed), ref_of(dx), {num_sms, {}});
}

}  // namespace

void bind_experts(py::module_& m) {
  m.def("dense_columns", &bound_dense_columns, py::arg("num_experts"), py::arg("rank"),
        py::kw_only(), py::arg("padded") = false, py::arg("shared_dropout") = false);
  m.def("dense_stack", &bound_dense_stack, py::arg("compute_type"), py::arg("columns"),
        py::arg("router_weight"), py::arg("lora_a"), py::arg("lora_b"), py::arg("w"),
        py::arg("up"));
  m.def("dense_unstack", &bound_dense_unstack, py::arg("compute_type"), py::arg("columns"),
        py::arg("dw"), py::arg("num_partials"), py::arg("dup"), py::arg("drouter_weight"),
        py::arg("dlora_a"), py::arg("dlora_b"));
  m.def("moe_gate", &bound_moe_gate, py::arg("compute_type"), py::arg("columns"), py::arg("z"),
        py::arg("num_splits"), py::arg("routing"), py::arg("balance_loss"), py::arg("h"),
        py::arg("gated"));
  m.def("dense_apply_gates", &bound_dense_apply_gates, py::arg("compute_type"), py::arg("columns"),
        py::arg("routing"), py::arg("h"), py::arg("gated"));
  m.def("dense_gate_backward", &bound_dense_gate_backward, py::arg("compute_type"),
        py::arg("columns"), py::arg("g"), py::arg("num_splits"), py::arg("routing"),
        py::arg("dbalance_loss"), py::arg("h"), py::arg("gates"), py::arg("dz"),
        "g is the address of the sums.");
  for (const auto& [name, workspace] :
       {std::pair{"dense_down_workspace", &bound_dense_down_workspace},
        std::pair{"dense_outer_workspace", &bound_dense_outer_workspace}})
    m.def(name, workspace, py::arg("compute_type"), py::arg("num_rows"), py::arg("in_features"),
          py::arg("num_cols"), py::kw_only(), py::arg("num_sms"));
  m.def("dense_down", &bound_dense_down, py::arg("compute_type"), py::arg("x"), py::arg("w"),
        py::arg("columns"), py::kw_only(), py::arg("shared_dropout"), py::arg("threshold"),
        py::arg("seed"), py::arg("z"), py::arg("num_sms"),
        "z is the address of [num_splits · num_rows, row_stride] sums.");
  m.def("dense_outer", &bound_dense_outer, py::arg("compute_type"), py::arg("dz"), py::arg("x"),
        py::arg("columns"), py::kw_only(), py::arg("shared_dropout"), py::arg("threshold"),
        py::arg("seed"), py::arg("dw"), py::arg("num_sms"),
        "dw is the address of [num_splits · num_cols, row_stride] sums.");
  m.def("dense_expand", &bound_dense_expand, py::arg("compute_type"), py::arg("dz"), py::arg("w"),
        py::arg("columns"), py::kw_only(), py::arg("shared_dropout"), py::arg("threshold"),
        py::arg("seed"), py::arg("dx"), py::arg("num_sms"));
  m.def("plan_grouped_expand", &bound_plan_grouped_expand, py::arg("compute_type"),
        py::arg("num_tokens"), py::arg("num_cols"), py::arg("num_experts"), py::arg("top_k"),
        py::kw_only(), py::arg("num_sms"));
  m.def("grouped_gate", &bound_grouped_gate, py::arg("compute_type"), py::arg("sums"),
        py::arg("num_splits"), py::arg("routing"), py::arg("h"), py::arg("gated"));
  m.def("grouped_apply_gates", &bound_grouped_apply_gates, py::arg("compute_type"),
        py::arg("routing"), py::arg("h"), py::arg("gated"));
  m.def("grouped_gate_backward", &bound_grouped_gate_backward, py::arg("compute_type"),
        py::arg("g"), py::arg("num_splits"), py::arg("by_slot"), py::arg("routing"),
        py::arg("dbalance_loss"), py::arg("h"), py::arg("dlogits"), py::arg("dh"));
  m.def("grouped_up", &bound_grouped_up, py::arg("compute_type"), py::arg("choices"),
        py::arg("base"), py::arg("gated"), py::arg("lora_b"), py::arg("scaling"), py::arg("y"),
        py::kw_only(), py::arg("num_sms"));
  m.def("grouped_down_backward_x", &bound_grouped_down_backward_x, py::arg("compute_type"),
        py::arg("choices"), py::arg("dlogits"), py::arg("router_weight"), py::arg("dh"),
        py::arg("lora_a"), py::kw_only(), py::arg("shared_dropout"), py::arg("threshold"),
        py::arg("seed"), py::arg("dx"), py::arg("num_sms"));
}
