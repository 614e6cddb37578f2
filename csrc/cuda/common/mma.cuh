// Every instruction that C++ cannot name: asynchronous copies, ldmatrix and mma.sync. This is the
// only file with inline PTX. Under LOWRANK_EXT_SIMT each has a body for the CPU with the same
// meaning lane by lane (PTX ISA, "Matrix fragments for mma.m16n8k16", "cp.async").
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/compute_type.cuh"

#ifdef LOWRANK_EXT_SIMT
#include "executor.h"
#endif

namespace lowrank_ext::cuda {

constexpr int kWarpSize = 32;

// ---- memory -------------------------------------------------------------------------------------

// The same value, which the compiler no longer knows to be the same: what is computed from it
// (addresses in tiles: a few integer instructions) is computed here and now, not before a loop and
// kept in registers.
template <class Integer>
__device__ __forceinline__ Integer opaque(Integer value) {
  static_assert(sizeof(Integer) == 4);
#ifndef LOWRANK_EXT_SIMT
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// Base of the block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
#ifdef LOWRANK_EXT_SIMT
  return simt::dynamic_shared();
#else
  extern __shared__ __align__(128) unsigned char lowrank_ext_shared[];
  return lowrank_ext_shared;
#endif
}

#ifndef LOWRANK_EXT_SIMT
namespace detail {

template <int kBytes>
__device__ __forceinline__ void move_vector(void* to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
  } else {
    *static_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(from);
  }
}

}  // namespace detail
#endif

// One access of kBytes (4, 8 or 16), both sides aligned to it. `from` is global or shared memory,
// `into` the thread's own. store_vector the other way round, to shared memory.
template <int kBytes>
__device__ __forceinline__ void load_vector(void* into, const void* from) {
#ifdef LOWRANK_EXT_SIMT
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  simt::load(into, from, kBytes);
#else
  detail::move_vector<kBytes>(into, from);
#endif
}

template <int kBytes>
__device__ __forceinline__ void store_vector(void* to, const void* from) {
#ifdef LOWRANK_EXT_SIMT
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  simt::store(to, from, kBytes);
#else
  detail::move_vector<kBytes>(to, from);
#endif
}

// store_vector to global memory. In PTX: of a store written in C++ the compiler (nvcc 13.0, below
// sm_100) makes stores of single elements again where their branch for tails stores the same ones.
template <int kBytes>
__device__ __forceinline__ void store_global_vector(void* to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef LOWRANK_EXT_SIMT
  simt::store(to, from, kBytes);
#else
  const size_t address = __cvta_generic_to_global(to);
  if constexpr (kBytes == 16) {
    const uint4 words = *static_cast<const uint4*>(from);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(address), "r"(words.x),
                 "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
  } else if constexpr (kBytes == 8) {
    const uint2 words = *static_cast<const uint2*>(from);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};\n" ::"l"(address), "r"(words.x), "r"(words.y)
                 : "memory");
  } else {
    asm volatile("st.global.b32 [%0], %1;\n" ::"l"(address),
                 "r"(*static_cast<const uint32_t*>(from))
                 : "memory");
  }
#endif
}

#ifndef LOWRANK_EXT_SIMT
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Starts a copy of kBytes (4, 8 or 16, both sides aligned to it) from global to shared memory; of
// 16 past L1, as each byte is used once. Only valid_bytes are read, the rest becomes zero; with
// none, `global` is not looked at.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef LOWRANK_EXT_SIMT
  simt::copy_async(shared, global, kBytes, valid_bytes);
#else
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(valid_bytes)
                 : "memory");
  }
#endif
}

// Closes the group of copies that this thread has started since the last commit.
__device__ __forceinline__ void copy_async_commit() {
#ifdef LOWRANK_EXT_SIMT
  simt::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most kPendingGroups of this thread's groups are unfinished. The finished ones are
// then visible to this thread; to others after the next barrier.
template <int kPendingGroups>
__device__ __forceinline__ void copy_async_wait() {
#ifdef LOWRANK_EXT_SIMT
  simt::copy_async_wait(kPendingGroups);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPendingGroups) : "memory");
#endif
}

// ---- integers -----------------------------------------------------------------------------------

// 0xFFFF in the lower half where low is negative, in the upper half where high is. One prmt, whose
// selectors above 7 repeat the sign of a byte.
__device__ __forceinline__ uint32_t sign_masks(int low, int high) {
#ifdef LOWRANK_EXT_SIMT
  return (low < 0 ? 0x0000FFFFu : 0u) | (high < 0 ? 0xFFFF0000u : 0u);
#else
  uint32_t masks;
  asm("prmt.b32 %0, %1, %2, 0xFFBB;\n" : "=r"(masks) : "r"(low), "r"(high));
  return masks;
#endif
}

// ---- ldmatrix -----------------------------------------------------------------------------------

