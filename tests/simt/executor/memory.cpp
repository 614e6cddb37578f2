#include "memory.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>

#include "fault.h"

namespace simt {

// ---- order --------------------------------------------------------------------------------------

void Order::start_block(int num_threads) {
  std::fill_n(clocks_.begin(), num_threads, 1);
  std::fill_n(at_block_barrier_.begin(), num_threads, 0);
  const int num_warps = (num_threads + kWarpSize - 1) / kWarpSize;
  std::memset(known_.data(), 0, num_warps * sizeof(known_[0]));
}

void Order::pass_block_barrier(int num_threads) {
  for (int thread = 0; thread < num_threads; ++thread)
    at_block_barrier_[thread] = ++clocks_[thread];
}

void Order::pass_warp_barrier(int warp, uint32_t lanes) {
  auto& known = known_[warp];
  std::array<uint32_t, kWarpSize> joined{};
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    known[lane][lane] = ++clocks_[warp * kWarpSize + lane];
    for (int other = 0; other < kWarpSize; ++other)
      joined[other] = std::max(joined[other], known[lane][other]);
  }
  for (uint32_t rest = lanes; rest; rest &= rest - 1) known[std::countr_zero(rest)] = joined;
}

bool Order::ordered(const Access& earlier, const Access& now) const {
  if (earlier.block != now.block) return false;
  if (earlier.thread == now.thread) return true;
  if (earlier.clock < at_block_barrier_[earlier.thread]) return true;
  const int warp = now.thread / kWarpSize;
  return earlier.thread / kWarpSize == warp &&
         earlier.clock < known_[warp][now.thread % kWarpSize][earlier.thread % kWarpSize];
}

// ---- shadow -------------------------------------------------------------------------------------

namespace {

constexpr int kLineBytes = 16;

void* map_zeros(size_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

}  // namespace

Shadow::~Shadow() { unmap(); }

void Shadow::unmap() {
  if (!mapped_lines_) return;
  munmap(cells_, mapped_lines_ * kLineBytes * sizeof(Cell));
  munmap(halvings_, mapped_lines_);
}

void Shadow::resize(size_t num_lines) {
  num_lines_ = num_lines;
  if (num_lines <= mapped_lines_) return;
  unmap();
  mapped_lines_ = num_lines;
  cells_ = static_cast<Cell*>(map_zeros(num_lines * kLineBytes * sizeof(Cell)));
  halvings_ = static_cast<uint8_t*>(map_zeros(num_lines));
}

void Shadow::split(size_t line, int halvings) {
  const int from_step = kLineBytes >> halvings_[line], step = kLineBytes >> halvings;
  for (int byte = 0; byte < kLineBytes; byte += step)
    if (byte % from_step != 0) cell(line, byte) = cell(line, byte / from_step * from_step);
  halvings_[line] = static_cast<uint8_t>(halvings);
}

template <class F>
void Shadow::for_each_cell(size_t first_byte, int bytes, F f) {
  const size_t end = first_byte + bytes;
  for (size_t at = first_byte; at < end;) {
    const size_t line = at / kLineBytes;
    const int low = at % kLineBytes;
    const int high = static_cast<int>(std::min(end - line * kLineBytes, size_t{kLineBytes}));
    const int halvings = 4 - std::countr_zero(static_cast<unsigned>(low | high | kLineBytes));
    if (halvings > halvings_[line]) split(line, halvings);
    const int step = kLineBytes >> halvings_[line];
    for (int byte = low; byte < high; byte += step) f(cell(line, byte), line * kLineBytes + byte);
    at = (line + 1) * kLineBytes;
  }
}

void Shadow::merge(size_t first_byte, int bytes) {
  if (first_byte % kLineBytes == 0 && bytes == kLineBytes) halvings_[first_byte / kLineBytes] = 0;
}

// ---- what a launch may touch --------------------------------------------------------------------

namespace {

struct Segments {
  uintptr_t module;
  uintptr_t writable_begin = 0, writable_end = 0;
  std::vector<std::pair<uintptr_t, uintptr_t>> constant;
};

// The segments of this module: .data and .bss are writable; .rodata, and what the loader has made
// read-only after relocation, constant.
int find_segments(dl_phdr_info* info, size_t, void* context) {
  auto& found = *static_cast<Segments*>(context);
  if (info->dlpi_addr != found.module) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr, end = begin + header.p_memsz;
    const bool writable = header.p_type == PT_LOAD && header.p_flags & PF_W;
    const bool constant = header.p_type == PT_LOAD && !writable;
    if (constant || header.p_type == PT_GNU_RELRO) found.constant.emplace_back(begin, end);
    if (writable) found.writable_begin = begin;
    if (writable) found.writable_end = end;
  }
  for (const auto& [begin, end] : found.constant)
    if (begin <= found.writable_begin && found.writable_begin < end) found.writable_begin = end;
  return 1;
}

thread_local std::pair<uintptr_t, uintptr_t> this_stack;

std::pair<uintptr_t, uintptr_t> host_stack() {
  if (this_stack.second) return this_stack;
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t bytes = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &begin, &bytes);
    pthread_attr_destroy(&attributes);
  }
  const auto first = reinterpret_cast<uintptr_t>(begin);
  return this_stack = {first, first + bytes};
}

