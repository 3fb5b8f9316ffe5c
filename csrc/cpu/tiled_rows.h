// As add_weighted_rows of gather.h, to the bit, for many sums whose entries name most of the rows
// between them: a dictionary of tens of megabytes is then read through the caches once for a block
// of sums, not once for each.
//
// Rows go by tiles of 128, columns by strips of 64: a tile of a strip (40 KB as float32, widened
// and shifted while it is copied) stays in the first-level cache while every sum of the block adds
// its entries there, its 64 running sums in registers; the entries of a tile are read from the
// second-level cache for every strip but the first. Each sum takes its entries in their own order,
// groups of eight as in gather.h, up to the first group that begins beyond the tile: so the tiles
// decide only when an entry is added, never what is added to what, and entries that do not ascend
// are merely slower.
#pragma once

#include "fastsae/scratch.h"
#include "gather.h"

namespace fastsae {
namespace FASTSAE_ISA {

constexpr int64_t kStrip = 64;
constexpr int64_t kTile = 128;
// A group that begins in a tile may end beyond it: so many rows more are at hand.
constexpr int64_t kBeyond = 32;
constexpr int64_t kStripLanes = kStrip / kLanes;

// Sums of a block: sum s adds weight(e) * rows[index[e]] for e in [begin(s), begin(s + 1)).
template <typename Begin, typename Weight>
struct Block {
  int64_t count;
  Begin begin;
  const int32_t* index;
  Weight weight;
};

// One strip of one tile. Where `totals` is not null, each 64 entries of a sum are summed by
// themselves and then added to its total, as accumulate.h does.
template <bool kShifted, typename T, typename B>
class TiledSums {
 public:
  TiledSums(const B& block, const T* rows, int64_t n_rows, int64_t stride, int64_t d,
            const float* shift, float* sums, float* totals)
      : block_(block),
        rows_(rows),
        n_rows_(n_rows),
        stride_(stride),
        d_(d),
        shift_(shift),
        sums_(sums),
        totals_(totals),
        tile_((kTile + kBeyond) * kStrip),
        from_(block.count),
        to_(block.count) {}

  // Returns the number of columns that whole strips cover.
  int64_t run() {
    const int64_t columns = d_ / kStrip * kStrip;
    for (int64_t s = 0; s < block_.count; ++s) from_[s] = block_.begin(s);
    for (int64_t first = 0; first < n_rows_; first += kTile) {
      const int64_t most = kTile + kBeyond, held = n_rows_ - first < most ? n_rows_ - first : most;
      for (int64_t c = 0; c < columns; c += kStrip) {
        pack(first, held, c);
        for (int64_t s = 0; s < block_.count; ++s) add(s, first, held, c);
      }
      std::memcpy(from_.get(), to_.get(), static_cast<size_t>(block_.count) * sizeof(int64_t));
    }
    return columns;
  }

 private:
  void pack(int64_t first, int64_t held, int64_t c) {
    const float* shift = kShifted ? shift_ + c : nullptr;
    for (int64_t r = 0; r < held; ++r) {
      const T* row = rows_ + (first + r) * stride_ + c;
      float* to = tile_.get() + r * kStrip;
      for (int64_t i = 0; i < kStrip; i += kLanes)
        store(to + i, shifted<kShifted>(load(row + i), shift + i));
    }
  }

  void add(int64_t s, int64_t first, int64_t held, int64_t c) {
    const int64_t begin = block_.begin(s), end = block_.begin(s + 1), beyond = first + kTile;
    int64_t e = from_[s];
    to_[s] = e;
    if (e == end || block_.index[e] >= beyond) return;
    float* sum = sums_ + s * d_ + c;
    F16 out[kStripLanes];
    for (int64_t i = 0; i < kStripLanes; ++i) out[i] = load(sum + i * kLanes);
    do {
      if (end - e < 8 || !add_held(e, first, held, out)) add_any(e, end, c, out);
      e = end - e < 8 ? end : e + 8;
      if (totals_ && (e == end || (e - begin) % 64 == 0)) {
        float* total = totals_ + s * d_ + c;
        for (int64_t i = 0; i < kStripLanes; ++i) {
          store(total + i * kLanes, FASTSAE_ISA::add(load(total + i * kLanes), out[i]));
          out[i] = zero();
        }
      }
    } while (e < end && block_.index[e] < beyond);
    for (int64_t i = 0; i < kStripLanes; ++i) store(sum + i * kLanes, out[i]);
    to_[s] = e;
  }

