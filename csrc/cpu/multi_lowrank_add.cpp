// An adapter per row. Rows that share an adapter form a segment; adapters without rows are not
// read. A segment of few bf16 rows goes through small_segments.h where it lies. Otherwise, where all rows
// share one adapter, the branch of lowrank_add does the work; and other segments go block by block
// through the vendor's products, gathered first where their rows are not neighbours. Ranks beyond
// an adapter's own are padding, which is never read; rows with id -1, and rows of an adapter of
// rank 0, are copied.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <deque>
#include <tuple>
#include <vector>

#include "../ops/multi_lowrank_add.h"
#include "branch.h"
#include "features.h"
#include "matrix.h"
#include "row_blocks.h"
#include "small_segments.h"

namespace lowrank_ext::cpu {
namespace {

constexpr const char* kOp = "multi_lowrank_add";
constexpr const char* kBackwardOp = "multi_lowrank_add_backward";

// Up to this many rows a segment goes through small_segments.h; above, the vendor's bf16 product wins.
constexpr int64_t few_rows_limit(int64_t rank) { return rank <= 32 ? 128 : 64; }

constexpr int64_t kCopyGrain = 64;  // rows per task: a few us at usual widths

// Neighbouring rows.
struct Run {
  int64_t first, count;
};

struct RowList {
  std::vector<Run> runs;
  int64_t num_rows = 0;

  void append(int64_t row) {
    ++num_rows;
    if (!runs.empty() && runs.back().first + runs.back().count == row) {
      ++runs.back().count;
    } else {
      runs.push_back({row, 1});
    }
  }

  // Rows [first, first + count) of the list.
  RowList part(int64_t first, int64_t count) const {
    RowList result{{}, count};
    for (const Run& run : runs) {
      const int64_t skip = std::min(first, run.count), taken = std::min(run.count - skip, count);
      if (taken > 0) result.runs.push_back({run.first + skip, taken});
      first -= skip;
      count -= taken;
    }
    return result;
  }

