// Stands in for csrc/cuda/sort_pairs.cu, which is CUB's.
#include "../../../csrc/cuda/sort_pairs.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace fastsae {
namespace cuda {

void sort_pairs(const Call&, void* scratch, size_t& scratch_bytes, const uint32_t* keys,
                uint32_t* sorted_keys, const int32_t* payload, int32_t* sorted_payload,
                int64_t count, int bits) {
  if (!scratch) {
    scratch_bytes = 1;
    return;
  }
  const auto part = [&](int64_t i) {
    return bits >= 32 ? keys[i] : keys[i] & ((uint32_t{1} << bits) - 1);
  };
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return part(a) < part(b); });
  for (int64_t i = 0; i < count; ++i) {
    sorted_keys[i] = keys[order[static_cast<size_t>(i)]];
    sorted_payload[i] = payload[order[static_cast<size_t>(i)]];
  }
}

}  // namespace cuda
}  // namespace fastsae
