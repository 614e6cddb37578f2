// The schema of every op; kernels register themselves. The SIMT executor's module (tests/simt) compiles
// this file too, for its own library of the same ops, whose backend is csrc/cuda run on the CPU.
#include <torch/csrc/stable/library.h>

#ifdef LOWRANK_EXT_SIMT
STABLE_TORCH_LIBRARY(lowrank_ext_simt, m) {
#else
STABLE_TORCH_LIBRARY(lowrank_ext, m) {
#endif
  // y = x weightᵀ + bias + scaling · out_scale ⊙ (mid(drop(x) lora_aᵀ) lora_bᵀ); returns y [...,
  // N], h [..., r]. allow_tf32: whether fp32 products on a GPU may round their factors to TF32.
  m.def(
      "lowrank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? "
      "core, Tensor? rank_scale, Tensor? out_scale, float scaling, float dropout_p, Tensor? seed, "
      "bool allow_tf32) -> (Tensor, Tensor)");
  // Returns dx, dlora_a, dlora_b, dcore, drank_scale, dout_scale; an empty tensor where not needed.
  m.def(
      "lowrank_linear_backward(Tensor dout, Tensor? x, Tensor weight, Tensor? h, Tensor lora_a, "
      "Tensor lora_b, Tensor? core, Tensor? rank_scale, Tensor? out_scale, float scaling, float "
      "dropout_p, Tensor? seed, bool allow_tf32, bool need_dx, bool need_dlora_a, bool "
      "need_dlora_b, bool need_dcore, bool need_drank_scale, bool need_dout_scale) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The same branch on the output of any base module.
  m.def(
      "lowrank_add(Tensor base_out, Tensor x, Tensor lora_a, Tensor lora_b, Tensor? core, Tensor? "
      "rank_scale, Tensor? out_scale, float scaling, float dropout_p, Tensor? seed, bool "
      "allow_tf32) -> (Tensor, Tensor)");
  m.def(
      "lowrank_add_backward(Tensor dout, Tensor? x, Tensor? h, Tensor lora_a, Tensor lora_b, "
      "Tensor? core, Tensor? rank_scale, Tensor? out_scale, float scaling, float dropout_p, "
      "Tensor? seed, bool allow_tf32, bool need_dx, bool need_dlora_a, bool need_dlora_b, bool "
      "need_dcore, bool need_drank_scale, bool need_dout_scale) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  // Top-k routing; returns topk_weights [..., k], topk_ids [..., k], expert_counts [E],
  // balance_loss [], sorted_slots [T k], expert_offsets [E + 1], slot_positions [T k]; slot t k + j
  // is token t's j-th choice.
  m.def(
      "moe_route(Tensor router_logits, int top_k, Tensor? token_mask) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_route_backward(Tensor? dtopk_weights, Tensor? dbalance_loss, Tensor router_logits, "
      "Tensor topk_ids, Tensor expert_counts, Tensor? token_mask) -> Tensor");
  // An adapter per row: lora_a [n, r, K], lora_b [n, N, r], adapter_ids int64 [...] (-1: the row is
  // base_out's), scaling [n], ranks int64 [n]; returns y [..., N], h [..., r].
  m.def(
      "multi_lowrank_add(Tensor base_out, Tensor x, Tensor lora_a, Tensor lora_b, Tensor "
      "adapter_ids, Tensor scaling, Tensor? ranks, float dropout_p, Tensor? seed) -> (Tensor, "
      "Tensor)");
  // Returns dx, dlora_a, dlora_b; an empty tensor where not needed.
  m.def(
      "multi_lowrank_add_backward(Tensor dout, Tensor? x, Tensor? h, Tensor lora_a, Tensor lora_b, "
      "Tensor adapter_ids, Tensor scaling, Tensor? ranks, float dropout_p, Tensor? seed, bool "
      "need_dx, bool need_dlora_a, bool need_dlora_b) -> (Tensor, Tensor, Tensor)");
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
#ifndef LOWRANK_EXT_SIMT  // no CUDA backend: nothing for the executor to run
  // int64 [...]: the adapter id of each row of x [..., K], from the active AdapterBank.rows block of
  // the bank, for modules with these adapters. Implemented in Python, beside the block.
  m.def("active_adapter_ids(Tensor x, int bank, str[] layout) -> Tensor");
  // Instruction sets that the CPU kernels use on this machine, separated by spaces.
  m.def("cpu_features() -> str");
#endif
}
