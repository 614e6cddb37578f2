// How elements are stored, multiplied and summed. A kernel takes one of these types as its template
// argument `Compute`; it never names a CUDA type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

namespace lowrank_ext::cuda {

// scalar_t is the element in memory, acc_t the accumulator. kTensorCores: products run on
// mma.sync with contraction steps of two 16-byte chunks; otherwise they are fused multiply-adds.
struct Bf16 {
  using scalar_t = __nv_bfloat16;
  using acc_t = float;
  static constexpr bool kTensorCores = true;
};
struct Fp16 {
  using scalar_t = __half;
  using acc_t = float;
  static constexpr bool kTensorCores = true;
};
struct Tf32 {  // float in memory, rounded to 10 mantissa bits as the products read it
  using scalar_t = float;
  using acc_t = float;
  static constexpr bool kTensorCores = true;
};
struct Fp32 {
  using scalar_t = float;
  using acc_t = float;
  static constexpr bool kTensorCores = false;
};
struct Fp64 {
  using scalar_t = double;
  using acc_t = double;
  static constexpr bool kTensorCores = false;
};

// Conversions round to nearest even.
template <class To, class From>
__host__ __device__ __forceinline__ To convert(From value) {
  return static_cast<To>(value);
}
template <>
__host__ __device__ __forceinline__ float convert(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__host__ __device__ __forceinline__ float convert(__half value) {
  return __half2float(value);
}
template <>
__host__ __device__ __forceinline__ __nv_bfloat16 convert(float value) {
  return __float2bfloat16(value);
}
template <>
__host__ __device__ __forceinline__ __half convert(float value) {
  return __float2half(value);
}

// e^value, to the last bit or two: the fast instruction is not.
__device__ __forceinline__ float exponential(float value) { return expf(value); }
__device__ __forceinline__ double exponential(double value) { return exp(value); }

}  // namespace lowrank_ext::cuda
