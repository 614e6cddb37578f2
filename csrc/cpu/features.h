// The instruction sets of this CPU, read once from cpuid; kernels choose their variant by them. The
// environment variable LOWRANK_EXT_CPU (amx_bf16, avx512_bf16, avx512, portable) limits them, for tests
// and comparisons.
#pragma once

namespace lowrank_ext::cpu {

struct Features {
  bool avx512;       // F, BW, VL, DQ, with AVX2, FMA and F16C
  bool avx512_bf16;  // the vendor's bf16 products run at full rate (AMX implies it)
  bool amx_bf16;     // tiles, which the system has given this process leave to use
};

const Features& features();

}  // namespace lowrank_ext::cpu
