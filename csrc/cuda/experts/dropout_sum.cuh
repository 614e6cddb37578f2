// Sums in registers that meet a dropout mask on their way into another sum, for kernels that add up
// products of several experts. The tile is a warp's 16 rows of an Accumulator; no thread owns whole
// chunks of it, so the warp draws the mask together, a Philox call for eight columns of a row,
// eight bits a call, and lanes get the bits of the elements that they own by shuffles. Rows that
// are not asked for are neither drawn nor added, whatever their values are. No shared memory.
#pragma once

#include "common/dropout.cuh"

namespace lowrank_ext::cuda {

// A warp's Philox calls: kPieces neighboring lanes share a row of its 16.
template <class Sum>
struct DropoutTile {
  static constexpr int kPieces = Sum::kPiecesN;
  static constexpr int kRowsPerRound = kWarpSize / kPieces;
  static constexpr int kRounds = 16 / kRowsPerRound;
  static_assert(Sum::kPiecesM == 1 && kRounds <= 4, "a lane's bits of all rounds fill one word");
};

// Element bits of the warp's tile, 1 where it is dropped: byte i of a lane's word belongs to row
// kRowsPerRound · i + lane / kPieces and piece lane % kPieces. row_of(row) is the row of the whole
// batch. Rows that are not in `rows` drop everything.
template <class Sum, class RowOf>
__device__ __forceinline__ uint32_t draw_tile(const Dropout& dropout, uint64_t seed, RowOf row_of,
                                              int64_t first_col, uint32_t mask, uint32_t rows,
                                              int lane) {
  using Tile = DropoutTile<Sum>;
  const int64_t col = first_col + 8 * (lane % Tile::kPieces);
  uint32_t word = 0;
#pragma unroll 1  // draws are long
  for (int i = 0; i < Tile::kRounds; ++i) {
    const int row = Tile::kRowsPerRound * i + lane / Tile::kPieces;
    uint32_t bits = 0xFFu;
    if (rows >> row & 1) bits = dropped_bits(dropout, seed, row_of(row), col, mask);
    word |= bits << (8 * i);
  }
  return word;
}

// sum += scale · part where the bits of draw_tile keep it.
template <class Sum>
__device__ __forceinline__ void add_kept(Sum& sum, const Sum& part, typename Sum::acc_t scale,
                                         uint32_t word, int lane) {
  constexpr int kPieces = DropoutTile<Sum>::kPieces;
  constexpr int kRowsPerRound = DropoutTile<Sum>::kRowsPerRound;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      const uint32_t words = __shfl_sync(0xFFFFFFFFu, word, row % kRowsPerRound * kPieces + piece);
      const uint32_t dropped = words >> (8 * (row / kRowsPerRound) + 2 * (lane % 4));
      const auto& from = part.values[0][piece];
      auto& to = sum.values[0][piece];
      if (!(dropped & 1)) to[2 * half] += scale * from[2 * half];
      if (!(dropped & 2)) to[2 * half + 1] += scale * from[2 * half + 1];
    }
  }
}

// The same without a mask: of whole rows.
template <class Sum>
__device__ __forceinline__ void add_rows(Sum& sum, const Sum& part, typename Sum::acc_t scale,
                                         uint32_t rows, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!(rows >> (lane / 4 + 8 * half) & 1)) continue;
#pragma unroll
    for (int piece = 0; piece < Sum::kPiecesN; ++piece) {
      sum.values[0][piece][2 * half] += scale * part.values[0][piece][2 * half];
      sum.values[0][piece][2 * half + 1] += scale * part.values[0][piece][2 * half + 1];
    }
  }
}

}  // namespace lowrank_ext::cuda
