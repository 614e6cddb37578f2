#include "executor.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <utility>

#include "fault.h"
#include "fiber.h"
#include "hooks.h"
#include "memory.h"
#include "traffic.h"

namespace simt {

namespace {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr const char* kSyncThreads = "__syncthreads";
constexpr const char* kSyncWarp = "__syncwarp";

class Random {
 public:
  explicit Random(uint64_t seed) : state_((seed + 1) * 0x9E3779B97F4A7C15u) {}
  uint32_t below(uint32_t limit) {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545F4914F6CDD1Du >> 32) * limit >> 32);
  }
  int bit_of(uint32_t bits) {
    for (uint32_t skip = below(std::popcount(bits)); skip; --skip) bits &= bits - 1;
    return std::countr_zero(bits);
  }

 private:
  uint64_t state_;
};

// A copy_async between its issue and its thread's wait.
struct Copy {
  unsigned char* to;
  int bytes, valid_bytes;
  uint32_t pc;
  unsigned char data[16];
};

// What threadIdx and the others read. On the thread's stack, where kernels' reads pass unseen.
struct alignas(64) Indices {
  Dim3 thread, block, block_dim, grid_dim;
};

struct Thread {
  Fiber fiber;
  Indices* indices;
  bool exited;
  const char* waits_in;  // null while it can run
  uint32_t waits_at;     // pc
  void* result;          // of the collective that it waits in
  std::vector<Copy> copies;
  size_t first_copy;               // those before it are finished
  std::vector<size_t> group_ends;  // committed groups, as ends in copies
};

struct Meeting {
  const char* name;
  uint32_t lanes;
  uint32_t arrived = 0;
  size_t in_bytes, out_bytes;
  std::vector<unsigned char> in, out;
};

struct Warp {
  uint32_t lanes;  // that the block has
  uint32_t live;   // that have not exited
  uint32_t runnable;
  std::array<Meeting, kWarpSize> meetings;  // by the lowest lane: disjoint groups may meet at once
};

struct Machine {
  FiberStacks stacks{kMaxThreads};
  std::vector<Thread> threads{kMaxThreads};
  std::array<Warp, kMaxWarps> warps;
  Memory memory;
  Traffic traffic;
  Fiber scheduler;

  const Launch* launch = nullptr;
  const std::function<void()>* thread_body = nullptr;
  bool record = true;
  Report report;
  Random random{0};
  Dim3 block_idx;
  uint32_t block = 0;  // number of the running block over all launches
  int num_threads = 0, num_live = 0, num_at_barrier = 0;
  uint32_t runnable_warps = 0;
  int running = -1;           // thread, -1: the scheduler
  std::string fault_text;     // of the launch that a fault has ended
  std::exception_ptr thrown;  // by thread_body
  sigjmp_buf overflowed;      // where the handler of a stack overflow goes on
};

Machine& machine() {
  static Machine* const the_machine = new Machine;  // never destroyed: threads may outlive main
  return *the_machine;
}

uintptr_t module_base() {
  static const uintptr_t base = [] {
    Dl_info here;
    dladdr(reinterpret_cast<void*>(&machine), &here);
    return reinterpret_cast<uintptr_t>(here.dli_fbase);
  }();
  return base;
}

uint32_t offset_in_module(const void* caller) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(caller) - module_base());
}

Thread& running_thread() { return machine().threads[machine().running]; }
Warp& running_warp() { return machine().warps[machine().running / kWarpSize]; }
int running_lane() { return machine().running % kWarpSize; }

// An access of `thread` at this moment.
Access access_now(int thread, uint32_t pc, bool atomic = false) {
  Machine& m = machine();
  return {m.block, m.memory.order().clock(thread), pc, static_cast<uint16_t>(thread), atomic,
          false};
}

