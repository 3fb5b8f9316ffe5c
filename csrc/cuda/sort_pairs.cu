// CUB's radix sort, in a file of its own because it takes most of the time of a build. Stable and
// deterministic; one pass over keys and payload for each 8 bits of the key.
#include <cub/device/device_radix_sort.cuh>

#include "fastsae/launch.cuh"
#include "sort_pairs.h"

namespace fastsae {
namespace cuda {

void sort_pairs(const Call& call, void* scratch, size_t& scratch_bytes, const uint32_t* keys,
                uint32_t* sorted_keys, const int32_t* payload, int32_t* sorted_payload,
                int64_t count, int bits) {
  check(call, cudaSetDevice(call.device));
  check(call, cub::DeviceRadixSort::SortPairs(scratch, scratch_bytes, keys, sorted_keys, payload,
                                              sorted_payload, static_cast<int32_t>(count), 0, bits,
                                              static_cast<cudaStream_t>(call.stream)));
}

}  // namespace cuda
}  // namespace fastsae
