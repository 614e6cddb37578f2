// Partial sums of scale · drop(source)ᵀ thin, source [M, C] and thin [M, r]: what dlora_a and, in a
// pass of its own, dlora_b are made of. Compiled once, in outer_sum.cu, for both.
#pragma once

#include "common/kernels.h"
#include "lowrank/thin_product.cuh"

namespace lowrank_ext::cuda {

// Part s in rows [s C, (s + 1) C) of data [num_splits · C, r] or, transposed, in rows
// [s r, (s + 1) r) of data [num_splits · r, C]; row strides padded_to_sector. finite_only: what is
// not finite in source counts as zero.
ThinProductPlan plan_outer_sum(NumberKind kind, int64_t num_rows, int64_t num_cols, int64_t rank,
                               int num_sms);
int64_t outer_sum_bytes(NumberKind kind, int64_t num_rows, int64_t num_cols, int64_t rank,
                        bool transposed, int num_sms);
void outer_sum(const char* name, NumberKind kind, const Any& source, const Any& thin,
               const DropoutArgs& dropout, double scale, bool transposed, void* partials,
               const Device& device, bool finite_only = false);

}  // namespace lowrank_ext::cuda
