// The names of CUDA that kernels use, for g++ and the SIMT executor. In place of CUDA's header of this
// name, first on the include path.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../executor.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __restrict__ __restrict
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One block runs at a time, so its shared memory is a static variable: the executor takes all
// writable data of the module for shared memory.
#define __shared__ static

#define threadIdx (::simt::thread_idx())
#define blockIdx (::simt::block_idx())
#define blockDim (::simt::block_dim())
#define gridDim (::simt::grid_dim())
constexpr int warpSize = 32;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// ---- barriers -----------------------------------------------------------------------------------

#define __syncthreads() ::simt::sync_threads()
__forceinline__ void __syncwarp(unsigned mask = 0xFFFFFFFFu) { ::simt::sync_warp(mask); }

// ---- shuffles and votes -------------------------------------------------------------------------

namespace simt::detail {

template <class T>
struct ShuffleLane {
  T value;
  int from;  // lane
};

template <class T>
__forceinline__ T shuffle(const char* name, unsigned mask, T value, int from) {
  return lanes_collective<ShuffleLane<T>, T>(
      name, mask, ShuffleLane<T>{value, from},
      [](const ShuffleLane<T>(&all)[kWarpSize], T(&out)[kWarpSize]) {
        for (int lane = 0; lane < kWarpSize; ++lane) out[lane] = all[all[lane].from].value;
      });
}

__forceinline__ int this_lane() {
  const Dim3 &idx = thread_idx(), &dim = block_dim();
  return static_cast<int>((idx.x + dim.x * (idx.y + dim.y * idx.z)) % kWarpSize);
}

// The lanes of `mask` whose predicate holds.
__forceinline__ unsigned vote(const char* name, unsigned mask, bool predicate) {
  return lanes_collective<bool, unsigned>(
      name, mask, predicate, [](const bool (&all)[kWarpSize], unsigned (&out)[kWarpSize]) {
        unsigned lanes = 0;  // lanes outside `mask` are false
        for (int lane = 0; lane < kWarpSize; ++lane) lanes |= unsigned{all[lane]} << lane;
        for (unsigned& result : out) result = lanes;
      });
}

}  // namespace simt::detail

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int first = simt::detail::this_lane() / width * width;
  return simt::detail::shuffle("shfl_sync", mask, value, first + (from & (width - 1)));
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = simt::detail::this_lane(), in_group = lane % width;
  const bool inside = in_group >= static_cast<int>(delta);
  return simt::detail::shuffle("shfl_up_sync", mask, value, inside ? lane - int(delta) : lane);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = simt::detail::this_lane(), in_group = lane % width;
  const bool inside = in_group + static_cast<int>(delta) < width;
  return simt::detail::shuffle("shfl_down_sync", mask, value, inside ? lane + int(delta) : lane);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  // A partner in a later group keeps the lane's own value; one in an earlier group is read.
  const int lane = simt::detail::this_lane(), partner = lane ^ lane_mask;
  const bool inside = partner < (lane / width + 1) * width;
  return simt::detail::shuffle("shfl_xor_sync", mask, value, inside ? partner : lane);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, bool predicate) {
  return simt::detail::vote("ballot_sync", mask, predicate);
}
__forceinline__ bool __any_sync(unsigned mask, bool predicate) {
  return simt::detail::vote("any_sync", mask, predicate) != 0;
}
__forceinline__ bool __all_sync(unsigned mask, bool predicate) {
  return simt::detail::vote("all_sync", mask, !predicate) == 0;
}
// The lanes of `mask` with this lane's value.
__forceinline__ unsigned __match_any_sync(unsigned mask, int value) {
  return simt::lanes_collective<int, unsigned>(
      "match_any_sync", mask, value,
      [mask](const int (&all)[simt::kWarpSize], unsigned (&out)[simt::kWarpSize]) {
        for (int lane = 0; lane < simt::kWarpSize; ++lane) {
          out[lane] = 0;
          for (int other = 0; other < simt::kWarpSize; ++other)
            if (mask >> other & 1 && all[other] == all[lane]) out[lane] |= 1u << other;
        }
      });
}

// ---- atomics ------------------------------------------------------------------------------------

namespace simt::detail {

// Not instrumented, nor inlined where it would be: the access is reported here, as atomic.
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T atomic_update(T* address, F update,
                                                                 const void* caller) {
  atomic_access(address, sizeof(T), caller);
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace simt::detail

#define SIMT_ATOMIC(name, ...)                                                             \
  template <class T>                                                                       \
  __attribute__((noinline, no_sanitize("thread"))) T name(T* address,                      \
                                                          std::type_identity_t<T> value) { \
    return simt::detail::atomic_update(                                                    \
        address, [value](T old) { return static_cast<T>(__VA_ARGS__); },                   \
        __builtin_return_address(0));                                                      \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicMax, old < value ? value : old)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicExch, (void(old), value))
#undef SIMT_ATOMIC

template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* address,
                                                             std::type_identity_t<T> expected,
                                                             std::type_identity_t<T> value) {
  return simt::detail::atomic_update(
      address, [expected, value](T old) { return old == expected ? value : old; },
      __builtin_return_address(0));
}

// ---- bits and arithmetic ------------------------------------------------------------------------

template <class T>
__forceinline__ T __ldg(const T* address) {
  return *address;
}
template <class To, class From>
__forceinline__ To simt_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
__forceinline__ unsigned __float_as_uint(float value) { return simt_bits<unsigned>(value); }
__forceinline__ float __uint_as_float(unsigned bits) { return simt_bits<float>(bits); }
__forceinline__ int __float_as_int(float value) { return simt_bits<int>(value); }
__forceinline__ float __int_as_float(int bits) { return simt_bits<float>(bits); }
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
__forceinline__ int __popc(unsigned bits) { return __builtin_popcount(bits); }
__forceinline__ int __ffs(int bits) { return __builtin_ffs(bits); }
__forceinline__ int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
__forceinline__ float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
