// Which addresses the hooks in kernels' loads and stores pass over without a look.
#pragma once

#include <cstdint>

namespace simt {

// Closed: all of them; so it is outside launches, in the SIMT executor itself and on other threads.
// Open: the fibers' stacks, whose contents are registers on a GPU.
struct IgnoredRange {
  uintptr_t begin = 0;
  uintptr_t bytes = ~uintptr_t{0};
};
extern thread_local IgnoredRange ignored_range [[gnu::tls_model("initial-exec")]];

// Around the executor's own work on a fiber. A fault never comes back from it.
class Quiet {
 public:
  Quiet() : before_(ignored_range) { ignored_range = {}; }
  ~Quiet() { ignored_range = before_; }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;

 private:
  IgnoredRange before_;
};

// An access outside the ignored range. `aligned`: the address must be a multiple of the size.
void kernel_access(uintptr_t address, int bytes, bool write, bool atomic, bool aligned,
                   const void* caller);

// What UBSan found. Ends the launch; on the host, the program.
[[noreturn]] void undefined_behavior(const char* what, const char* file, unsigned line);

}  // namespace simt
