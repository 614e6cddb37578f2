// The two products of a low-rank branch, from features to ranks (shrink) and back (expand). In bf16
// they are our own, with dropout inside: a row is masked where it is read or written, so neither a
// masked copy nor an unmasked product of a matrix exists. fp32 and fp64 take the vendor's product, and
// so does bf16 without dropout where it is faster.
//
// bf16 needs features().avx512_bf16.
#pragma once

#include "dropout.h"
#include "matrix.h"

namespace lowrank_ext::cpu {

// h = scale · drop(x) lora_aᵀ, rounded once. h [M, r], x [M, K] and lora_a [r, K], which may be a
// transposed view of [K, r], have one dtype. Dropout in bf16 only; dropped elements may be NaN.
void shrink(const Tensor& h, const Tensor& x, const Tensor& lora_a, double scale,
            const Dropout& dropout);

// y {=, +=} mask ⊙ (scale · h lora), rounded once. y [M, N], h [M, r] and lora [r, N], which may be a
// transposed view of [N, r], have one dtype. bits: the mask from draw_keep_bits, or null; in bf16
// only.
void expand(const Tensor& y, const Tensor& h, const Tensor& lora, double scale,
            const uint64_t* bits, bool add);

}  // namespace lowrank_ext::cpu
