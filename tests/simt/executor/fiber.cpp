#include "fiber.h"

#include <sys/mman.h>

#include <new>

namespace simt {

#ifdef SIMT_UCONTEXT

void Fiber::prepare(unsigned char* stack, size_t stack_bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = stack_bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_to(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }

#else

// Saves what a function must preserve, leaves the stack pointer in *save and takes up `load`.
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden simt_switch_stack
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, .-simt_switch_stack
)");

void Fiber::prepare(unsigned char* stack, size_t stack_bytes, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  // The return of simt_switch_stack enters entry() as a call would: the stack pointer is 8 below
  // a multiple of 16, and entry's return address is null.
  void** const top = reinterpret_cast<void**>(stack + stack_bytes);
  top[-2] = nullptr;
  top[-3] = nullptr;
  top[-4] = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) top[-5 - i] = nullptr;
  stack_pointer_ = top - 4 - kSavedRegisters;
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  simt_switch_stack(&from.stack_pointer_, to.stack_pointer_);
}

#endif

FiberStacks::FiberStacks(int count) : count_(count) {
  void* const memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<unsigned char*>(memory);
  for (int i = 0; i < count; ++i) mprotect(base_ + i * kStride, kGuardBytes, PROT_NONE);
}

bool FiberStacks::in_guard(const void* address) const {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - begin();
  return offset < bytes() && offset % kStride < kGuardBytes;
}

}  // namespace simt