int64_t extent(const TensorSpan& span) {
  return span.num_rows == 0 ? 0 : (span.num_rows - 1) * span.row_stride_bytes + span.row_bytes;
}

uintptr_t begin_of(const TensorSpan& span) { return reinterpret_cast<uintptr_t>(span.data); }

// The row that an offset from the span's start falls in or behind.
int64_t row_of(const TensorSpan& span, int64_t offset) {
  if (offset < 0 || span.num_rows <= 1 || span.row_stride_bytes <= 0) return 0;
  return std::min(offset / span.row_stride_bytes, span.num_rows - 1);
}

bool contains(const TensorSpan& span, uintptr_t address, int bytes) {
  const int64_t offset = static_cast<int64_t>(address - begin_of(span));
  if (offset < 0 || offset + bytes > extent(span)) return false;
  if (span.row_stride_bytes == span.row_bytes) return true;
  return offset - row_of(span, offset) * span.row_stride_bytes + bytes <= span.row_bytes;
}

const char* kind_text(AccessKind kind) {
  return kind == AccessKind::kRead ? "read" : kind == AccessKind::kWrite ? "write" : "atomic";
}

// Of an offset in the shadow of shared memory.
std::string shared_text(size_t byte) {
  if (byte < kMaxSharedBytes) return "byte " + std::to_string(byte) + " of dynamic shared memory";
  return "static shared memory";
}

std::string bytes_text(int64_t bytes) {
  return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

}  // namespace

Memory::Memory() {
  constexpr size_t kAlignment = 1024;
  const size_t bytes = (kMaxSharedBytes + kAlignment - 1) / kAlignment * kAlignment;
  dynamic_shared_ = static_cast<unsigned char*>(std::aligned_alloc(kAlignment, bytes));
  if (!dynamic_shared_) throw std::bad_alloc();

  Dl_info here;
  dladdr(reinterpret_cast<void*>(&find_segments), &here);
  Segments segments{reinterpret_cast<uintptr_t>(here.dli_fbase), 0, 0, {}};
  dl_iterate_phdr(find_segments, &segments);
  static_shared_ = {segments.writable_begin / kLineBytes * kLineBytes, segments.writable_end};
  for (const auto& [begin, end] : segments.constant) constants_.push_back({begin, end});
  const size_t static_bytes = static_shared_.end - static_shared_.begin;
  shared_shadow_.resize((bytes + static_bytes) / kLineBytes + 1);
}

void Memory::start_launch(const Launch& launch, bool record, uint32_t first_block) {
  launch_ = &launch;
  record_ = record;
  first_block_ = first_block;
  last_tensor_ = 0;
  const auto [begin, end] = host_stack();
  host_stack_ = {begin, end};
  merge_regions();
  if (!record) return;
  bytes_read_.resize(std::max(bytes_read_.size(), launch.tensors.size()));
  for (size_t i = 0; i < launch.tensors.size(); ++i)
    bytes_read_[i].assign(extent(launch.tensors[i]) / 64 + 1, 0);
}

