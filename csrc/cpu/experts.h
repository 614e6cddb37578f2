// What the two forms of moe_lowrank_add on the CPU share: operands, masks, the router, and the sums
// over each expert's rows.
//
// By row (experts_per_token.cpp): every token multiplies its row with the rows of its own experts.
// Nothing is gathered; best where the experts are small.
// By group (experts_grouped.cpp): tokens are gathered by expert and the vendor multiplies each
// group with its expert; best where the experts are large.
//
// Slot t k + j is token t's j-th choice; buffers of T k rows are in the order of SlotOrder.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "../ops/moe_lowrank_add.h"
#include "dropout.h"
#include "operands.h"
#include "routing.h"
#include "row_products.h"

namespace lowrank_ext::cpu {

enum class ExpertForm { kByRow, kByGroup };

// A matrix and its rows, looked up once: every question to a tensor goes through torch's C shim.
struct Matrix : Rows {
  Tensor tensor;

  Matrix(const Tensor& matrix) : Rows(rows_of(matrix)), tensor(matrix) {}
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
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

  double dropout_scale() const { return dropout.active() ? dropout.scale() : 1.0; }
  bool mask_per_expert() const { return dropout.active() && !shared_dropout; }
};

// The form for experts of this rank.
ExpertForm plan_experts(ScalarType compute, int64_t rank);

ExpertOperands prepare_experts(const ExpertArgs& args, ScalarType input);

// All [T, …] matrices with dense columns.
struct ExpertOutputs {
  Matrix y, h, router_probs, topk_ids, topk_weights;
};

void forward_by_row(const ExpertOperands& ops, const Matrix& x, const Matrix& base_out,
                    const ExpertOutputs& out);
void forward_by_group(const ExpertOperands& ops, const Matrix& x, const Matrix& base_out,
                      const ExpertOutputs& out);

// The backward's view of a call; matrices as in ExpertOutputs.
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

// What the forms leave for the sums over rows, in the compute dtype. Absent where not needed.
struct ExpertGradients {
  std::optional<Matrix> dh;       // [T k, r_e], dropout's scale included
  std::optional<Matrix> dlogits;  // [T, E]
  std::optional<Matrix> dx;       // [T, K], dtype of x
  // [T k, words] int64: keep bits that dx has drawn and dlora_a needs again, by row only.
  std::optional<Matrix> keep_bits;
};

// z [T k, r_e] = scaling · weight · h of each slot.
Tensor gated_h(const ExpertOperands& ops, const SlotOrder& order, const Matrix& h,
               const Matrix& topk_ids, const Matrix& topk_weights);

// Both write gradients.dh, .dlogits and .dx where those are present; by group, also dlora_b, for
// which the rows of dout have been gathered anyway.
void backward_by_row(const ExpertBackward& call, const ExpertGradients& gradients);
void backward_by_group(const ExpertBackward& call, const ExpertGradients& gradients,
                       const std::optional<Tensor>& z, const std::optional<Tensor>& dlora_b);

// ---- pieces

// Calls body with a null pointer of the storage type that the compute dtype is held in.
template <typename Body>
void visit_storage(ScalarType compute, const Body& body) {
  if (compute == ScalarType::BFloat16) return body(static_cast<BFloat16*>(nullptr));
  if (compute == ScalarType::Float) return body(static_cast<float*>(nullptr));
  body(static_cast<double*>(nullptr));
}

inline int64_t size_of(ScalarType dtype) {
  if (dtype == ScalarType::Double) return 8;
  return dtype == ScalarType::Float ? 4 : 2;
}

// One row of a matrix, from a column on.
inline Rows row_at(Rows matrix, int64_t row, int64_t col = 0) {
  matrix.data =
      static_cast<char*>(matrix.data) + (row * matrix.stride + col) * size_of(matrix.dtype);
  return matrix;
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

// The row as storage_t with zeros where dropped: in place where it is that already, else in
// scratch.
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

// Routes `count` tokens from `first` on: probs, ids and weights.
template <typename storage_t>
void route_tokens(const ExpertOperands& ops, const Matrix& x, int64_t first, int64_t count,
                  const ExpertOutputs& out);

// Gradients of the router's logits and of h for one token, given g [k r_e] = scaling · dout lora_b.
template <typename acc_t>
void gate_backward(const ExpertBackward& call, const ExpertGradients& gradients, int64_t token,
                   acc_t* g,         // in: g; out: gradient of h
                   acc_t* dlogits);  // [E]

// lora_b [E N, r_e] as [E r_e, N].
Tensor transposed_experts(const ExpertOperands& ops);

// A [T, C] matrix to gather the rows of slots from, with zeros where `masked` and the slot's expert
// drops; keep_bits: drawn already.
struct GroupSource {
  const Matrix& matrix;
  bool masked = false;
  const Matrix* keep_bits = nullptr;
};

// body(expert, first, rows): the rows of slots first … of the order, in blocks of one expert.
using BlockBody = std::function<void(int64_t expert, int64_t first, const Tensor& rows)>;
void for_each_group(const ExpertOperands& ops, const SlotOrder& order, const GroupSource& source,
                    const BlockBody& body);

// gradient[i] = Σ over expert i's slots of leftᵀ source, zeros without slots. gradient: [E, r_e,
// C], or [E, C, r_e] if `transpose`. `also` sees every block.
void sum_groups(const ExpertOperands& ops, const SlotOrder& order, const Tensor& left,
                const GroupSource& source, const Tensor& gradient, bool transpose,
                const BlockBody& also = {});

}  // namespace lowrank_ext::cpu
