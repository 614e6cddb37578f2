// Views of matrices in global memory, tiles in shared memory, the loop that streams them, and
// products of tiles.
//
// A tile is kRows x kCols elements, row after row, in 16-byte chunks. A chunk's place in its row is
// permuted by the row ("swizzle"), so that none of these meets a bank twice: a warp copying whole
// rows, ldmatrix reading eight rows of one chunk column, a warp reading four rows of two
// neighboring chunks (32-bit elements, contraction along the rows) or writing accumulator
// fragments.
//
// A product's accumulators are distributed over the block's warps as mma.sync's m16n8 fragments
// are: lane 4 g + t owns rows g, g + 8 and columns 2 t, 2 t + 1 of each 16 x 8 piece. Compute types
// without tensor cores use the same ownership, so every kernel is written once.
#pragma once

#include <cstdint>

#include "common/mma.cuh"

namespace lowrank_ext::cuda {

// ---- global memory ------------------------------------------------------------------------------

// [num_rows, num_cols], dense rows, row_stride elements apart (0 repeats one row). An absent
// argument has no data. vectorized: every row starts on 16 bytes.
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t num_rows = 0, num_cols = 0, row_stride = 0;
  bool vectorized = false;

  __host__ __device__ __forceinline__ T* at(int64_t row, int64_t col) const {
    return data + row * row_stride + col;
  }
  __host__ __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
};

// How many of `size` elements from (row, col) on are inside the matrix.
template <class T>
__device__ __forceinline__ int elements_inside(const Matrix<T>& matrix, int64_t row, int64_t col,
                                               int size) {
  if (row >= matrix.num_rows || col >= matrix.num_cols) return 0;
  const int64_t rest = matrix.num_cols - col;
  return rest < size ? static_cast<int>(rest) : size;
}

// 16 bytes of elements in registers.
template <class scalar_t>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(scalar_t);
  scalar_t elements[kSize];
};

// `inside` elements from (row, col) on, one by one, and zeros.
template <class scalar_t, class T>
__device__ __forceinline__ Chunk<scalar_t> load_elements(const Matrix<T>& matrix, int64_t row,
                                                         int64_t col, int inside) {
  Chunk<scalar_t> chunk;
#pragma unroll
  for (int i = 0; i < chunk.kSize; ++i)
    chunk.elements[i] = i < inside ? *matrix.at(row, col + i) : scalar_t(0.0f);
  return chunk;
}

// Elements (row, col) to (row, col + Chunk size); zero outside the matrix. col is a multiple of the
// chunk's size.
template <class scalar_t, class T>
__device__ __forceinline__ Chunk<scalar_t> load_chunk(const Matrix<T>& matrix, int64_t row,
                                                      int64_t col) {
  const int inside = elements_inside(matrix, row, col, Chunk<scalar_t>::kSize);
  if (!matrix.vectorized || inside != Chunk<scalar_t>::kSize)
    return load_elements<scalar_t>(matrix, row, col, inside);
  Chunk<scalar_t> chunk;
  load_vector<16>(chunk.elements, matrix.at(row, col));
  return chunk;
}

// A chunk on its way: loaded long before it is used. The compiler would take a Chunk apart into
// elements where it was loaded (nvcc 13.0), and so wait for it there; these words are taken apart
// by unpack.
template <class scalar_t>
struct PackedChunk {
  uint32_t words[4];

  explicit __device__ __forceinline__ PackedChunk(const Chunk<scalar_t>& chunk) {
    memcpy(words, chunk.elements, 16);
  }
  PackedChunk() = default;

  __device__ __forceinline__ Chunk<scalar_t> unpack() const {
    uint32_t now[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) now[i] = opaque(words[i]);
    Chunk<scalar_t> chunk;
    memcpy(chunk.elements, now, 16);
    return chunk;
  }
};

template <class scalar_t, class T>
__device__ __forceinline__ PackedChunk<scalar_t> load_packed_chunk(const Matrix<T>& matrix,
                                                                   int64_t row, int64_t col) {
  const int inside = elements_inside(matrix, row, col, Chunk<scalar_t>::kSize);
  if (!matrix.vectorized || inside != Chunk<scalar_t>::kSize)
    return PackedChunk<scalar_t>(load_elements<scalar_t>(matrix, row, col, inside));
  PackedChunk<scalar_t> packed;
  load_vector<16>(packed.words, matrix.at(row, col));
  return packed;
}

