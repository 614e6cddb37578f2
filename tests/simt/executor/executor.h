// Runs CUDA kernels on the CPU, one fiber per thread, and checks every access to memory.
//
// A kernel is the same C++ as on a GPU, compiled by g++ with the headers in stub/ in place of
// CUDA's and with -fsanitize=thread, which puts a call before each load and store; those calls end
// in hooks.cpp. What C++ cannot name (vector accesses, cp.async, ldmatrix, mma) the kernel headers
// write as calls of the functions below. Blocks and warps run in an order that
// Options::schedule_seed permutes (executor.cpp); memory.cpp says which accesses are allowed,
// traffic.cpp what they cost.
//
// Templates and inline functions that kernels use must be compiled only with the instrumentation:
// the linker keeps one copy of each. So everything here that kernels do not instantiate themselves
// is a declaration.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

constexpr int kWarpSize = 32;

// ---- for the host -------------------------------------------------------------------------------

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// One tensor argument as rows: a touch of a gap between rows is out of bounds too. Spans may
// overlap (an output that is also an input).
struct TensorSpan {
  const char* name;
  const void* data;
  int64_t num_rows, row_bytes, row_stride_bytes;
  bool writable;
};

struct Launch {
  const char* kernel;
  Dim3 grid, block;
  size_t shared_bytes;  // dynamic
  std::vector<TensorSpan> tensors;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs thread_body once per thread of the grid; throws Error on the first fault, and what
// thread_body throws. thread_body may capture two pointers at most: more would lie on the heap,
// which kernels may not read.
void run(const Launch& launch, const std::function<void()>& thread_body);

struct Options {
  uint64_t schedule_seed = 0;
  // Off: bounds, alignment and barriers are checked, but no races, no uninitialized or early reads,
  // and no traffic is counted. For shapes too large for the rest.
  bool record = true;
};
Options& options();

struct TensorTraffic {
  std::string name;
  int64_t bytes = 0;  // size of the tensor
  int64_t bytes_read = 0, bytes_written = 0;
  int64_t unique_bytes_read = 0;  // each byte once
  int64_t read_requests = 0, write_requests = 0;
  int64_t sectors_read = 0, sectors_written = 0;
};

struct Report {
  std::string kernel;
  Dim3 grid, block;
  int64_t shared_bytes = 0;
  std::vector<TensorTraffic> tensors;
  // A wavefront serves each bank once; conflicts are those beyond what the width needs.
  int64_t shared_requests = 0, shared_wavefronts = 0, shared_conflicts = 0;
  int64_t barriers = 0;  // of all blocks
  int64_t mma = 0, shuffles = 0, atomics = 0;
};
std::vector<Report>& reports();  // one per launch that ended without a fault; clear() as you like

// ---- for kernels: who runs ----------------------------------------------------------------------

const Dim3& thread_idx();
const Dim3& block_idx();
const Dim3& block_dim();
const Dim3& grid_dim();

// ---- for kernels: barriers and collectives ------------------------------------------------------

void sync_threads();
void sync_warp(unsigned mask = 0xFFFFFFFFu);

namespace detail {
// compute(context, in, out): `in` and `out` are arrays of 32, by lane.
using Compute = void (*)(void* context, const void* in, void* out);
void meet(const char* name, unsigned mask, const void* mine, size_t in_bytes, void* result,
          size_t out_bytes, Compute compute, void* context);
// Checks and counts an atomic access by `caller`, the address after the call.
void atomic_access(const void* address, int bytes, const void* caller);
}  // namespace detail

// The lanes of `mask` meet; the last to arrive runs compute(all, out) once, `all` and `out` by
// lane. `name` is for error texts and counters ("mma", "shfl…").
template <class In, class Out, class F>
[[gnu::always_inline]] inline Out lanes_collective(
    const char* name, unsigned mask, const In& mine,
    F compute /* (const In (&)[32], Out (&)[32]) */) {
  Out result;
  const detail::Compute erased = [](void* context, const void* in, void* out) {
    (*static_cast<F*>(context))(*static_cast<const In(*)[kWarpSize]>(in),
                                *static_cast<Out(*)[kWarpSize]>(out));
  };
  detail::meet(name, mask, &mine, sizeof(In), &result, sizeof(Out), erased, &compute);
  return result;
}

template <class In, class Out, class F>
[[gnu::always_inline]] inline Out warp_collective(const char* name, const In& mine, F compute) {
  return lanes_collective<In, Out, F>(name, 0xFFFFFFFFu, mine, compute);
}

void count_mma();

// ---- for kernels: memory ------------------------------------------------------------------------

// Dynamic shared memory of the block, aligned to 1024 bytes.
unsigned char* dynamic_shared();

// 1, 2, 4, 8 or 16 bytes; `from` of load and `to` of store are global or shared memory, the other
// side is the thread's own.
void load(void* into, const void* from, int bytes);
void store(void* to, const void* from, int bytes);

// ldmatrix: lane i's `my_row` is a row of 16 bytes of shared memory, the first num_rows lanes'
// count; every lane gets all of them.
void warp_shared_rows(const void* my_row, int num_rows, unsigned char (&rows)[kWarpSize][16]);

// cp.async of 4, 8 or 16 bytes, of which valid_bytes are read and the rest become zero.
void copy_async(void* shared_dst, const void* global_src, int bytes, int valid_bytes);
void copy_async_commit();
void copy_async_wait(int pending_groups);

}  // namespace simt
