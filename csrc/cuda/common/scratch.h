// Where the parts of a call's scratch memory lie. A layout is a function that takes its parts one
// after the other; it runs twice, without memory to measure them, then to place them.
#pragma once

#include "common/arguments.h"

namespace lowrank_ext::cuda {

class Scratch {
 public:
  explicit Scratch(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  int64_t num_bytes() const { return num_bytes_; }

  // The next part; null while measuring. Parts are aligned to a cache line of the L2.
  void* bytes(int64_t num_bytes) {
    constexpr int64_t kAlignment = 128;
    char* const part = memory_ ? memory_ + num_bytes_ : nullptr;
    num_bytes_ += (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }

  template <class T>
  T* array(int64_t size) {
    return static_cast<T*>(bytes(size * static_cast<int64_t>(sizeof(T))));
  }

  // Rows start on 16 bytes, as the kernels' fast path wants them.
  MatrixRef matrix(ElementType type, int64_t num_rows, int64_t num_cols) {
    const int64_t chunk = 16 / element_bytes(type);
    const int64_t row_stride = (num_cols + chunk - 1) / chunk * chunk;
    void* const data = bytes(num_rows * row_stride * element_bytes(type));
    return {data, type, num_rows, num_cols, row_stride};
  }

  PartialSums partial_sums(const PartialSumsSize& size) {
    return {bytes(size.bytes), size.num_splits, size.row_stride};
  }

 private:
  char* memory_;
  int64_t num_bytes_ = 0;
};

}  // namespace lowrank_ext::cuda
