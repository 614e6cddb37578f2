// Functions carry their instruction set as an attribute, so that one object file holds every
// variant and runs on any CPU; features.h says which variant may be called.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#define LOWRANK_EXT_X86 1
#define LOWRANK_EXT_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define LOWRANK_EXT_AVX512_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
#else
#define LOWRANK_EXT_X86 0
#endif

// Tiles need the system's leave, which features.cpp asks Linux for.
#if defined(__x86_64__) && defined(__linux__)
#define LOWRANK_EXT_AMX_KERNELS 1
#define LOWRANK_EXT_AMX                                                     \
  __attribute__((                                                           \
      target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c," \
             "amx-tile,amx-bf16")))
#else
#define LOWRANK_EXT_AMX_KERNELS 0
#endif