void Memory::merge_regions() {
  regions_.clear();
  for (const TensorSpan& span : launch_->tensors)
    if (extent(span) > 0)
      regions_.push_back({begin_of(span), begin_of(span) + extent(span), span.writable, 0});
  std::sort(regions_.begin(), regions_.end(),
            [](const Region& a, const Region& b) { return a.begin < b.begin; });
  size_t kept = 0;
  for (const Region& region : regions_) {
    if (kept && region.begin < regions_[kept - 1].end) {
      Region& last = regions_[kept - 1];
      last.end = std::max(last.end, region.end);
      last.writable |= region.writable;
    } else {
      regions_[kept++] = region;
    }
  }
  regions_.resize(kept);
  // Only what this launch may write can race. Lines keep the alignment of their addresses.
  size_t num_bytes = 0;
  for (Region& region : regions_) {
    if (!region.writable) continue;
    region.first_byte = num_bytes + region.begin % kLineBytes;
    num_bytes += (region.end - region.begin / kLineBytes * kLineBytes + kLineBytes - 1) /
                 kLineBytes * kLineBytes;
  }
  if (record_) global_shadow_.resize(num_bytes / kLineBytes);
}

void Memory::start_block(int num_threads) {
  constexpr int kPoison = 0xFF;  // NaN in every type
  std::fill_n(dynamic_shared_, launch_->shared_bytes, kPoison);
  order_.start_block(num_threads);
}

const Memory::Region& Memory::region_of(uintptr_t address) const {
  const auto after =
      std::upper_bound(regions_.begin(), regions_.end(), address,
                       [](uintptr_t value, const Region& region) { return value < region.begin; });
  return *(after - 1);
}

bool Memory::readable_only(uintptr_t address) const {
  if (host_stack_.contains(address, 1)) return true;
  return std::any_of(constants_.begin(), constants_.end(),
                     [&](const Range& range) { return range.contains(address, 1); });
}

bool Memory::in_shared(uintptr_t address, int bytes) const {
  const auto first = reinterpret_cast<uintptr_t>(dynamic_shared_);
  return Range{first, first + launch_->shared_bytes}.contains(address, bytes) ||
         static_shared_.contains(address, bytes);
}

size_t Memory::shared_byte(uintptr_t address) const {
  const size_t offset = address - reinterpret_cast<uintptr_t>(dynamic_shared_);
  if (offset < kMaxSharedBytes) return offset;
  return kMaxSharedBytes + (address - static_shared_.begin);
}

int Memory::find_tensor(uintptr_t address, int bytes, bool write) const {
  const auto& tensors = launch_->tensors;
  const int count = static_cast<int>(tensors.size());
  const auto fits = [&](int i) {
    return (!write || tensors[i].writable) && contains(tensors[i], address, bytes);
  };
  if (last_tensor_ < count && fits(last_tensor_)) return last_tensor_;
  for (int i = 0; i < count; ++i)
    if (fits(i)) return last_tensor_ = i;
  return -1;
}

// ---- checks -------------------------------------------------------------------------------------

Place Memory::access(uintptr_t address, int bytes, AccessKind kind, const Access& now) {
  const bool write = kind != AccessKind::kRead;
  if (in_shared(address, bytes)) {
    if (record_) check_cells(shared_byte(address), bytes, kind, now, true);
    return {true, -1};
  }
  const int tensor = find_tensor(address, bytes, write);
  if (tensor < 0) fault_outside(address, bytes, kind, now);
  if (record_) {
    const Region& region = region_of(address);
    if (region.writable)
      check_cells(region.first_byte + (address - region.begin), bytes, kind, now, false);
    if (!write) mark_read(tensor, address, bytes);
  }
  return {false, tensor};
}

void Memory::require_shared(uintptr_t address, int bytes, const char* what, const Access& now) {
  if (!in_shared(address, bytes))
    fault_at(std::string(what) + " of " + bytes_text(bytes) + " is outside shared memory" +
                 describe_nearest(address, bytes),
             now);
}