  template <typename Body>  // body(run, position of its first row in the list)
  void for_each_run(const Body& body) const {
    int64_t position = 0;
    for (const Run& run : runs) {
      body(run, position);
      position += run.count;
    }
  }
};

// The rows of one adapter, in their order.
struct Segment {
  int64_t adapter, rank;
  double scaling;
  RowList rows;
};

struct Segments {
  std::vector<Segment> adapted;  // by the first row
  RowList base;
};

std::vector<int64_t> integers(const Tensor& tensor) {
  const Tensor dense = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  const auto* data = static_cast<const int64_t*>(dense.data_ptr());
  return {data, data + dense.numel()};
}

std::vector<double> scalings(const Tensor& scaling) {
  const Tensor dense = scaling.is_contiguous() ? scaling : torch::stable::contiguous(scaling);
  std::vector<double> values(dense.numel());
  visit_accumulator(dense, [&](const auto* data) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = data[i];
  });
  return values;
}

// Checks the values of ids and ranks, too, which only the CPU can look at.
Segments segments_of(const char* op, const MultiBranchArgs& args) {
  const int64_t num_adapters = args.num_adapters();
  std::vector<int64_t> ranks(num_adapters, args.rank());
  if (args.ranks) ranks = integers(*args.ranks);
  for (int64_t i = 0; i < num_adapters; ++i)
    check(ranks[i] >= 0 && ranks[i] <= args.rank(), op,
          ": ranks must be between 0 and r=", args.rank(), ", got ", ranks[i], " for adapter ", i);
  const std::vector<double> factors = scalings(args.scaling);
  const std::vector<int64_t> ids = integers(args.adapter_ids);
  Segments result;
  std::vector<int64_t> segment_of(num_adapters, -1);
  for (size_t row = 0; row < ids.size(); ++row) {
    const int64_t id = ids[row];
    check(id >= -1 && id < num_adapters, op,
          ": adapter_ids must be between -1 and n - 1 = ", num_adapters - 1, ", got ", id,
          " for row ", row);
    if (id == -1 || ranks[id] == 0) {
      result.base.append(row);
      continue;
    }
    if (segment_of[id] == -1) {
      segment_of[id] = static_cast<int64_t>(result.adapted.size());
      result.adapted.push_back({id, ranks[id], factors[id], {}});
    }
    result.adapted[segment_of[id]].rows.append(row);
  }
  return result;
}

Tensor lora_a_of(const MultiBranchArgs& args, const Segment& segment) {  // [rank, K]
  const Tensor& a = args.lora_a;
  return strided_view(a, segment.adapter * a.stride(0), segment.rank, a.size(2), a.stride(1),
                      a.stride(2));
}

Tensor lora_b_of(const MultiBranchArgs& args, const Segment& segment) {  // [N, rank]
  const Tensor& b = args.lora_b;
  return strided_view(b, segment.adapter * b.stride(0), b.size(1), segment.rank, b.stride(1),
                      b.stride(2));
}

BranchArgs branch_of(const MultiBranchArgs& args, const Segment& segment) {
  constexpr bool kAllowTf32 = false;  // a GPU's
  return {
      lora_a_of(args, segment), lora_b_of(args, segment), std::nullopt, std::nullopt, std::nullopt,
      segment.scaling,          args.dropout_p,           args.seed,    kAllowTf32};
}

Tensor first_columns(const Tensor& matrix, int64_t num_cols) {
  return strided_view(matrix, 0, matrix.size(0), num_cols, matrix.stride(0), 1);
}

// Bit for bit, as a conversion would not be for NaN.
void copy(const Tensor& to, const Tensor& from) {
  const auto size = static_cast<int64_t>(to.element_size());
  const int64_t row_bytes = to.size(1) * size;
  torch::stable::parallel_for(0, to.size(0), kCopyGrain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      std::memcpy(static_cast<char*>(to.data_ptr()) + m * to.stride(0) * size,
                  static_cast<const char*>(from.data_ptr()) + m * from.stride(0) * size, row_bytes);
  });
}

Rows rows_from(const Tensor& matrix, int64_t row) {
  return {static_cast<char*>(matrix.data_ptr()) +
              row * matrix.stride(0) * static_cast<int64_t>(matrix.element_size()),
          matrix.scalar_type(), matrix.stride(0)};
}

// The rows of a segment block by block: in the dtype of the products, and next to each other.
class SegmentBlocks {
 public:
  SegmentBlocks(const Segment& segment, const Dtypes& dtypes, const Dropout& dropout,
                int64_t in_features, int64_t out_features)
      : segment_(segment), dtypes_(dtypes), dropout_(dropout) {
    const int64_t widest = std::max(in_features, out_features);
    const bool in_place = segment.rows.runs.size() == 1 && !dtypes.converts() && !dropout.active();
    const int64_t element_size = dtypes.compute == ScalarType::Double  ? 8
                                 : dtypes.compute == ScalarType::Float ? 4
                                                                       : 2;
    block_rows_ = in_place ? segment.rows.num_rows : block_rows(widest, element_size);
  }

  template <typename Body>  // body(first, count), positions in the segment
  void for_each(const Body& body) {
    const int64_t num_rows = segment_.rows.num_rows;
    for (int64_t first = 0; first < num_rows; first += block_rows_) {
      const int64_t count = std::min(block_rows_, num_rows - first);
      block_ = segment_.rows.part(first, count);
      body(first, count);
    }
  }

  // The block's rows of `matrix`: a view where that is possible.
  Tensor load(const Tensor& matrix) const {
    if (in_place(matrix)) return row_block(matrix, block_.runs[0].first, block_.num_rows);
    return gathered(matrix, nullptr);
  }

  Tensor load_dropped(const Tensor& x) {
    if (!dropout_.active()) return load(x);
    return gathered(x, draw_bits(x.size(1)));
  }

