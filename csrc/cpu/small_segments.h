// The two products of a low-rank branch for a handful of rows that share an adapter (decode): rows
// are read and written where they lie, so nothing is gathered, and an adapter is read once. At
// these sizes the vendor's bf16 product costs its set-up several times over.
//
// Only where features().avx512_bf16.
#pragma once

#include <cstdint>
#include <vector>

namespace lowrank_ext::cpu {

// One adapter and the rows that use it; all bf16. Row pointers are as many as there are rows.
struct SmallSegment {
  const uint16_t* lora_a;  // [rank, K], row stride a_stride
  int64_t a_stride;
  const uint16_t* lora_b;  // [N, rank], row stride b_stride
  int64_t b_stride;
  int64_t rank;
  float scaling;
  std::vector<const uint16_t*> x;  // [K]
  std::vector<uint16_t*> h;        // [rank], written by shrink_small_segments
  std::vector<uint16_t*> y;        // [N], added to by expand_small_segments
};

// h[m, j] = x_scale · Σ_k x[m, k] lora_a[j, k] for all segments, rounded once; fp32 sums in a fixed
// order.
void shrink_small_segments(const std::vector<SmallSegment>& segments, int64_t in_features,
                           float x_scale);

// y[m, n] += scaling · Σ_j h[m, j] lora_b[n, j], rounded once.
void expand_small_segments(const std::vector<SmallSegment>& segments, int64_t out_features);

}  // namespace lowrank_ext::cpu
