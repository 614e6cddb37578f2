// The products of a branch between rows and ranks. In bf16 they are our own, with dropout on the
// way: a row is masked where it is read or written, so neither a masked copy of a matrix nor a
// product of its size exists. The vendor's product does the work in fp32 and fp64, and in bf16
// where nothing is dropped and it is faster.
//
// In bf16 only where features().avx512_bf16.
#pragma once

#include "dropout.h"
#include "matrix.h"

namespace lowrank_ext::cpu {

// h = scale · drop(x) lora_aᵀ, rounded once. All of one dtype: h [M, r], x [M, K], lora_a [r, K] or
// a transposed view of [K, r]. Dropout in bf16 only; what is dropped may be NaN.
void shrink(const Tensor& h, const Tensor& x, const Tensor& lora_a, double scale,
            const Dropout& dropout);

// y += scale · h lora where kept; without `add` it becomes that, and 0 where dropped. Rounded once.
// All of one dtype: y [M, N], h [M, r], lora [r, N] or a transposed view of [N, r]. bits: keep bits
// of y as drawn by draw_keep_bits, or null; in bf16 only.
void expand(const Tensor& y, const Tensor& h, const Tensor& lora, double scale,
            const uint64_t* bits, bool add);

}  // namespace lowrank_ext::cpu
