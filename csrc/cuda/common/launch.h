// Where kernels run: device, stream, launch. On a GPU through the CUDA runtime; with
// LOWRANK_EXT_SIMT on the CPU, in the SIMT executor (tests/simt). No other file calls either of the
// two. No torch header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef LOWRANK_EXT_SIMT
#include <vector>

#include "executor.h"
#else
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <utility>
#endif

namespace lowrank_ext::cuda {

struct LaunchShape {
  unsigned grid_x, grid_y, grid_z;  // a zero launches nothing
  unsigned threads;                 // of a block
  size_t shared_bytes;              // dynamic shared memory
};

inline void check_launch(const std::string& launcher, const LaunchShape& shape) {
  constexpr unsigned kMaxGridX = 0x7FFFFFFF, kMaxGridYZ = 65535, kMaxThreads = 1024;
  const auto check = [&](const char* what, unsigned value, unsigned limit) {
    if (value > limit)
      throw std::runtime_error(launcher + ": " + what + " must be at most " +
                               std::to_string(limit) + ", got " + std::to_string(value));
  };
  check("grid.x", shape.grid_x, kMaxGridX);
  check("grid.y", shape.grid_y, kMaxGridYZ);
  check("grid.z", shape.grid_z, kMaxGridYZ);
  check("block size", shape.threads, kMaxThreads);
}

inline bool launches_nothing(const LaunchShape& shape) {
  return shape.grid_x == 0 || shape.grid_y == 0 || shape.grid_z == 0;
}

#ifdef LOWRANK_EXT_SIMT

struct Stream {};

// Tests set it, so that plans which split their work run at the tests' small shapes.
inline int simt_num_sms = 4;

inline int num_sms(int) { return simt_num_sms; }
inline Stream current_stream(int) { return {}; }

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

// The memory that a kernel may touch, from its params.each_tensor(f): f(name, matrix), a matrix
// having data, num_rows, num_cols and row_stride.
template <class Params>
std::vector<simt::TensorSpan> tensor_spans(const Params& params) {
  std::vector<simt::TensorSpan> spans;
  params.each_tensor([&](const char* name, const auto& matrix) {
    using Element = std::remove_pointer_t<decltype(matrix.data)>;
    if (!matrix.data || matrix.num_rows == 0 || matrix.num_cols == 0) return;
    const int64_t element_size = sizeof(Element);
    const int64_t num_rows = matrix.row_stride == 0 ? 1 : matrix.num_rows;
    spans.push_back({name, matrix.data, num_rows, matrix.num_cols * element_size,
                     matrix.row_stride * element_size, !std::is_const_v<Element>});
  });
  return spans;
}

template <class Params>
void launch_kernel(const char* name, void (*kernel)(Params), LaunchShape shape,
                   const Params& params, Stream) {
  if (launches_nothing(shape)) return;
  check_launch(std::string("launch_") + name, shape);
  const simt::Launch launch{name,
                            {shape.grid_x, shape.grid_y, shape.grid_z},
                            {shape.threads, 1, 1},
                            shape.shared_bytes,
                            tensor_spans(params)};
  simt::run(launch, [&] { kernel(params); });
}

#else

using Stream = cudaStream_t;

// An error of the runtime stays pending until it is read: read here, since it is thrown.
inline void check_cuda(cudaError_t error, const std::string& where) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(where + ": " + cudaGetErrorString(error));
}

// A function of the CUDA half of torch. _C.so does not link that library, so that one file serves
// torch with and without CUDA; and a weak symbol would stay null, because torch is imported with
// RTLD_LOCAL: what it loaded for itself is found by name only.
template <class Function>
Function* torch_cuda_function(const char* name) {
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const function = library ? dlsym(library, name) : nullptr;
  if (!function)
    throw std::runtime_error(std::string("lowrank_ext: this torch has no ") + name +
                             " in libtorch_cuda.so; install a CUDA build of torch >= 2.11");
  return reinterpret_cast<Function*>(function);
}

inline int num_sms(int device) {
  static std::array<std::atomic<int>, 64> known{};
  const bool cached = static_cast<size_t>(device) < known.size();
  if (cached && known[device]) return known[device];
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "num_sms");
  if (cached) known[device] = count;
  return count;
}

// The stream that torch's operators run on at this moment.
inline Stream current_stream(int device) {
  static auto* const get =
      torch_cuda_function<int32_t(int32_t, void**)>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  if (get(device, &stream) != 0) throw std::runtime_error("lowrank_ext: no current CUDA stream");
  return static_cast<Stream>(stream);
}

// Makes `device` current, and the one before it again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check_cuda(cudaGetDevice(&previous_), "DeviceGuard");
    if (previous_ != device_) check_cuda(cudaSetDevice(device_), "DeviceGuard");
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

// More than 48 KiB of dynamic shared memory must be asked for once per kernel and device.
inline void allow_shared_memory(const std::string& launcher, const void* kernel, size_t bytes) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (bytes <= kAlwaysAllowed) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  check_cuda(cudaGetDevice(&device), launcher);
  const std::lock_guard lock(mutex);
  size_t& limit = allowed[{kernel, device}];
  if (bytes <= limit) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             launcher);
  limit = bytes;
}

template <class Params>
void launch_kernel(const char* name, void (*kernel)(Params), LaunchShape shape,
                   const Params& params, Stream stream) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4096,
                "a kernel's parameters are copied as bytes, at most 4 KiB of them");
  if (launches_nothing(shape)) return;
  const std::string launcher = std::string("launch_") + name;
  check_launch(launcher, shape);
  const void* const function = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(launcher, function, shape.shared_bytes);
  void* arguments[] = {const_cast<Params*>(&params)};
  check_cuda(cudaLaunchKernel(function, dim3(shape.grid_x, shape.grid_y, shape.grid_z),
                              dim3(shape.threads), arguments, shape.shared_bytes, stream),
             launcher);
}

#endif

}  // namespace lowrank_ext::cuda
