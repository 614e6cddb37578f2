// What csrc/cuda/common computes from 64-bit indices, for Python: places in a matrix and masks.
#include "bind_arguments.h"
#include "bind_kernels.h"
#include "common/dropout.cuh"

namespace {

// Types of this file alone: what kernels instantiate too would come without the instrumentation.
struct Byte {
  unsigned char value;
};

template <class Bits>
struct Element {
  Bits bits = 1;
  Element() = default;
  explicit Element(float value) : bits(value != 0.0f) {}
};

int64_t matrix_offset(int64_t row, int64_t col, int64_t row_stride) {
  Byte first{};
  const Matrix<Byte> matrix{&first, row + 1, col + 1, row_stride, false};
  return reinterpret_cast<intptr_t>(matrix.at(row, col)) - reinterpret_cast<intptr_t>(&first);
}

template <class Bits>
py::list kept_by_chunks(const Dropout& dropout, uint64_t seed, int64_t row, int64_t first_col,
                        uint32_t expert) {
  constexpr int kSize = 16 / sizeof(Bits);
  py::list kept;
  for (int64_t col = first_col; col < first_col + 8; col += kSize) {
    Element<Bits> elements[kSize];
    drop(elements, dropout, seed, row, col, expert);
    for (const Element<Bits>& element : elements) kept.append(element.bits != 0);
  }
  return kept;
}

py::list kept(int element_bytes, uint32_t threshold, uint64_t seed, int64_t row, int64_t first_col,
              uint32_t expert) {
  const Dropout dropout{threshold, nullptr};
  if (element_bytes == 2) return kept_by_chunks<uint16_t>(dropout, seed, row, first_col, expert);
  if (element_bytes == 4) return kept_by_chunks<uint32_t>(dropout, seed, row, first_col, expert);
  if (element_bytes == 8) return kept_by_chunks<uint64_t>(dropout, seed, row, first_col, expert);
  const uint32_t dropped = dropped_bits(dropout, seed, row, first_col, expert);
  py::list result;
  for (int i = 0; i < 8; ++i) result.append((dropped >> i & 1) == 0);
  return result;
}

}  // namespace

void bind_common(py::module_& m) {
  m.def("matrix_offset", &matrix_offset, py::arg("row"), py::arg("col"), py::kw_only(),
        py::arg("row_stride"), "Elements from a matrix's first one to (row, col).");
  m.def("kept", &kept, py::arg("element_bytes"), py::kw_only(), py::arg("threshold"),
        py::arg("seed"), py::arg("row"), py::arg("first_col"), py::arg("expert") = 0,
        "Whether dropout keeps each of eight columns: as drop() of elements of 2, 4 or 8 bytes "
        "says, or dropped_bits for 0.");
}
