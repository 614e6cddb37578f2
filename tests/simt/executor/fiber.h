// Stacks, and switching between them. x86-64 has a few lines of assembly; elsewhere ucontext, whose
// swapcontext costs two system calls a switch.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif

#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  // Makes the next switch to this fiber call entry() at the top of `stack`; entry never returns.
  void prepare(unsigned char* stack, size_t stack_bytes, void (*entry)());
  // Goes on in `to`; returns when something switches back to `from`.
  static void switch_to(Fiber& from, Fiber& to);

 private:
#ifdef SIMT_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

// Stacks of equal size side by side in one range of addresses, each above a guard page. Memory is
// taken from the system when a stack is first used.
class FiberStacks {
 public:
  static constexpr size_t kStackBytes = 256 << 10;

  explicit FiberStacks(int count);
  unsigned char* stack(int i) const { return base_ + i * kStride + kGuardBytes; }
  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(base_); }
  size_t bytes() const { return count_ * kStride; }
  bool in_guard(const void* address) const;

 private:
  static constexpr size_t kGuardBytes = 64 << 10;
  static constexpr size_t kStride = kGuardBytes + kStackBytes;

  int count_;
  unsigned char* base_;
};

}  // namespace simt
