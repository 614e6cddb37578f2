// The kernel interface of common: what host code calls, defined in the .cu files beside it.
#pragma once

#include "common/arguments.h"

namespace lowrank_ext::cuda {

// An adapter tensor as it was given, and where its elements go: rounded to x's type, rows dense.
struct AdapterCopy {
  MatrixRef source;    // fp32, or of rounded's type
  int64_t col_stride;  // of source, in elements
  MatrixRef rounded;
};

// One launch for all copies of a call.
constexpr int kMaxAdapterCopies = 5;
void round_adapters(const AdapterCopy* copies, int num_copies, const Device& device);

}  // namespace lowrank_ext::cuda