// The same elements to global memory; those outside the matrix are not written.
template <class scalar_t>
__device__ __forceinline__ void store_chunk(const Matrix<scalar_t>& matrix, int64_t row,
                                            int64_t col, const Chunk<scalar_t>& chunk) {
  const int inside = elements_inside(matrix, row, col, chunk.kSize);
  if (matrix.vectorized && inside == chunk.kSize) {
    store_global_vector<16>(matrix.at(row, col), chunk.elements);
  } else {
#pragma unroll
    for (int i = 0; i < chunk.kSize; ++i)
      if (i < inside) *matrix.at(row, col + i) = chunk.elements[i];
  }
}

// Neighbors (row, col) and (row, col + 1) to global memory, as an accumulator's pairs are; col is
// even. Those outside the matrix are not written.
template <class T>
__device__ __forceinline__ void store_pair(const Matrix<T>& matrix, int64_t row, int64_t col,
                                           T left, T right) {
  struct alignas(2 * sizeof(T)) Pair {
    T left, right;
  };
  const int inside = elements_inside(matrix, row, col, 2);
  if (matrix.vectorized && inside == 2) {
    const Pair pair{left, right};
    store_global_vector<sizeof(Pair)>(matrix.at(row, col), &pair);
  } else {
    if (inside > 0) *matrix.at(row, col) = left;
    if (inside > 1) *matrix.at(row, col + 1) = right;
  }
}

// ---- shared memory ------------------------------------------------------------------------------

template <class scalar, int kRows_, int kCols_>
struct Tile {
  using scalar_t = scalar;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kPerChunk = 16 / sizeof(scalar_t);
  static constexpr int kChunksPerRow = kCols / kPerChunk;
  static constexpr int kChunks = kRows * kChunksPerRow;
  static constexpr int kBytes = 16 * kChunks;
  static_assert(kCols % kPerChunk == 0);
  static_assert(kChunksPerRow == 2 || kChunksPerRow == 4 || kChunksPerRow % 8 == 0);

  scalar_t* data;  // aligned to 128 bytes

  // Where logical chunk `chunk` of `row` lies in the row. With eight chunks (128 bytes, all banks)
  // a row, eight rows permute them eight ways; narrower rows share a line of 128 bytes, and only
  // rows of different lines need different permutations. Rows wider than a line also turn by line.
  // Neighboring rows differ in the turn's highest bit, four rows in the two highest: lanes that
  // share eight chunks among two rows (pairs of fp64 accumulators), or four, do not meet either.
  static __device__ __forceinline__ int place(int row, int chunk) {
    const int turn = (row & 1) << 2 | (row & 2) | (row >> 2 & 1);  // the bits of row % 8, reversed
    if constexpr (kChunksPerRow == 2) return chunk ^ (turn & 1);
    if constexpr (kChunksPerRow == 4) return chunk ^ ((row >> 1 & 1) << 1 | (turn & 1));
    return (chunk & ~7) | ((chunk ^ turn ^ (chunk >> 3)) & 7);
  }
  __device__ __forceinline__ scalar_t* chunk(int row, int chunk) const {
    return data + row * kCols + place(row, chunk) * kPerChunk;
  }
  __device__ __forceinline__ scalar_t* at(int row, int col) const {
    return chunk(row, col / kPerChunk) + col % kPerChunk;
  }
};

// Takes the next bytes of dynamic shared memory for a tile. Tiles are multiples of 128 bytes.
template <class TileT>
__device__ __forceinline__ TileT take_tile(unsigned char*& next) {
  static_assert(TileT::kBytes % 128 == 0);
  const TileT tile{reinterpret_cast<typename TileT::scalar_t*>(next)};
  next += TileT::kBytes;
  return tile;
}

// Calls f(row, chunk) for the chunks that belong to `thread`: always the same ones, so a thread may
// change what it copied itself before the barrier that shows it to the others.
template <class TileT, int kThreads, class F>
__device__ __forceinline__ void for_each_own_chunk(int thread, F f) {
#pragma unroll
  for (int first = 0; first < TileT::kChunks; first += kThreads) {
    const int i = first + thread;
    if (TileT::kChunks % kThreads == 0 || i < TileT::kChunks)
      f(i / TileT::kChunksPerRow, i % TileT::kChunksPerRow);
  }
}

