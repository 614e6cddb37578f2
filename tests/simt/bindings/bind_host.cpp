// What lowrank/branch.h and common/launch.h decide on the host, and the settings that the SIMT
// executor's build has in place of a GPU's properties.
#include "bind_host.h"

#include <string>

#include "common/launch.h"
#include "experts/plan_experts.h"
#include "lowrank/branch.h"

namespace py = pybind11;
namespace cuda = lowrank_ext::cuda;

void bind_host(py::module_& m) {
  py::module_ host = m.def_submodule("host");
  host.def("num_sms", [] { return cuda::simt_num_sms; });
  host.def("set_num_sms", [](int count) { cuda::simt_num_sms = count; });
  host.def("min_seeded_bytes", [] { return cuda::min_seeded_bytes; });
  host.def("set_min_seeded_bytes", [](int64_t bytes) { cuda::min_seeded_bytes = bytes; });
  host.def(
      "reset",
      [num_sms = cuda::simt_num_sms, bytes = cuda::min_seeded_bytes] {
        cuda::simt_num_sms = num_sms;
        cuda::min_seeded_bytes = bytes;
        cuda::fixed_expert_plan.reset();
      },
      "All settings as they were when the module was loaded.");
  host.def(
      "fix_expert_plan",
      [](bool grouped, bool dense_up_backward) {
        cuda::fixed_expert_plan = {grouped, dense_up_backward};
      },
      py::arg("grouped"), py::arg("dense_up_backward") = false,
      "The form that every call of moe_lowrank_add takes, whatever its sizes.");
  host.def("plan_experts_by_sizes", [] { cuda::fixed_expert_plan.reset(); });
  host.def(
      "plan_experts",
      [](int64_t num_experts, int64_t rank, int64_t top_k, int64_t element_bytes, bool drops,
         bool shared_dropout) {
        const auto plan =
            cuda::plan_experts({num_experts, rank, top_k, element_bytes, drops, shared_dropout});
        return py::make_tuple(plan.grouped, plan.dense_up_backward);
      },
      py::arg("num_experts"), py::arg("rank"), py::arg("top_k"), py::arg("element_bytes") = 2,
      py::arg("drops") = false, py::arg("shared_dropout") = true, "(grouped, dense_up_backward)");
  host.def("seed_base_output", &cuda::seed_base_output, py::arg("num_rows"), py::arg("num_cols"),
           py::arg("element_size"));
  host.def(
      "check_launch",
      [](const std::string& launcher, unsigned grid_x, unsigned grid_y, unsigned grid_z,
         unsigned threads) { cuda::check_launch(launcher, {grid_x, grid_y, grid_z, threads, 0}); },
      "Raises what a launch of this shape raises before it reaches the GPU.");
}
