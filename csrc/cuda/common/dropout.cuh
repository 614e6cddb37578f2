// Dropout drawn in the kernel: bit for bit the mask of csrc/cpu/dropout.h and of
// lowrank_ext/reference.py. Element (m, k) belongs to the Philox4x32-7 call with counter
// (k / 8, m mod 2^32, m / 2^32, expert) and key (seed mod 2^32, seed / 2^32); its four words, low
// half first, are 16-bit draws for eight neighboring columns; draws below `threshold` are dropped.
// expert is 0 unless each expert has its own mask.
//
// A mask is applied to one 16-byte chunk at a time, by the thread that copied it: a chunk of eight
// 2-byte elements is one call. Wider elements share a call between two or four chunks, and each of
// them draws it again: their stream is as many times longer, so the cost per byte is the same.
#pragma once

#include "common/tile.cuh"

namespace lowrank_ext::cuda {

struct Dropout {
  uint32_t threshold;   // of 65536; 0 draws nothing
  const int64_t* seed;  // one element, on the device
};

struct Philox4 {
  uint32_t words[4];
};

// 7 rounds: the fewest that pass BigCrush (Salmon et al., SC'11, table 2).
__device__ __forceinline__ Philox4 philox(uint32_t call, uint64_t row, uint32_t expert,
                                          uint64_t seed) {
  constexpr int kRounds = 7;
  uint32_t c0 = call, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32);
  uint32_t c3 = expert, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    // Both halves of a product, as nvcc makes one instruction of them.
    const uint32_t low0 = c0 * 0xD2511F53u, high0 = __umulhi(c0, 0xD2511F53u);
    const uint32_t low1 = c2 * 0xCD9E8D57u, high1 = __umulhi(c2, 0xCD9E8D57u);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Zeroes the dropped elements of a chunk (of any element type) whose first element is
// (row, first_col); first_col is a multiple of the chunk's size.
template <class Element, int kSize>
__device__ __forceinline__ void drop(Element (&elements)[kSize], const Dropout& dropout,
                                     uint64_t seed, int64_t row, int64_t first_col,
                                     uint32_t expert = 0) {
  static_assert(8 % kSize == 0);
  const Philox4 draws =
      philox(static_cast<uint32_t>(static_cast<uint64_t>(first_col) / 8), row, expert, seed);
  if constexpr (sizeof(Element) == 2) {  // draw and element have the same size: two at a time
    static_assert(kSize == 8);
    uint32_t pairs[4];
    memcpy(pairs, elements, sizeof(pairs));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int low = static_cast<int>(draws.words[i] & 0xFFFFu);
      const int high = static_cast<int>(draws.words[i] >> 16);
      const int threshold = static_cast<int>(dropout.threshold);
      pairs[i] &= ~sign_masks(low - threshold, high - threshold);
    }
    memcpy(elements, pairs, sizeof(pairs));
    return;
  }
  // first_draw is a constant 0 where a chunk is a whole call; else it selects among few words.
  const int first_draw = kSize == 8 ? 0 : static_cast<int>(first_col % 8);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int draw = first_draw + i;
    const uint32_t low_pair = draw < 4 ? draws.words[0] : draws.words[2];
    const uint32_t high_pair = draw < 4 ? draws.words[1] : draws.words[3];
    const uint32_t word = draw % 4 < 2 ? low_pair : high_pair;
    const uint32_t bits = draw % 2 ? word >> 16 : word & 0xFFFFu;
    if (bits < dropout.threshold) elements[i] = Element(0.0f);
  }
}

// Bit i is 1 where element (row, first_col + i) is dropped, for eight columns; first_col is a
// multiple of 8. For sums that lie in registers, where no thread owns whole chunks.
__device__ __forceinline__ uint32_t dropped_bits(const Dropout& dropout, uint64_t seed, int64_t row,
                                                 int64_t first_col, uint32_t expert) {
  const Philox4 draws =
      philox(static_cast<uint32_t>(static_cast<uint64_t>(first_col) / 8), row, expert, seed);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    // The sign of the difference moves in from the right: one funnel shift.
    bits = bits << 1 | ((draws.words[i] >> 16) - dropout.threshold) >> 31;
    bits = bits << 1 | ((draws.words[i] & 0xFFFFu) - dropout.threshold) >> 31;
  }
  return bits;
}

}  // namespace lowrank_ext::cuda
