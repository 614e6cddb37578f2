#include "features.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace lowrank_ext::cpu {

static Features of_this_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  return {avx512, avx512 && __builtin_cpu_supports("avx512bf16")};
#else
  return {false, false};
#endif
}

// Limited by LOWRANK_EXT_CPU.
static Features allowed() {
  const char* const variable = std::getenv("LOWRANK_EXT_CPU");
  const std::string limit = variable == nullptr ? "" : variable;
  const Features all = of_this_cpu();
  if (limit.empty() || limit == "avx512_bf16") return all;
  if (limit == "avx512") return {all.avx512, false};
  if (limit == "portable") return {false, false};
  throw std::runtime_error(
      "lowrank_ext: LOWRANK_EXT_CPU must be avx512_bf16, avx512 or portable, got '" + limit + "'");
}

const Features& features() {
  static const Features chosen = allowed();
  return chosen;
}

static std::string cpu_features() {
  std::string names;
  if (features().avx512_bf16) names += "avx512_bf16 ";
  if (features().avx512) names += "avx512 ";
  return names + "portable";
}

}  // namespace lowrank_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_features", TORCH_BOX(&lowrank_ext::cpu::cpu_features));
}
