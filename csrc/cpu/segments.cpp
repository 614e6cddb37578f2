#include "segments.h"

#include <algorithm>

#include "small_matrix.h"

namespace lowrank_ext::cpu {
namespace {

std::vector<int64_t> integers(const Tensor& tensor) {
  const Tensor values = dense(tensor);
  const auto* data = dense_data<const int64_t>(values);
  return {data, data + values.numel()};
}

std::vector<double> doubles(const Tensor& tensor) {
  const Tensor values = dense(tensor);
  std::vector<double> result(values.numel());
  visit_accumulator(
      values, [&](const auto* data) { std::copy(data, data + result.size(), result.begin()); });
  return result;
}

std::vector<int64_t> ranks_of(const char* op, const MultiBranchArgs& args) {
  if (!args.ranks) return std::vector<int64_t>(args.num_adapters(), args.rank());
  std::vector<int64_t> ranks = integers(*args.ranks);
  for (size_t i = 0; i < ranks.size(); ++i)
    check(ranks[i] >= 0 && ranks[i] <= args.rank(), op,
          ": ranks must be between 0 and r=", args.rank(), ", got ", ranks[i], " for adapter ", i);
  return ranks;
}

}  // namespace

void RowList::append(int64_t row) {
  ++num_rows;
  if (!runs.empty() && runs.back().first + runs.back().count == row) {
    ++runs.back().count;
  } else {
    runs.push_back({row, 1});
  }
}

RowList RowList::part(int64_t first, int64_t count) const {
  RowList result{{}, count};
  for (const Run& run : runs) {
    const int64_t skip = std::min(first, run.count), taken = std::min(run.count - skip, count);
    if (taken > 0) result.runs.push_back({run.first + skip, taken});
    first -= skip;
    count -= taken;
  }
  return result;
}

Segments segments_of(const char* op, const MultiBranchArgs& args) {
  const int64_t num_adapters = args.num_adapters();
  const std::vector<int64_t> ranks = ranks_of(op, args), ids = integers(args.adapter_ids);
  const std::vector<double> scaling = doubles(args.scaling);
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
      result.adapted.push_back({id, ranks[id], scaling[id], {}});
    }
    result.adapted[segment_of[id]].rows.append(row);
  }
  return result;
}

}  // namespace lowrank_ext::cpu