// The copy of one chunk whose source does not start on 16 bytes: in pieces of 4 bytes (8 for fp64),
// or, where elements of 2 bytes do not start on 4, as a whole and at once. Lines of 128 bytes next
// to each other start with different pieces: a warp's chunks fill four lines, and its lanes would
// otherwise meet in the banks of one piece.
template <class scalar_t, class T>
__device__ __forceinline__ void copy_unaligned_chunk_async(scalar_t* to, const T* from,
                                                           int inside) {
  constexpr int kPieceBytes = sizeof(T) == 8 ? 8 : 4;
  constexpr int kPerPiece = kPieceBytes / sizeof(T), kSize = 16 / sizeof(T);
  if (kPerPiece == 1 || reinterpret_cast<uintptr_t>(from) % kPieceBytes == 0) {
    const int first = static_cast<int>(reinterpret_cast<uintptr_t>(to) / 128 * kPerPiece % kSize);
#pragma unroll 1  // small code: few matrices are not aligned
    for (int offset = 0; offset < kSize; offset += kPerPiece) {
      const int i = first ^ offset;
      const int valid = inside - i < 0 ? 0 : inside - i < kPerPiece ? inside - i : kPerPiece;
      copy_async<kPieceBytes>(to + i, from + i, valid * static_cast<int>(sizeof(T)));
    }
  } else {
    Chunk<scalar_t> chunk;
#pragma unroll
    for (int i = 0; i < kSize; ++i) chunk.elements[i] = i < inside ? from[i] : scalar_t(0.0f);
    store_vector<16>(to, chunk.elements);
  }
}

// Starts copying source[first_row …, first_col …] into the tile; elements outside the source become
// zero. first_col is a multiple of the chunk's size. The tile must be free. A tile that lies wholly
// inside costs one addition per chunk: in loops over tiles a thread's offsets stay the same.
template <int kThreads, class TileT, class T>
__device__ __forceinline__ void copy_tile_async(const TileT& tile, const Matrix<T>& source,
                                                int64_t first_row, int64_t first_col, int thread) {
  const bool whole =
      first_row + TileT::kRows <= source.num_rows && first_col + TileT::kCols <= source.num_cols;
  if (source.vectorized && whole) {
    const T* const origin = source.at(first_row, first_col);
    for_each_own_chunk<TileT, kThreads>(thread, [&](int row, int chunk) {
      copy_async<16>(tile.chunk(row, chunk),
                     origin + (row * source.row_stride + chunk * TileT::kPerChunk), 16);
    });
    return;
  }
  for_each_own_chunk<TileT, kThreads>(thread, [&](int row, int chunk) {
    const int64_t source_row = first_row + row;
    const int64_t source_col = first_col + chunk * TileT::kPerChunk;
    const int inside = elements_inside(source, source_row, source_col, TileT::kPerChunk);
    const T* from = inside > 0 ? source.at(source_row, source_col) : source.data;
    if (source.vectorized) {
      copy_async<16>(tile.chunk(row, chunk), from, inside * static_cast<int>(sizeof(T)));
    } else {
      copy_unaligned_chunk_async(tile.chunk(row, chunk), from, inside);
    }
  });
}

// Copies of tiles that follow one another down the rows of a matrix (kAlongRows) or along its
// columns, for long loops: a thread's addresses are computed once, then only moved on.
template <int kThreads, class TileT, class T, bool kAlongRows>
struct TileStream {
  static constexpr int kOwnChunks = (TileT::kChunks + kThreads - 1) / kThreads;

  Matrix<T> source;
  int64_t row, col;           // of the first tile
  int num_whole;              // tiles from there on that lie inside, in rows that start on 16 bytes
  const T* from[kOwnChunks];  // in the next tile

  __device__ __forceinline__ TileStream(const Matrix<T>& matrix, int64_t first_row,
                                        int64_t first_col, int thread)
      : source(matrix), row(first_row), col(first_col) {
    const int64_t rows = source.num_rows - row, cols = source.num_cols - col;
    const int64_t whole = kAlongRows ? (cols < TileT::kCols ? 0 : rows / TileT::kRows)
                                     : (rows < TileT::kRows ? 0 : cols / TileT::kCols);
    num_whole = source.vectorized && whole > 0 ? static_cast<int>(whole) : 0;
    int i = 0;
    for_each_own_chunk<TileT, kThreads>(thread, [&](int tile_row, int chunk) {
      from[i++] = source.at(row + tile_row, col + chunk * TileT::kPerChunk);
    });
  }

