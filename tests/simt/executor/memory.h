// What each byte of shared and global memory has seen, and which accesses may follow it.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "executor.h"

namespace simt {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr size_t kMaxSharedBytes = 227 << 10;

enum class AccessKind : uint8_t { kRead, kWrite, kAtomic };

struct Access {
  uint32_t block = 0;  // numbered over all launches from 1
  uint32_t clock = 0;  // of the thread
  uint32_t pc = 0;     // offset in the module
  uint16_t thread = 0;
  bool atomic = false;
  bool pending = false;  // a copy_async that its thread has not waited for
};

// Which threads have waited for which. A thread's clock counts the barriers it has passed.
class Order {
 public:
  void start_block(int num_threads);
  uint32_t clock(int thread) const { return clocks_[thread]; }
  void pass_block_barrier(int num_threads);
  void pass_warp_barrier(int warp, uint32_t lanes);
  // Does `earlier` happen before what `now.thread` does now?
  bool ordered(const Access& earlier, const Access& now) const;

 private:
  std::array<uint32_t, kMaxThreads> clocks_;
  std::array<uint32_t, kMaxThreads> at_block_barrier_;  // clocks after the last one
  // known_[warp][lane][other]: other's clock after the last __syncwarp whose news reached lane.
  std::array<std::array<std::array<uint32_t, kWarpSize>, kWarpSize>, kMaxWarps> known_;
};

// A range of addresses in 16-byte lines. A line's accesses are kept in pieces as small as the
// smallest that touched it, 16 bytes down to 1; a write of all 16 makes it whole again.
class Shadow {
 public:
  struct Cell {
    Access write;
    Access reads[2];
  };
  ~Shadow();
  void resize(size_t num_lines);
  template <class F>
  void for_each_cell(size_t first_byte, int bytes, F f);  // f(cell, first byte)
  // After a write of these bytes.
  void merge(size_t first_byte, int bytes);

 private:
  Cell& cell(size_t line, int byte) { return cells_[byte * num_lines_ + line]; }
  void split(size_t line, int halvings);
  void unmap();

  // Cells of byte 0 of all lines, then of byte 1, …: whole lines touch the first plane only. Pages
  // are zero until used; what earlier launches left is told by its block.
  Cell* cells_ = nullptr;
  uint8_t* halvings_ = nullptr;
  size_t num_lines_ = 0, mapped_lines_ = 0;
};

// Where an access fell.
struct Place {
  bool shared;
  int tensor;  // of the launch, where not shared
};

class Memory {
 public:
  Memory();
  unsigned char* dynamic_shared() { return dynamic_shared_; }
  void start_launch(const Launch& launch, bool record, uint32_t first_block);
  void start_block(int num_threads);
  Order& order() { return order_; }

  // All of these end the launch with a fault where the access is not allowed.
  Place access(uintptr_t address, int bytes, AccessKind kind, const Access& now);
  void require_shared(uintptr_t address, int bytes, const char* what, const Access& now);
  void start_copy(uintptr_t shared_address, int bytes, Access now);
  void finish_copy(uintptr_t shared_address, int bytes, const Access& now);
  // Constant tables and the host's stack, which holds the parameters: may be read, counts nothing.
  bool readable_only(uintptr_t address) const;

  int64_t unique_bytes_read(int tensor) const;

 private:
  struct Region {  // of global memory: tensors that overlap, merged
    uintptr_t begin, end;
    bool writable;
    size_t first_byte;  // in shadow_
  };
  struct Range {
    uintptr_t begin, end;
    bool contains(uintptr_t address, int bytes) const {
      return address >= begin && address < end && end - address >= static_cast<size_t>(bytes);
    }
  };

  bool in_shared(uintptr_t address, int bytes) const;
  int find_tensor(uintptr_t address, int bytes, bool write) const;
  void merge_regions();
  const Region& region_of(uintptr_t address) const;
  void check_cells(size_t first_byte, int bytes, AccessKind kind, const Access& now, bool shared);
  void check_read(Shadow::Cell& cell, size_t byte, const Access& now, bool shared);
  void check_write(Shadow::Cell& cell, size_t byte, const Access& now, bool shared);
  bool current(const Access& access, const Access& now, bool shared) const;
  void remember_read(Shadow::Cell& cell, const Access& now, bool shared) const;
  [[noreturn]] void fault_race(const Access& earlier, bool earlier_writes, size_t byte,
                               const Access& now, bool now_writes, bool shared);
  [[noreturn]] void fault_outside(uintptr_t address, int bytes, AccessKind kind, const Access& now);
  std::string global_text(size_t byte) const;
  std::string describe_nearest(uintptr_t address, int bytes) const;
  void mark_read(int tensor, uintptr_t address, int bytes);
  size_t shared_byte(uintptr_t address) const;

  unsigned char* dynamic_shared_;
  Range static_shared_{0, 0};
  std::vector<Range> constants_;
  Range host_stack_{0, 0};

  const Launch* launch_ = nullptr;
  bool record_ = true;
  uint32_t first_block_ = 1;
  mutable int last_tensor_ = 0;
  std::vector<Region> regions_;
  std::vector<std::vector<uint64_t>> bytes_read_;  // a bit per byte of each tensor
  Shadow shared_shadow_, global_shadow_;
  Order order_;
};

}  // namespace simt
