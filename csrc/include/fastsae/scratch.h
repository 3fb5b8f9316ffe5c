// Uninitialised memory of one thread, freed with its scope. Not std::vector: its members would be
// weak symbols compiled once per instruction set, of which the linker keeps an arbitrary one.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastsae {
namespace FASTSAE_ISA {

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(
            static_cast<T*>(std::malloc(static_cast<size_t>(count > 0 ? count : 1) * sizeof(T)))) {
    if (!data_) std::abort();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_;
};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
