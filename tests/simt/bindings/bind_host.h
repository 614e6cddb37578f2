#pragma once

#include <pybind11/pybind11.h>

// Adds the submodule host to the module _simt: settings and plans of csrc/cuda's host code.
void bind_host(pybind11::module_& m);
