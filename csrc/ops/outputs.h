// Fresh outputs of the ops, not yet written unless said otherwise. A gradient that is not needed is
// empty ([0]), and a tensor of its own: outputs of an op must not alias.
#pragma once

#include "matrix.h"

namespace lowrank_ext {

struct BranchOutputs {
  Tensor y;  // [..., N]
  Tensor h;  // [..., r]
};

inline BranchOutputs branch_outputs(const Tensor& x, int64_t out_features, int64_t rank) {
  return {empty(with_last_dim(x, out_features), x.scalar_type(), x),
          empty(with_last_dim(x, rank), x.scalar_type(), x)};
}

// dx [..., K] for dout [..., N].
inline Tensor input_gradient(const Tensor& dout, bool is_needed, int64_t in_features) {
  return empty(is_needed ? with_last_dim(dout, in_features) : std::vector<int64_t>{0},
               dout.scalar_type(), dout);
}

// The gradients of a call's parameters: zeros where dout has no rows.
class ParameterGradients {
 public:
  ParameterGradients(const Tensor& dout, bool no_rows) : dout_(dout), no_rows_(no_rows) {}

  Tensor of(const Tensor& parameter, bool is_needed) const {
    if (!is_needed) return empty({0}, dout_.scalar_type(), dout_);
    return no_rows_ ? zeros_like(parameter) : dense_like(parameter);
  }
  Tensor of(const std::optional<Tensor>& parameter, bool is_needed) const {
    return of(is_needed ? *parameter : dout_, is_needed);
  }

 private:
  const Tensor& dout_;
  const bool no_rows_;
};

}  // namespace lowrank_ext
