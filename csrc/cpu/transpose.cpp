// transpose: CSR -> CSC, a stable counting sort of the entries by latent.
//
// The entries are cut into parts, one a thread. Each part counts its entries of each latent; a
// prefix sum over latents, and over parts within a latent, gives each part its own place to start
// from in each latent; each part places its entries in order. So entries of one latent stay in the
// order of their tokens, and the result is the one permutation that does, however many parts.
//
// Access: the counters (8 bytes a latent and part) are the random part of the counting, the 12
// bytes written for an entry that of the placing: a line and a page for each latent. Where the
// latents of every token ascend and are many, a part places the entries of 512 latents of all its
// tokens, then those of the next 512, so that the lines and pages it writes to stay in the caches.
#include <algorithm>
#include <memory>
#include <utility>

#include "fastsae/threading.h"
#include "kernels.h"

namespace fastsae {
namespace {

// Fewer entries than this, or than so many a latent, are no work for another thread: at 65,536
// entries of 24,576 latents two parts take as long as one.
constexpr int64_t kLeastEntries = int64_t{1} << 15;
constexpr int64_t kLeastEntriesPerLatent = 2;
constexpr int64_t kTile = 512;
// Entries of a token in a tile, from which on the tiles pay for the visit to each token.
constexpr int64_t kLeastEntriesInTile = 4;

// Where the part `part` of the entries begins.
int64_t cut(const Codes& codes, int64_t part, int64_t parts) {
  const int64_t first = codes.begin(0), nnz = codes.begin(codes.n_tokens) - first;
  return first + nnz / parts * part + nnz % parts * part / parts;
}

int64_t token_of(const Codes& codes, int64_t e) {
  if (!codes.offsets) return e / codes.k;
  return std::upper_bound(codes.offsets, codes.offsets + codes.n_tokens + 1, e) - codes.offsets - 1;
}

// The entries [begin, end), `next` the place of the next entry of each latent.
struct Part {
  int64_t begin, end;
  int64_t* next;
};

class Placing {
 public:
  Placing(const Codes& codes, int64_t d_sae, int32_t* tokens, int64_t* entries)
      : codes_(codes), d_sae_(d_sae), tokens_(tokens), entries_(entries) {}

  void run(const Part& part) const {
    if (part.begin == part.end) return;
    const int64_t first = token_of(codes_, part.begin), last = token_of(codes_, part.end - 1);
    const int64_t n_tokens = last - first + 1, tiles = (d_sae_ + kTile - 1) / kTile;
    const std::unique_ptr<int64_t[]> at(new int64_t[static_cast<size_t>(n_tokens)]);
    for (int64_t n = first; n <= last; ++n) at[n - first] = std::max(codes_.begin(n), part.begin);
    const bool tiled = part.end - part.begin >= kLeastEntriesInTile * n_tokens * tiles &&
                       ascending(part, first, last);
    const int64_t width = tiled ? kTile : d_sae_;
    for (int64_t tile_end = width; tile_end < d_sae_ + width; tile_end += width) {
      for (int64_t n = first; n <= last; ++n) {
        const int64_t end = std::min(codes_.begin(n + 1), part.end);
        int64_t e = at[n - first];
        for (; e < end && codes_.indices[e] < tile_end; ++e) {
          const int64_t place = part.next[codes_.indices[e]]++;
          tokens_[place] = static_cast<int32_t>(n);
          entries_[place] = e;
        }
        at[n - first] = e;
      }
    }
  }

 private:
  bool ascending(const Part& part, int64_t first, int64_t last) const {
    int64_t e = part.begin;
    for (int64_t n = first; n <= last; ++n) {
      const int64_t end = std::min(codes_.begin(n + 1), part.end);
      for (++e; e < end; ++e)
        if (codes_.indices[e] < codes_.indices[e - 1]) return false;
      e = end;
    }
    return true;
  }

  const Codes& codes_;
  int64_t d_sae_;
  int32_t* tokens_;
  int64_t* entries_;
};

}  // namespace

void transpose(Codes codes, int64_t d_sae, int64_t* offsets, int32_t* tokens, int64_t* entries) {
  const int64_t nnz = codes.begin(codes.n_tokens) - codes.begin(0);
  const int64_t most = nnz / std::max(kLeastEntries, kLeastEntriesPerLatent * d_sae);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(max_threads(), most));
  const std::unique_ptr<int64_t[]> counters(new int64_t[static_cast<size_t>(parts * d_sae)]);
  const Placing placing(codes, d_sae, tokens, entries);
#pragma omp parallel num_threads(static_cast<int>(parts)) if (parts > 1)
  {
#pragma omp for schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) {
      int64_t* count = counters.get() + part * d_sae;
      std::fill(count, count + d_sae, 0);
      const int64_t end = cut(codes, part + 1, parts);
      for (int64_t e = cut(codes, part, parts); e < end; ++e) ++count[codes.indices[e]];
    }
#pragma omp single
    {
      int64_t next = 0;
      for (int64_t f = 0; f < d_sae; ++f) {
        offsets[f] = next;
        for (int64_t part = 0; part < parts; ++part) {
          int64_t& counter = counters[static_cast<size_t>(part * d_sae + f)];
          next += std::exchange(counter, next);
        }
      }
      offsets[d_sae] = next;
    }
#pragma omp for schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = cut(codes, part, parts), end = cut(codes, part + 1, parts);
      placing.run({begin, end, counters.get() + part * d_sae});
    }
  }
}

bool ascending(Codes codes) {
  int64_t falls = 0;
#pragma omp parallel for schedule(static) reduction(+ : falls)
  for (int64_t n = 0; n < codes.n_tokens; ++n)
    for (int64_t e = codes.begin(n) + 1; e < codes.begin(n + 1); ++e)
      falls += codes.indices[e] < codes.indices[e - 1];
  return falls == 0;
}

bool indices_within(const int32_t* indices, int64_t nnz, int64_t d_sae) {
  // As unsigned, a negative index is a very large one: one compare serves both ends.
  uint32_t largest = 0;
#pragma omp parallel for schedule(static) reduction(max : largest) if (nnz > kLeastEntries * 8)
  for (int64_t e = 0; e < nnz; ++e) {
    const uint32_t index = static_cast<uint32_t>(indices[e]);
    largest = index > largest ? index : largest;
  }
  return nnz == 0 || static_cast<int64_t>(largest) < d_sae;
}

}  // namespace fastsae