  // Eight entries, if the tile holds their rows.
  bool add_held(int64_t e, int64_t first, int64_t held, F16* out) {
    int64_t place[8];
    uint64_t farthest = 0;
    for (int l = 0; l < 8; ++l) {
      place[l] = block_.index[e + l] - first;
      // As unsigned, a row before the tile is a very distant one.
      const uint64_t distance = static_cast<uint64_t>(place[l]);
      farthest = distance > farthest ? distance : farthest;
    }
    if (farthest >= static_cast<uint64_t>(held)) return false;
    const float* row[8];
    F16 w[8];
    for (int l = 0; l < 8; ++l) {
      row[l] = tile_.get() + place[l] * kStrip;
      w[l] = broadcast(block_.weight(e + l));
    }
    for (int64_t i = 0; i < kStripLanes; ++i) {
      F16 sum = mul(w[0], load(row[0] + i * kLanes));
      for (int l = 1; l < 8; ++l) sum = fma(w[l], load(row[l] + i * kLanes), sum);
      out[i] = FASTSAE_ISA::add(out[i], sum);
    }
    return true;
  }

  // The next eight entries, or what is left of them, in the groups of add_group.
  void add_any(int64_t e, int64_t end, int64_t c, F16* out) {
    const int64_t count = end - e < 8 ? end - e : 8;
    if (count == 8) return add_rows<8>(e, c, out);
    if (count & 4) add_rows<4>(e, c, out);
    if (count & 2) add_rows<2>(e + (count & 4), c, out);
    if (count & 1) add_rows<1>(e + (count & 6), c, out);
  }

  template <int kRows>
  void add_rows(int64_t e, int64_t c, F16* out) {
    for (int64_t i = 0; i < kStripLanes; ++i) {
      const int64_t column = c + i * kLanes;
      const auto lanes = [&](int l) {
        const T* row = rows_ + block_.index[e + l] * stride_ + column;
        return shifted<kShifted>(load(row), kShifted ? shift_ + column : nullptr);
      };
      const auto weight = [&](int l) { return broadcast(block_.weight(e + l)); };
      if (kRows == 1) {
        out[i] = fma(weight(0), lanes(0), out[i]);
        continue;
      }
      F16 sum = mul(weight(0), lanes(0));
      for (int l = 1; l < kRows; ++l) sum = fma(weight(l), lanes(l), sum);
      out[i] = FASTSAE_ISA::add(out[i], sum);
    }
  }

  const B& block_;
  const T* rows_;
  int64_t n_rows_, stride_, d_;
  const float* shift_;
  float *sums_, *totals_;
  Scratch<float> tile_;
  // Where each sum goes on in this tile, and in the next.
  Scratch<int64_t> from_, to_;
};

// sums [count, d], and totals [count, d] where blocks of 64 entries are wanted: zeros before. All
// columns of whole strips; returns how many these are.
template <bool kShifted, typename T, typename B>
inline int64_t add_weighted_rows_tiled(const T* rows, int64_t n_rows, int64_t stride, int64_t d,
                                       const float* shift, const B& block, float* sums,
                                       float* totals) {
  return TiledSums<kShifted, T, B>(block, rows, n_rows, stride, d, shift, sums, totals).run();
}

template <typename Begin, typename Weight>
Block<Begin, Weight> block_of(int64_t count, Begin begin, const int32_t* index, Weight weight) {
  return {count, begin, index, weight};
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
