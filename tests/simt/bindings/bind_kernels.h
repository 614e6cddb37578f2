// Adds the kernel interfaces of csrc/cuda and the plan functions to the module _simt. Compiled
// without the instrumentation, so only declarations and plan functions may be used here, which no
// kernel calls.
#pragma once

#include <pybind11/pybind11.h>

void bind_common(pybind11::module_& m);
void bind_lowrank(pybind11::module_& m);
void bind_experts(pybind11::module_& m);
void bind_routing(pybind11::module_& m);
void bind_segments(pybind11::module_& m);