// Reads kMatrices (2 or 4) matrices of 8 rows of 16 bytes from shared memory. Lane i holds the
// address of row i % 8 of matrix i / 8 (with two matrices lanes 16 to 31 hold any valid address).
// Lane 4 g + t receives bytes 4 t to 4 t + 3 of row g of every matrix; with kTransposed (elements
// of 2 bytes) elements (2 t, g) and (2 t + 1, g).
template <bool kTransposed, int kMatrices>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[kMatrices], const void* row) {
  static_assert(kMatrices == 2 || kMatrices == 4);
#ifdef LOWRANK_EXT_SIMT
  unsigned char rows[32][16];
  simt::warp_shared_rows(row, 8 * kMatrices, rows);
  const int lane = simt::thread_idx().x % kWarpSize, g = lane / 4, t = lane % 4;
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    unsigned char bytes[4];
    for (int byte = 0; byte < 4; ++byte)
      bytes[byte] = kTransposed ? rows[8 * matrix + 2 * t + byte / 2][2 * g + byte % 2]
                                : rows[8 * matrix + g][4 * t + byte];
    std::memcpy(&registers[matrix], bytes, 4);
  }
#else
  const uint32_t address = shared_address(row);
  if constexpr (kMatrices == 4 && kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// ---- mma.sync -----------------------------------------------------------------------------------

// The bits of value rounded to TF32 (nearest, ties away from zero).
__device__ __forceinline__ uint32_t tf32_bits(float value) {
  uint32_t bits;
#ifdef LOWRANK_EXT_SIMT
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7F800000u) != 0x7F800000u) bits = (bits + 0x1000u) & ~0x1FFFu;
#else
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
#endif
  return bits;
}

#ifdef LOWRANK_EXT_SIMT

struct MmaOperands {
  uint32_t a[4];
  uint32_t b[2];
  float c[4];
};
struct MmaResult {
  float d[4];
};

// Element `half` of a register of two 16-bit elements, or the register itself as TF32.
template <class Compute>
inline float mma_element(uint32_t bits, int half) {
  if constexpr (sizeof(typename Compute::scalar_t) == 4) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  } else {
    const uint16_t part = static_cast<uint16_t>(bits >> (16 * half));
    typename Compute::scalar_t value;
    std::memcpy(&value, &part, 2);
    return convert<float>(value);
  }
}

// A[m, k] and B[k, n] of the warp's 16 x K by K x 8 product, from the fragments of all lanes.
template <class Compute>
inline float mma_a(const MmaOperands (&all)[32], int m, int k) {
  constexpr int kPerRegister = 4 / sizeof(typename Compute::scalar_t);
  constexpr int kHalfK = 4 * kPerRegister;
  const int lane = 4 * (m % 8) + k % kHalfK / kPerRegister;
  return mma_element<Compute>(all[lane].a[m / 8 + 2 * (k / kHalfK)], k % kPerRegister);
}
template <class Compute>
inline float mma_b(const MmaOperands (&all)[32], int k, int n) {
  constexpr int kPerRegister = 4 / sizeof(typename Compute::scalar_t);
  constexpr int kHalfK = 4 * kPerRegister;
  const int lane = 4 * n + k % kHalfK / kPerRegister;
  return mma_element<Compute>(all[lane].b[k / kHalfK], k % kPerRegister);
}

// One product of the warp; the products of a step are summed exactly, then rounded to fp32.
template <class Compute>
inline void mma_all_lanes(const MmaOperands (&all)[32], MmaResult (&out)[32]) {
  constexpr int kDepth = 32 / sizeof(typename Compute::scalar_t);
  double a[16][kDepth], b[8][kDepth];
  for (int k = 0; k < kDepth; ++k) {
    for (int m = 0; m < 16; ++m) a[m][k] = mma_a<Compute>(all, m, k);
    for (int n = 0; n < 8; ++n) b[n][k] = mma_b<Compute>(all, k, n);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int m = lane / 4 + 8 * (i / 2), n = 2 * (lane % 4) + i % 2;
      double sum = all[lane].c[i];
      for (int k = 0; k < kDepth; ++k) sum += a[m][k] * b[n][k];
      out[lane].d[i] = static_cast<float>(sum);
    }
  }
}

#endif

// c [16, 8] += a [16, K] b [K, 8], K = 16 for elements of 2 bytes, 8 for TF32. Lane 4 g + t owns
// c[g, 2 t], c[g, 2 t + 1], c[g + 8, 2 t], c[g + 8, 2 t + 1].
template <class Compute>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef LOWRANK_EXT_SIMT
  MmaOperands mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  std::memcpy(mine.c, c, sizeof(c));
  const auto result =
      simt::warp_collective<MmaOperands, MmaResult>("mma", mine, mma_all_lanes<Compute>);
  std::memcpy(c, result.d, sizeof(c));
  simt::count_mma();
#else
#define LOWRANK_EXT_MMA(shape_and_types)                                            \
  asm volatile("mma.sync.aligned." shape_and_types                                  \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<Compute, Bf16>) {
    LOWRANK_EXT_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<Compute, Fp16>) {
    LOWRANK_EXT_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<Compute, Tf32>);
    LOWRANK_EXT_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef LOWRANK_EXT_MMA
#endif
}

}  // namespace lowrank_ext::cuda
