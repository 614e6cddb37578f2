// Memory of a call's temporaries. It is kept from call to call: finding a free block in a process that
// trains takes the allocator longer than small products take to run.
#pragma once

#include <cstdint>

namespace lowrank_ext::cpu {

// Inside of one, on the thread that made it, scratch_bytes gives memory, which ends with it.
class ScratchScope {
 public:
  ScratchScope();
  ~ScratchScope();
  ScratchScope(const ScratchScope&) = delete;
  ScratchScope& operator=(const ScratchScope&) = delete;

 private:
  int64_t used_before_;
};

// Uninitialized, aligned to a cache line; null outside of a scope, or where too little is left.
void* scratch_bytes(int64_t num_bytes);

}  // namespace lowrank_ext::cpu
