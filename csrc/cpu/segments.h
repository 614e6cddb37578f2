// The rows of a batch by adapter: one segment for each adapter that has rows, as runs of neighboring
// rows.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/multi_lowrank_add.h"

namespace lowrank_ext::cpu {

// Neighboring rows.
struct Run {
  int64_t first, count;
};

// Rows in ascending order.
struct RowList {
  std::vector<Run> runs;
  int64_t num_rows = 0;

  void append(int64_t row);
  RowList part(int64_t first, int64_t count) const;  // rows [first, first + count) of the list

  template <typename Body>  // body(run, position of its first row in the list)
  void for_each_run(const Body& body) const {
    int64_t position = 0;
    for (const Run& run : runs) {
      body(run, position);
      position += run.count;
    }
  }
};

// The rows of one adapter.
struct Segment {
  int64_t adapter, rank;
  double scaling;
  RowList rows;
};

struct Segments {
  std::vector<Segment> adapted;  // by their first rows
  RowList base;                  // rows with id -1, and rows of an adapter of rank 0

  bool is_one_adapter() const { return adapted.size() == 1 && base.num_rows == 0; }
};

// Raises where an id or a rank is out of range.
Segments segments_of(const char* op, const MultiBranchArgs& args);

}  // namespace lowrank_ext::cpu
