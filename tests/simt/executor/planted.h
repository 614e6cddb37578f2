// Small kernels whose faults or figures are known: what the SIMT executor is tested with.
#pragma once

#include <string>
#include <vector>

#include "executor.h"

namespace simt {

struct PlantedArgs {
  const float* x;  // read only, rows x_stride elements apart
  int64_t x_rows, x_cols, x_stride;
  float* y;  // [y_size]
  int64_t y_size;
  unsigned blocks, threads;
  size_t shared_bytes;
};

std::vector<std::string> planted_names();
// `fixed`: the twin without the fault.
void run_planted(const std::string& name, bool fixed, const PlantedArgs& args);

}  // namespace simt
