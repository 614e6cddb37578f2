#pragma once

#include <pybind11/pybind11.h>

// Adds csrc/cuda/kernels.h and the plan functions to the module _simt.
void bind_kernels(pybind11::module_& m);
