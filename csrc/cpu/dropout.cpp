// On AVX-512 eight Philox calls run side by side, one in the low half of each 64-bit lane, and give
// the keep bits of 64 columns. A round's 32-bit products fill the lane; the high half is one shift
// away, and the upper halves are never read. So a round is six instructions, and the first two rounds
// share the terms that do not depend on the column: 0.7 instructions per element, less than the pass
// over x that uses the bits.
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
// Rows per task: enough work (about 20 us) to be worth a thread.
constexpr int64_t kRowGrain = 16;

// The first Philox counter of a row of the mask.
struct RowCounter {
  uint64_t row;
  uint32_t expert;
  uint32_t first_call;  // column / 8
};

void draw_row_portable(const Dropout& dropout, RowCounter at, int64_t num_words, uint64_t* bits) {
  constexpr int kCalls = 8;  // of a word
  for (int64_t word = 0; word < num_words; ++word) {
    uint32_t c0[kCalls], c1[kCalls], c2[kCalls], c3[kCalls];
    for (int i = 0; i < kCalls; ++i) {
      c0[i] = at.first_call + static_cast<uint32_t>(word * kCalls + i);
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
    bits[word] = 0;
    for (int i = 0; i < kCalls; ++i) {
      const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
      for (int j = 0; j < 8; ++j) {
        const uint32_t draw = words[j / 2] >> (16 * (j % 2)) & 0xFFFF;
        bits[word] |= uint64_t{draw >= dropout.threshold} << (8 * i + j);
      }
    }
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

// The terms of Philox that the words of a row share.
struct RowDraw {
  __m512i keys0[kRounds], keys1[kRounds];  // of the rounds; the first two with shared terms added
  __m512i c3;                              // after two rounds
  __m512i limit;

  // The counter's words 1 to 3 do not depend on the column, so in round 0 neither does the product
  // of word 2, nor in round 1 that of word 0.
  LOWRANK_EXT_AVX512 RowDraw(const Dropout& dropout, RowCounter at) {
    uint32_t k0[kRounds], k1[kRounds];
    for (int round = 0; round < kRounds; ++round) {
      k0[round] = static_cast<uint32_t>(dropout.seed) + static_cast<uint32_t>(round) * kWeyl0;
      k1[round] = static_cast<uint32_t>(dropout.seed >> 32) + static_cast<uint32_t>(round) * kWeyl1;
    }
    const uint64_t of_word2 = (at.row >> 32) * kMultiplier1;
    const uint32_t word0 =
        static_cast<uint32_t>(of_word2 >> 32) ^ static_cast<uint32_t>(at.row) ^ k0[0];
    const uint64_t of_word0 = uint64_t{word0} * kMultiplier0;
    k1[0] ^= at.expert;
    k0[1] ^= static_cast<uint32_t>(of_word2);
    k1[1] ^= static_cast<uint32_t>(of_word0 >> 32);
    for (int round = 0; round < kRounds; ++round) {
      keys0[round] = _mm512_set1_epi64(k0[round]);
      keys1[round] = _mm512_set1_epi64(k1[round]);
    }
    c3 = _mm512_set1_epi64(static_cast<int64_t>(of_word0));
    // draw >= threshold, as draw > threshold - 1, since threshold may be 65536.
    limit = _mm512_set1_epi16(static_cast<short>(dropout.threshold - 1));
  }

  // The bits of eight calls. `calls` has them in the order 0, 4, 1, 5, 2, 6, 3, 7, so that the two
  // 128-bit unpacks below give calls 0 to 3 and 4 to 7.
  LOWRANK_EXT_AVX512 inline uint64_t word(__m512i calls) const {
    constexpr int kXor3 = 0x96;
    const __m512i multiplier0 = _mm512_set1_epi64(kMultiplier0);
    const __m512i multiplier1 = _mm512_set1_epi64(kMultiplier1);
    __m512i product0 = _mm512_mul_epu32(calls, multiplier0);
    __m512i c2 = _mm512_xor_si512(_mm512_srli_epi64(product0, 32), keys1[0]);
    __m512i product1 = _mm512_mul_epu32(c2, multiplier1);
    __m512i c0 = _mm512_xor_si512(_mm512_srli_epi64(product1, 32), keys0[1]);
    c2 = _mm512_xor_si512(product0, keys1[1]);
    __m512i c1 = product1, c3 = this->c3;
#pragma GCC unroll 8
    for (int round = 2; round < kRounds; ++round) {
      product0 = _mm512_mul_epu32(c0, multiplier0);
      product1 = _mm512_mul_epu32(c2, multiplier1);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1, keys0[round], kXor3);
      c1 = product1;
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3, keys1[round], kXor3);
      c3 = product0;
    }
    // A lane's draws of its call: columns 0 to 3, and 4 to 7.
    const auto low_halves = static_cast<_MM_PERM_ENUM>(0xA0);
    const __m512i first = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, low_halves);
    const __m512i second = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, low_halves);
    const uint64_t low = _mm512_cmpgt_epu16_mask(_mm512_unpacklo_epi64(first, second), limit);
    const uint64_t high = _mm512_cmpgt_epu16_mask(_mm512_unpackhi_epi64(first, second), limit);
    return low | high << 32;
  }
};

LOWRANK_EXT_AVX512 void draw_row_avx512(const Dropout& dropout, RowCounter at, int64_t num_words,
                                        uint64_t* bits) {
  const RowDraw row(dropout, at);
  const __m512i eight = _mm512_set1_epi64(8);
  __m512i calls =
      _mm512_add_epi64(_mm512_set1_epi64(at.first_call), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  for (int64_t word = 0; word < num_words; ++word) {
    bits[word] = row.word(calls);
    calls = _mm512_add_epi64(calls, eight);
  }
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

using DrawRow = void (*)(const Dropout&, RowCounter, int64_t, uint64_t*);
using CopyRow = void (*)(char*, const char*, int64_t, const uint64_t*, int64_t);

DrawRow choose_draw_row() {
#if LOWRANK_EXT_X86
  if (features().avx512) return draw_row_avx512;
#endif
  return draw_row_portable;
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
  static const DrawRow draw_row = choose_draw_row();
  draw_row(dropout, {static_cast<uint64_t>(row), expert, static_cast<uint32_t>(first_col / 8)},
           mask_words_per_row(num_cols), bits);
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
