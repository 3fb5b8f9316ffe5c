// A stable sort by the low `bits` of 32-bit keys, each with its payload. With `scratch` null it
// sets `scratch_bytes` and does nothing else.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastsae/call.h"

namespace fastsae {
namespace cuda {

void sort_pairs(const Call& call, void* scratch, size_t& scratch_bytes, const uint32_t* keys,
                uint32_t* sorted_keys, const int32_t* payload, int32_t* sorted_payload,
                int64_t count, int bits);

}  // namespace cuda
}  // namespace fastsae
