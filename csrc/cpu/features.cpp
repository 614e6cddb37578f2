#include "features.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"

#if LOWRANK_EXT_AMX_KERNELS
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lowrank_ext::cpu {

// Linux saves the 8 KiB of tiles only for processes that ask. A second request changes nothing.
static bool may_use_tiles() {
#if LOWRANK_EXT_AMX_KERNELS
  constexpr unsigned kTiles = 1u << 24, kTilesOfBf16 = 1u << 22, kBoth = kTiles | kTilesOfBf16;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBoth) != kBoth) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

static Features of_this_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return {avx512, bf16, bf16 && may_use_tiles()};
#else
  return {false, false, false};
#endif
}

// Limited by LOWRANK_EXT_CPU.
static Features allowed() {
  const char* const variable = std::getenv("LOWRANK_EXT_CPU");
  const std::string limit = variable == nullptr ? "" : variable;
  const Features all = of_this_cpu();
  if (limit.empty() || limit == "amx_bf16") return all;
  if (limit == "avx512_bf16") return {all.avx512, all.avx512_bf16, false};
  if (limit == "avx512") return {all.avx512, false, false};
  if (limit == "portable") return {false, false, false};
  throw std::runtime_error(
      "lowrank_ext: LOWRANK_EXT_CPU must be amx_bf16, avx512_bf16, avx512 or portable, got '" +
      limit + "'");
}

const Features& features() {
  static const Features chosen = allowed();
  return chosen;
}

static std::string cpu_features() {
  std::string names;
  if (features().amx_bf16) names += "amx_bf16 ";
  if (features().avx512_bf16) names += "avx512_bf16 ";
  if (features().avx512) names += "avx512 ";
  return names + "portable";
}

}  // namespace lowrank_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(lowrank_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_features", TORCH_BOX(&lowrank_ext::cpu::cpu_features));
}
