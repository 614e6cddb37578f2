// multi_lowrank_add on the CPU: an adapter per row. Rows that share an adapter form a segment;
// adapters without rows are not read. Segments of few bf16 rows go through small_segments.h or
// amx_segments.h; a segment of all rows is a branch like lowrank_add's; other segments go block by block
// through shrink and expand. Ranks beyond an adapter's own are padding, which is never read.
#include "ops/multi_lowrank_add.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

#include "amx_segments.h"
#include "branch.h"
#include "features.h"
#include "segment_blocks.h"
#include "segments.h"
#include "small_segments.h"

namespace lowrank_ext::cpu {
namespace {

// Up to this many rows small_segments.h is the fastest: on CPUs without tiles, and with them.
constexpr int64_t max_dot_rows(int64_t rank) { return rank <= 32 ? 128 : 64; }
constexpr int64_t max_dot_rows_beside_tiles(int64_t rank) { return rank <= 8 ? 128 : 128 / rank; }

// Up to this many rows amx_segments.h is faster than the vendor's bf16 product.
constexpr int64_t max_tile_rows(int64_t rank, bool one_adapter) {
  if (!one_adapter) return 1024;
  return rank <= 8 ? 128 : 256;
}

constexpr int64_t kCopyGrain = 64;  // rows per task: a few us at usual widths
// Up to this many rows small segments read base_out where it lies; of more, y is better copied first,
// a row after the other, than written for the first time tile by tile.
constexpr int64_t kMaxDirectRows = 64;

// The segment's part of a stack, lora_a [n, r, K] or its gradient: [rank, K].
Tensor lora_a_of(const Tensor& a, const Segment& segment) {
  return strided_view(a, segment.adapter * a.stride(0), segment.rank, a.size(2), a.stride(1),
                      a.stride(2));
}

// The segment's part of a stack, lora_b [n, N, r] or its gradient: [N, rank].
Tensor lora_b_of(const Tensor& b, const Segment& segment) {
  return strided_view(b, segment.adapter * b.stride(0), b.size(1), segment.rank, b.stride(1),
                      b.stride(2));
}

BranchArgs branch_of(const MultiBranchArgs& args, const Segment& segment) {
  constexpr bool kAllowTf32 = false;  // GPUs only
  return {lora_a_of(args.lora_a, segment),
          lora_b_of(args.lora_b, segment),
          std::nullopt,
          std::nullopt,
          std::nullopt,
          segment.scaling,
          args.dropout_p,
          args.seed,
          kAllowTf32};
}

Tensor first_columns(const Tensor& matrix, int64_t num_cols) {
  return strided_view(matrix, 0, matrix.size(0), num_cols, matrix.stride(0), 1);
}

// The rows of ``to`` become those of ``from``, bit for bit: a conversion would change the payload of a
// NaN.
void copy(const Tensor& to, const Tensor& from, const RowList& rows) {
  const Rows target = rows_of(to), source = rows_of(from);
  const int64_t row_bytes = to.size(1) * size_of(target.dtype);
  for (const Run& run : rows.runs) {
    torch::stable::parallel_for(0, run.count, kCopyGrain, [&](int64_t begin, int64_t end) {
      for (int64_t m = run.first + begin; m < run.first + end; ++m)
        std::memcpy(row_at(target, m).data, row_at(source, m).data, row_bytes);
    });
  }
}

// ---- forward

// y [M, N] holds base_out in the segment's rows.
void segment_forward(const MultiBranchArgs& args, const Segment& segment, const Dropout& dropout,
                     const Tensor& x, const Tensor& y, const Tensor& h) {
  const Dtypes dtypes = dtypes_for(x.scalar_type());
  const Tensor lora_a = operand(lora_a_of(args.lora_a, segment), dtypes);
  const Tensor lora_b = operand(lora_b_of(args.lora_b, segment), dtypes);
  SegmentBlocks blocks(segment, dtypes, dropout, x.size(1), y.size(1));
  blocks.for_each([&](int64_t, int64_t count) {
    const Tensor h_block = empty({count, segment.rank}, dtypes.compute);
    shrink(h_block, blocks.load_dropped(x), lora_a, dropout.scale(), Dropout{});
    blocks.store(first_columns(h, segment.rank), h_block);
    if (dtypes.converts()) {
      const Tensor branch = empty({count, y.size(1)}, dtypes.compute);
      multiply(branch, h_block, transposed(lora_b));
      blocks.add(y, branch, segment.scaling);
    } else {
      const Tensor y_block = blocks.load(y);
      expand(y_block, h_block, transposed(lora_b), segment.scaling, nullptr, /*add=*/true);
      if (!blocks.is_view(y)) blocks.store(y, y_block);
    }
  });
}

enum class Kernel {
  kDots,
  kTiles,
  kBlocks
};  // small_segments.h, amx_segments.h, shrink and expand

Kernel kernel_for(const Segment& segment, ScalarType input, bool one_adapter) {
  if (input != ScalarType::BFloat16 || !features().avx512_bf16) return Kernel::kBlocks;
  const int64_t num_rows = segment.rows.num_rows, rank = segment.rank;
  if (!features().amx_bf16) return num_rows <= max_dot_rows(rank) ? Kernel::kDots : Kernel::kBlocks;
  if (num_rows <= max_dot_rows_beside_tiles(rank)) return Kernel::kDots;
  return num_rows <= max_tile_rows(rank, one_adapter) ? Kernel::kTiles : Kernel::kBlocks;
}

// The forward of all small segments at once.
class SmallSegmentsForward {
 public:
  SmallSegmentsForward(const MultiBranchArgs& args, const Segments& segments,
                       const Dropout& dropout, const Tensor& base, const Tensor& x, const Tensor& y,
                       const Tensor& h)
      : args_(args), segments_(segments), dropout_(dropout), x_(x) {
    rows_.reserve(4 * x.size(0));
    for (const Tensor* matrix : {&x, &h, &base, &y}) append_rows(*matrix);
  }

