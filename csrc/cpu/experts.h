// What the two forms of moe_lowrank_add on the CPU share: operands, masks, the router, and the sums
// over each expert's rows.
//
// Per token (experts_per_token.cpp): each token's row is multiplied with the rows of its own
// experts, without gathering; best for small experts.
// Grouped (experts_grouped.cpp): tokens are gathered by expert, and the vendor multiplies each group
// with its expert; best for large experts.
//
// Slot t k + j is token t's j-th choice; buffers of T k rows are in the order of SlotOrder.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "dropout.h"
#include "operands.h"
#include "ops/moe_lowrank_add.h"
#include "routing.h"
#include "row_products.h"

namespace lowrank_ext::cpu {

enum class ExpertForm { kPerToken, kGrouped };

// A matrix and its rows. Pointer, dtype and strides are looked up once, since each look-up goes
// through torch's C shim.
struct Matrix : Rows {
  Tensor tensor;
  bool is_dense;

  Matrix(const Tensor& matrix)
      : Rows(rows_of(matrix)), tensor(matrix), is_dense(matrix.is_contiguous()) {}

  // The elements, as those of dense_data.
  template <typename T>
  T* as() const {
    return is_dense ? static_cast<T*>(data) : dense_data<T>(tensor);
  }
};

struct ExpertOperands : Dtypes {
  Dropout dropout;
  bool shared_dropout;
  double scaling;
  int64_t num_experts, rank, in_features, out_features, top_k;
  Matrix router_weight;  // [E, K], compute
  Matrix lora_a;         // [E r_e, K], compute
  Matrix lora_b;         // [E N, r_e], compute
  ExpertForm form;
};

// The form for experts of this rank.
ExpertForm plan_experts(ScalarType compute, int64_t rank);

ExpertOperands prepare_experts(const ExpertArgs& args, ScalarType input);

// One forward; all matrices have T rows and dense columns.
struct ExpertForward {
  const ExpertOperands& ops;
  Matrix x, base_out;
  Matrix y, h, router_probs, topk_ids, topk_weights;  // outputs

  int64_t num_tokens() const { return x.tensor.size(0); }
};

void forward_per_token(const ExpertForward& call);
void forward_grouped(const ExpertForward& call);

// One backward.
struct ExpertBackward {
  const ExpertOperands& ops;
  ExpertNeeds needs;
  Matrix dout;                    // [T, N]
  std::optional<Matrix> x;        // [T, K], where needs.x()
  std::optional<Matrix> h;        // [T, E r_e], where needs.h()
  Matrix router_probs;            // [T, E]
  Matrix topk_ids, topk_weights;  // [T, k]
  const BalanceGradient& balance;
  const SlotOrder& order;
  const int64_t* slot_positions;  // order's

  int64_t num_tokens() const { return dout.tensor.size(0); }
  bool gradient_of_h() const { return needs.gates() || needs.dlora_a; }
};

// What the forms write per token and slot, in the compute dtype. Absent where not needed.
struct TokenGradients {
  std::optional<Matrix> dh;       // [T k, r_e], times the dropout's scale
  std::optional<Matrix> dlogits;  // [T, E]
  std::optional<Matrix> dx;       // [T, K], dtype of x
  // [T k, words] int64: keep bits that dx draws and dlora_a reuses; per token only.
  std::optional<Matrix> keep_bits;
};

// z [T k, r_e] = scaling · weight · h of each slot.
Tensor gated_h(const ExpertOperands& ops, const SlotOrder& order, const Matrix& h,
               const Matrix& topk_ids, const Matrix& topk_weights);

// Both write the gradients that are present. The grouped form also sums dlora_b from z, over the rows
// of dout that it gathers.
void backward_per_token(const ExpertBackward& call, const TokenGradients& gradients);
void backward_grouped(const ExpertBackward& call, const TokenGradients& gradients,
                      const std::optional<Tensor>& z, const std::optional<Tensor>& dlora_b);

// ---- pieces

// Calls body with a null pointer of the storage type of the compute dtype.
template <typename Body>
void visit_storage(ScalarType compute, const Body& body) {
  if (compute == ScalarType::BFloat16) return body(static_cast<BFloat16*>(nullptr));
  if (compute == ScalarType::Float) return body(static_cast<float*>(nullptr));
  body(static_cast<double*>(nullptr));
}

// Keep bits of a token on its way into an expert, in memory of one thread.
class ExpertMask {
 public:
  ExpertMask(const ExpertOperands& ops, int64_t num_cols)
      : ops_(ops), bits_(ops.dropout.active() ? mask_words_per_row(num_cols) : 0) {}

  // Of columns [first_col, first_col + num_cols); null where nothing is dropped.
  const uint64_t* draw(int64_t expert, int64_t token, int64_t first_col, int64_t num_cols) {
    if (!ops_.dropout.active()) return nullptr;
    draw(expert, token, first_col, num_cols, bits_.data());
    return bits_.data();
  }

  void draw(int64_t expert, int64_t token, int64_t first_col, int64_t num_cols, uint64_t* bits) {
    draw_row_bits(ops_.dropout, ops_.shared_dropout ? 0 : static_cast<uint32_t>(expert), token,
                  first_col, num_cols, bits);
  }

 private:
  const ExpertOperands& ops_;
  std::vector<uint64_t> bits_;
};

// The row as storage_t with zeros where dropped: the row itself where nothing changes, else scratch.
template <typename storage_t>
const storage_t* load_row(Rows row, ScalarType compute, int64_t num_cols, const uint64_t* bits,
                          storage_t* scratch) {
  if (row.dtype != compute) {
    convert_row({scratch, compute, num_cols}, row, 1.0, num_cols, bits);
    return scratch;
  }
  if (bits == nullptr) return static_cast<const storage_t*>(row.data);
  copy_row_kept(scratch, row.data, sizeof(storage_t), bits, num_cols);
  return scratch;
}

// Routes `count` tokens from `first` on: writes router_probs, topk_ids and topk_weights.
template <typename storage_t>
void route_tokens(const ExpertForward& call, int64_t first, int64_t count);

// Gradients of the router's logits and of h for one token, given g [k r_e] = scaling · dout lora_b.
template <typename acc_t>
void gate_backward(const ExpertBackward& call, const TokenGradients& gradients, int64_t token,
                   acc_t* g,         // in: g; out: gradient of h
                   acc_t* dlogits);  // [E]

// lora_b [E N, r_e] as [E r_e, N].
Tensor transposed_experts(const ExpertOperands& ops);

// A [T, C] matrix from which the rows of slots are gathered. With `masked`, elements that the slot's
// expert drops are zero; keep_bits, where given, are the bits of the mask.
struct GroupSource {
  const Matrix& matrix;
  bool masked = false;
  const Matrix* keep_bits = nullptr;
};

// body(expert, first, rows): rows [first, first + rows.size(0)) in the order of slots, all of one
// expert.
using BlockBody = std::function<void(int64_t expert, int64_t first, const Tensor& rows)>;
void for_each_group(const ExpertOperands& ops, const SlotOrder& order, const GroupSource& source,
                    const BlockBody& body);

// gradient[i] = Σ over expert i's slots of leftᵀ source, zeros without slots. gradient: [E, r_e,
// C], or [E, C, r_e] with `transpose`. on_block is called with every block.
void sum_groups(const ExpertOperands& ops, const SlotOrder& order, const Tensor& left,
                const GroupSource& source, const Tensor& gradient, bool transpose,
                const BlockBody& on_block = {});

}  // namespace lowrank_ext::cpu
