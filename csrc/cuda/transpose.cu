// transpose: CSR -> CSC, a stable sort of the entries by latent.
//
// Access: a radix sort of (latent, place of the entry) over only the bits that d_sae needs, two
// passes of 16 bytes an entry up to 2^16 - 1 latents, three up to 2^24 - 1. A latent outside
// [0, d_sae) sorts as d_sae, behind all others, where no segment reaches it. Where each latent
// begins is then found by binary search, a thread a latent: the sorted keys lie in the second-level
// cache, and unlike marking boundaries its work does not depend on how empty latents are spread.
// The token of an entry is its place divided by k, or a binary search in the offsets. Places are
// 32-bit while they are sorted, so nnz < 2^31. No GPU has run this yet.
#include "fastsae/launch.cuh"
#include "kernels.h"
#include "sort_pairs.h"

namespace fastsae {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// How many of sorted[0, count) are below `bound`.
template <typename T>
__host__ __device__ inline int64_t count_below(const T* sorted, int64_t count, T bound) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (sorted[low + half] < bound) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

__global__ void keys_kernel(const int32_t* __restrict__ indices, int64_t nnz, int64_t d_sae,
                            uint32_t* __restrict__ keys, int32_t* __restrict__ places) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= nnz) return;
  const uint32_t latent = static_cast<uint32_t>(indices[e]);
  keys[e] = latent < d_sae ? latent : static_cast<uint32_t>(d_sae);
  places[e] = static_cast<int32_t>(e);
}

__global__ void finish_kernel(const uint32_t* __restrict__ keys, const int32_t* __restrict__ places,
                              Codes codes, int64_t nnz, int64_t d_sae,
                              int64_t* __restrict__ latent_offsets, int32_t* __restrict__ tokens,
                              int64_t* __restrict__ entries) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i <= d_sae) latent_offsets[i] = count_below(keys, nnz, static_cast<uint32_t>(i));
  if (i >= nnz) return;
  const int64_t entry = places[i];
  entries[i] = entry;
  tokens[i] = static_cast<int32_t>(
      codes.offsets ? count_below(codes.offsets, codes.n_tokens + 1, entry + 1) - 1
                    : entry / codes.k);
}

// Keys, sorted keys, places, sorted places, then what the sort itself needs; each at a multiple of
// 256 bytes.
constexpr int64_t kAlignment = 256;
int64_t bytes_of(int64_t nnz) {
  return (nnz * static_cast<int64_t>(sizeof(int32_t)) + kAlignment - 1) / kAlignment * kAlignment;
}

int bits_of(int64_t largest) {
  int bits = 0;
  for (; largest; largest >>= 1) ++bits;
  return bits;
}

}  // namespace

size_t transpose_bytes(Where where, int64_t nnz, int64_t d_sae) {
  if (nnz == 0) return 0;
  size_t sort_bytes = 0;
  sort_pairs(call_of("transpose", where, {"nnz", nnz}, {"d_sae", d_sae}), nullptr, sort_bytes,
             nullptr, nullptr, nullptr, nullptr, nnz, bits_of(d_sae));
  return static_cast<size_t>(4 * bytes_of(nnz)) + sort_bytes;
}

void transpose(Where where, Codes codes, int64_t nnz, int64_t d_sae, int64_t* latent_offsets,
               int32_t* tokens, int64_t* entries, void* scratch, size_t scratch_bytes) {
  const Call call =
      call_of("transpose", where, {"n_tokens", codes.n_tokens}, {"nnz", nnz}, {"d_sae", d_sae});
  char* at = static_cast<char*>(scratch);
  const int64_t bytes = bytes_of(nnz);
  auto* keys = reinterpret_cast<uint32_t*>(at);
  auto* sorted_keys = reinterpret_cast<uint32_t*>(at + bytes);
  auto* places = reinterpret_cast<int32_t*>(at + 2 * bytes);
  auto* sorted_places = reinterpret_cast<int32_t*>(at + 3 * bytes);
  if (nnz) {
    launch(call, keys_kernel, (nnz + kThreads - 1) / kThreads, kThreads, 0, codes.indices, nnz,
           d_sae, keys, places);
    size_t sort_bytes = scratch_bytes - static_cast<size_t>(4 * bytes);
    sort_pairs(call, at + 4 * bytes, sort_bytes, keys, sorted_keys, places, sorted_places, nnz,
               bits_of(d_sae));
  }
  const int64_t threads = nnz > d_sae + 1 ? nnz : d_sae + 1;
  launch(call, finish_kernel, (threads + kThreads - 1) / kThreads, kThreads, 0, sorted_keys,
         sorted_places, codes, nnz, d_sae, latent_offsets, tokens, entries);
}

}  // namespace cuda
}  // namespace fastsae
