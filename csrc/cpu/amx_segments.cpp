// Both products are outᵀ = weights rowsᵀ, weights being lora_a or lora_b: the left tiles are read where
// they lie, [16 outputs, 32 columns], so an adapter is neither packed nor transposed. The right tiles
// hold 16 pairs of columns by 16 rows and are packed once for a segment. A task owns up to 64 outputs of
// one segment and walks over its rows; up to four tiles of sums share every load of an operand. A weight
// tile at an edge is read from a copy that ends in zeros, so padding of lora_a and lora_b is never read;
// the rows end in zeros too, so that an infinite one meets no column that does not exist.
#include "amx_segments.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "bf16_blocks.h"

namespace lowrank_ext::cpu {

#if LOWRANK_EXT_AMX_KERNELS

namespace {

constexpr int64_t kTile = 16;         // rows of a tile, and fp32 columns of it
constexpr int64_t kTileCols = 32;     // bf16 columns of a tile
constexpr int64_t kTileStride = 64;   // bytes of a row
constexpr int64_t kAccumulators = 4;  // tiles of sums at a time; the other four hold operands
constexpr int64_t kFewTiles = 256;    // packed without an allocation, 256 KiB of the stack
// Bytes of weights worth a thread, about 5 us.
constexpr int64_t kTaskBytes = 1 << 16;

struct alignas(64) Tile {
  uint16_t values[kTile * kTileCols];
};
static_assert(sizeof(Tile) == kTile * kTileStride);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// out[m][j] = base[m][j] + factor · Σ_c rows[m][c] weights[j, c]; without base where that is null.
struct Product {
  const uint16_t* weights;  // [num_out, num_cols], row stride `stride`
  int64_t stride, num_out, num_cols;
  const uint16_t* const* rows;
  uint16_t* const* out;
  int64_t num_rows;
  float factor;
  const uint16_t* const* base;
  Tile* packed = nullptr;  // [row tiles, column tiles]