  // The block's rows of `matrix` = values. Nothing to do where `values` is load()'s view of them.
  void store(const Tensor& matrix, const Tensor& values) const { write(convert, matrix, values); }

  // The same with dropped elements zero.
  void store_dropped(const Tensor& dx, const Tensor& values) {
    write(convert, dx, values, 1.0, dropout_.active() ? draw_bits(dx.size(1)) : nullptr);
  }

  void add(const Tensor& matrix, const Tensor& values, double scale) const {
    write(accumulate, matrix, values, scale);
  }

  bool in_place(const Tensor& matrix) const {
    return block_.runs.size() == 1 && matrix.scalar_type() == dtypes_.compute;
  }

 private:
  Tensor gathered(const Tensor& matrix, const uint64_t* bits) const {
    const int64_t num_cols = matrix.size(1), words = mask_words_per_row(num_cols);
    Tensor result = empty({block_.num_rows, num_cols}, dtypes_.compute);
    block_.for_each_run([&](const Run& run, int64_t position) {
      convert(rows_from(result, position), rows_from(matrix, run.first), 1.0, run.count, num_cols,
              bits == nullptr ? nullptr : bits + position * words);
    });
    return result;
  }

  void write(decltype(&convert) pass, const Tensor& matrix, const Tensor& values,
             double scale = 1.0, const uint64_t* bits = nullptr) const {
    const int64_t num_cols = matrix.size(1), words = mask_words_per_row(num_cols);
    block_.for_each_run([&](const Run& run, int64_t position) {
      pass(rows_from(matrix, run.first), rows_from(values, position), scale, run.count, num_cols,
           bits == nullptr ? nullptr : bits + position * words);
    });
  }

  // Keep bits of the block's rows, which are drawn for their places in the whole batch.
  const uint64_t* draw_bits(int64_t num_cols) {
    const int64_t words = mask_words_per_row(num_cols);
    if (!bits_) bits_ = empty({block_rows_ * words}, ScalarType::Long);
    auto* bits = static_cast<uint64_t*>(bits_->data_ptr());
    block_.for_each_run([&](const Run& run, int64_t position) {
      draw_keep_bits(dropout_, run.first, run.count, num_cols, bits + position * words);
    });
    return bits;
  }

  const Segment& segment_;
  const Dtypes& dtypes_;
  const Dropout& dropout_;
  int64_t block_rows_;
  RowList block_;
  std::optional<Tensor> bits_;
};

double scale_of(const Dropout& dropout) { return dropout.active() ? dropout.scale() : 1.0; }

// y [M, N] holds base_out in the segment's rows, h [M, r] zeros.
void segment_forward(const MultiBranchArgs& args, const Segment& segment, const Dropout& dropout,
                     const Tensor& x, const Tensor& y, const Tensor& h) {
  const Dtypes dtypes = dtypes_for(x.scalar_type());
  const Tensor lora_a = operand(lora_a_of(args, segment), dtypes);
  const Tensor lora_b = operand(lora_b_of(args, segment), dtypes);
  SegmentBlocks blocks(segment, dtypes, dropout, x.size(1), y.size(1));
  blocks.for_each([&](int64_t, int64_t count) {
    const Tensor h_block = empty({count, segment.rank}, dtypes.compute);
    features_to_ranks(h_block, blocks.load_dropped(x), lora_a, scale_of(dropout), Dropout{});
    blocks.store(first_columns(h, segment.rank), h_block);
    if (dtypes.converts()) {
      const Tensor branch = empty({count, y.size(1)}, dtypes.compute);
      multiply(branch, h_block, transposed(lora_b));
      blocks.add(y, branch, segment.scaling);
    } else {
      const Tensor y_block = blocks.load(y);
      ranks_to_features(y_block, h_block, transposed(lora_b), segment.scaling, nullptr,
                        /*add=*/true);
      if (!blocks.in_place(y)) blocks.store(y, y_block);
    }
  });
}

bool goes_by_few_rows(const Segment& segment, ScalarType input) {
  return input == ScalarType::BFloat16 && features().avx512_bf16 &&
         segment.rows.num_rows <= few_rows_limit(segment.rank);
}