  // Tile `index`; they are asked for one after the other.
  __device__ __forceinline__ void copy_async_to(const TileT& tile, int index, int thread) {
    if (index >= num_whole) {
      copy_tile_async<kThreads>(tile, source,
                                kAlongRows ? row + int64_t{index} * TileT::kRows : row,
                                kAlongRows ? col : col + int64_t{index} * TileT::kCols, thread);
      return;
    }
    int i = 0;
    for_each_own_chunk<TileT, kThreads>(thread, [&](int tile_row, int chunk) {
      copy_async<16>(tile.chunk(tile_row, chunk), from[i], 16);
      from[i++] += kAlongRows ? TileT::kRows * source.row_stride : TileT::kCols;
    });
  }
};

// The slot of the step before that of `slot`.
template <int kStages>
__device__ __forceinline__ int slot_before(int slot) {
  return slot == 0 ? kStages - 1 : slot - 1;
}

// A loop of num_steps steps whose tiles come through kStages stages of cp.async. All threads of the
// block call it. For each step, in the stage `slot`,
//     load(step, slot)     starts the copies, kStages - 1 steps ahead,
//     prepare(step, slot)  may change what this thread has copied itself, and
//     compute(step, slot)  finds all of the stage complete.
// One barrier a step, between the last two: behind it the stage of the step before has been read
// and is loaded again. After the last step there is none: other threads may still read the stages.
template <int kStages, class Load, class Prepare, class Step>
__device__ __forceinline__ void run_pipeline(int num_steps, Load load, Prepare prepare,
                                             Step compute) {
  // The group is closed even when nothing is left: the waits count groups.
  const auto issue = [&](int step, int slot) {
    if (step < num_steps) load(step, slot);
    copy_async_commit();
  };
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) issue(step, step);
  int slot = 0;
#pragma unroll 1  // a step is code enough
  for (int step = 0; step < num_steps; ++step) {
    copy_async_wait<kStages - 2>();
    prepare(step, slot);
    __syncthreads();
    issue(step + kStages - 1, slot_before<kStages>(slot));
    compute(step, slot);
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
}

template <class TileT>
__device__ __forceinline__ Chunk<typename TileT::scalar_t> read_chunk(const TileT& tile, int row,
                                                                      int chunk) {
  Chunk<typename TileT::scalar_t> values;
  load_vector<16>(values.elements, tile.chunk(row, chunk));
  return values;
}

template <class TileT>
__device__ __forceinline__ void write_chunk(const TileT& tile, int row, int chunk,
                                            const Chunk<typename TileT::scalar_t>& values) {
  store_vector<16>(tile.chunk(row, chunk), values.elements);
}

// Rounds an accumulator's pair of neighbors into (row, col), (row, col + 1); col is even.
template <class TileT, class acc_t>
__device__ __forceinline__ void write_pair(const TileT& tile, int row, int col, acc_t left,
                                           acc_t right) {
  using scalar_t = typename TileT::scalar_t;
  struct alignas(2 * sizeof(scalar_t)) Pair {
    scalar_t left, right;
  };
  const Pair pair{convert<scalar_t>(left), convert<scalar_t>(right)};
  store_vector<sizeof(Pair)>(tile.at(row, col), &pair);
}

// ---- products -----------------------------------------------------------------------------------

// This thread's share of a [kTileM, kTileN] product of a block of kWarpsM x kWarpsN warps; warp w
// owns rows kWarpTileM · (w / kWarpsN) … and columns kWarpTileN · (w % kWarpsN) ….
template <class Compute_, int kTileM_, int kTileN_, int kWarpsM_, int kWarpsN_>
struct Accumulator {
  using Compute = Compute_;
  using acc_t = typename Compute::acc_t;
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kThreads = kWarpSize * kWarpsM * kWarpsN;
  static constexpr int kWarpTileM = kTileM / kWarpsM;
  static constexpr int kWarpTileN = kTileN / kWarpsN;
  static constexpr int kPiecesM = kWarpTileM / 16;
  static constexpr int kPiecesN = kWarpTileN / 8;
  static_assert(kWarpTileM % 16 == 0 && kWarpTileN % 8 == 0);

