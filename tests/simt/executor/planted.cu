// Each kernel is written as for a GPU, with one fault that the template flag kFixed repairs. i is
// the thread, lane its place in the warp. Kernels without a fault ignore the flag.
#include "planted.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>

namespace simt {
namespace {

using Args = PlantedArgs;

__device__ __forceinline__ float* shared_floats() {
  return reinterpret_cast<float*>(dynamic_shared());
}

// ---- bounds and alignment -----------------------------------------------------------------------

template <bool kFixed>
__global__ void past_the_end(const Args& a) {
  const unsigned i = threadIdx.x;
  a.y[i] = a.x[kFixed ? i : i + 1];
}

template <bool kFixed>
__global__ void before_the_start(const Args& a) {
  a.y[threadIdx.x] = a.x[int64_t{threadIdx.x} - (kFixed ? 0 : 2)];
}

template <bool kFixed>
__global__ void row_gap(const Args& a) {
  const unsigned i = threadIdx.x;
  if (i < a.x_rows) a.y[i] = a.x[i * a.x_stride + a.x_cols - (kFixed ? 1 : 0)];
}

template <bool kFixed>
__global__ void vector_into_row_gap(const Args& a) {
  float4 values;
  load(&values, a.x + a.x_cols / 4 * 4 - (kFixed ? 4 : 0), sizeof(values));
  a.y[threadIdx.x] = values.x;
}

template <bool kFixed>
__global__ void write_to_input(const Args& a) {
  float* const to = kFixed ? a.y : const_cast<float*>(a.x);
  to[threadIdx.x] = 1.0f;
}

template <bool kFixed>
__global__ void misaligned_load(const Args& a) {
  float4 values;
  load(&values, a.x + (kFixed ? 0 : 1), sizeof(values));
  a.y[threadIdx.x] = values.x;
}

template <bool kFixed>
__global__ void misaligned_pointer(const Args& a) {
  const auto* const from = reinterpret_cast<const float4*>(a.x + (kFixed ? 4 : 5));
  reinterpret_cast<float4*>(a.y)[threadIdx.x] = *from;
}

template <bool kFixed>
__global__ void past_dynamic_shared(const Args& a) {
  const unsigned i = threadIdx.x;
  shared_floats()[kFixed ? i : i + 1] = 1.0f;
  a.y[i] = 1.0f;
}

template <bool kFixed>
__global__ void overflowing_index(const Args& a) {
  // The product passes 2^31 before it is made 64 bits wide.
  const int rows = static_cast<int>(a.x_rows), large = 1 << 30;
  const int64_t index = kFixed ? int64_t{large} * rows : int64_t{large * rows};
  a.y[threadIdx.x] = a.x[index % a.x_cols];
}

__attribute__((noinline)) int deep(int depth, volatile int* seen) {
  volatile int frame[64];
  frame[depth % 64] = depth;
  *seen = depth;
  return depth == 0 ? 0 : deep(depth - 1, frame) + frame[depth % 64];
}

template <bool kFixed>
__global__ void stack_overflow(const Args& a) {
  volatile int seen;
  a.y[threadIdx.x] = static_cast<float>(deep(kFixed ? 10 : 1 << 20, &seen));
}

// ---- races and uninitialized memory -------------------------------------------------------------

template <bool kFixed>
__global__ void missing_syncthreads(const Args& a) {
  __shared__ float values[64];
  const unsigned i = threadIdx.x;
  values[i] = 0.0f;
  __syncthreads();
  values[i] = a.x[i];
  if (kFixed) __syncthreads();
  a.y[i] = values[63 - i];
}

template <bool kFixed>
__global__ void write_after_read(const Args& a) {
  __shared__ float values[64];
  const unsigned i = threadIdx.x;
  values[i] = a.x[i];
  __syncthreads();
  const float other = values[63 - i];
  if (kFixed) __syncthreads();
  values[i] = other;
  __syncthreads();
  a.y[i] = values[i];
}

template <bool kFixed>
__global__ void missing_syncwarp(const Args& a) {
  const unsigned i = threadIdx.x;
  shared_floats()[i] = 0.0f;
  __syncwarp();
  shared_floats()[i] = a.x[i];
  if (kFixed) __syncwarp();
  a.y[i] = shared_floats()[i ^ 1];
}

// A shuffle makes lanes meet, but orders no memory.
template <bool kFixed>
__global__ void shuffle_is_no_barrier(const Args& a) {
  const unsigned i = threadIdx.x;
  shared_floats()[i] = a.x[i];
  const float sum = __shfl_xor_sync(0xFFFFFFFFu, a.x[i], 1);
  if (kFixed) __syncwarp();
  a.y[i] = sum + shared_floats()[i ^ 1];
}

// __syncwarp orders a warp, not two.
template <bool kFixed>
__global__ void syncwarp_across_warps(const Args& a) {
  const unsigned i = threadIdx.x;
  shared_floats()[i] = a.x[i];
  __syncwarp();
  if (kFixed) __syncthreads();
  a.y[i] = shared_floats()[i ^ 32];
}

// Half a warp's barrier says nothing to the other half.
template <bool kFixed>
__global__ void partial_syncwarp(const Args& a) {
  const unsigned i = threadIdx.x, half = 0xFFFFu << (i / 16 * 16);
  shared_floats()[i] = a.x[i];
  __syncwarp(half);
  a.y[i] = shared_floats()[i ^ (kFixed ? 8 : 16)];
}

template <bool kFixed>
__global__ void race_between_blocks(const Args& a) {
  if (threadIdx.x == 0) a.y[kFixed ? blockIdx.x : 0] = 1.0f;
}

template <bool kFixed>
__global__ void read_of_another_block(const Args& a) {
  a.y[blockIdx.x] = 1.0f;
  a.y[gridDim.x + blockIdx.x] = a.y[kFixed ? blockIdx.x : gridDim.x - 1 - blockIdx.x];
}

template <bool kFixed>
__global__ void uninitialized_shared(const Args& a) {
  const unsigned i = threadIdx.x;
  if (kFixed || i != 5) shared_floats()[i] = a.x[i];
  a.y[i] = shared_floats()[i];
}

// Shared memory does not outlive its block.
template <bool kFixed>
__global__ void left_by_another_block(const Args& a) {
  __shared__ float values[32];
  if (kFixed || blockIdx.x == 0) values[threadIdx.x] = a.x[threadIdx.x];
  a.y[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x];
}

template <bool kFixed>
__global__ void plain_beside_atomic(const Args& a) {
  if (kFixed || threadIdx.x != 3) {
    atomicAdd(a.y, 1.0f);
  } else {
    a.y[0] = 1.0f;
  }
}

// ---- cp.async -----------------------------------------------------------------------------------

template <bool kFixed>
__global__ void early_copy_read(const Args& a) {
  const unsigned i = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    copy_async(dynamic_shared() + 16 * (2 * i + stage), a.x + 4 * (2 * i + stage), 16, 16);
    copy_async_commit();
  }
  copy_async_wait(1);
  const int stage = kFixed ? 0 : 1;
  a.y[i] = shared_floats()[4 * (2 * i + stage)];
  copy_async_wait(0);
}

template <bool kFixed>
__global__ void write_under_copy(const Args& a) {
  const unsigned i = threadIdx.x;
  copy_async(dynamic_shared() + 16 * i, a.x + 4 * i, 16, 16);
  copy_async_commit();
  if (kFixed) copy_async_wait(0);
  shared_floats()[4 * i] = 1.0f;
  copy_async_wait(0);
  a.y[i] = shared_floats()[4 * i];
}

// After the wait a copy is there for its own thread; for the others after the next barrier.
template <bool kFixed>
__global__ void copy_without_barrier(const Args& a) {
  const unsigned i = threadIdx.x;
  copy_async(dynamic_shared() + 16 * i, a.x + 4 * i, 16, 16);
  copy_async_commit();
  copy_async_wait(0);
  if (kFixed) __syncthreads();
  a.y[i] = shared_floats()[4 * (i ^ 1)];
}

template <bool kFixed>
__global__ void copy_never_waited_for(const Args& a) {
  const unsigned i = threadIdx.x;
  copy_async(dynamic_shared() + 16 * i, a.x + 4 * i, 16, 16);
  copy_async_commit();
  if (kFixed) copy_async_wait(0);
  a.y[i] = 1.0f;
}

// Without a commit there is no group that the wait could wait for.
template <bool kFixed>
__global__ void copy_never_committed(const Args& a) {
  const unsigned i = threadIdx.x;
  copy_async(dynamic_shared() + 16 * i, a.x + 4 * i, 16, 16);
  if (kFixed) copy_async_commit();
  copy_async_wait(0);
  a.y[i] = shared_floats()[4 * i];
}

template <bool kFixed>
__global__ void copy_past_the_end(const Args& a) {
  const unsigned i = threadIdx.x;
  const int inside = static_cast<int>(a.x_cols - 4 * i);
  copy_async(dynamic_shared() + 16 * i, a.x + 4 * i, 16, kFixed && inside < 4 ? 4 * inside : 16);
  copy_async_commit();
  copy_async_wait(0);
  for (int j = 0; j < 4; ++j) a.y[4 * i + j] = shared_floats()[4 * i + j];
}

// ---- barriers -----------------------------------------------------------------------------------

template <bool kFixed>
__global__ void divergent_barrier(const Args& a) {
  if (kFixed || threadIdx.x % 32 < 16) __syncthreads();
  a.y[threadIdx.x] = 1.0f;
}

template <bool kFixed>
__global__ void barrier_against_shuffle(const Args& a) {
  float value = 1.0f;
  if (!kFixed && threadIdx.x < 16) {
    __syncthreads();
  } else {
    value = __shfl_sync(0xFFFFFFFFu, value, 0);
  }
  a.y[threadIdx.x] = value;
}

template <bool kFixed>
__global__ void lanes_miss_a_shuffle(const Args& a) {
  float value = 1.0f;
  if (kFixed || threadIdx.x < 16) value = __shfl_sync(0xFFFFFFFFu, value, 0);
  a.y[threadIdx.x] = value;
}

template <bool kFixed>
__global__ void different_collectives(const Args& a) {
  float value = 1.0f;
  if (kFixed || threadIdx.x < 16) {
    value = __shfl_sync(0xFFFFFFFFu, value, 0);
  } else {
    value = static_cast<float>(__ballot_sync(0xFFFFFFFFu, true));
  }
  a.y[threadIdx.x] = value;
}

// A whole warp may leave before a barrier of the others.
template <bool kFixed>
__global__ void warp_leaves_early(const Args& a) {
  if (threadIdx.x < (kFixed ? 32 : 16)) return;
  __syncthreads();
  a.y[threadIdx.x] = 1.0f;
}

// ---- figures that are known ---------------------------------------------------------------------

// The column of a [32, 32] tile of floats: all in one bank. A 33rd column moves each row on by one.
template <bool kFixed>
__global__ void column_of_tile(const Args& a) {
  constexpr unsigned kStride = kFixed ? 33 : 32;
  const unsigned i = threadIdx.x;
  shared_floats()[i * kStride] = a.x[i];
  a.y[i] = shared_floats()[i * kStride];
}

// Rows of 16 bytes, one per lane, side by side or 128 bytes apart.
template <bool kFixed>
__global__ void vector_rows(const Args& a) {
  const unsigned i = threadIdx.x;
  float* const row = shared_floats() + i * (kFixed ? 4 : 32);
  float4 values{1.0f, 2.0f, 3.0f, 4.0f};
  store(row, &values, 16);
  load(&values, row, 16);
  float2 pair;
  load(&pair, row, 8);
  a.y[i] = values.w + pair.y;
}

template <bool kFixed>
__global__ void matrix_rows(const Args& a) {
  const unsigned i = threadIdx.x;
  float* const row = shared_floats() + i * (kFixed ? 4 : 32);
  for (int j = 0; j < 4; ++j) row[j] = static_cast<float>(i);
  __syncwarp();
  unsigned char rows[32][16];
  warp_shared_rows(row, 32, rows);
  float first;
  std::memcpy(&first, rows[31 - i], sizeof(first));
  a.y[i] = first;
}

// Neighboring lanes read neighbors, or elements one sector apart.
template <bool kFixed>
__global__ void strided_read(const Args& a) {
  const unsigned i = threadIdx.x;
  a.y[i] = a.x[kFixed ? i : 8 * i];
}

// 32 floats from the middle of a sector on: five sectors instead of four.
template <bool kFixed>
__global__ void straddling_read(const Args& a) {
  a.y[threadIdx.x] = a.x[threadIdx.x + (kFixed ? 0 : 4)];
}

// All lanes read one element, four times over.
template <bool kFixed>
__global__ void repeated_read(const Args& a) {
  float sum = 0.0f;
  for (int64_t j = 0; j < 4; ++j) sum += *static_cast<const volatile float*>(a.x + j % 1);
  a.y[threadIdx.x] = sum;
}

// Every lane takes its own number of turns: requests of ever fewer lanes.
template <bool kFixed>
__global__ void ragged_loop(const Args& a) {
  float sum = 0.0f;
  for (unsigned j = 0; j <= threadIdx.x % 32; ++j) sum += a.x[32 * j + threadIdx.x % 32];
  a.y[threadIdx.x] = sum;
}

// ---- kernels whose results are known ------------------------------------------------------------

// y[block] = sum of x[block, :], one element a thread.
template <bool kFixed>
__global__ void block_sum(const Args& a) {
  __shared__ float of_warp[32];
  const unsigned i = threadIdx.x, lane = i % 32;
  float sum = a.x[blockIdx.x * a.x_stride + i];
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (lane == 0) of_warp[i / 32] = sum;
  __syncthreads();
  if (i != 0) return;
  float total = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += of_warp[warp];
  a.y[blockIdx.x] = total;
}

// y = four shuffles and four votes of lane numbers, 32 values each.
template <bool kFixed>
__global__ void warp_functions(const Args& a) {
  const unsigned lane = threadIdx.x, all = 0xFFFFFFFFu;
  const auto put = [&](int row, double value) { a.y[32 * row + lane] = static_cast<float>(value); };
  put(0, __shfl_sync(all, lane, 5, 8));
  put(1, __shfl_up_sync(all, lane, 3, 16));
  put(2, __shfl_down_sync(all, double(lane), 3, 16));
  put(3, __shfl_xor_sync(all, lane, 9, 8));
  put(4, __ballot_sync(all, lane % 8 == 0));
  put(5, __any_sync(all, lane == 40));
  put(6, __match_any_sync(all, int(lane / 8 % 2)));
  put(7, __all_sync(0xFFFFu << lane / 16 * 16, lane < 16));
}

// The order in which threads take numbers is the schedule's.
template <bool kFixed>
__global__ void tickets(const Args& a) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  a.y[1 + i] = atomicAdd(a.y, 1.0f);
}

