// One latent's weighted sum of rows, for accumulate_rows and fused_update alike:
//   total = sum over entries e of latent f of c_t v_e (g_t - shift), t = tokens[e]
//
// Entries are summed in blocks of 64 whose sums are then added in order, as csrc/cpu/accumulate.h
// does and with the same bits up to kPiece entries: one chain of thousands of float32 additions
// would lose accuracy that a GEMM keeps.
//
// The mean segment has 4 to 8 entries, but a latent that fires on a third of all tokens has
// thousands, which one block would read alone, long after the others are done. So a segment is cut
// every kPiece entries. Its first piece is summed by the latent's own block; a kernel before it
// sums all others, a block a piece, into scratch rows that the latent's block adds in their order.
// Which scratch row: piece q >= 1 of a segment that begins at b starts at s = b + q kPiece and has
// row s / kPiece - 1. Starts within a segment are kPiece apart and those of two segments further
// apart than that, so no two pieces share a row; and the block of row r finds its piece by one
// binary search, since the segment that owns place (r + 1) kPiece is the only one that can. No
// counter, no atomic, no waiting for the device, and nnz / kPiece rows always suffice.
//
// kPiece = 512: a block reads 512 rows of 8 KiB at most, and scratch takes no more than 1/512 of
// what is gathered (times two in half precision). No GPU has run this yet.
#pragma once

#include "gather.cuh"
#include "kernels.h"

namespace fastsae {
namespace cuda {

constexpr int64_t kPiece = 512;

struct Segment {
  int64_t begin, end;
};

// What is summed. An entry or token out of range makes its latent's sum NaN (gather.cuh).
template <typename T>
struct Terms {
  const T* values;
  LatentMajor codes;
  int64_t nnz;
  const T* rows;
  int64_t stride;
  int64_t n_tokens;
  int64_t d;
  const float* shift;
  const float* row_scale;
  PieceSums pieces;
};

__host__ __device__ inline int64_t within(int64_t place, int64_t nnz) {
  return place < 0 ? 0 : place < nnz ? place : nnz;
}

__host__ __device__ inline Segment segment_of(const LatentMajor& codes, int64_t nnz, int64_t f) {
  return {within(codes.offsets[f], nnz), within(codes.offsets[f + 1], nnz)};
}

// The scratch row of the piece that starts at `start`.
__host__ __device__ inline int64_t row_of_piece(int64_t start) { return start / kPiece - 1; }

// The entries of the piece with this scratch row; none where no segment has such a piece.
__host__ __device__ inline Segment piece_of_row(const LatentMajor& codes, int64_t nnz,
                                                int64_t row) {
  const int64_t place = (row + 1) * kPiece;
  // The last latent whose segment begins at or before `place`; empty ones before it are passed by.
  int64_t low = 0, high = codes.d_sae;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (codes.offsets[middle] <= place)
      low = middle;
    else
      high = middle;
  }
  const Segment segment = segment_of(codes, nnz, low);
  const int64_t start = segment.begin + (place - segment.begin + kPiece - 1) / kPiece * kPiece;
  if (segment.begin >= place || start >= segment.end) return {0, 0};
  return {start, start + kPiece < segment.end ? start + kPiece : segment.end};
}

// total = the sum over [segment.begin, segment.end), for the columns of one thread, and `values`
// grows by this thread's share of the sum of c_t v_e. Every thread of the block must call it, for
// it waits for all; those outside the row leave `total` as it is.
template <int kVector, typename T>
__device__ inline void sum_segment(const Terms<T>& of, Segment segment, int64_t column, bool inside,
                                   float (&total)[kVector], double& values) {
  __shared__ Staged staged;
  float shift[kVector] = {};
  if (inside) load_floats(of.shift, column, shift);
  for (int64_t at = segment.begin; at < segment.end; at += kStaged) {
    const int64_t left = segment.end - at;
    const int count = static_cast<int>(left < kStaged ? left : kStaged);
    __syncthreads();
    for (int j = threadIdx.x; j < count; j += blockDim.x) {
      const int64_t entry = of.codes.entries[at + j];
      const int32_t token = of.codes.tokens[at + j];
      const bool sound = entry >= 0 && entry < of.nnz && token >= 0 && token < of.n_tokens;
      float weight = sound ? to_float(of.values[entry]) : 0.0f;
      if (sound && of.row_scale) weight *= of.row_scale[token];
      stage_one(staged, j, sound, weight, token);
      // In double: it costs nothing beside the rows, and is a gradient of its own.
      values += staged.weight[j];
    }
    __syncthreads();
    if (!inside) continue;
    float partial[kVector] = {};
    add_rows(staged, count, of.rows, of.stride, column, shift, partial);
#pragma unroll
    for (int i = 0; i < kVector; ++i) total[i] += partial[i];
  }
}

// Latent f's whole sum for the columns of one thread, from its own first piece and the scratch rows
// of the others. `values` as in sum_segment; one thread takes those of the scratch rows.
template <int kVector, typename T>
__device__ inline void sum_latent(const Terms<T>& of, int64_t f, int64_t column, bool inside,
                                  float (&total)[kVector], double& values) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) total[i] = 0.0f;
  const Segment segment = segment_of(of.codes, of.nnz, f);
  const int64_t own = segment.begin + kPiece;
  sum_segment(of, {segment.begin, own < segment.end ? own : segment.end}, column, inside, total,
              values);
  for (int64_t start = own; start < segment.end; start += kPiece) {
    const int64_t row = row_of_piece(start);
    if (inside)
#pragma unroll
      for (int i = 0; i < kVector; ++i) total[i] += of.pieces.rows[row * of.d + column + i];
    if (threadIdx.x == 0) values += of.pieces.values[row];
  }
}

// Terms as the launchers are given them. Without a token there is no row 0 to stand in for a wrong
// one.
template <typename T>
Terms<T> terms(const void* values, LatentMajor codes, int64_t nnz, Matrix rows, int64_t n_tokens,
               int64_t d, const float* shift, const float* row_scale, PieceSums pieces) {
  return {static_cast<const T*>(values),
          codes,
          n_tokens == 0 ? 0 : nnz,
          static_cast<const T*>(rows.data),
          rows.stride,
          n_tokens,
          d,
          shift,
          row_scale,
          pieces};
}

// Fills of.pieces; to be launched before a kernel that calls sum_latent. `wide` as for that kernel.
template <typename T>
void sum_pieces(const Call& call, const Terms<T>& of, bool wide);

}  // namespace cuda
}  // namespace fastsae
