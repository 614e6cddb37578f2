// Every op of the library. This file is the table of contents: schemas only, kernels register
// themselves.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lowrank_ext, m) {
  // y = x weightᵀ + bias + scaling · out_scale ⊙ (mid(drop(x) lora_aᵀ) lora_bᵀ); returns y [...,
  // N], h [..., r].
  m.def(
      "lowrank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? "
      "core, "
      "Tensor? rank_scale, Tensor? out_scale, float scaling, float dropout_p, Tensor? seed) "
      "-> (Tensor, Tensor)");
  // Returns dx, dlora_a, dlora_b, dcore, drank_scale, dout_scale; an empty tensor where not needed.
  m.def(
      "lowrank_linear_backward(Tensor dout, Tensor? x, Tensor weight, Tensor? h, Tensor lora_a, "
      "Tensor lora_b, "
      "Tensor? core, Tensor? rank_scale, Tensor? out_scale, float scaling, float dropout_p, "
      "Tensor? seed, "
      "bool need_dx, bool need_dlora_a, bool need_dlora_b, bool need_dcore, bool need_drank_scale, "
      "bool need_dout_scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The same branch on the output of any base module.
  m.def(
      "lowrank_add(Tensor base_out, Tensor x, Tensor lora_a, Tensor lora_b, Tensor? core, Tensor? "
      "rank_scale, "
      "Tensor? out_scale, float scaling, float dropout_p, Tensor? seed) -> (Tensor, Tensor)");
  m.def(
      "lowrank_add_backward(Tensor dout, Tensor? x, Tensor? h, Tensor lora_a, Tensor lora_b, "
      "Tensor? core, "
      "Tensor? rank_scale, Tensor? out_scale, float scaling, float dropout_p, Tensor? seed, bool "
      "need_dx, "
      "bool need_dlora_a, bool need_dlora_b, bool need_dcore, bool need_drank_scale, bool "
      "need_dout_scale) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Top-k routing; returns topk_weights [..., k], topk_ids [..., k], expert_counts [E],
  // balance_loss
  // [], sorted_slots [T k], expert_offsets [E + 1], slot_positions [T k]; slot t k + j is token t's
  // j-th choice.
  m.def(
      "moe_route(Tensor router_logits, int top_k, Tensor? token_mask) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_route_backward(Tensor? dtopk_weights, Tensor? dbalance_loss, Tensor router_logits, "
      "Tensor topk_ids, Tensor expert_counts, Tensor? token_mask) -> Tensor");
  // y = base_out + scaling · Σ_i w_i lora_b[i] lora_a[i] drop_i(x) over the top_k experts i of each
  // row; returns y [..., N], h [..., E r_e], router_probs [..., E], topk_ids [..., k], topk_weights
  // [..., k], balance_loss [], expert_counts [E].
  m.def(
      "moe_lowrank_add(Tensor base_out, Tensor x, Tensor router_weight, Tensor lora_a, Tensor "
      "lora_b, int top_k, float scaling, float dropout_p, Tensor? seed, bool shared_dropout, "
      "Tensor? token_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Returns dx, drouter_weight, dlora_a, dlora_b; an empty tensor where not needed.
  m.def(
      "moe_lowrank_add_backward(Tensor dout, Tensor? dbalance_loss, Tensor? x, Tensor "
      "router_weight, Tensor lora_a, Tensor lora_b, Tensor? h, Tensor router_probs, Tensor "
      "topk_ids, Tensor topk_weights, Tensor expert_counts, float scaling, float dropout_p, "
      "Tensor? seed, bool shared_dropout, Tensor? token_mask, bool need_dx, bool "
      "need_drouter_weight, bool need_dlora_a, bool need_dlora_b) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  // Instruction sets that the CPU kernels use on this machine, separated by spaces.
  m.def("cpu_features() -> str");
}