  acc_t values[kPiecesM][kPiecesN][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kPiecesM; ++m)
#pragma unroll
      for (int n = 0; n < kPiecesN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) values[m][n][i] = acc_t(0);
  }

  static __device__ __forceinline__ int first_row(int thread) {
    return thread / kWarpSize / kWarpsN * kWarpTileM;
  }
  static __device__ __forceinline__ int first_col(int thread) {
    return thread / kWarpSize % kWarpsN * kWarpTileN;
  }

  // f(row, col, left, right) for every pair of neighbors (row, col), (row, col + 1) owned here;
  // row and col within the tile, left and right by reference.
  template <class F>
  __device__ __forceinline__ void for_each_pair(int thread, F f) {
    const int g = thread % kWarpSize / 4, t = thread % 4;
#pragma unroll
    for (int m = 0; m < kPiecesM; ++m)
#pragma unroll
      for (int n = 0; n < kPiecesN; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          f(first_row(thread) + 16 * m + 8 * half + g, first_col(thread) + 8 * n + 2 * t,
            values[m][n][2 * half], values[m][n][2 * half + 1]);
  }
};

// How an operand lies in its tile: its contraction index along the columns, [outer, k], or along
// the rows, [k, outer].
enum class Contraction { kAlongColumns, kAlongRows };

namespace detail {

// Two chunks of contraction: 16 elements of 2 bytes, or 8 of TF32. The fragment of A at rows
// [outer, outer + 16), from contraction chunk pair k_pair on.
template <Contraction kContraction, class TileT>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const TileT& tile, int outer, int k_pair,
                                       int lane) {
  using scalar_t = typename TileT::scalar_t;
  const int matrix = lane / 8, row = lane % 8;
  if constexpr (kContraction == Contraction::kAlongColumns) {
    load_matrices<false>(a, tile.chunk(outer + matrix % 2 * 8 + row, 2 * k_pair + matrix / 2));
  } else if constexpr (sizeof(scalar_t) == 2) {
    load_matrices<true>(a, tile.chunk(16 * k_pair + matrix / 2 * 8 + row, outer / 8 + matrix % 2));
  } else {
    const int g = lane / 4, k = 8 * k_pair + lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = *tile.at(k + i / 2 * 4, outer + i % 2 * 8 + g);
      a[i] = __float_as_uint(value);
    }
  }
}

// The fragments of B for the kPieces (1 or 2) pieces of 8 columns from `outer` on.
template <Contraction kContraction, int kPieces, class TileT>
__device__ __forceinline__ void load_b(uint32_t (&b)[2 * kPieces], const TileT& tile, int outer,
                                       int k_pair, int lane) {
  using scalar_t = typename TileT::scalar_t;
  // With one piece lanes 16 … 31 repeat the addresses of lanes 0 … 15.
  const int matrix = lane / 8 % (2 * kPieces), row = lane % 8;
  if constexpr (kContraction == Contraction::kAlongColumns) {
    load_matrices<false>(b, tile.chunk(outer + matrix / 2 * 8 + row, 2 * k_pair + matrix % 2));
  } else if constexpr (sizeof(scalar_t) == 2) {
    load_matrices<true>(b, tile.chunk(16 * k_pair + matrix % 2 * 8 + row, outer / 8 + matrix / 2));
  } else {
    const int g = lane / 4, k = 8 * k_pair + lane % 4;
#pragma unroll
    for (int i = 0; i < 2 * kPieces; ++i) {
      const float value = *tile.at(k + i % 2 * 4, outer + i / 2 * 8 + g);
      b[i] = __float_as_uint(value);
    }
  }
}

template <class Compute, int kSize>
__device__ __forceinline__ void round_operands(uint32_t (&registers)[kSize]) {
  if constexpr (std::is_same_v<Compute, Tf32>) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) registers[i] = tf32_bits(__uint_as_float(registers[i]));
  }
}

template <Contraction kContractionA, Contraction kContractionB, int kDepth, class Acc, class TileA,
          class TileB>
