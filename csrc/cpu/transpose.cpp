// transpose: CSR -> CSC, a stable counting sort of the entries by latent.
//
// Access: one pass counts, one prefix sum over latents, one pass places; the counters (8 bytes a
// latent) are the random part. One thread: at nnz = 65,536 it takes a thousandth of the encoder's
// GEMM, and entries of one latent stay in the order of their tokens without further work.
#include <cstring>

#include "kernels.h"

namespace fastsae {

void transpose(Codes codes, int64_t d_sae, int64_t* offsets, int32_t* tokens, int64_t* entries) {
  std::memset(offsets, 0, static_cast<size_t>(d_sae + 1) * sizeof(int64_t));
  const int64_t nnz = codes.begin(codes.n_tokens);
  // Counted two places up: the prefix sum then leaves each latent's start one place up, and placing
  // the entries advances it to the latent's end, which is the offset wanted there.
  for (int64_t e = 0; e < nnz; ++e)
    if (codes.indices[e] + 2 <= d_sae) ++offsets[codes.indices[e] + 2];
  for (int64_t f = 2; f <= d_sae; ++f) offsets[f] += offsets[f - 1];
  for (int64_t n = 0; n < codes.n_tokens; ++n) {
    for (int64_t e = codes.begin(n); e < codes.begin(n + 1); ++e) {
      const int64_t place = offsets[codes.indices[e] + 1]++;
      tokens[place] = static_cast<int32_t>(n);
      entries[place] = e;
    }
  }
}

bool indices_within(const int32_t* indices, int64_t nnz, int64_t d_sae) {
  // As unsigned, a negative index is a very large one: one compare serves both ends.
  uint32_t largest = 0;
  for (int64_t e = 0; e < nnz; ++e) {
    const uint32_t index = static_cast<uint32_t>(indices[e]);
    largest = index > largest ? index : largest;
  }
  return nnz == 0 || static_cast<int64_t>(largest) < d_sae;
}

}  // namespace fastsae
