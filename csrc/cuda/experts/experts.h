// What the two forms of moe_lowrank_add on a GPU share: the call, its outputs and its gradients.
//
// Dense (experts_dense.cpp): every token multiplies with every expert, and those that it did not
// choose count as zero. Few columns; one pass over each stream.
// Grouped (experts_grouped.cpp): slots sorted by expert, each multiplied with its own expert only.
#pragma once

#include "common/tensors.h"
#include "experts/kernels.h"
#include "experts/plan_experts.h"
#include "ops/moe_lowrank_add.h"

namespace lowrank_ext::cuda {

// A dense tensor of any shape as rows of its last dimension.
inline MatrixRef rows_of(const Tensor& tensor) {
  const int64_t num_cols = tensor.size(tensor.dim() - 1);
  return {dense_data<void>(tensor), element_type(tensor.scalar_type()),
          num_cols == 0 ? 0 : tensor.numel() / num_cols, num_cols, num_cols};
}

// What both passes know about the call.
struct ExpertCall {
  ScalarType input;
  ComputeType compute_type;
  DropoutArgs dropout;
  bool shared_dropout;
  int64_t num_experts, rank, top_k, in_features, out_features;
  double scaling;
  Tensor router_weight, lora_a, lora_b;  // dense
  std::optional<Tensor> token_mask;      // dense
  Device device;

  ExpertCall(const ExpertArgs& args, const Tensor& like)
      : input(like.scalar_type()),
        // Products of fp32 decide the routing: never in TF32.
        compute_type(compute_type_of(input, /*allow_tf32=*/false)),
        dropout(dropout_of(args.dropout_p, args.seed)),
        shared_dropout(args.shared_dropout),
        num_experts(args.num_experts()),
        rank(args.rank()),
        top_k(args.top_k),
        in_features(args.in_features()),
        out_features(args.out_features()),
        scaling(args.scaling),
        router_weight(dense(args.router_weight)),
        lora_a(dense(args.lora_a)),
        lora_b(dense(args.lora_b)),
        token_mask(dense(args.token_mask)),
        device(device_of_kernels(like)) {}

  bool drops() const { return dropout.threshold != 0; }
  int64_t num_h_cols() const { return num_experts * rank; }
  ExpertPlan plan() const {
    return expert_plan({num_experts, rank, top_k, element_size(input), drops(), shared_dropout});
  }
  ExpertRouting routing(const RoutingTensors& tensors) const {
    return {ref(tensors.router_probs), ref(tensors.topk_weights),
            dense_data<int64_t>(tensors.topk_ids), dense_data<int64_t>(tensors.expert_counts),
            dense_data<const bool>(token_mask)};
  }
};

// All [M, …] matrices.
struct ExpertForward {
  MatrixRef x, base;
  ExpertRouting routing;
  MatrixRef balance_loss, y, h;
};

struct ExpertBackward {
  ExpertNeeds needs;
  MatrixRef dout, x, h;  // x and h where needed
  ExpertRouting routing;
  MatrixRef dbalance_loss;                         // absent: none
  MatrixRef dx, drouter_weight, dlora_a, dlora_b;  // absent where not needed

  bool need_g() const { return needs.gates() || needs.dlora_a; }
};

// `like` is a tensor of the call, for scratch memory of its device.
void forward_dense(const ExpertCall& call, const ExpertForward& pass, const Tensor& like);
void backward_dense(const ExpertCall& call, const ExpertBackward& pass, const Tensor& like);
void forward_grouped(const ExpertCall& call, const ExpertForward& pass, const Tensor& like);
void backward_grouped(const ExpertCall& call, const ExpertBackward& pass, const Tensor& like);

}  // namespace lowrank_ext::cuda
