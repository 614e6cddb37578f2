// Dropout drawn in the kernel: no mask and no dropped copy outlives a call.
//
// Element (m, k) belongs to the Philox4x32-7 call with counter (k / 8, m mod 2^32, m / 2^32,
// expert) and key (seed mod 2^32, seed / 2^32); expert is 0 unless each expert has its own mask. The
// four result words, low half first, are eight 16-bit draws for eight
// neighboring columns; a draw below `threshold` = round(p · 65536) drops its element. The
// definition in plain torch is lowrank_ext/reference.py; the CUDA kernels draw the same bits.
#pragma once

#include <cmath>
#include <cstdint>

namespace lowrank_ext::cpu {

inline constexpr int kMaskColumns = 64;  // keep bits are drawn a word at a time

struct Dropout {
  uint32_t threshold;  // 0: nothing is dropped; 65536: everything is
  uint64_t seed;

  bool active() const { return threshold != 0; }
  // 1 / (1 - p) for p rounded to the threshold: 1 without dropout, and 1 where nothing is kept.
  double scale() const { return threshold == 65536 ? 1.0 : 65536.0 / (65536.0 - threshold); }
  static uint32_t threshold_of(double p) {
    return static_cast<uint32_t>(std::nearbyint(p * 65536));
  }
};

inline int64_t mask_words_per_row(int64_t num_cols) {  // 64-bit words
  return (num_cols + kMaskColumns - 1) / kMaskColumns;
}

// bits[row][k / 64] bit k % 64 is 1 where (first_row + row, k) is kept. Rows are mask_words_per_row
// apart.
void draw_keep_bits(const Dropout& dropout, int64_t first_row, int64_t num_rows, int64_t num_cols,
                    uint64_t* bits);

// The keep bits of one row of one expert's mask, for `num_cols` columns from first_col on, a multiple
// of kMaskColumns.
void draw_row_bits(const Dropout& dropout, uint32_t expert, int64_t row, int64_t first_col,
                   int64_t num_cols, uint64_t* bits);

// dst[m, k] = kept ? src[m, k] : 0, bit for bit, for elements of 2, 4 or 8 bytes. Strides in
// elements.
void copy_kept(void* dst, int64_t dst_stride, const void* src, int64_t src_stride,
               int64_t element_size, const uint64_t* bits, int64_t num_rows, int64_t num_cols);

// The same for one row, on the calling thread.
void copy_row_kept(void* dst, const void* src, int64_t element_size, const uint64_t* bits,
                   int64_t num_cols);

}  // namespace lowrank_ext::cpu