  // `first`: the position of the segment's first row among those of all segments.
  void append(const Segment& segment, int64_t first, Kernel kernel) {
    const Operand lora_a = operand_of(args_.lora_a, segment, lora_a_of);
    const Operand lora_b = operand_of(args_.lora_b, segment, lora_b_of);
    if (dropout_.active()) drop_rows(segment, first);
    uint16_t** const rows = rows_.data() + first;
    const int64_t step = static_cast<int64_t>(rows_.size()) / 4;
    (kernel == Kernel::kTiles ? tiles_ : dots_)
        .push_back({lora_a.data, lora_a.stride, lora_b.data, lora_b.stride, segment.rank,
                    segment.rows.num_rows, static_cast<float>(segment.scaling), rows, rows + step,
                    rows + 2 * step, rows + 3 * step});
  }

  void run() const {
    const auto x_scale = static_cast<float>(dropout_.scale());
    const int64_t in_features = args_.in_features(), out_features = args_.out_features();
    if (!dots_.empty()) {
      shrink_small_segments(dots_, in_features, x_scale);
      expand_small_segments(dots_, out_features);
    }
    if (!tiles_.empty()) {
      shrink_amx_segments(tiles_, in_features, x_scale);
      expand_amx_segments(tiles_, out_features);
    }
  }

 private:
  struct Operand {
    const uint16_t* data;
    int64_t stride;
  };

  static uint16_t* data_of(const Tensor& matrix) {
    return static_cast<uint16_t*>(rows_data(matrix));
  }

  void append_rows(const Tensor& matrix) {
    uint16_t* const data = data_of(matrix);
    const int64_t stride = matrix.stride(0);
    for (const Segment& segment : segments_.adapted)
      for (const Run& run : segment.rows.runs)
        for (int64_t i = run.first; i < run.first + run.count; ++i)
          rows_.push_back(data + i * stride);
  }