void Memory::check_cells(size_t first_byte, int bytes, AccessKind kind, const Access& now,
                         bool shared) {
  Shadow& shadow = shared ? shared_shadow_ : global_shadow_;
  if (kind == AccessKind::kRead) {
    shadow.for_each_cell(first_byte, bytes, [&](Shadow::Cell& cell, size_t byte) {
      check_read(cell, byte, now, shared);
    });
    return;
  }
  if (kind == AccessKind::kAtomic && shared) {  // it reads, too
    shadow.for_each_cell(first_byte, bytes, [&](Shadow::Cell& cell, size_t byte) {
      check_read(cell, byte, now, shared);
    });
  }
  shadow.for_each_cell(first_byte, bytes, [&](Shadow::Cell& cell, size_t byte) {
    check_write(cell, byte, now, shared);
  });
  shadow.merge(first_byte, bytes);
}

// Is this an access of the running block (shared memory) or of this launch (global memory)?
bool Memory::current(const Access& access, const Access& now, bool shared) const {
  return shared ? access.block == now.block : access.block >= first_block_;
}

void Memory::check_read(Shadow::Cell& cell, size_t byte, const Access& now, bool shared) {
  const Access& write = cell.write;
  if (current(write, now, shared)) {
    if (write.pending)
      fault_at("early read of a cp.async copy: " + shared_text(byte) +
                   " is still being copied for " + thread_text(write) + ", " +
                   source_line(write.pc) + ", which has not waited for it",
               now);
    if (!(write.atomic && now.atomic) && !order_.ordered(write, now))
      fault_race(write, true, byte, now, now.atomic, shared);
  } else if (shared) {
    fault_at("read of uninitialized memory, which no thread has written yet: " + shared_text(byte),
             now);
  }
  remember_read(cell, now, shared);
}

// Keeps two reads of which any later write is unordered with one, if it is unordered with any read
// so far: reads that happened before this one are covered by it, and two of different blocks, or
// of different warps, cannot both be ordered by what orders only one block, or one warp.
void Memory::remember_read(Shadow::Cell& cell, const Access& now, bool shared) const {
  for (Access& read : cell.reads) {
    if (!current(read, now, shared) || order_.ordered(read, now)) {
      read = now;
      return;
    }
  }
  const auto& [first, second] = cell.reads;
  if (first.block != second.block) return;
  const bool same_warp = first.thread / kWarpSize == second.thread / kWarpSize;
  if (now.block != first.block || (same_warp && now.thread / kWarpSize != first.thread / kWarpSize))
    cell.reads[1] = now;
}

void Memory::check_write(Shadow::Cell& cell, size_t byte, const Access& now, bool shared) {
  const Access& write = cell.write;
  if (current(write, now, shared)) {
    if (write.pending)
      fault_at("write to the destination of a cp.async copy: " + shared_text(byte) +
                   " is still being copied for " + thread_text(write) + ", " +
                   source_line(write.pc) + ", which has not waited for it",
               now);
    if (!(write.atomic && now.atomic) && !order_.ordered(write, now))
      fault_race(write, true, byte, now, true, shared);
  }
  for (const Access& read : cell.reads)
    if (current(read, now, shared) && !(read.atomic && now.atomic) && !order_.ordered(read, now))
      fault_race(read, read.atomic, byte, now, true, shared);
  cell.write = now;
  cell.reads[0] = cell.reads[1] = {};
}

void Memory::start_copy(uintptr_t shared_address, int bytes, Access now) {
  if (!record_) return;
  now.pending = true;
  check_cells(shared_byte(shared_address), bytes, AccessKind::kWrite, now, true);
}

void Memory::finish_copy(uintptr_t shared_address, int bytes, const Access& now) {
  if (!record_) return;
  shared_shadow_.for_each_cell(shared_byte(shared_address), bytes,
                               [&](Shadow::Cell& cell, size_t) { cell.write = now; });
}