std::string dim_text(const Dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string lanes_text(uint32_t lanes) {
  char text[16];
  snprintf(text, sizeof(text), "0x%08x", lanes);
  return text;
}

Dim3 block_of(uint64_t i, const Dim3& grid) {
  return {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
          static_cast<unsigned>(i / grid.x / grid.y)};
}

// ---- who runs next ------------------------------------------------------------------------------

void set_runnable(int thread) {
  Machine& m = machine();
  m.threads[thread].waits_in = nullptr;
  m.warps[thread / kWarpSize].runnable |= 1u << thread % kWarpSize;
  m.runnable_warps |= 1u << thread / kWarpSize;
}

void set_waiting(int thread) {
  Machine& m = machine();
  Warp& warp = m.warps[thread / kWarpSize];
  warp.runnable &= ~(1u << thread % kWarpSize);
  if (!warp.runnable) m.runnable_warps &= ~(1u << thread / kWarpSize);
}

// Stays with a warp as long as it can run, since its stacks are in the cache, but not always.
int choose_thread(int last) {
  Machine& m = machine();
  if (!m.runnable_warps) return -1;
  constexpr uint32_t kOneIn = 64;  // switches
  int warp = last / kWarpSize;
  if (last < 0 || !m.warps[warp].runnable || m.random.below(kOneIn) == 0)
    warp = m.random.bit_of(m.runnable_warps);
  return warp * kWarpSize + m.random.bit_of(m.warps[warp].runnable);
}

// Lets another thread run, or the scheduler where none can; comes back when `this` one may go on.
void switch_away() {
  Machine& m = machine();
  const int before = m.running, next = choose_thread(before);
  if (next == before) return;
  m.running = next;
  Fiber::switch_to(m.threads[before].fiber, next < 0 ? m.scheduler : m.threads[next].fiber);
}

// ---- barriers and meetings ----------------------------------------------------------------------

void require_whole_warps_at_barrier() {
  Machine& m = machine();
  for (int w = 0; w * kWarpSize < m.num_threads; ++w) {
    const Warp& warp = m.warps[w];
    if (!warp.live || warp.live == warp.lanes) continue;
    const Thread& waiting = m.threads[w * kWarpSize + std::countr_zero(warp.live)];
    fault("divergent barrier: lanes " + lanes_text(warp.live) + " of warp " + std::to_string(w) +
          " of block " + dim_text(m.block_idx) + " wait in __syncthreads at " +
          source_line(waiting.waits_at) + ", its other lanes have exited");
  }
}

void open_barrier_if_complete() {
  Machine& m = machine();
  if (!m.num_live || m.num_at_barrier < m.num_live) return;
  require_whole_warps_at_barrier();
  m.num_at_barrier = 0;
  ++m.report.barriers;
  m.memory.order().pass_block_barrier(m.num_threads);
  for (int thread = 0; thread < m.num_threads; ++thread) {
    if (!m.threads[thread].exited) set_runnable(thread);
    if (m.record && thread % kWarpSize == 0) m.traffic.flush(thread / kWarpSize);
  }
}

// The last lane has arrived at a meeting of these lanes.
void end_meeting(Warp& warp, int first_thread, Meeting& meeting, detail::Compute compute,
                 void* context) {
  Machine& m = machine();
  if (compute) compute(context, meeting.in.data(), meeting.out.data());
  for (uint32_t rest = meeting.arrived; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    Thread& thread = m.threads[first_thread + lane];
    if (meeting.out_bytes)
      std::memcpy(thread.result, &meeting.out[lane * meeting.out_bytes], meeting.out_bytes);
    set_runnable(first_thread + lane);
  }
  if (m.record && meeting.arrived == warp.live) m.traffic.flush(first_thread / kWarpSize);
  if (std::strncmp(meeting.name, "shfl", 4) == 0) ++m.report.shuffles;
  if (meeting.name == kSyncWarp)
    m.memory.order().pass_warp_barrier(first_thread / kWarpSize, meeting.arrived);
  meeting.arrived = 0;
}

void require_same_meeting(const Meeting& meeting, const char* name, uint32_t lanes, size_t in_bytes,
                          size_t out_bytes, uint32_t pc) {
  if (std::strcmp(meeting.name, name) == 0 && meeting.lanes == lanes &&
      meeting.in_bytes == in_bytes && meeting.out_bytes == out_bytes)
    return;
  const int other = machine().running / kWarpSize * kWarpSize + std::countr_zero(meeting.arrived);
  const Thread& waiting = machine().threads[other];
  fault("lanes of a warp meet in different places: " + std::string(meeting.name) + " of lanes " +
        lanes_text(meeting.lanes) + " at " + source_line(waiting.waits_at) + ", and " + name +
        " of lanes " + lanes_text(lanes) + " at " + source_line(pc));
}

void start_meeting(Meeting& meeting, const char* name, uint32_t lanes, size_t in_bytes,
                   size_t out_bytes) {
  meeting.name = name;
  meeting.lanes = lanes;
  meeting.in_bytes = in_bytes;
  meeting.out_bytes = out_bytes;
  meeting.in.assign(kWarpSize * in_bytes, 0);
  meeting.out.resize(kWarpSize * out_bytes);
}

void meet_at(uint32_t pc, const char* name, uint32_t mask, const void* mine, size_t in_bytes,
             void* result, size_t out_bytes, detail::Compute compute, void* context) {
  Machine& m = machine();
  Warp& warp = running_warp();
  const int lane = running_lane();
  // Lanes that have exited count as arrived at __syncwarp, and nowhere else.
  const uint32_t lanes = mask & (name == kSyncWarp ? warp.live : warp.lanes);
  if (!(lanes >> lane & 1))
    fault(std::string(name) + " of lanes " + lanes_text(mask) + " without the calling lane, " +
          source_line(pc));
  Meeting& meeting = warp.meetings[std::countr_zero(lanes)];
  if (!meeting.arrived) start_meeting(meeting, name, lanes, in_bytes, out_bytes);
  require_same_meeting(meeting, name, lanes, in_bytes, out_bytes, pc);
  if (in_bytes) std::memcpy(&meeting.in[lane * in_bytes], mine, in_bytes);
  meeting.arrived |= 1u << lane;

  Thread& thread = running_thread();
  thread.waits_in = name;
  thread.waits_at = pc;
  thread.result = result;
  set_waiting(m.running);
  if (meeting.arrived == lanes) end_meeting(warp, m.running - lane, meeting, compute, context);
  switch_away();
}

// A lane has exited: those that wait for it in __syncwarp need wait no more.
void end_warp_barriers_without(int thread) {
  Machine& m = machine();
  const int w = thread / kWarpSize;
  Warp& warp = m.warps[w];
  const uint32_t lane = 1u << thread % kWarpSize;
  for (Meeting& meeting : warp.meetings) {
    if (!meeting.arrived || meeting.name != kSyncWarp || !(meeting.lanes & lane)) continue;
    meeting.lanes &= ~lane;
    if (meeting.arrived == meeting.lanes)
      end_meeting(warp, w * kWarpSize, meeting, nullptr, nullptr);
  }
}

// ---- a thread's life ----------------------------------------------------------------------------

void require_copies_waited_for(const Thread& thread) {
  for (size_t i = thread.first_copy; i < thread.copies.size(); ++i)
    if (thread.copies[i].valid_bytes > 0)
      fault_at("cp.async never waited for before the thread's end",
               access_now(machine().running, thread.copies[i].pc));
}

void exit_thread() {
  Machine& m = machine();
  Thread& thread = running_thread();
  require_copies_waited_for(thread);
  thread.exited = true;
  set_waiting(m.running);
  Warp& warp = running_warp();
  warp.live &= ~(1u << running_lane());
  if (m.record && !warp.live) m.traffic.flush(m.running / kWarpSize);
  --m.num_live;
  end_warp_barriers_without(m.running);
  open_barrier_if_complete();
}

[[noreturn]] void abandon_fibers() {
  Machine& m = machine();
  ignored_range = {};
  Fiber& mine = m.threads[m.running].fiber;
  m.running = -1;
  Fiber::switch_to(mine, m.scheduler);
  __builtin_unreachable();
}

void run_thread() {
  Machine& m = machine();
  ignored_range = {m.stacks.begin(), m.stacks.bytes()};
  try {
    (*m.thread_body)();
  } catch (...) {
    m.thrown = std::current_exception();
  }
  ignored_range = {};
  if (m.thrown) abandon_fibers();
  exit_thread();
  switch_away();
  __builtin_unreachable();
}

// ---- a block, a launch --------------------------------------------------------------------------

void start_thread(int i) {
  Machine& m = machine();
  const Dim3& size = m.launch->block;
  Thread& thread = m.threads[i];
  constexpr size_t kUsable = FiberStacks::kStackBytes - sizeof(Indices);
  unsigned char* const stack = m.stacks.stack(i);
  thread.fiber.prepare(stack, kUsable, run_thread);
  thread.indices =
      new (stack + kUsable) Indices{block_of(i, size), m.block_idx, size, m.launch->grid};
  thread.exited = false;
  thread.copies.clear();
  thread.first_copy = 0;
  thread.group_ends.clear();
  set_runnable(i);
}

void start_block(const Dim3& block_idx) {
  Machine& m = machine();
  m.block_idx = block_idx;
  ++m.block;
  m.num_live = m.num_threads;
  m.num_at_barrier = 0;
  m.runnable_warps = 0;
  m.memory.start_block(m.num_threads);
  for (int w = 0; w * kWarpSize < m.num_threads; ++w) {
    Warp& warp = m.warps[w];
    const int rest = m.num_threads - w * kWarpSize;
    warp.lanes = warp.live = rest < kWarpSize ? (1u << rest) - 1 : kAllLanes;
    warp.runnable = 0;
    for (Meeting& meeting : warp.meetings) meeting.arrived = 0;
  }
  for (int i = 0; i < m.num_threads; ++i) start_thread(i);
}

// "32 threads in __syncthreads at a.cuh:10, the first (0, 0, 0); …"
std::string waiting_text() {
  Machine& m = machine();
  std::vector<std::pair<int, int>> groups;  // first thread, count
  for (int i = 0; i < m.num_threads; ++i) {
    if (m.threads[i].exited) continue;
    const auto same = [&](const std::pair<int, int>& group) {
      const Thread &a = m.threads[group.first], &b = m.threads[i];
      return a.waits_in == b.waits_in && a.waits_at == b.waits_at;
    };
    const auto found = std::find_if(groups.begin(), groups.end(), same);
    if (found == groups.end()) {
      groups.emplace_back(i, 1);
    } else {
      ++found->second;
    }
  }
  std::string text;
  for (const auto& [first, count] : groups)
    text += std::to_string(count) + " in " + m.threads[first].waits_in + " at " +
            source_line(m.threads[first].waits_at) + ", the first thread " +
            dim_text(m.threads[first].indices->thread) + "; ";
  return text + std::to_string(m.num_threads - m.num_live) + " have exited";
}

bool some_warp_is_split_at_barrier() {
  Machine& m = machine();
  for (int w = 0; w * kWarpSize < m.num_threads; ++w) {
    int at_barrier = 0;
    for (int i = w * kWarpSize; i < std::min(m.num_threads, (w + 1) * kWarpSize); ++i)
      at_barrier += !m.threads[i].exited && m.threads[i].waits_in == kSyncThreads;
    if (at_barrier && at_barrier != std::popcount(m.warps[w].lanes)) return true;
  }
  return false;
}

// Comes back when every thread has exited or the launch has ended otherwise.
void run_block() {
  Machine& m = machine();
  m.running = choose_thread(-1);
  Fiber::switch_to(m.scheduler, m.threads[m.running].fiber);
  if (!m.fault_text.empty() || m.thrown || !m.num_live) return;
  m.fault_text = std::string(m.launch->kernel) + ": " +
                 (some_warp_is_split_at_barrier() ? "divergent barrier" : "deadlock") +
                 " in block " + dim_text(m.block_idx) + ", threads wait: " + waiting_text();
}

void run_blocks() {
  Machine& m = machine();
  const Dim3& grid = m.launch->grid;
  std::vector<uint32_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (uint32_t i = 0; i < order.size(); ++i) {
    const uint32_t other = m.random.below(i + 1);
    order[i] = order[other];
    order[other] = i;
  }
  for (const uint32_t i : order) {
    start_block(block_of(i, grid));
    run_block();
    if (!m.fault_text.empty() || m.thrown) return;
  }
}

void check_launch(const Launch& launch) {
  const auto require = [&](bool holds, const std::string& text) {
    if (!holds) throw Error(std::string(launch.kernel) + ": " + text);
  };
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  require(threads >= 1 && threads <= kMaxThreads,
          "a block must have 1 to 1024 threads, got " + std::to_string(threads));
  require(blocks >= 1 && blocks <= kAllLanes,
          "a grid must have 1 to 2^32 - 1 blocks, got " + std::to_string(blocks));
  require(launch.shared_bytes <= kMaxSharedBytes,
          "dynamic shared memory must be at most 232448 bytes, got " +
              std::to_string(launch.shared_bytes));
}

Report new_report(const Launch& launch) {
  Report report;
  report.kernel = launch.kernel;
  report.grid = launch.grid;
  report.block = launch.block;
  report.shared_bytes = static_cast<int64_t>(launch.shared_bytes);
  for (const TensorSpan& span : launch.tensors) {
    TensorTraffic tensor;
    tensor.name = span.name;
    tensor.bytes = span.num_rows * span.row_bytes;
    report.tensors.push_back(tensor);
  }
  return report;
}

void finish_report() {
  Machine& m = machine();
  if (m.record)
    for (size_t i = 0; i < m.report.tensors.size(); ++i)
      m.report.tensors[i].unique_bytes_read = m.memory.unique_bytes_read(static_cast<int>(i));
  reports().push_back(std::move(m.report));
}

// ---- stack overflow -----------------------------------------------------------------------------

// While a launch runs, a touch of a guard page is a fault like any other. Other crashes go the way
// they went before.
class OverflowHandler {
 public:
  OverflowHandler() {
    stack_t stack{};
    stack.ss_sp = signal_stack_;
    stack.ss_size = sizeof(signal_stack_);
    sigaltstack(&stack, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &action_before_);
  }
  ~OverflowHandler() {
    sigaction(SIGSEGV, &action_before_, nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  static void handle(int, siginfo_t* info, void*) {
    Machine& m = machine();
    if (m.running >= 0 && m.stacks.in_guard(info->si_addr)) siglongjmp(m.overflowed, 1);
    sigaction(SIGSEGV, &action_before_, nullptr);  // crashes again, for whoever handled it before
  }

  alignas(16) static inline unsigned char signal_stack_[64 << 10];
  static inline struct sigaction action_before_;
  stack_t stack_before_;
};

}  // namespace

// ---- faults -------------------------------------------------------------------------------------

std::string thread_text(const Access& access) {
  return "thread " + dim_text(block_of(access.thread, machine().launch->block));
}

std::string thread_and_block_text(const Access& access) {
  const Machine& m = machine();
  // The order of blocks is random, so only the running one's place in the grid is known.
  return (access.block == m.block ? "block " + dim_text(m.block_idx) : "another block's") + " " +
         thread_text(access);
}

void fault(const std::string& text) {
  Machine& m = machine();
  m.fault_text = std::string(m.launch->kernel) + ": " + text;
  abandon_fibers();
}

void fault_at(const std::string& text, const Access& access) {
  fault(text + "; " + thread_and_block_text(access) + ", " + source_line(access.pc));
}

void undefined_behavior(const char* what, const char* file, unsigned line) {
  const std::string text = std::string(what) + " at " + file + ":" + std::to_string(line);
  if (machine().running < 0) {
    fprintf(stderr, "%s\n", text.c_str());
    std::abort();
  }
  const Quiet quiet;
  fault(text + "; " + thread_and_block_text(access_now(machine().running, 0)));
}

// ---- for the host -------------------------------------------------------------------------------

Options& options() {
  static Options the_options;
  return the_options;
}

std::vector<Report>& reports() {
  static std::vector<Report> the_reports;
  return the_reports;
}

void run(const Launch& launch, const std::function<void()>& thread_body) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard lock(one_launch_at_a_time);
  check_launch(launch);
  Machine& m = machine();
  m.launch = &launch;
  m.thread_body = &thread_body;
  m.record = options().record;
  m.report = new_report(launch);
  m.random = Random(options().schedule_seed);
  m.num_threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  m.fault_text.clear();
  m.thrown = nullptr;
  m.memory.start_launch(launch, m.record, m.block + 1);
  m.traffic.start_launch(m.report);

  const OverflowHandler handler;
  if (sigsetjmp(m.overflowed, 1) == 0) {
    run_blocks();
  } else {
    ignored_range = {};
    m.fault_text = std::string(launch.kernel) + ": stack overflow; " +
                   thread_and_block_text(access_now(m.running, 0));
  }
  m.running = -1;
  for (int warp = 0; warp < kMaxWarps; ++warp) m.traffic.flush(warp);
  if (m.thrown) std::rethrow_exception(std::exchange(m.thrown, nullptr));
  if (!m.fault_text.empty()) throw Error(m.fault_text);
  finish_report();
}

// ---- for kernels --------------------------------------------------------------------------------

const Dim3& thread_idx() { return running_thread().indices->thread; }
const Dim3& block_idx() { return running_thread().indices->block; }
const Dim3& block_dim() { return running_thread().indices->block_dim; }
const Dim3& grid_dim() { return running_thread().indices->grid_dim; }

void sync_threads() {
  const Quiet quiet;
  Machine& m = machine();
  Thread& thread = running_thread();
  thread.waits_in = kSyncThreads;
  thread.waits_at = offset_in_module(__builtin_return_address(0));
  set_waiting(m.running);
  ++m.num_at_barrier;
  open_barrier_if_complete();
  switch_away();
}

void sync_warp(unsigned mask) {
  const Quiet quiet;
  meet_at(offset_in_module(__builtin_return_address(0)), kSyncWarp, mask, nullptr, 0, nullptr, 0,
          nullptr, nullptr);
}

void detail::meet(const char* name, unsigned mask, const void* mine, size_t in_bytes, void* result,
                  size_t out_bytes, Compute compute, void* context) {
  const Quiet quiet;
  meet_at(offset_in_module(__builtin_return_address(0)), name, mask, mine, in_bytes, result,
          out_bytes, compute, context);
}

void count_mma() {
  if (running_lane() == 0) ++machine().report.mma;
}

unsigned char* dynamic_shared() { return machine().memory.dynamic_shared(); }

namespace {

void require_aligned(uintptr_t address, int bytes, const char* what, const Access& now) {
  if (address % bytes != 0)
    fault_at("misaligned " + std::string(what) + " of " + std::to_string(bytes) +
                 " bytes: the address is " + std::to_string(address % bytes) + " past a multiple",
             now);
}

// One access of at most 16 bytes, checked and counted.
void access(uintptr_t address, int bytes, AccessKind kind, const Access& now) {
  Machine& m = machine();
  const Place place = m.memory.access(address, bytes, kind, now);
  if (m.record)
    m.traffic.add(now, place, address, bytes, kind, m.warps[now.thread / kWarpSize].lanes);
}

}  // namespace

void kernel_access(uintptr_t address, int bytes, bool write, bool atomic, bool aligned,
                   const void* caller) {
  const Quiet quiet;
  Machine& m = machine();
  if (!write && m.memory.readable_only(address)) return;
  const Access now = access_now(m.running, offset_in_module(caller), atomic);
  if (aligned) require_aligned(address, bytes, write ? "write" : "read", now);
  const AccessKind kind = !write   ? AccessKind::kRead
                          : atomic ? AccessKind::kAtomic
                                   : AccessKind::kWrite;
  constexpr int kWidest = 16;
  for (int done = 0; done < bytes; done += kWidest)
    access(address + done, std::min(bytes - done, kWidest), kind, now);
}

void detail::atomic_access(const void* address, int bytes, const void* caller) {
  kernel_access(reinterpret_cast<uintptr_t>(address), bytes, true, true, true, caller);
}

void load(void* into, const void* from, int bytes) {
  kernel_access(reinterpret_cast<uintptr_t>(from), bytes, false, false, true,
                __builtin_return_address(0));
  std::memcpy(into, from, bytes);
}

void store(void* to, const void* from, int bytes) {
  kernel_access(reinterpret_cast<uintptr_t>(to), bytes, true, false, true,
                __builtin_return_address(0));
  std::memcpy(to, from, bytes);
}

void warp_shared_rows(const void* my_row, int num_rows, unsigned char (&rows)[kWarpSize][16]) {
  const Quiet quiet;
  struct Gather {
    int first_thread, num_rows;
    uint32_t pc;
  } gather{machine().running / kWarpSize * kWarpSize, num_rows,
           offset_in_module(__builtin_return_address(0))};
  constexpr int kRowBytes = 16;
  using Rows = unsigned char[kWarpSize][kRowBytes];
  const auto read_rows = [](void* context, const void* in, void* out) {
    const Gather& about = *static_cast<const Gather*>(context);
    const auto& addresses = *static_cast<const uintptr_t (*)[kWarpSize]>(in);
    Machine& m = machine();
    for (int lane = 0; lane < about.num_rows; ++lane) {
      const Access now = access_now(about.first_thread + lane, about.pc);
      require_aligned(addresses[lane], kRowBytes, "ldmatrix row", now);
      m.memory.require_shared(addresses[lane], kRowBytes, "ldmatrix row", now);
      m.memory.access(addresses[lane], kRowBytes, AccessKind::kRead, now);
      std::memcpy((*static_cast<Rows*>(out))[lane], reinterpret_cast<void*>(addresses[lane]),
                  kRowBytes);
    }
    for (int lane = 1; lane < kWarpSize; ++lane)
      std::memcpy(static_cast<Rows*>(out)[lane], out, sizeof(Rows));
    if (m.record) m.traffic.add_shared_rows(addresses, about.num_rows);
  };
  const auto mine = reinterpret_cast<uintptr_t>(my_row);
  meet_at(gather.pc, "ldmatrix", kAllLanes, &mine, sizeof(mine), rows, sizeof(rows), read_rows,
          &gather);
}

void copy_async(void* shared_dst, const void* global_src, int bytes, int valid_bytes) {
  const Quiet quiet;
  Machine& m = machine();
  const uint32_t pc = offset_in_module(__builtin_return_address(0));
  const Access now = access_now(m.running, pc);
  const auto to = reinterpret_cast<uintptr_t>(shared_dst);
  const auto from = reinterpret_cast<uintptr_t>(global_src);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || valid_bytes < 0 || valid_bytes > bytes)
    fault_at("cp.async copies 4, 8 or 16 bytes, at most all of them read, got " +
                 std::to_string(bytes) + " and " + std::to_string(valid_bytes),
             now);
  require_aligned(to, bytes, "cp.async destination", now);
  m.memory.require_shared(to, bytes, "cp.async destination", now);

  Copy copy{static_cast<unsigned char*>(shared_dst), bytes, valid_bytes, pc, {}};
  if (valid_bytes > 0) {
    require_aligned(from, bytes, "cp.async source", now);
    access(from, valid_bytes, AccessKind::kRead, now);
    std::memcpy(copy.data, global_src, valid_bytes);
  }
  m.memory.start_copy(to, bytes, now);
  if (m.record)
    m.traffic.add(now, {true, -1}, to, bytes, AccessKind::kWrite,
                  m.warps[m.running / kWarpSize].lanes);
  constexpr int kPoison = 0xFF;
  std::memset(shared_dst, kPoison, bytes);
  running_thread().copies.push_back(copy);
}

void copy_async_commit() {
  const Quiet quiet;
  Thread& thread = running_thread();
  thread.group_ends.push_back(thread.copies.size());
}

void copy_async_wait(int pending_groups) {
  const Quiet quiet;
  Machine& m = machine();
  Thread& thread = running_thread();
  const auto num_groups = static_cast<int>(thread.group_ends.size());
  if (num_groups <= pending_groups) return;
  const int num_done = num_groups - pending_groups;
  const size_t end = thread.group_ends[num_done - 1];
  for (; thread.first_copy < end; ++thread.first_copy) {
    const Copy& copy = thread.copies[thread.first_copy];
    std::memcpy(copy.to, copy.data, copy.bytes);
    m.memory.finish_copy(reinterpret_cast<uintptr_t>(copy.to), copy.bytes,
                         access_now(m.running, copy.pc));
  }
  thread.group_ends.erase(thread.group_ends.begin(), thread.group_ends.begin() + num_done);
  if (thread.first_copy == thread.copies.size() && thread.group_ends.empty()) {
    thread.copies.clear();
    thread.first_copy = 0;
  }
}

}  // namespace simt
