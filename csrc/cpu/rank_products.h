// The products of a branch between bf16 rows and ranks, with dropout on the way: a row is masked
// where it is read or written, so neither a masked copy of a matrix nor a product of its size
// exists. Without dropout the vendor's product does the work where it is as fast.
#pragma once

#include "dropout.h"
#include "matrix.h"

namespace lowrank_ext::cpu {

// Whether the functions below may be called: AVX-512 with bf16 dot products.
bool has_rank_products();

// Up to this rank the functions below beat the vendor's product at any number of rows.
inline constexpr int64_t kMaxOwnRank = 32;

// h = scale · drop(x) lora_aᵀ, rounded once; fp32 sums, in the same order for every row. All bf16:
// h [M, r], x [M, K], lora_a [r, K] or a transposed view of [K, r]. What is dropped may be NaN.
void features_to_ranks(const Tensor& h, const Tensor& x, const Tensor& lora_a, double scale,
                       const Dropout& dropout);

// y += scale · h lora where kept; without `add` it becomes that, and 0 where dropped. Rounded once.
// All bf16: y [M, N], h [M, r], lora [r, N] or a transposed view of [N, r]. bits: keep bits of y as
// drawn by draw_keep_bits, or null.
void ranks_to_features(const Tensor& y, const Tensor& h, const Tensor& lora, double scale,
                       const uint64_t* bits, bool add);

}  // namespace lowrank_ext::cpu
