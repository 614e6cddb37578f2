// small_segments.h by matrix tiles (AMX): the same products, a tile of 16 rows by 32 columns per
// instruction, which leaves an adapter's bytes as the limit up to hundreds of rows. The vendor's product
// packs its weights at every call.
//
// Needs features().amx_bf16.
#pragma once

#include "small_segments.h"

namespace lowrank_ext::cpu {

// h[m, j] = x_scale · Σ_k x[m, k] lora_a[j, k] for all segments, rounded once; fp32 sums in a
// fixed order, the same for any number of rows and threads.
void shrink_amx_segments(const std::vector<SmallSegment>& segments, int64_t in_features,
                         float x_scale);

// y[m, n] = base[m, n] + scaling · Σ_j h[m, j] lora_b[n, j], rounded once.
void expand_amx_segments(const std::vector<SmallSegment>& segments, int64_t out_features);

}  // namespace lowrank_ext::cpu