// All segments of few rows at once.
class FewRowsForward {
 public:
  FewRowsForward(const MultiBranchArgs& args, const Dropout& dropout, const Tensor& x,
                 const Tensor& y, const Tensor& h)
      : args_(args), dropout_(dropout), x_(x), y_(y), h_(h) {}

  void append(const Segment& segment) {
    const Dtypes dtypes{x_.scalar_type(), x_.scalar_type(), ScalarType::Float};
    const Tensor& lora_a = keep(operand_of(lora_a_of(args_, segment), dtypes));
    const Tensor& lora_b = keep(operand_of(lora_b_of(args_, segment), dtypes));
    FewRows group{data(lora_a, 0),
                  lora_a.stride(0),
                  data(lora_b, 0),
                  lora_b.stride(0),
                  segment.rank,
                  static_cast<float>(segment.scaling),
                  {},
                  {},
                  {}};
    SegmentBlocks blocks(segment, dtypes, dropout_, x_.size(1), y_.size(1));
    blocks.for_each([&](int64_t first, int64_t count) {
      std::optional<Tensor> dropped;
      if (dropout_.active()) dropped = keep(blocks.load_dropped(x_));
      const RowList block = segment.rows.part(first, count);
      block.for_each_run([&](const Run& run, int64_t position) {
        for (int64_t i = 0; i < run.count; ++i) {
          const int64_t row = run.first + i;
          group.x.push_back(dropped ? data(*dropped, position + i) : data(x_, row));
          group.h.push_back(data(h_, row));
          group.y.push_back(data(y_, row));
        }
      });
    });
    groups_.push_back(std::move(group));
  }

  void run() const {
    if (groups_.empty()) return;
    few_rows_down(groups_, x_.size(1), static_cast<float>(scale_of(dropout_)));
    few_rows_up(groups_, y_.size(1));
  }

 private:
  static uint16_t* data(const Tensor& matrix, int64_t row) {
    return static_cast<uint16_t*>(matrix.data_ptr()) + row * matrix.stride(0);
  }

  // bf16 rows with dense columns: the stack itself where it is that.
  static Tensor operand_of(const Tensor& matrix, const Dtypes& dtypes) {
    const bool as_is = matrix.scalar_type() == dtypes.input && matrix.stride(1) == 1;
    return as_is ? matrix : operand(matrix, dtypes);
  }

  const Tensor& keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  const MultiBranchArgs& args_;
  const Dropout& dropout_;
  const Tensor &x_, &y_, &h_;
  std::vector<FewRows> groups_;
  std::deque<Tensor> kept_;  // references to its entries stay good
};

bool is_one_adapter(const Segments& segments) {
  return segments.adapted.size() == 1 && segments.base.num_rows == 0;
}

// y [M, N] holds base_out.
void forward(const MultiBranchArgs& args, const Segments& segments, const Tensor& x,
             const Tensor& y, const Tensor& h) {
  const bool one_adapter = is_one_adapter(segments);
  if (!one_adapter || segments.adapted[0].rank < args.rank()) zero(h);
  if (one_adapter && !goes_by_few_rows(segments.adapted[0], x.scalar_type())) {
    const Segment& segment = segments.adapted[0];
    return branch_forward(branch_of(args, segment), x, y, first_columns(h, segment.rank));
  }
  const Dropout dropout = dropout_of(args.dropout_p, args.seed);
  FewRowsForward few_rows(args, dropout, x, y, h);
  for (const Segment& segment : segments.adapted) {
    if (goes_by_few_rows(segment, x.scalar_type())) {
      few_rows.append(segment);
    } else {
      segment_forward(args, segment, dropout, x, y, h);
    }
  }
  few_rows.run();
}

// Empty ([0]) where not needed.
struct MultiGradients {
  Tensor dx, dlora_a, dlora_b;
};

Tensor zeros(const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor result = empty(sizes, dtype);
  zero(result);
  return result;
}

