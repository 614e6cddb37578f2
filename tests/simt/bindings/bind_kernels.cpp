// csrc/cuda/kernels.h for Python: the launchers, with tensors as dicts (kernel_calls.py makes
// them), and the plans. Compiled without the instrumentation, so only declarations and plan
// functions may be used here, which no kernel calls.
//
// Workspaces are allocated here, exactly as large as the size functions say, and filled with NaN.
#include "bind_kernels.h"

#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "experts/grouped_expand.cuh"
#include "experts/kernels.h"
#include "lowrank/expand.cuh"
#include "lowrank/kernels.h"
#include "lowrank/lowrank_mid_backward.cuh"
#include "lowrank/lowrank_up_backward.cuh"
#include "lowrank/outer_sum.h"
#include "routing/kernels.h"
#include "segments/kernels.h"
#include "segments/segment_down.cuh"
#include "segments/segment_up.cuh"

namespace py = pybind11;
using namespace lowrank_ext::cuda;

namespace {

ComputeType compute_type_named(const std::string& name) {
  if (name == "bf16") return ComputeType::kBf16;
  if (name == "fp16") return ComputeType::kFp16;
  if (name == "tf32") return ComputeType::kTf32;
  if (name == "fp32") return ComputeType::kFp32;
  if (name == "fp64") return ComputeType::kFp64;
  throw py::value_error("compute_type must be bf16, fp16, tf32, fp32 or fp64, got " + name);
}

ElementType element_type_of(const std::string& name) {
  if (name == "bfloat16") return ElementType::kBf16;
  if (name == "float16") return ElementType::kFp16;
  if (name == "float32") return ElementType::kFp32;
  if (name == "float64") return ElementType::kFp64;
  throw py::value_error("dtype must be a float type, got " + name);
}

// A tensor, or None where the argument is absent.
MatrixRef ref_of(const py::object& matrix) {
  if (matrix.is_none()) return {};
  return {reinterpret_cast<void*>(matrix["data_ptr"].cast<uintptr_t>()),
          element_type_of(matrix["dtype"].cast<std::string>()), matrix["num_rows"].cast<int64_t>(),
          matrix["num_cols"].cast<int64_t>(), matrix["row_stride"].cast<int64_t>()};
}

Mid mid_of(const py::object& rank_scale, const py::object& core) {
  return {ref_of(rank_scale), ref_of(core)};
}

// `seed` is the address of one int64, or 0.
DropoutArgs dropout_of(uint32_t threshold, uintptr_t seed) {
  const double scale = threshold == 65536 ? 1.0 : 65536.0 / (65536.0 - threshold);
  return {threshold, scale, reinterpret_cast<const int64_t*>(seed)};
}

class Workspace {
 public:
  explicit Workspace(int64_t num_bytes)
      : data_(::operator new(static_cast<size_t>(num_bytes), kAlignment)) {
    std::memset(data_, 0xFF, static_cast<size_t>(num_bytes));
  }
  ~Workspace() { ::operator delete(data_, kAlignment); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{128};
  void* data_;
};

ComputeTraits compute_traits_of(ComputeType compute_type) {
  return dispatch(compute_type, [](auto compute) { return compute_traits<decltype(compute)>(); });
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

StackRef stack_of(const py::object& stack) {
  return {ref_of(stack), stack["num_groups"].cast<int64_t>(),
          stack["group_stride"].cast<int64_t>()};
}

// ---- plans

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

// ---- launchers

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

// ---- the dense form of moe_lowrank_add; `columns` is (E, r, first_expert, expert_stride, R)

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

void bound_order_tokens(uintptr_t ids, int64_t num_tokens, int64_t top_k, int64_t num_experts,
                        uintptr_t tokens, int num_sms) {
  const Workspace workspace(order_tokens_workspace_bytes(num_tokens, num_experts, num_sms));
  order_tokens(reinterpret_cast<const int64_t*>(ids), num_tokens, top_k, num_experts,
               reinterpret_cast<int64_t*>(tokens), workspace.data(), {num_sms, {}});
}

// Addresses of int64 arrays; `positions` may be 0.
void bound_order_slots(uintptr_t ids, int64_t num_slots, int64_t num_groups, bool extra_groups,
                       uintptr_t sorted_slots, uintptr_t offsets, uintptr_t positions,
                       int num_sms) {
  const auto array = [](uintptr_t address) { return reinterpret_cast<int64_t*>(address); };
  const Workspace workspace(order_slots_workspace_bytes(num_slots, num_groups, num_sms));
  order_slots(array(ids), num_slots, num_groups, extra_groups,
              {array(sorted_slots), array(offsets), array(positions)}, workspace.data(),
              {num_sms, {}});
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

void bind_kernels(py::module_& m) {
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
  m.def("order_slots", &bound_order_slots, py::arg("ids"), py::arg("num_slots"),
        py::arg("num_groups"), py::kw_only(), py::arg("extra_groups"), py::arg("sorted_slots"),
        py::arg("offsets"), py::arg("positions"), py::arg("num_sms"));
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
  m.def("order_tokens", &bound_order_tokens, py::arg("ids"), py::arg("num_tokens"),
        py::arg("top_k"), py::arg("num_experts"), py::arg("tokens"), py::kw_only(),
        py::arg("num_sms"));
}
