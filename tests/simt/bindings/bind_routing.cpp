// csrc/cuda/routing/kernels.h for Python, and the family's plans.
#include "bind_arguments.h"
#include "bind_kernels.h"
#include "routing/kernels.h"

namespace {

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

}  // namespace

void bind_routing(py::module_& m) {
  m.def("order_slots", &bound_order_slots, py::arg("ids"), py::arg("num_slots"),
        py::arg("num_groups"), py::kw_only(), py::arg("extra_groups"), py::arg("sorted_slots"),
        py::arg("offsets"), py::arg("positions"), py::arg("num_sms"));
  m.def("order_tokens", &bound_order_tokens, py::arg("ids"), py::arg("num_tokens"),
        py::arg("top_k"), py::arg("num_experts"), py::arg("tokens"), py::kw_only(),
        py::arg("num_sms"));
}
