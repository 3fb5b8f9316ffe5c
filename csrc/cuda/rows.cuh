// Rows of float32, bfloat16 or float16 as float lanes: 16 bytes at a time where every row starts at
// a multiple of 16 bytes (kVector lanes of T), one element at a time elsewhere (kVector = 1).
#pragma once

#include <cstring>

#include "fastsae/abi.h"
#include "fastsae/launch.cuh"

namespace fastsae {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
// The widest block of these kernels: rows of up to 1,024 (float32) or 2,048 columns need one vector
// a thread. Two such blocks must fit a multiprocessor, 128 registers a thread: left to itself,
// ptxas takes 32 to 48, which it finds by loading the rows that should be in flight together one
// after the other. No GPU has run this yet.
constexpr int kMostThreads = 256;
constexpr int kFewestBlocks = 2;

template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline void assign(float& to, float value) { to = value; }
__device__ inline void assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }
__device__ inline void assign(__half& to, float value) { to = __float2half_rn(value); }

// kVector elements as they lie in memory.
template <int kVector, typename T>
struct Packet {
  uint4 bits;
};
template <typename T>
struct Packet<1, T> {
  T bits;
};

template <int kVector, typename T>
__device__ inline Packet<kVector, T> read(const T* from) {
  return *reinterpret_cast<const Packet<kVector, T>*>(from);
}

template <int kVector, typename T>
__device__ inline void widen(const Packet<kVector, T>& packet, float (&to)[kVector]) {
  T lanes[kVector];
  memcpy(static_cast<void*>(lanes), &packet, sizeof(lanes));
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = to_float(lanes[i]);
}

template <int kVector, typename T>
__device__ inline void load(const T* from, float (&to)[kVector]) {
  widen<kVector, T>(read<kVector>(from), to);
}

template <int kVector, typename T>
__device__ inline Packet<kVector, T> narrow(const float (&from)[kVector]) {
  T lanes[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) assign(lanes[i], from[i]);
  Packet<kVector, T> packet;
  memcpy(&packet, lanes, sizeof(lanes));
  return packet;
}

template <int kVector, typename T>
__device__ inline void store(T* to, const float (&from)[kVector]) {
  *reinterpret_cast<Packet<kVector, T>*>(to) = narrow<kVector, T>(from);
}

// As load and store, for what is not used again soon: it leaves the second-level cache first, so
// that the rows which many latents gather can stay.
template <int kVector, typename T>
__device__ inline void load_streaming(const T* from, float (&to)[kVector]) {
  if constexpr (kVector == 1) {
    load(from, to);
  } else {
    widen<kVector, T>({__ldcs(reinterpret_cast<const uint4*>(from))}, to);
  }
}

template <int kVector, typename T>
__device__ inline void store_streaming(T* to, const float (&from)[kVector]) {
  if constexpr (kVector == 1) {
    store(to, from);
  } else {
    __stcs(reinterpret_cast<uint4*>(to), narrow<kVector, T>(from).bits);
  }
}

// Biases and shifts, float32 whatever T is; nothing there is zeros.
template <int kVector>
__device__ inline void load_floats(const float* vector, int64_t column, float (&to)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = vector ? vector[column + i] : 0.0f;
}

// The sum over a block of each of kValues numbers, the same bits in every thread. Needs whole
// warps.
template <int kValues, typename T>
__device__ inline void block_sum(T (&values)[kValues]) {
  __shared__ T of_warp[kMostThreads / kWarp][kValues];
  for (int i = 0; i < kValues; ++i)
    for (int lane = kWarp / 2; lane > 0; lane /= 2)
      values[i] += __shfl_xor_sync(kWholeWarp, values[i], lane);
  __syncthreads();
  if (threadIdx.x % kWarp == 0)
    for (int i = 0; i < kValues; ++i) of_warp[threadIdx.x / kWarp][i] = values[i];
  __syncthreads();
  for (int i = 0; i < kValues; ++i) {
    values[i] = of_warp[0][i];
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp)
      values[i] += of_warp[warp][i];
  }
}

// Calls run(T{}) with the element type of `dtype`.
template <typename Run>
void with_type(DType dtype, Run run) {
  if (dtype == DType::float32)
    run(float{});
  else if (dtype == DType::bfloat16)
    run(__nv_bfloat16{});
  else
    run(__half{});
}

// Whether every row of a matrix can be read 16 bytes at a time.
inline bool is_wide(const void* data, int64_t stride, DType dtype, int64_t d) {
  const int64_t size = dtype == DType::float32 ? 4 : 2;
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0 &&
         d * size % 16 == 0;
}
inline bool is_wide(const Matrix& m, int64_t d) { return is_wide(m.data, m.stride, m.dtype, d); }
inline bool is_wide(const MutableMatrix& m, int64_t d) {
  return is_wide(m.data, m.stride, m.dtype, d);
}

// Threads of a block that shares a row of d elements: one for each kVector of them, in whole warps.
inline int threads_for(int64_t d, int vector) {
  const int64_t threads = (d / vector + kWarp - 1) / kWarp * kWarp;
  if (threads > kMostThreads) return kMostThreads;
  return threads < kWarp ? kWarp : static_cast<int>(threads);
}

}  // namespace cuda
}  // namespace fastsae
