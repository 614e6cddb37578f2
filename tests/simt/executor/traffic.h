// Forms warp requests out of lanes' accesses and counts what they cost.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "memory.h"

namespace simt {

class Traffic {
 public:
  void start_launch(Report& report) { report_ = &report; }
  // `warp_lanes`: those that the warp has. A request is complete when each has taken part.
  void add(const Access& now, const Place& place, uintptr_t address, int bytes, AccessKind kind,
           uint32_t warp_lanes);
  // Lanes have met: requests that lack lanes stay so.
  void flush(int warp);
  // ldmatrix: one request, a phase for every 8 rows.
  void add_shared_rows(const uintptr_t (&rows)[kWarpSize], int num_rows);

 private:
  struct Request {
    uint32_t lanes = 0;
    int bytes = 0;
    bool write = false, shared = false;
    std::array<uintptr_t, kWarpSize> addresses;
    std::array<int16_t, kWarpSize> tensors;
  };
  // The requests of one warp from one place in the code.
  struct Site {
    std::array<uint32_t, kWarpSize> times{};  // accesses of each lane since the lanes last met
    uint32_t first = 0;                       // time of requests[0]
    std::vector<Request> requests;
    uint32_t num_open = 0;
    bool listed = false;  // in open_sites_
  };

  Site& site(int warp, uint64_t place_in_code);
  void count(const Request& request);
  void count_global(const Request& request);
  void count_shared(const Request& request);
  void count_phases(const Request& request, int lanes_per_phase);

  Report* report_ = nullptr;
  std::unordered_map<uint64_t, int> indices_;  // of places in the code
  std::array<std::vector<Site>, kMaxWarps> sites_;
  std::array<std::vector<int>, kMaxWarps> open_sites_;
  uint64_t last_place_ = ~0ull;
  int last_index_ = 0;
};

}  // namespace simt
