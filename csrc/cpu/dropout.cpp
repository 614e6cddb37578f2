// Sixteen Philox calls run side by side (one per 32-bit lane) and give the keep bits of 128
// columns: about one vector instruction per element on AVX-512, so the draw costs less than the
// pass over x that it rides on.
#include "dropout.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "features.h"
#include "isa.h"

namespace lowrank_ext::cpu {
namespace {

constexpr int kRounds = 7;
constexpr uint32_t kMultiplier0 = 0xD2511F53;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9;
constexpr uint32_t kWeyl1 = 0xBB67AE85;
constexpr int kCalls = kMaskColumns / 8;
// Rows per task: enough work (about 20 us) to be worth a thread.
constexpr int64_t kRowGrain = 16;

struct BlockCounter {
  uint32_t first_call;  // k / 8 of the block's first column
  uint64_t row;
  uint32_t expert;
};

void draw_block_portable(const Dropout& dropout, BlockCounter at, uint64_t* out) {
  uint32_t c0[kCalls], c1[kCalls], c2[kCalls], c3[kCalls];
  for (int i = 0; i < kCalls; ++i) {
    c0[i] = at.first_call + i;
    c1[i] = static_cast<uint32_t>(at.row);
    c2[i] = static_cast<uint32_t>(at.row >> 32);
    c3[i] = at.expert;
  }
  uint32_t k0 = static_cast<uint32_t>(dropout.seed);
  uint32_t k1 = static_cast<uint32_t>(dropout.seed >> 32);
  for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1) {
    for (int i = 0; i < kCalls; ++i) {
      const uint64_t product0 = uint64_t{c0[i]} * kMultiplier0;
      const uint64_t product1 = uint64_t{c2[i]} * kMultiplier1;
      c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(product1);
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(product0);
    }
  }
  out[0] = out[1] = 0;
  for (int i = 0; i < kCalls; ++i) {
    const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
    uint64_t kept = 0;
    for (int j = 0; j < 8; ++j) {
      const uint32_t draw = words[j / 2] >> (16 * (j % 2)) & 0xFFFF;
      kept |= uint64_t{draw >= dropout.threshold} << j;
    }
    out[i / 8] |= kept << (8 * (i % 8));
  }
}

void copy_row_portable(char* dst, const char* src, int64_t element_size, const uint64_t* bits,
                       int64_t num_cols) {
  for (int64_t k = 0; k < num_cols; ++k) {
    const bool kept = bits[k / 64] >> (k % 64) & 1;
    if (kept) {
      std::memcpy(dst + k * element_size, src + k * element_size, element_size);
    } else {
      std::memset(dst + k * element_size, 0, element_size);
    }
  }
}

#if LOWRANK_EXT_X86

struct Words {
  __m512i c0, c1, c2, c3;
};

// High and low 32 bits of c · multiplier for each of the 16 lanes.
LOWRANK_EXT_AVX512 inline void multiply(__m512i c, __m512i multiplier, __m512i& high,
                                        __m512i& low) {
  const __m512i even = _mm512_mul_epu32(c, multiplier);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(c, 32), multiplier);
  high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}

LOWRANK_EXT_AVX512 inline Words philox_avx512(Words c, uint64_t seed) {
  const __m512i multiplier0 = _mm512_set1_epi64(kMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kMultiplier1);
  __m512i k0 = _mm512_set1_epi32(static_cast<int>(seed));
  __m512i k1 = _mm512_set1_epi32(static_cast<int>(seed >> 32));
  for (int round = 0; round < kRounds; ++round) {
    __m512i high0, low0, high1, low1;
    multiply(c.c0, multiplier0, high0, low0);
    multiply(c.c2, multiplier1, high1, low1);
    constexpr int kXor3 = 0x96;
    c.c0 = _mm512_ternarylogic_epi32(high1, c.c1, k0, kXor3);
    c.c1 = low1;
    c.c2 = _mm512_ternarylogic_epi32(high0, c.c3, k1, kXor3);
    c.c3 = low0;
    k0 = _mm512_add_epi32(k0, _mm512_set1_epi32(static_cast<int>(kWeyl0)));
    k1 = _mm512_add_epi32(k1, _mm512_set1_epi32(static_cast<int>(kWeyl1)));
  }
  return c;
}

LOWRANK_EXT_AVX512 void draw_block_avx512(const Dropout& dropout, BlockCounter at, uint64_t* out) {
  // The 4x4 transpose below moves lane 4L + t to 128-bit lane L of register t; giving that lane
  // call 4t + L makes register t hold calls 4t … 4t + 3, so its 32 draws are 32 neighbouring
  // columns in order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  Words c;
  c.c0 = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(at.first_call)), order);
  c.c1 = _mm512_set1_epi32(static_cast<int>(at.row));
  c.c2 = _mm512_set1_epi32(static_cast<int>(at.row >> 32));
  c.c3 = _mm512_set1_epi32(static_cast<int>(at.expert));
  c = philox_avx512(c, dropout.seed);
  const __m512i low01 = _mm512_unpacklo_epi32(c.c0, c.c1);
  const __m512i high01 = _mm512_unpackhi_epi32(c.c0, c.c1);
  const __m512i low23 = _mm512_unpacklo_epi32(c.c2, c.c3);
  const __m512i high23 = _mm512_unpackhi_epi32(c.c2, c.c3);
  // draw >= threshold, as draw > threshold - 1, since threshold may be 65536.
  const __m512i limit = _mm512_set1_epi16(static_cast<short>(dropout.threshold - 1));
  const uint64_t kept[4] = {_mm512_cmpgt_epu16_mask(_mm512_unpacklo_epi64(low01, low23), limit),
                            _mm512_cmpgt_epu16_mask(_mm512_unpackhi_epi64(low01, low23), limit),
                            _mm512_cmpgt_epu16_mask(_mm512_unpacklo_epi64(high01, high23), limit),
                            _mm512_cmpgt_epu16_mask(_mm512_unpackhi_epi64(high01, high23), limit)};
  out[0] = kept[0] | kept[1] << 32;
  out[1] = kept[2] | kept[3] << 32;
}