Tensor zeros_like(const Tensor& stack) {
  return zeros({stack.size(0), stack.size(1), stack.size(2)}, stack.scalar_type());
}

// Adapter i's part of a dense gradient [n, rows, columns], its first `num_cols` columns.
Rows gradient_rows(const Tensor& gradient, int64_t i) {
  return {static_cast<char*>(gradient.data_ptr()) +
              i * gradient.stride(0) * static_cast<int64_t>(gradient.element_size()),
          gradient.scalar_type(), gradient.stride(1)};
}

// What the segment adds to the gradients, whose buffers are zero: its rows of dx, its adapter's
// part of dlora_a and dlora_b.
void segment_backward(const MultiBranchArgs& args, const MultiBranchNeeds& needs,
                      const Segment& segment, const Dropout& dropout, const Tensor& dout,
                      const std::optional<Tensor>& x, const std::optional<Tensor>& h,
                      const MultiGradients& gradients) {
  const int64_t num_rows = segment.rows.num_rows, rank = segment.rank;
  const int64_t in_features = args.in_features(), out_features = args.out_features();
  const Dtypes dtypes = dtypes_for(dout.scalar_type());
  SegmentBlocks blocks(segment, dtypes, dropout, in_features, out_features);
  const Tensor g = empty({num_rows, rank}, dtypes.compute);  // scaling · dout lora_b
  std::optional<BlockSum> p, q;                              // doutᵀ h and gᵀ drop(x), transposed
  std::optional<Tensor> lora_a, lora_b;
  if (needs.g()) lora_b = operand(lora_b_of(args, segment), dtypes);
  if (needs.dx) lora_a = operand(lora_a_of(args, segment), dtypes);
  if (needs.dlora_b) p.emplace(dtypes, rank, out_features);
  if (needs.dlora_a) q.emplace(dtypes, rank, in_features);
  blocks.for_each([&](int64_t first, int64_t count) {
    const Tensor dout_block = blocks.load(dout);
    const Tensor g_block = row_block(g, first, count);
    if (needs.g())
      features_to_ranks(g_block, dout_block, transposed(*lora_b), segment.scaling, Dropout{});
    if (p) p->add(blocks.load(first_columns(*h, rank)), dout_block, nullptr);
    if (q) q->add(g_block, blocks.load_dropped(*x), nullptr);
    if (needs.dx) {
      const bool direct = blocks.in_place(gradients.dx) && !dropout.active();
      const Tensor product =
          direct ? blocks.load(gradients.dx) : empty({count, in_features}, dtypes.compute);
      ranks_to_features(product, g_block, *lora_a, scale_of(dropout), nullptr, /*add=*/false);
      if (!direct) blocks.store_dropped(gradients.dx, product);
    }
  });
  if (p)
    convert(gradient_rows(gradients.dlora_b, segment.adapter),
            rows_of(transposed_copy(p->result())), segment.scaling, out_features, rank);
  if (q)
    convert(gradient_rows(gradients.dlora_a, segment.adapter), rows_of(q->result()),
            scale_of(dropout), rank, in_features);
}

// Every row has the one segment's adapter: what lowrank_add computes, put into the stacks.
void one_adapter_backward(const MultiBranchArgs& args, const MultiBranchNeeds& needs,
                          const Segment& segment, const Tensor& dout,
                          const std::optional<Tensor>& x, const std::optional<Tensor>& h,
                          MultiGradients& gradients) {
  const BranchNeeds branch_needs{needs.dx, needs.dlora_a, needs.dlora_b, false, false, false};
  const auto h_columns = h ? std::optional(first_columns(*h, segment.rank)) : h;
  const BranchGradients own =
      branch_backward(branch_of(args, segment), branch_needs, dout, x, h_columns, std::nullopt);
  if (needs.dx) gradients.dx = own.dx;
  if (needs.dlora_a)
    convert(gradient_rows(gradients.dlora_a, segment.adapter), rows_of(own.dlora_a), 1.0,
            segment.rank, args.in_features());
  if (needs.dlora_b)
    convert(gradient_rows(gradients.dlora_b, segment.adapter), rows_of(own.dlora_b), 1.0,
            args.out_features(), segment.rank);
}

