// How checks end a launch, and the words they use.
#pragma once

#include <cstdint>
#include <string>

#include "memory.h"

namespace simt {

// Ends the launch with "kernel: text"; the fiber is abandoned.
[[noreturn]] void fault(const std::string& text);
// "…; block (x, y, z) thread (x, y, z), file:line" of an access of this launch.
[[noreturn]] void fault_at(const std::string& text, const Access& access);

// "thread (x, y, z)", with its block where that is not `block`.
std::string thread_text(const Access& access);
std::string thread_and_block_text(const Access& access);

// The source lines of an offset in the module, calls inlined there from the outside in:
// "kernel.cuh:80 > tile.cuh:12"; the offset itself without addr2line.
std::string source_line(uint32_t pc);

}  // namespace simt