__device__ __forceinline__ void multiply_add_mma(Acc& acc, const TileA& a_tile, const TileB& b_tile,
                                                 int thread) {
  using Compute = typename Acc::Compute;
  constexpr int kStep = 2 * TileA::kPerChunk;
  constexpr int kPieces = Acc::kPiecesN % 2 == 0 ? 2 : 1;  // of B per ldmatrix
  static_assert(kDepth % kStep == 0);
  const int lane = thread % kWarpSize;
#pragma unroll
  for (int k_pair = 0; k_pair < kDepth / kStep; ++k_pair) {
    uint32_t a[Acc::kPiecesM][4];
#pragma unroll
    for (int m = 0; m < Acc::kPiecesM; ++m) {
      load_a<kContractionA>(a[m], a_tile, Acc::first_row(thread) + 16 * m, k_pair, lane);
      round_operands<Compute>(a[m]);
    }
#pragma unroll
    for (int n = 0; n < Acc::kPiecesN; n += kPieces) {
      uint32_t b[2 * kPieces];
      load_b<kContractionB, kPieces>(b, b_tile, Acc::first_col(thread) + 8 * n, k_pair, lane);
      round_operands<Compute>(b);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const uint32_t b_piece[2] = {b[2 * piece], b[2 * piece + 1]};
#pragma unroll
        for (int m = 0; m < Acc::kPiecesM; ++m)
          mma<Compute>(acc.values[m][n + piece], a[m], b_piece);
      }
    }
  }
}

// Elements k, k + 1, … of one chunk's size of row (or column) `outer` of an operand.
template <Contraction kContraction, class TileT>
__device__ __forceinline__ Chunk<typename TileT::scalar_t> load_run(const TileT& tile, int outer,
                                                                    int k) {
  if constexpr (kContraction == Contraction::kAlongColumns) {
    return read_chunk(tile, outer, k / TileT::kPerChunk);
  } else {
    Chunk<typename TileT::scalar_t> run;
#pragma unroll
    for (int i = 0; i < run.kSize; ++i) run.elements[i] = *tile.at(k + i, outer);
    return run;
  }
}

template <Contraction kContractionA, Contraction kContractionB, int kDepth, class Acc, class TileA,
          class TileB>
__device__ __forceinline__ void multiply_add_fma(Acc& acc, const TileA& a_tile, const TileB& b_tile,
                                                 int thread) {
  using Run = Chunk<typename TileA::scalar_t>;
  static_assert(kDepth % Run::kSize == 0);
  const int g = thread % kWarpSize / 4, t = thread % 4;
#pragma unroll 1  // registers: one run of every operand row at a time
  for (int k = 0; k < kDepth; k += Run::kSize) {
    Run a[Acc::kPiecesM][2];
#pragma unroll
    for (int m = 0; m < Acc::kPiecesM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[m][half] =
            load_run<kContractionA>(a_tile, Acc::first_row(thread) + 16 * m + 8 * half + g, k);
#pragma unroll
    for (int n = 0; n < Acc::kPiecesN; ++n) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const Run b =
            load_run<kContractionB>(b_tile, Acc::first_col(thread) + 8 * n + 2 * t + side, k);
#pragma unroll
        for (int m = 0; m < Acc::kPiecesM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < Run::kSize; ++i)
              acc.values[m][n][2 * half + side] += a[m][half].elements[i] * b.elements[i];
      }
    }
  }
}

}  // namespace detail

// acc [kTileM, kTileN] += A B, contracting over kDepth elements. A is [kTileM, kDepth] (or, along
// rows, [kDepth, kTileM]) in a_tile, B [kTileN, kDepth] (or [kDepth, kTileN]) in b_tile. All
// threads of the block call it; the tiles must be complete (a barrier before).
template <Contraction kContractionA, Contraction kContractionB, int kDepth, class Acc, class TileA,
          class TileB>
__device__ __forceinline__ void multiply_add(Acc& acc, const TileA& a_tile, const TileB& b_tile,
                                             int thread) {
  if constexpr (Acc::Compute::kTensorCores) {
    detail::multiply_add_mma<kContractionA, kContractionB, kDepth>(acc, a_tile, b_tile, thread);
  } else {
    detail::multiply_add_fma<kContractionA, kContractionB, kDepth>(acc, a_tile, b_tile, thread);
  }
}

}  // namespace lowrank_ext::cuda