// Every block writes one element: the last one wins.
template <bool kFixed>
__global__ void last_block_wins(const Args& a) {
  if (threadIdx.x == 0) a.y[0] = static_cast<float>(blockIdx.x);
}

// y [2, n]: x rounded to bfloat16 and to half.
template <bool kFixed>
__global__ void conversions(const Args& a) {
  for (int64_t i = threadIdx.x; i < a.x_cols; i += blockDim.x) {
    a.y[i] = __bfloat162float(__float2bfloat16(a.x[i]));
    a.y[a.x_cols + i] = __half2float(__float2half(a.x[i]));
  }
}

template <bool kFixed>
__global__ void throws(const Args&) {
  if (!kFixed && threadIdx.x == 7) throw std::invalid_argument("thrown by a kernel");
}

// ---- table --------------------------------------------------------------------------------------

struct Pair {
  void (*faulty)(const Args&);
  void (*fixed)(const Args&);
};

const std::map<std::string, Pair>& table() {
  static const std::map<std::string, Pair> the_table{
#define SIMT_PLANTED(name)             \
  {                                    \
    #name, { name<false>, name<true> } \
  }
      SIMT_PLANTED(past_the_end),
      SIMT_PLANTED(before_the_start),
      SIMT_PLANTED(row_gap),
      SIMT_PLANTED(vector_into_row_gap),
      SIMT_PLANTED(write_to_input),
      SIMT_PLANTED(misaligned_load),
      SIMT_PLANTED(misaligned_pointer),
      SIMT_PLANTED(past_dynamic_shared),
      SIMT_PLANTED(overflowing_index),
      SIMT_PLANTED(stack_overflow),
      SIMT_PLANTED(missing_syncthreads),
      SIMT_PLANTED(write_after_read),
      SIMT_PLANTED(missing_syncwarp),
      SIMT_PLANTED(shuffle_is_no_barrier),
      SIMT_PLANTED(syncwarp_across_warps),
      SIMT_PLANTED(partial_syncwarp),
      SIMT_PLANTED(race_between_blocks),
      SIMT_PLANTED(read_of_another_block),
      SIMT_PLANTED(uninitialized_shared),
      SIMT_PLANTED(left_by_another_block),
      SIMT_PLANTED(plain_beside_atomic),
      SIMT_PLANTED(early_copy_read),
      SIMT_PLANTED(write_under_copy),
      SIMT_PLANTED(copy_without_barrier),
      SIMT_PLANTED(copy_never_waited_for),
      SIMT_PLANTED(copy_never_committed),
      SIMT_PLANTED(copy_past_the_end),
      SIMT_PLANTED(divergent_barrier),
      SIMT_PLANTED(barrier_against_shuffle),
      SIMT_PLANTED(lanes_miss_a_shuffle),
      SIMT_PLANTED(different_collectives),
      SIMT_PLANTED(warp_leaves_early),
      SIMT_PLANTED(column_of_tile),
      SIMT_PLANTED(vector_rows),
      SIMT_PLANTED(matrix_rows),
      SIMT_PLANTED(strided_read),
      SIMT_PLANTED(straddling_read),
      SIMT_PLANTED(repeated_read),
      SIMT_PLANTED(ragged_loop),
      SIMT_PLANTED(block_sum),
      SIMT_PLANTED(warp_functions),
      SIMT_PLANTED(tickets),
      SIMT_PLANTED(last_block_wins),
      SIMT_PLANTED(conversions),
      SIMT_PLANTED(throws),
#undef SIMT_PLANTED
  };
  return the_table;
}

}  // namespace

std::vector<std::string> planted_names() {
  std::vector<std::string> names;
  for (const auto& [name, pair] : table()) names.push_back(name);
  return names;
}

void run_planted(const std::string& name, bool fixed, const PlantedArgs& args) {
  const Pair& pair = table().at(name);
  void (*const kernel)(const Args&) = fixed ? pair.fixed : pair.faulty;
  const int64_t element = sizeof(float);
  const Launch launch{
      name.c_str(),
      {args.blocks, 1, 1},
      {args.threads, 1, 1},
      args.shared_bytes,
      {{"x", args.x, args.x_rows, args.x_cols * element, args.x_stride * element, false},
       {"y", args.y, 1, args.y_size * element, args.y_size * element, true}}};
  run(launch, [&] { kernel(args); });
}

}  // namespace simt