  // The segment's rows of x become masked copies.
  void drop_rows(const Segment& segment, int64_t first) {
    const ScalarType dtype = x_.scalar_type();
    const Dtypes dtypes{dtype, dtype, ScalarType::Float};
    SegmentBlocks blocks(segment, dtypes, dropout_, args_.in_features(), args_.out_features());
    blocks.for_each([&](int64_t position, int64_t count) {
      const Tensor& dropped = keep(blocks.load_dropped(x_));
      for (int64_t i = 0; i < count; ++i)
        rows_[first + position + i] = data_of(dropped) + i * dropped.stride(0);
    });
  }

  // bf16 with dense rows: the part of the stack itself where it is that.
  template <typename Part>
  Operand operand_of(const Tensor& stack, const Segment& segment, const Part& part) {
    const ScalarType dtype = x_.scalar_type();
    if (stack.scalar_type() == dtype && stack.stride(2) == 1)
      return {static_cast<uint16_t*>(strided_data(stack)) + segment.adapter * stack.stride(0),
              stack.stride(1)};
    const Tensor& copy =
        keep(operand(part(stack, segment), Dtypes{dtype, dtype, ScalarType::Float}));
    return {data_of(copy), copy.stride(0)};
  }

  const Tensor& keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  const MultiBranchArgs& args_;
  const Segments& segments_;
  const Dropout& dropout_;
  const Tensor& x_;
  std::vector<uint16_t*> rows_;  // of x, h, base and y, each in the order of the segments
  std::vector<SmallSegment> dots_, tiles_;  // by their kernels
  std::deque<Tensor> kept_;                 // a deque: references to its entries stay valid
};

// Whether some rows of h, or columns of some, belong to no adapter.
bool leaves_part_of_h(const Segments& segments, int64_t rank) {
  const auto is_padded = [&](const Segment& segment) { return segment.rank < rank; };
  return segments.base.num_rows > 0 ||
         std::any_of(segments.adapted.begin(), segments.adapted.end(), is_padded);
}

void multi_lowrank_add_cpu(const MultiBranchArgs& args, const Tensor& base_out, const Tensor& x,
                           const Tensor& y, const Tensor& h) {
  const ScratchScope scope;
  const Segments segments = segments_of("multi_lowrank_add", args);
  if (x.size(0) == 0) return;
  const bool one_adapter = segments.is_one_adapter();
  if (leaves_part_of_h(segments, args.rank())) zero(h);
  const auto kernel_of = [&](const Segment& segment) {
    return kernel_for(segment, x.scalar_type(), one_adapter);
  };
  if (one_adapter && kernel_of(segments.adapted[0]) == Kernel::kBlocks) {
    const Segment& segment = segments.adapted[0];
    copy(y, base_out, segment.rows);
    return branch_forward(branch_of(args, segment), x, y, first_columns(h, segment.rank));
  }
  const Dropout dropout = dropout_of(args.dropout_p, args.seed);
  const bool direct = x.size(0) <= kMaxDirectRows;
  copy(y, base_out, direct ? segments.base : RowList{{{0, x.size(0)}}, x.size(0)});
  std::optional<SmallSegmentsForward> small;
  int64_t first = 0;
  for (const Segment& segment : segments.adapted) {
    const Kernel kernel = kernel_of(segment);
    if (kernel == Kernel::kBlocks) {
      if (direct) copy(y, base_out, segment.rows);
      segment_forward(args, segment, dropout, x, y, h);
    } else {
      if (!small) small.emplace(args, segments, dropout, direct ? base_out : y, x, y, h);
      small->append(segment, first, kernel);
    }
    first += segment.rows.num_rows;
  }
  if (small) small->run();
}

// ---- backward

// One segment's part of the gradients: its rows of dx, its adapter's dlora_a and dlora_b.
void segment_backward(const MultiBranchArgs& args, const MultiBranchNeeds& needs,
                      const Segment& segment, const Dropout& dropout, const Tensor& dout,
                      const std::optional<Tensor>& x, const std::optional<Tensor>& h,
                      const MultiBranchGradients& gradients) {
  const int64_t num_rows = segment.rows.num_rows, rank = segment.rank;
  const int64_t in_features = args.in_features(), out_features = args.out_features();
  const Dtypes dtypes = dtypes_for(dout.scalar_type());
  SegmentBlocks blocks(segment, dtypes, dropout, in_features, out_features);
  const Tensor g = empty({num_rows, rank}, dtypes.compute);  // scaling · dout lora_b
  std::optional<BlockSum> p, q;                              // doutᵀ h and gᵀ drop(x), transposed
  std::optional<Tensor> lora_a, lora_b;
  if (needs.g()) lora_b = operand(lora_b_of(args.lora_b, segment), dtypes);
  if (needs.dx) lora_a = operand(lora_a_of(args.lora_a, segment), dtypes);
  if (needs.dlora_b) p.emplace(dtypes, rank, out_features);
  if (needs.dlora_a) q.emplace(dtypes, rank, in_features);
  blocks.for_each([&](int64_t first, int64_t count) {
    const Tensor dout_block = blocks.load(dout);
    const Tensor g_block = row_block(g, first, count);
    if (needs.g()) shrink(g_block, dout_block, transposed(*lora_b), segment.scaling, Dropout{});
    if (p) p->add(blocks.load(first_columns(*h, rank)), dout_block, nullptr);
    if (q) q->add(g_block, blocks.load_dropped(*x), nullptr);
    if (needs.dx) {
      const bool direct = blocks.is_view(gradients.dx) && !dropout.active();
      const Tensor product =
          direct ? blocks.load(gradients.dx) : empty({count, in_features}, dtypes.compute);
      expand(product, g_block, *lora_a, dropout.scale(), nullptr, /*add=*/false);
      if (!direct) blocks.store_dropped(gradients.dx, product);
    }
  });
  if (p)
    round_into(lora_b_of(gradients.dlora_b, segment), transposed_copy(p->result()),
               segment.scaling);
  if (q) round_into(lora_a_of(gradients.dlora_a, segment), q->result(), dropout.scale());
}

// The backward where all rows share one adapter.
void one_adapter_backward(const MultiBranchArgs& args, const MultiBranchNeeds& needs,
                          const Segment& segment, const Tensor& dout,
                          const std::optional<Tensor>& x, const std::optional<Tensor>& h,
                          const MultiBranchGradients& gradients) {
  const Tensor none = empty({0}, dout.scalar_type());
  const BranchGradients branch{gradients.dx,
                               needs.dlora_a ? lora_a_of(gradients.dlora_a, segment) : none,
                               needs.dlora_b ? lora_b_of(gradients.dlora_b, segment) : none,
                               none,
                               none,
                               none};
  branch_backward(
      branch_of(args, segment), {needs.dx, needs.dlora_a, needs.dlora_b, false, false, false}, dout,
      x, h ? std::optional(first_columns(*h, segment.rank)) : h, /*add_to_dx=*/false, branch);
}

void multi_lowrank_add_backward_cpu(const MultiBranchArgs& args, const MultiBranchNeeds& needs,
                                    const Tensor& dout, const std::optional<Tensor>& x,
                                    const std::optional<Tensor>& h,
                                    const MultiBranchGradients& gradients) {
  const ScratchScope scope;
  const Segments segments = segments_of("multi_lowrank_add_backward", args);
  const bool one_adapter = segments.is_one_adapter();
  if (needs.dlora_a) zero(gradients.dlora_a);
  if (needs.dlora_b) zero(gradients.dlora_b);
  if (needs.dx && !one_adapter) zero(gradients.dx);
  if (one_adapter)
    return one_adapter_backward(args, needs, segments.adapted[0], dout, x, h, gradients);
  const Dropout dropout = dropout_of(args.dropout_p, args.seed);
  for (const Segment& segment : segments.adapted)
    segment_backward(args, needs, segment, dropout, dout, x, h, gradients);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CPU, m) {
  m.impl("multi_lowrank_add", TORCH_BOX(unpacked<multi_lowrank_add<multi_lowrank_add_cpu>>));
  m.impl("multi_lowrank_add_backward",
         TORCH_BOX(unpacked<multi_lowrank_add_backward<multi_lowrank_add_backward_cpu>>));
}

}  // namespace lowrank_ext::cpu
