// Memory for large results that come and go with every step, such as gradients.
//
// A result is written once into memory fresh from the system, whose first touch costs more than the
// result: a fault for each page, which the system first fills with zeros and a virtual machine
// first has to find. Measured on a gradient of 75 MB (7 ms of arithmetic): 12 ms in memory that is
// kept, 22 to 53 ms in fresh pages of 2 MiB, 27 to 71 in fresh pages of 4 KiB. C libraries give
// blocks of this size back at once, so the last two are kept here: a step takes two, for the
// gradients of W_enc and W_dec. What is kept is marked as free for the taking, for when memory runs
// short.
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include "kernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastsae {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kKept = 2;

struct Block {
  void* data;
  size_t bytes;
};

struct Pool {
  std::mutex mutex;
  Block kept[kKept] = {};
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool* const only = new Pool();
  return *only;
}

size_t whole_pages(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

void advise(const Block& block, bool in_use) {
#if defined(MADV_HUGEPAGE) && defined(MADV_FREE)
  // Advice only: a system that does not take it loses nothing but time.
  (void)madvise(block.data, block.bytes, in_use ? MADV_HUGEPAGE : MADV_FREE);
#else
  (void)block;
  (void)in_use;
#endif
}

}  // namespace

void* take_memory(size_t bytes) {
  const size_t rounded = whole_pages(bytes);
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    for (Block& block : pool().kept)
      if (block.data && block.bytes == rounded) return std::exchange(block, Block{}).data;
  }
  void* data = std::aligned_alloc(kHugePage, rounded);
  if (!data) throw std::bad_alloc();
  advise({data, rounded}, true);
  return data;
}

void give_memory(void* data, size_t bytes) {
  Block block = {data, whole_pages(bytes)};
  advise(block, false);
  {
    // The newest stands first; the oldest leaves.
    const std::lock_guard<std::mutex> lock(pool().mutex);
    for (Block& place : pool().kept) {
      std::swap(place, block);
      if (!block.data) return;
    }
  }
  std::free(block.data);
}

}  // namespace fastsae
