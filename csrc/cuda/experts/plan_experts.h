// Which form moe_lowrank_add takes on a GPU, by sizes alone, so that forward and backward agree.
// Counted, not timed: no GPU has measured the threshold yet (benchmarks/gpu_measure.py times both
// forms side by side).
//
// The plan counts passes over streams of x's size, forward and backward, with K and N alike: x read
// by the projections down, base read and y written, dout read, x read for the weights' gradients,
// dx written. A product or a mask costs as many passes as take the same time:
//     dense    a read of x and of dout for each tile of columns, whose number is R = E r + E, padded
//              under dropout; products with all of R; in the forward E draws where each expert has
//              its own mask
//     grouped  a read of x for the router and one for each choice, two of dout for each choice;
//              k r columns, r padded to 16; k draws
// Products: 80 multiply-adds a byte on tensor cores, 6 without (an H100 at 0.5 PFLOP/s, or 30
// TFLOP/s, and 3 TB/s). Draws: a Philox call makes the mask of 16 bytes in about 70 integer
// instructions, which at 14 T/s take as long as the 16 bytes at 3 TB/s, so a draw is a pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

namespace lowrank_ext::cuda {

struct ExpertSizes {
  int64_t num_experts, rank, top_k, element_bytes;
  bool drops;
  bool shared_dropout;  // one dropout mask for all experts, else one for each
};

struct ExpertPlan {
  bool grouped;
  // In the grouped form: one pass over dout multiplies it with every expert's lora_b.
  bool dense_up_backward;
};

namespace detail {

struct ExpertCosts {
  double products_per_pass, tile_cols;
  double h_cols, all_cols, chosen_cols;  // E r; R; k r padded
  double experts, choices, draws;  // draws of a token: k or, of one mask, 1; 0 without dropout
  bool drops_by_expert;            // through each expert's own mask

  explicit ExpertCosts(const ExpertSizes& sizes) {
    constexpr int64_t kMultiple = 16;
    const auto padded = [](int64_t size) { return (size + kMultiple - 1) / kMultiple * kMultiple; };
    const auto [num_experts, rank, top_k, element_bytes, drops, shared_dropout] = sizes;
    drops_by_expert = drops && !shared_dropout;
    const bool tensor_cores = element_bytes == 2;
    products_per_pass = (tensor_cores ? 80.0 : 6.0) * element_bytes;
    tile_cols = tensor_cores && !drops ? 128 : 64;
    h_cols = num_experts * rank;
    const int64_t expert_cols =
        drops_by_expert ? num_experts * padded(rank) : padded(num_experts * rank);
    all_cols = drops ? padded(num_experts) + expert_cols : num_experts * (rank + 1);
    chosen_cols = top_k * padded(rank);
    experts = num_experts;
    choices = top_k;
    draws = !drops ? 0 : drops_by_expert ? top_k : 1;
  }

  double products(double cols) const { return cols / products_per_pass; }
  double tiles(double cols, double tile) const {
    return static_cast<double>((static_cast<int64_t>(cols) + static_cast<int64_t>(tile) - 1) /
                               static_cast<int64_t>(tile));
  }

  double dense_up_backward() const {
    constexpr double kOnePassCols = 64;  // lowrank_up_backward.cuh
    const double wide_tile = products_per_pass == 160 ? 128 : 64;
    const double reads = h_cols <= kOnePassCols ? 1 : 2 * tiles(h_cols, wide_tile);
    return std::max(reads, products(2 * h_cols));
  }
  double grouped_up_backward() const { return std::max(2 * choices, products(2 * chosen_cols)); }
  double dense() const {
    const double reads = tiles(all_cols, tile_cols), of_all = products(all_cols);
    const double down = std::max({reads, of_all, drops_by_expert ? experts : draws});
    const double outer = std::max({reads, of_all, draws});
    const double dx = std::max({1.0, of_all, draws});
    const double up = std::max(2.0, products(h_cols));
    return down + up + dense_up_backward() + outer + dx;
  }
  double grouped() const {
    const double router = 2;
    const double down = std::max({choices, products(chosen_cols), draws});
    const double dx = std::max({1.0, products(chosen_cols + experts), draws});
    const double up = std::max(2.0, products(chosen_cols));
    return router + 2 * down + up + std::min(dense_up_backward(), grouped_up_backward()) + dx;
  }
};

}  // namespace detail

inline ExpertPlan plan_experts(const ExpertSizes& sizes) {
  const detail::ExpertCosts costs(sizes);
  return {costs.grouped() < costs.dense(), costs.dense_up_backward() < costs.grouped_up_backward()};
}

// The plan of a call. In the SIMT executor's build and in a library built for benchmarks
// (LOWRANK_EXT_BENCHMARKS in CMakeLists.txt) a fixed plan takes its place, so that every form runs
// at any size; it is set while no other thread makes calls.
#ifdef LOWRANK_EXT_FIXED_PLANS
inline std::optional<ExpertPlan> fixed_expert_plan;
inline ExpertPlan expert_plan(const ExpertSizes& sizes) {
  return fixed_expert_plan ? *fixed_expert_plan : plan_experts(sizes);
}
#else
inline ExpertPlan expert_plan(const ExpertSizes& sizes) { return plan_experts(sizes); }
#endif

}  // namespace lowrank_ext::cuda
