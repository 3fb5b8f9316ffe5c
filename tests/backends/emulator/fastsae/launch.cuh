// Stands in for csrc/include/fastsae/launch.cuh: the same kernels, compiled as C++ and run on a
// CPU.
//
// Blocks run one after the other, the threads of a block as fibers: each runs until it waits for
// others (__syncthreads, __shfl_xor_sync), then the next one does. So a kernel's index arithmetic,
// barriers and use of shared memory are tested to the bit, and AddressSanitizer sees every access.
// A thread that runs alone until it waits shows a missing barrier as a wrong result, in one of the
// two orders (FASTSAE_EMULATOR_BACKWARDS=1); speed, and memory order finer than barriers, are
// beyond it. Shared memory starts as NaN in each block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastsae/call.h"

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#ifndef __restrict__
#define __restrict__ __restrict
#endif

namespace emulator {

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  long long arrived = 0;  // barriers of the block passed or waited at
  long long shuffled = 0;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned long long> exchange;
  std::vector<char> shared;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  dim3 block, threads;
  std::function<void()> body;
};

inline Block& block() {
  static Block one;
  return one;
}

inline void wait() {
  Block& b = block();
  swapcontext(&b.running->context, &b.scheduler);
}

inline void enter() {
  Block& b = block();
  b.body();
  b.running->done = true;
  swapcontext(&b.running->context, &b.scheduler);
}

// Waits until every fiber in [begin, end) has made as many arrivals of this kind.
inline void meet(long long Fiber::* arrivals, size_t begin, size_t end) {
  Block& b = block();
  const long long mine = ++(b.running->*arrivals);
  for (bool all = false; !all;) {
    all = true;
    for (size_t i = begin; i < end; ++i) {
      if (b.fibers[i].done && b.fibers[i].*arrivals < mine)
        throw std::logic_error("a thread ended that others wait for");
      all = all && b.fibers[i].*arrivals >= mine;
    }
    if (!all) wait();
  }
}

inline void run_block(unsigned index, int threads, size_t shared, std::function<void()> body) {
  Block& b = block();
  b.block = dim3(index);
  b.threads = dim3(threads);
  b.body = std::move(body);
  b.shared.assign(shared, static_cast<char>(0xff));
  b.exchange.assign(threads, 0);
  b.fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.thread = dim3(i, 0, 0);
    fiber.arrived = fiber.shuffled = 0;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  const char* backwards = std::getenv("FASTSAE_EMULATOR_BACKWARDS");
  for (bool left = true; left;) {
    left = false;
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = b.fibers[backwards ? threads - 1 - i : i];
      if (fiber.done) continue;
      left = true;
      b.running = &fiber;
      swapcontext(&b.scheduler, &fiber.context);
    }
  }
}

}  // namespace emulator

#define threadIdx (emulator::block().running->thread)
#define blockIdx (emulator::block().block)
#define blockDim (emulator::block().threads)

inline void __syncthreads() {
  emulator::meet(&emulator::Fiber::arrived, 0, emulator::block().fibers.size());
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  emulator::Block& b = emulator::block();
  const size_t me = threadIdx.x, first = me / emulator::kWarp * emulator::kWarp;
  std::memcpy(&b.exchange[me], &value, sizeof(T));
  emulator::meet(&emulator::Fiber::shuffled, first, first + emulator::kWarp);
  T other;
  std::memcpy(&other, &b.exchange[me ^ lane_mask], sizeof(T));
  emulator::meet(&emulator::Fiber::shuffled, first, first + emulator::kWarp);
  return other;
}

inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint4 __ldcs(const uint4* from) { return *from; }
inline void __stcs(uint4* to, uint4 value) { *to = value; }

namespace fastsae {
namespace cuda {

using std::fmaf;
using std::max;
using std::min;
using std::sqrt;

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::block().shared.data());
}

template <typename... Parameters, typename... Arguments>
void launch(const Call& call, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared, Arguments... arguments) {
  if (threads % emulator::kWarp || threads > 1024)
    throw std::runtime_error(describe(call) + ": a block of " + std::to_string(threads));
  for (int64_t i = 0; i < blocks; ++i)
    emulator::run_block(static_cast<unsigned>(i), threads, shared, [&] { kernel(arguments...); });
}

}  // namespace cuda
}  // namespace fastsae
