// How a kernel is started: every launch is checked, and a failure names the operator, its sizes and
// the device. The kernels see CUDA through this header alone, so that tests can compile them with
// another of the same name that runs them on a CPU (tests/backends/emulator/fastsae/launch.cuh).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "fastsae/call.h"

namespace fastsae {
namespace cuda {

inline void check(const Call& call, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaDeviceProp device;
  const bool known = cudaGetDeviceProperties(&device, call.device) == cudaSuccess;
  throw std::runtime_error(describe(call) + " on device " + std::to_string(call.device) + " (" +
                           (known ? device.name : "unknown") + "): " + cudaGetErrorString(error));
}

// More than this much dynamic shared memory has to be asked for, kernel by kernel.
constexpr size_t kSharedForTheAsking = 48 * 1024;

template <typename... Parameters, typename... Arguments>
void launch(const Call& call, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared, Arguments... arguments) {
  if (blocks == 0) return;
  const auto start = [&](Parameters... parameters) {
    void* addresses[] = {&parameters...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                            dim3(static_cast<unsigned>(blocks)), dim3(threads), addresses, shared,
                            static_cast<cudaStream_t>(call.stream));
  };
  // This library's runtime is linked statically: the device that torch made current is known to the
  // driver, not to it.
  check(call, cudaSetDevice(call.device));
  if (shared > kSharedForTheAsking)
    check(call, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared)));
  check(call, start(arguments...));
  check(call, cudaGetLastError());
}

#ifdef __CUDACC__
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ uint4 fastsae_dynamic_shared[];
  return reinterpret_cast<T*>(fastsae_dynamic_shared);
}
#endif

}  // namespace cuda
}  // namespace fastsae
