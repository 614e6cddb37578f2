// __nv_bfloat16 for g++: the upper half of a float.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;  // uninitialized, as on a GPU
  __forceinline__ __nv_bfloat16(float value);
  __forceinline__ operator float() const;
};

__forceinline__ float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(unsigned{value.bits} << 16);
}

// To nearest even; a NaN becomes the one that CUDA gives.
__forceinline__ __nv_bfloat16 __float2bfloat16(float value) {
  const unsigned bits = __float_as_uint(value);
  __nv_bfloat16 result;
  result.bits =
      value != value ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  return result;
}
__forceinline__ __nv_bfloat16 __float2bfloat16_rn(float value) { return __float2bfloat16(value); }
__forceinline__ uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
__forceinline__ __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) {
  __nv_bfloat16 result;
  result.bits = bits;
  return result;
}

__forceinline__ __nv_bfloat16::__nv_bfloat16(float value) { *this = __float2bfloat16(value); }
__forceinline__ __nv_bfloat16::operator float() const { return __bfloat162float(*this); }
