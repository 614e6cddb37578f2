// What the kernels' interfaces (each family's kernels.h) are called with: references to matrices on
// the device, the type to compute in, dropout, the device. No torch header.
#pragma once

#include <cstdint>

#include "common/launch.h"

namespace lowrank_ext::cuda {

// How the elements of x are stored and multiplied. kTf32 and kFp32 both store float.
enum class ComputeType { kBf16, kFp16, kTf32, kFp32, kFp64 };

enum class ElementType { kBf16, kFp16, kFp32, kFp64 };

inline int64_t element_bytes(ElementType type) {
  return type == ElementType::kFp64 ? 8 : type == ElementType::kFp32 ? 4 : 2;
}

// A [num_rows, num_cols] matrix of dense rows on the device; a vector has one row. data is null
// where the argument is absent (or the output not asked for).
struct MatrixRef {
  void* data = nullptr;
  ElementType type = ElementType::kFp32;
  int64_t num_rows = 0, num_cols = 0;
  int64_t row_stride = 0;  // in elements; 0 repeats one row

  explicit operator bool() const { return data != nullptr; }
};

// A matrix for each group.
struct StackRef {
  MatrixRef first;  // group 0's
  int64_t num_groups = 0;
  int64_t group_stride = 0;  // in elements
};

struct DropoutArgs {
  uint32_t threshold = 0;         // of 65536: draws below it drop their element; 0 draws nothing
  double scale = 1.0;             // of what is kept
  const int64_t* seed = nullptr;  // one element, on the device
};

struct Device {
  int num_sms;
  Stream stream;
};

// Sums that are split over blocks and left as they are: part s of a [M, R] sum in rows [s M, (s +
// 1) M) of data [num_splits · M, R], rows row_stride elements apart, in the accumulator's type.
struct PartialSums {
  void* data = nullptr;
  int num_splits = 0;
  int64_t row_stride = 0;
};

// The splits and the memory that they take.
struct PartialSumsSize {
  int num_splits;
  int64_t row_stride, bytes;
};

}  // namespace lowrank_ext::cuda