  int64_t row_tiles() const { return ceil_div(num_rows, kTile); }
  int64_t col_tiles() const { return ceil_div(num_cols, kTileCols); }
  // Fewer columns than a tile has, in whole pairs: tiles of just them.
  bool is_narrow() const { return num_cols < kTileCols && num_cols % 2 == 0 && num_cols > 0; }
};

// A part of a product.
struct Task {
  const Product* product;
  int64_t part;
};

template <typename NumParts>  // num_parts(product)
std::vector<Task> tasks_of(const std::vector<Product>& products, const NumParts& num_parts) {
  std::vector<Task> tasks;
  for (const Product& product : products)
    for (int64_t part = 0; part < num_parts(product); ++part) tasks.push_back({&product, part});
  return tasks;
}

// The shapes of the tile registers, a state of the thread, held while the object lives.
class TileShapes {
 public:
  LOWRANK_EXT_AMX void set_for(const Product& product) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    static_assert(sizeof(shapes) == 64);
    const int64_t cols = product.is_narrow() ? product.num_cols : kTileCols;
    const int first_row_tile = product.row_tiles() == 1 ? 4 : 5;
    const int last_row_tile = product.row_tiles() == 1 ? 4 : 7;
    for (int i = 0; i < 8; ++i) {
      const bool is_sums = i < kAccumulators, is_rows = first_row_tile <= i && i <= last_row_tile;
      shapes.row_bytes[i] = is_sums || is_rows ? kTileStride : 2 * cols;
      shapes.rows[i] = is_rows ? cols / 2 : kTile;
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  LOWRANK_EXT_AMX ~TileShapes() { _tile_release(); }
};

__mmask32 lanes_of(int64_t count) {
  return count >= kTileCols ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// tile[i, c] = matrix[i][c] for `num_rows` rows and `num_cols` columns, else 0.
template <typename RowAt>  // row_at(i)
LOWRANK_EXT_AVX512_BF16 inline void copy_tile(Tile& tile, int64_t num_rows, int64_t num_cols,
                                              const RowAt& row_at) {
  const __mmask32 lanes = lanes_of(num_cols);
  for (int64_t i = 0; i < kTile; ++i)
    _mm512_store_si512(tile.values + i * kTileCols,
                       i < num_rows ? (__m512i)load32(row_at(i), lanes) : _mm512_setzero_si512());
}

// tile[pair, m] = pairs of 32 columns of up to four rows; other lanes keep what they hold.
LOWRANK_EXT_AVX512_BF16 inline void pack_few_rows(Tile& tile, const uint16_t* const* rows,
                                                  int64_t count, int64_t col, int64_t num_cols) {
  alignas(64) uint32_t pairs[4][kTile];
  for (int64_t m = 0; m < count; ++m)
    _mm512_store_si512(pairs[m], (__m512i)load32(rows[m] + col, lanes_of(num_cols)));
  auto* to = reinterpret_cast<uint32_t*>(tile.values);
  for (int64_t m = 0; m < count; ++m)
#pragma GCC unroll 16
    for (int64_t p = 0; p < kTile; ++p) to[p * kTile + m] = pairs[m][p];
}

// One row of tiles of product.packed: pairs of columns by 16 rows. Lanes of rows that do not exist are
// products that nobody reads.
LOWRANK_EXT_AVX512_BF16 void pack_rows(const Product& product, int64_t row_tile) {
  const int64_t first = row_tile * kTile, count = std::min(kTile, product.num_rows - first);
  Tile rows;
  for (int64_t i = 0; i < product.col_tiles(); ++i) {
    const int64_t col = i * kTileCols, num_cols = product.num_cols - col;
    Tile& tile = product.packed[row_tile * product.col_tiles() + i];
    if (count <= 4) {
      pack_few_rows(tile, product.rows + first, count, col, num_cols);
      continue;
    }
    copy_tile(rows, count, num_cols, [&](int64_t m) { return product.rows[first + m] + col; });
    transpose_pairs(reinterpret_cast<__m512i*>(tile.values), rows.values, kTileCols, kTileCols,
                    kTile);
  }
}

struct TileView {
  const uint16_t* values;
  int64_t stride;  // bytes
};

// Weights [first, first + 16) by columns [col, col + 32); `scratch` holds them at an edge.
LOWRANK_EXT_AVX512_BF16 inline TileView weight_tile(const Product& product, int64_t first,
                                                    int64_t col, Tile& scratch) {
  const uint16_t* weights = product.weights + first * product.stride + col;
  const int64_t outs = product.num_out - first, cols = product.num_cols - col;
  if (outs >= kTile && (cols >= kTileCols || product.is_narrow()))
    return {weights, 2 * product.stride};
  copy_tile(scratch, outs, cols, [&](int64_t j) { return weights + j * product.stride; });
  // The compiler does not know that loading a tile reads memory.
  asm volatile("" ::: "memory");
  return {scratch.values, kTileStride};
}

// The same columns of the weights one task later: their rows are far apart, where the hardware's
// prefetching stops.
inline void prefetch_weights(const Product& product, int64_t first, int64_t col) {
  const int64_t last = std::min(first + kTile, product.num_out);
  for (int64_t j = first; j < last; ++j)
    _mm_prefetch(product.weights + j * product.stride + col, _MM_HINT_T0);
}

// sums[i] = weights [first + 16 i, …) times the rows of one tile, for up to four i.
LOWRANK_EXT_AMX void multiply_few_rows(const Product& product, int64_t first, int64_t count,
                                       const Tile* packed, Tile* sums) {
  Tile scratch[kAccumulators];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < product.col_tiles(); ++i) {
    const int64_t col = i * kTileCols;
    const auto load = [&](int64_t j) LOWRANK_EXT_AMX {
      prefetch_weights(product, first + (kAccumulators + j) * kTile, col);
      return weight_tile(product, first + j * kTile, col, scratch[j]);
    };
    _tile_loadd(4, packed[i].values, kTileStride);
    const TileView a = load(0);
    _tile_loadd(5, a.values, a.stride);
    _tile_dpbf16ps(0, 5, 4);
    if (count > 1) {
      const TileView b = load(1);
      _tile_loadd(6, b.values, b.stride);
      _tile_dpbf16ps(1, 6, 4);
    }
    if (count > 2) {
      const TileView c = load(2);
      _tile_loadd(7, c.values, c.stride);
      _tile_dpbf16ps(2, 7, 4);
    }
    if (count > 3) {
      const TileView d = load(3);
      _tile_loadd(5, d.values, d.stride);
      _tile_dpbf16ps(3, 5, 4);
    }
  }
  _tile_stored(0, sums[0].values, kTileStride);
  _tile_stored(1, sums[1].values, kTileStride);
  _tile_stored(2, sums[2].values, kTileStride);
  _tile_stored(3, sums[3].values, kTileStride);
}

// sums[i] = weights [first, first + 16) times the rows of tile i, for two to four i.
LOWRANK_EXT_AMX void multiply_many_rows(const Product& product, int64_t first, int64_t count,
                                        const Tile* packed, bool prefetch, Tile* sums) {
  Tile scratch;
  const int64_t col_tiles = product.col_tiles();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < col_tiles; ++i) {
    const int64_t col = i * kTileCols;
    if (prefetch) prefetch_weights(product, first + kAccumulators * kTile, col);
    const TileView a = weight_tile(product, first, col, scratch);
    _tile_loadd(4, a.values, a.stride);
    _tile_loadd(5, packed[i].values, kTileStride);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, packed[col_tiles + i].values, kTileStride);
    _tile_dpbf16ps(1, 4, 6);
    if (count > 2) {
      _tile_loadd(7, packed[2 * col_tiles + i].values, kTileStride);
      _tile_dpbf16ps(2, 4, 7);
    }
    if (count > 3) {
      _tile_loadd(5, packed[3 * col_tiles + i].values, kTileStride);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, sums[0].values, kTileStride);
  _tile_stored(1, sums[1].values, kTileStride);
  _tile_stored(2, sums[2].values, kTileStride);
  _tile_stored(3, sums[3].values, kTileStride);
}

// Sums [16 outputs, 16 rows] in fp32 into the outputs [first, first + 16) of one tile of rows.
LOWRANK_EXT_AVX512_BF16 void store_sums(const Product& product, int64_t first, int64_t row_tile,
                                        const Tile& sums) {
  const int64_t outs = std::min(kTile, product.num_out - first), row = row_tile * kTile;
  const int64_t count = std::min(kTile, product.num_rows - row);
  const auto lanes = static_cast<__mmask16>((1u << outs) - 1);
  const __m512 factor = _mm512_set1_ps(product.factor);
  __m512i by_rows[kTile];
  transpose_pairs(by_rows, sums.values, kTileCols, ceil_div(count, 4) * 8, kTile);
  // All loads before the stores, which would delay them where row strides are powers of two.
  for (int64_t m = 0; m < count; ++m) {
    const __m512 sum = _mm512_castsi512_ps(by_rows[m]);
    __m512 base = _mm512_setzero_ps();
    if (product.base != nullptr) {
      const __m512i wide =
          _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, product.base[row + m] + first));
      base = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    by_rows[m] = _mm512_castps_si512(_mm512_fmadd_ps(factor, sum, base));
  }
  for (int64_t m = 0; m < count; ++m)
    _mm256_mask_storeu_epi16(product.out[row + m] + first, lanes,
                             rounded(_mm512_castsi512_ps(by_rows[m])));
}

// Outputs [first, first + 64), or what is left of them, for all rows.
void run_task(const Product& product, int64_t first) {
  Tile sums[kAccumulators];
  const int64_t row_tiles = product.row_tiles();
  const int64_t out_tiles = std::min(kAccumulators, ceil_div(product.num_out - first, kTile));
  if (row_tiles == 1) {
    multiply_few_rows(product, first, out_tiles, product.packed, sums);
    for (int64_t j = 0; j < out_tiles; ++j) store_sums(product, first + j * kTile, 0, sums[j]);
    return;
  }
  // Shares of two to four tiles, as even as can be.
  const int64_t shares = ceil_div(row_tiles, kAccumulators);
  for (int64_t share = 0; share < shares; ++share) {
    const int64_t begin = row_tiles * share / shares;
    const int64_t count = row_tiles * (share + 1) / shares - begin;
    for (int64_t j = 0; j < out_tiles; ++j) {
      multiply_many_rows(product, first + j * kTile, count,
                         product.packed + begin * product.col_tiles(), share == 0, sums);
      for (int64_t i = 0; i < count; ++i)
        store_sums(product, first + j * kTile, begin + i, sums[i]);
    }
  }
}

// The fewest tasks per thread, so that small calls stay on one.
int64_t grain(const std::vector<Product>& products, size_t num_tasks) {
  int64_t bytes = 0;
  for (const Product& product : products)
    bytes += 2 * product.num_cols * (product.num_out + product.num_rows);
  return std::max<int64_t>(
      1, static_cast<int64_t>(num_tasks) * kTaskBytes / std::max<int64_t>(1, bytes));
}

void run(std::vector<Product>& products) {
  int64_t num_tiles = 0;
  for (const Product& product : products) num_tiles += product.row_tiles() * product.col_tiles();
  Tile few_tiles[kFewTiles];
  std::unique_ptr<Tile[]> many_tiles;
  if (num_tiles > kFewTiles) many_tiles = std::make_unique_for_overwrite<Tile[]>(num_tiles);
  Tile* next = many_tiles ? many_tiles.get() : few_tiles;
  for (Product& product : products) {
    product.packed = next;
    next += product.row_tiles() * product.col_tiles();
  }
  const std::vector<Task> packing =
      tasks_of(products, [](const Product& product) { return product.row_tiles(); });
  const int64_t row_tile_bytes = sizeof(Tile) * std::max<int64_t>(1, products[0].col_tiles());
  torch::stable::parallel_for(0, static_cast<int64_t>(packing.size()),
                              std::max<int64_t>(1, kTaskBytes / row_tile_bytes),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i)
                                  pack_rows(*packing[i].product, packing[i].part);
                              });
  constexpr int64_t kOuts = kAccumulators * kTile;
  const std::vector<Task> tasks =
      tasks_of(products, [](const Product& product) { return ceil_div(product.num_out, kOuts); });
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), grain(products, tasks.size()),
                              [&](int64_t begin, int64_t end) {
                                TileShapes shapes;
                                for (int64_t i = begin; i < end; ++i) {
                                  const Product& product = *tasks[i].product;
                                  if (i == begin || tasks[i - 1].product != &product)
                                    shapes.set_for(product);
                                  run_task(product, tasks[i].part * kOuts);
                                }
                              });
}

}  // namespace

void shrink_amx_segments(const std::vector<SmallSegment>& segments, int64_t in_features,
                         float x_scale) {
  std::vector<Product> products;
  for (const SmallSegment& segment : segments)
    products.push_back({segment.lora_a, segment.a_stride, segment.rank, in_features, segment.x,
                        segment.h, segment.num_rows, x_scale, /*base=*/nullptr});
  run(products);
}

void expand_amx_segments(const std::vector<SmallSegment>& segments, int64_t out_features) {
  std::vector<Product> products;
  for (const SmallSegment& segment : segments)
    products.push_back({segment.lora_b, segment.b_stride, out_features, segment.rank, segment.h,
                        segment.y, segment.num_rows, segment.scaling, segment.base});
  run(products);
}

#else

void shrink_amx_segments(const std::vector<SmallSegment>&, int64_t, float) {
  throw std::logic_error("shrink_amx_segments: called on a CPU without tiles");
}

void expand_amx_segments(const std::vector<SmallSegment>&, int64_t) {
  throw std::logic_error("expand_amx_segments: called on a CPU without tiles");
}

#endif

}  // namespace lowrank_ext::cpu
