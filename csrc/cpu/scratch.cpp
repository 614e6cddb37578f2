#include "scratch.h"

#include <cstddef>
#include <memory>
#include <new>

namespace lowrank_ext::cpu {
namespace {

constexpr int64_t kBytes =
    4 << 20;  // per thread that calls ops; only what is used becomes resident
constexpr int64_t kMostBytes = 1 << 20;  // of one temporary: a larger one is worth an allocation
constexpr int64_t kAlignment = 64;

struct Buffer {
  std::unique_ptr<std::byte[]> bytes;
  int64_t used = 0;
  int depth = 0;
};

Buffer& buffer() {
  static thread_local Buffer of_this_thread;
  return of_this_thread;
}

}  // namespace

ScratchScope::ScratchScope() : used_before_(buffer().used) { ++buffer().depth; }

ScratchScope::~ScratchScope() {
  --buffer().depth;
  buffer().used = used_before_;
}

void* scratch_bytes(int64_t num_bytes) {
  Buffer& own = buffer();
  const int64_t padded = (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (own.depth == 0 || padded > kMostBytes || own.used + padded > kBytes) return nullptr;
  if (!own.bytes) own.bytes.reset(new std::byte[kBytes + kAlignment]);
  void* start = own.bytes.get();
  size_t space = kBytes + kAlignment;
  std::byte* aligned = static_cast<std::byte*>(std::align(kAlignment, kBytes, start, space));
  void* result = aligned + own.used;
  own.used += padded;
  return result;
}

}  // namespace lowrank_ext::cpu