// Up to 64 columns: the bits of one word; `in_range` masks the ragged end.
LOWRANK_EXT_AVX512 inline void copy_word_avx512(char* dst, const char* src, int64_t element_size,
                                                uint64_t kept, uint64_t in_range) {
  if (element_size == 2) {
    for (int half = 0; half < 2; ++half, kept >>= 32, in_range >>= 32, dst += 64, src += 64) {
      const auto keep = static_cast<__mmask32>(kept & in_range);
      _mm512_mask_storeu_epi16(dst, static_cast<__mmask32>(in_range),
                               _mm512_maskz_loadu_epi16(keep, src));
    }
  } else if (element_size == 4) {
    for (int part = 0; part < 4; ++part, kept >>= 16, in_range >>= 16, dst += 64, src += 64) {
      const auto keep = static_cast<__mmask16>(kept & in_range);
      _mm512_mask_storeu_epi32(dst, static_cast<__mmask16>(in_range),
                               _mm512_maskz_loadu_epi32(keep, src));
    }
  } else {
    for (int part = 0; part < 8; ++part, kept >>= 8, in_range >>= 8, dst += 64, src += 64) {
      const auto keep = static_cast<__mmask8>(kept & in_range);
      _mm512_mask_storeu_epi64(dst, static_cast<__mmask8>(in_range),
                               _mm512_maskz_loadu_epi64(keep, src));
    }
  }
}

LOWRANK_EXT_AVX512 void copy_row_avx512(char* dst, const char* src, int64_t element_size,
                                        const uint64_t* bits, int64_t num_cols) {
  const int64_t full_words = num_cols / 64;
  const int64_t step = 64 * element_size;
  for (int64_t word = 0; word < full_words; ++word)
    copy_word_avx512(dst + word * step, src + word * step, element_size, bits[word], ~uint64_t{0});
  if (const int64_t rest = num_cols % 64)
    copy_word_avx512(dst + full_words * step, src + full_words * step, element_size,
                     bits[full_words], (uint64_t{1} << rest) - 1);
}

#endif  // LOWRANK_EXT_X86

using DrawBlock = void (*)(const Dropout&, BlockCounter, uint64_t*);
using CopyRow = void (*)(char*, const char*, int64_t, const uint64_t*, int64_t);

DrawBlock choose_draw_block() {
#if LOWRANK_EXT_X86
  if (features().avx512) return draw_block_avx512;
#endif
  return draw_block_portable;
}

CopyRow choose_copy_row() {
#if LOWRANK_EXT_X86
  if (features().avx512) return copy_row_avx512;
#endif
  return copy_row_portable;
}

}  // namespace

void draw_row_bits(const Dropout& dropout, uint32_t expert, int64_t row, int64_t first_col,
                   int64_t num_cols, uint64_t* bits) {
  static const DrawBlock draw_block = choose_draw_block();
  const int64_t num_words = mask_words_per_row(num_cols);
  for (int64_t word = 0; word < num_words; word += 2)
    draw_block(
        dropout,
        {static_cast<uint32_t>(first_col / 8 + word * 8), static_cast<uint64_t>(row), expert},
        bits + word);
}

void draw_keep_bits(const Dropout& dropout, int64_t first_row, int64_t num_rows, int64_t num_cols,
                    uint64_t* bits) {
  const int64_t words_per_row = mask_words_per_row(num_cols);
  torch::stable::parallel_for(0, num_rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      draw_row_bits(dropout, 0, first_row + row, 0, num_cols, bits + row * words_per_row);
  });
}

void copy_row_kept(void* dst, const void* src, int64_t element_size, const uint64_t* bits,
                   int64_t num_cols) {
  static const CopyRow copy_row = choose_copy_row();
  copy_row(static_cast<char*>(dst), static_cast<const char*>(src), element_size, bits, num_cols);
}

void copy_kept(void* dst, int64_t dst_stride, const void* src, int64_t src_stride,
               int64_t element_size, const uint64_t* bits, int64_t num_rows, int64_t num_cols) {
  const int64_t words_per_row = mask_words_per_row(num_cols);
  torch::stable::parallel_for(0, num_rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      copy_row_kept(static_cast<char*>(dst) + row * dst_stride * element_size,
                    static_cast<const char*>(src) + row * src_stride * element_size, element_size,
                    bits + row * words_per_row, num_cols);
  });
}

}  // namespace lowrank_ext::cpu
