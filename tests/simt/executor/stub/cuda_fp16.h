// __half for g++: IEEE binary16, converted in software.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __half {
  uint16_t bits;

  __half() = default;  // uninitialized, as on a GPU
  __forceinline__ __half(float value);
  __forceinline__ operator float() const;
};

__forceinline__ float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7FFFu;
  if (rest >= 0x7C00) return __uint_as_float(sign | 0x7F800000u | (rest & 0x3FF) << 13);
  if (rest >= 0x0400) return __uint_as_float(sign | ((rest << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(rest) * 0x1p-24f;  // exact
  return sign ? -subnormal : subnormal;
}

// To nearest even; a NaN becomes the one that CUDA gives.
__forceinline__ __half __float2half(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
  const unsigned magnitude = bits & 0x7FFFFFFFu;
  unsigned result;
  if (magnitude > 0x7F800000u) {
    result = 0x7FFF;
  } else if (magnitude >= 0x477FF000u) {  // 65520 and above round to infinity
    result = sign | 0x7C00u;
  } else if (magnitude >= 0x38800000u) {  // normal: drop 13 bits, move the exponent
    result = sign | ((magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
  } else {  // adding 0.5 leaves multiples of 2^-24 in the last bits, rounded by the sum
    result = sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000u);
  }
  __half half;
  half.bits = static_cast<uint16_t>(result);
  return half;
}
__forceinline__ __half __float2half_rn(float value) { return __float2half(value); }
__forceinline__ uint16_t __half_as_ushort(__half value) { return value.bits; }
__forceinline__ __half __ushort_as_half(uint16_t bits) {
  __half result;
  result.bits = bits;
  return result;
}

__forceinline__ __half::__half(float value) { *this = __float2half(value); }
__forceinline__ __half::operator float() const { return __half2float(*this); }
