// The module _simt: options and reports of the SIMT executor, the planted kernels. Loading it also
// registers torch.ops.lowrank_ext_simt. Nothing that kernels instantiate may be included here: this
// file is compiled without the instrumentation.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_host.h"
#include "bind_kernels.h"
#include "executor.h"
#include "planted.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float>;

py::tuple as_tuple(const simt::Dim3& d) { return py::make_tuple(d.x, d.y, d.z); }

py::dict as_dict(const simt::TensorTraffic& tensor) {
  using py::literals::operator""_a;
  return py::dict(
      "name"_a = tensor.name, "bytes"_a = tensor.bytes, "bytes_read"_a = tensor.bytes_read,
      "bytes_written"_a = tensor.bytes_written, "unique_bytes_read"_a = tensor.unique_bytes_read,
      "read_requests"_a = tensor.read_requests, "write_requests"_a = tensor.write_requests,
      "sectors_read"_a = tensor.sectors_read, "sectors_written"_a = tensor.sectors_written);
}

// With the sums over the tensors, and what a launch's size divides out.
py::dict as_dict(const simt::Report& report) {
  using py::literals::operator""_a;
  simt::TensorTraffic sum;
  py::list tensors;
  for (const simt::TensorTraffic& tensor : report.tensors) {
    tensors.append(as_dict(tensor));
    sum.bytes_read += tensor.bytes_read;
    sum.bytes_written += tensor.bytes_written;
    sum.unique_bytes_read += tensor.unique_bytes_read;
    sum.read_requests += tensor.read_requests;
    sum.write_requests += tensor.write_requests;
    sum.sectors_read += tensor.sectors_read;
    sum.sectors_written += tensor.sectors_written;
  }
  const auto requests = static_cast<double>(sum.read_requests + sum.write_requests);
  const auto sectors = static_cast<double>(sum.sectors_read + sum.sectors_written);
  const auto blocks = static_cast<double>(uint64_t{report.grid.x} * report.grid.y * report.grid.z);
  return py::dict(
      "kernel"_a = report.kernel, "grid"_a = as_tuple(report.grid),
      "block"_a = as_tuple(report.block), "shared_bytes"_a = report.shared_bytes,
      "tensors"_a = tensors, "bytes_read"_a = sum.bytes_read, "bytes_written"_a = sum.bytes_written,
      "unique_bytes_read"_a = sum.unique_bytes_read, "read_requests"_a = sum.read_requests,
      "write_requests"_a = sum.write_requests, "sectors_read"_a = sum.sectors_read,
      "sectors_written"_a = sum.sectors_written,
      "sectors_per_request"_a = requests > 0 ? sectors / requests : 0.0,
      "shared_requests"_a = report.shared_requests,
      "shared_wavefronts"_a = report.shared_wavefronts,
      "shared_conflicts"_a = report.shared_conflicts,
      "barriers_per_block"_a = static_cast<double>(report.barriers) / blocks, "mma"_a = report.mma,
      "shuffles"_a = report.shuffles, "atomics"_a = report.atomics);
}

py::list reports() {
  py::list list;
  for (const simt::Report& report : simt::reports()) list.append(as_dict(report));
  return list;
}

void run_planted(const std::string& name, bool fixed, const Floats& x, Floats& y, unsigned blocks,
                 unsigned threads, size_t shared_bytes) {
  constexpr py::ssize_t kElement = sizeof(float);
  if (x.ndim() != 2 || x.strides(1) != kElement || y.ndim() != 1)
    throw py::value_error("run_planted: x must be [rows, cols] with dense rows, y [size]");
  simt::run_planted(name, fixed,
                    {x.data(), x.shape(0), x.shape(1), x.strides(0) / kElement, y.mutable_data(),
                     y.shape(0), blocks, threads, shared_bytes});
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  m.doc() = "CUDA kernels on the CPU, checked; see tests/simt/executor.h";
  m.def("reports", &reports, "One dict per launch since clear_reports(), oldest first.");
  m.def("clear_reports", [] { simt::reports().clear(); });
  m.def(
      "set_options",
      [](uint64_t schedule_seed, bool record) { simt::options() = {schedule_seed, record}; },
      py::kw_only(), py::arg("schedule_seed") = 0, py::arg("record") = true,
      "Sets every option; what is not named gets its default.");
  bind_host(m);
  bind_common(m);
  bind_lowrank(m);
  bind_experts(m);
  bind_routing(m);
  bind_segments(m);
  m.def("planted_names", &simt::planted_names);
  m.def("run_planted", &run_planted, py::arg("name"), py::kw_only(), py::arg("fixed"),
        py::arg("x").noconvert(), py::arg("y").noconvert(), py::arg("blocks") = 1,
        py::arg("threads") = 32, py::arg("shared_bytes") = 0);
}
