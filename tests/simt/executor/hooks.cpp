// What g++ calls from kernels: before every load and store (-fsanitize=thread) and where UBSan has
// found undefined behavior. These are all the entry points that it emits; neither libtsan nor
// libubsan is linked.
#include "hooks.h"

#include <cstddef>
#include <cstdint>

namespace simt {
thread_local IgnoredRange ignored_range;
}

namespace {

[[gnu::always_inline]] inline void look(const void* pointer, size_t bytes, bool write, bool aligned,
                                        const void* caller, bool atomic = false) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const simt::IgnoredRange& ignored = simt::ignored_range;
  if (address - ignored.begin < ignored.bytes) return;
  simt::kernel_access(address, static_cast<int>(bytes), write, atomic, aligned, caller);
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

#define SIMT_HOOKS(bytes)                                                                          \
  void __tsan_read##bytes(void* at) { look(at, bytes, false, true, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* at) { look(at, bytes, true, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* at) {                                                    \
    look(at, bytes, false, false, __builtin_return_address(0));                                    \
  }                                                                                                \
  void __tsan_unaligned_write##bytes(void* at) {                                                   \
    look(at, bytes, true, false, __builtin_return_address(0));                                     \
  }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
#undef SIMT_HOOKS

void __tsan_read_range(void* at, size_t bytes) {
  look(at, bytes, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  look(at, bytes, true, false, __builtin_return_address(0));
}

// std::atomic and the __atomic builtins.
#define SIMT_ATOMIC(bits, T)                                                                   \
  T __tsan_atomic##bits##_load(const volatile T* at, int) {                                    \
    look(const_cast<T*>(at), bits / 8, false, true, __builtin_return_address(0), true);        \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                              \
  }                                                                                            \
  void __tsan_atomic##bits##_store(volatile T* at, T value, int) {                             \
    look(const_cast<T*>(at), bits / 8, true, true, __builtin_return_address(0), true);         \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                             \
  }                                                                                            \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* at, T* expected, T value, int, \
                                                    int) {                                     \
    look(const_cast<T*>(at), bits / 8, true, true, __builtin_return_address(0), true);         \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST,           \
                                       __ATOMIC_SEQ_CST);                                      \
  }                                                                                            \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* at, T* expected, T value, int,   \
                                                  int) {                                       \
    look(const_cast<T*>(at), bits / 8, true, true, __builtin_return_address(0), true);         \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST,           \
                                       __ATOMIC_SEQ_CST);                                      \
  }
#define SIMT_ATOMIC_UPDATE(bits, T, name, builtin)                                     \
  T __tsan_atomic##bits##_##name(volatile T* at, T value, int) {                       \
    look(const_cast<T*>(at), bits / 8, true, true, __builtin_return_address(0), true); \
    return builtin(at, value, __ATOMIC_SEQ_CST);                                       \
  }
#define SIMT_ATOMICS(bits, T)                                \
  SIMT_ATOMIC(bits, T)                                       \
  SIMT_ATOMIC_UPDATE(bits, T, exchange, __atomic_exchange_n) \
  SIMT_ATOMIC_UPDATE(bits, T, fetch_add, __atomic_fetch_add) \
  SIMT_ATOMIC_UPDATE(bits, T, fetch_sub, __atomic_fetch_sub) \
  SIMT_ATOMIC_UPDATE(bits, T, fetch_and, __atomic_fetch_and) \
  SIMT_ATOMIC_UPDATE(bits, T, fetch_or, __atomic_fetch_or)   \
  SIMT_ATOMIC_UPDATE(bits, T, fetch_xor, __atomic_fetch_xor) \
  SIMT_ATOMIC_UPDATE(bits, T, fetch_nand, __atomic_fetch_nand)
SIMT_ATOMICS(8, uint8_t)
SIMT_ATOMICS(16, uint16_t)
SIMT_ATOMICS(32, uint32_t)
SIMT_ATOMICS(64, uint64_t)
#undef SIMT_ATOMICS
#undef SIMT_ATOMIC_UPDATE
#undef SIMT_ATOMIC

void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

// UBSan's handlers take a description that begins with the place in the source.
struct UbsanPlace {
  const char* file;
  unsigned line, column;
};
#define SIMT_UBSAN(name, what)                                  \
  void __ubsan_handle_##name##_abort(const UbsanPlace* place) { \
    simt::undefined_behavior(what, place->file, place->line);   \
  }
SIMT_UBSAN(add_overflow, "signed integer overflow in +")
SIMT_UBSAN(sub_overflow, "signed integer overflow in -")
SIMT_UBSAN(mul_overflow, "signed integer overflow in *")
SIMT_UBSAN(negate_overflow, "signed integer overflow in unary -")
SIMT_UBSAN(divrem_overflow, "division by zero or overflow")
SIMT_UBSAN(shift_out_of_bounds, "shift by a wrong amount")
SIMT_UBSAN(out_of_bounds, "array index out of bounds")
#undef SIMT_UBSAN

}  // extern "C"
