// shrink and expand for segments of a handful of rows (decode). Rows are read and written where they
// lie, so nothing is gathered, and an adapter is read once. At these sizes the set-up of the vendor's
// bf16 product costs several times the product.
//
// Needs features().avx512_bf16.
#pragma once

#include <cstdint>
#include <vector>

namespace lowrank_ext::cpu {

// One adapter and pointers to the rows that use it; all bf16.
struct SmallSegment {
  const uint16_t* lora_a;  // [rank, K], row stride a_stride
  int64_t a_stride;
  const uint16_t* lora_b;  // [N, rank], row stride b_stride
  int64_t b_stride;
  int64_t rank, num_rows;
  float scaling;
  const uint16_t* const* x;     // [K]
  uint16_t* const* h;           // [rank], written by shrink
  const uint16_t* const* base;  // [N], what expand adds to
  uint16_t* const* y;           // [N], written by expand
};

// h[m, j] = x_scale · Σ_k x[m, k] lora_a[j, k] for all segments, rounded once; fp32 sums in a
// fixed order.
void shrink_small_segments(const std::vector<SmallSegment>& segments, int64_t in_features,
                           float x_scale);

// y[m, n] = base[m, n] + scaling · Σ_j h[m, j] lora_b[n, j], rounded once.
void expand_small_segments(const std::vector<SmallSegment>& segments, int64_t out_features);

}  // namespace lowrank_ext::cpu