void Memory::mark_read(int tensor, uintptr_t address, int bytes) {
  const size_t first = address - begin_of(launch_->tensors[tensor]);
  auto& words = bytes_read_[tensor];
  for (size_t byte = first, end = first + bytes; byte < end;) {
    const size_t stop = std::min((byte / 64 + 1) * 64, end);
    const uint64_t ones = stop - byte == 64 ? ~0ull : (1ull << (stop - byte)) - 1;
    words[byte / 64] |= ones << byte % 64;
    byte = stop;
  }
}

int64_t Memory::unique_bytes_read(int tensor) const {
  int64_t count = 0;
  for (const uint64_t word : bytes_read_[tensor]) count += std::popcount(word);
  return count;
}

// ---- messages -----------------------------------------------------------------------------------

void Memory::fault_race(const Access& earlier, bool earlier_writes, size_t byte, const Access& now,
                        bool now_writes, bool shared) {
  const bool other_block = earlier.block != now.block;
  fault("race on " + (shared ? shared_text(byte) : global_text(byte)) + ": " +
        (earlier_writes ? "write" : "read") + " by " +
        (other_block ? thread_and_block_text(earlier) : thread_text(earlier)) + ", " +
        source_line(earlier.pc) + ", and " + (now_writes ? "write" : "read") + " by " +
        thread_and_block_text(now) + ", " + source_line(now.pc) + ", with no barrier between them");
}

// "y[row 3, byte 8]" of an offset in the shadow of global memory.
std::string Memory::global_text(size_t byte) const {
  const auto holds = [&](const Region& region) {
    return region.writable && byte >= region.first_byte &&
           byte - region.first_byte < region.end - region.begin;
  };
  const Region& region = *std::find_if(regions_.begin(), regions_.end(), holds);
  const uintptr_t address = region.begin + (byte - region.first_byte);
  const TensorSpan& span = launch_->tensors[find_tensor(address, 1, false)];
  const auto offset = static_cast<int64_t>(address - begin_of(span));
  const int64_t row = row_of(span, offset);
  return std::string(span.name) + "[row " + std::to_string(row) + ", byte " +
         std::to_string(offset - row * span.row_stride_bytes) + "]";
}

void Memory::fault_outside(uintptr_t address, int bytes, AccessKind kind, const Access& now) {
  const std::string what = std::string(kind_text(kind)) + " of " + bytes_text(bytes);
  const int read_only = find_tensor(address, bytes, false);
  if (kind != AccessKind::kRead && read_only >= 0)
    fault_at(what + " to read-only " + launch_->tensors[read_only].name, now);
  fault_at(what + " is outside every tensor and shared memory" + describe_nearest(address, bytes),
           now);
}

// ": 8 bytes past the end of x[row 3] (256 bytes)" of the tensor or shared memory within reach.
std::string Memory::describe_nearest(uintptr_t address, int bytes) const {
  constexpr int64_t kReach = 1 << 20;
  int64_t nearest = kReach;
  std::string text = ", near none of them";
  const auto consider = [&](int64_t before, int64_t past, const std::string& name) {
    const int64_t distance = std::max(before, past);
    if (distance <= 0 || distance >= nearest) return;
    nearest = distance;
    text = ": " + bytes_text(distance) +
           (before > 0 ? " before the start of " : " past the end of ") + name;
  };
  const auto end_of = [&](int64_t offset) { return offset + bytes; };
  for (const TensorSpan& span : launch_->tensors) {
    const int64_t offset = static_cast<int64_t>(address - begin_of(span));
    const int64_t row = row_of(span, offset), in_row = offset - row * span.row_stride_bytes;
    consider(-offset, end_of(in_row) - span.row_bytes,
             std::string(span.name) + "[row " + std::to_string(row) + "] (" +
                 bytes_text(span.row_bytes) + ")");
  }
  const auto offset = static_cast<int64_t>(address - reinterpret_cast<uintptr_t>(dynamic_shared_));
  const auto shared_bytes = static_cast<int64_t>(launch_->shared_bytes);
  consider(-offset, end_of(offset) - shared_bytes,
           "dynamic shared memory (" + bytes_text(shared_bytes) + ")");
  return text;
}

}  // namespace simt