MultiGradients backward(const MultiBranchArgs& args, const MultiBranchNeeds& needs,
                        const Segments& segments, const Tensor& dout,
                        const std::optional<Tensor>& x, const std::optional<Tensor>& h) {
  const ScalarType input = dout.scalar_type();
  const bool one_adapter = is_one_adapter(segments);
  MultiGradients gradients{needs.dx && !one_adapter
                               ? zeros({dout.size(0), args.in_features()}, input)
                               : empty({0}, input),
                           needs.dlora_a ? zeros_like(args.lora_a) : empty({0}, input),
                           needs.dlora_b ? zeros_like(args.lora_b) : empty({0}, input)};
  if (one_adapter) {
    one_adapter_backward(args, needs, segments.adapted[0], dout, x, h, gradients);
    return gradients;
  }
  const Dropout dropout = dropout_of(args.dropout_p, args.seed);
  for (const Segment& segment : segments.adapted)
    segment_backward(args, needs, segment, dropout, dout, x, h, gradients);
  return gradients;
}

}  // namespace

std::tuple<Tensor, Tensor> multi_lowrank_add_cpu(const Tensor& base_out, const Tensor& x,
                                                 const Tensor& lora_a, const Tensor& lora_b,
                                                 const Tensor& adapter_ids, const Tensor& scaling,
                                                 const std::optional<Tensor>& ranks,
                                                 double dropout_p,
                                                 const std::optional<Tensor>& seed) {
  const MultiBranchArgs args{lora_a, lora_b, adapter_ids, scaling, ranks, dropout_p, seed};
  check_multi_forward(kOp, args, base_out, x);
  const Segments segments = segments_of(kOp, args);

  const Tensor rows = as_matrix(x);
  Tensor y = empty(with_last_dim(x, args.out_features()), x.scalar_type());
  Tensor h = empty(with_last_dim(x, args.rank()), x.scalar_type());
  if (rows.size(0) == 0) return {y, h};
  const Tensor y_rows = as_matrix(y);
  copy(y_rows, as_matrix(base_out));
  forward(args, segments, rows, y_rows, as_matrix(h));
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor> multi_lowrank_add_backward_cpu(
    const Tensor& dout, const std::optional<Tensor>& x, const std::optional<Tensor>& h,
    const Tensor& lora_a, const Tensor& lora_b, const Tensor& adapter_ids, const Tensor& scaling,
    const std::optional<Tensor>& ranks, double dropout_p, const std::optional<Tensor>& seed,
    bool need_dx, bool need_dlora_a, bool need_dlora_b) {
  const MultiBranchArgs args{lora_a, lora_b, adapter_ids, scaling, ranks, dropout_p, seed};
  const MultiBranchNeeds needs{need_dx, need_dlora_a, need_dlora_b};
  check_multi_backward(kBackwardOp, args, needs, dout, x, h);
  const Segments segments = segments_of(kBackwardOp, args);

  const auto rows = [](const std::optional<Tensor>& saved) {
    return saved ? std::optional(as_matrix(*saved)) : saved;
  };
  MultiGradients gradients = backward(args, needs, segments, as_matrix(dout), rows(x), rows(h));
  if (need_dx) gradients.dx = with_shape(gradients.dx, with_last_dim(dout, args.in_features()));
  return {gradients.dx, gradients.dlora_a, gradients.dlora_b};
}

}  // namespace lowrank_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CPU, m) {
  m.impl("multi_lowrank_add", TORCH_BOX(&lowrank_ext::cpu::multi_lowrank_add_cpu));
  m.impl("multi_lowrank_add_backward",
         TORCH_BOX(&lowrank_ext::cpu::multi_lowrank_add_backward_cpu));
}
