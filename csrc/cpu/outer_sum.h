// Sums over rows of bf16 matrices with fp32 accumulators: dlora_a = dhᵀ drop(x) and P = doutᵀ
// mid(h). The vendor's bf16 product would round every result to bf16.
//
// Needs features().avx512_bf16.
#pragma once

#include <cstdint>

namespace lowrank_ext::cpu {

// sum[j, c] += Σ_m left[m, j] · kept(m, c) · right[m, c], m < num_rows, j < rank, c < num_cols.
// left, right: bf16, row strides in elements; sum: fp32, rows num_cols apart. bits: keep bits of
// `right` from draw_keep_bits, or null. The order of summation depends on the shapes only, not on the
// threads.
void outer_sum(float* sum, const void* left, int64_t left_stride, int64_t rank, const void* right,
               int64_t right_stride, int64_t num_rows, int64_t num_cols, const uint64_t* bits);

}  // namespace lowrank_ext::cpu
