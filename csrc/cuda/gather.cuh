// sum[column] += sum_j weight[j] (rows[row[j]][column] - shift[column]), in the order of j, for the
// kVector columns of one thread.
//
// Access: eight rows are in flight before the first is used, since a gathered row is a miss in
// every cache. They are summed by a chain of fused multiply-adds from zero and their sum is added
// to the running one, as csrc/cpu/gather.h does and for its reason (fewer roundings of the size of
// the whole sum), so that both give the same bits.
#pragma once

#include "rows.cuh"

namespace fastsae {
namespace cuda {

// Entries whose weights and rows a block reads together and keeps in shared memory.
constexpr int kStaged = 64;
struct Staged {
  float weight[kStaged];
  int32_t row[kStaged];
};

// An entry that names no row of a matrix gets the weight NaN and row 0: it reads no foreign memory,
// and its sum says that something is wrong. On a device a check beforehand would have to wait.
__device__ inline void stage_one(Staged& staged, int at, bool sound, float weight, int32_t row) {
  staged.weight[at] = sound ? weight : __int_as_float(0x7fffffff);
  staged.row[at] = sound ? row : 0;
}

template <int kRows, int kVector, typename T>
__device__ inline void add_block(const float* weight, const int32_t* row, const T* rows,
                                 int64_t stride, int64_t column, const float (&shift)[kVector],
                                 float (&sum)[kVector]) {
  Packet<kVector, T> packets[kRows];
#pragma unroll
  for (int l = 0; l < kRows; ++l) packets[l] = read<kVector>(rows + row[l] * stride + column);
  float partial[kVector] = {};
#pragma unroll
  for (int l = 0; l < kRows; ++l) {
    float lanes[kVector];
    widen<kVector, T>(packets[l], lanes);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float lane = lanes[i] - shift[i];
      if constexpr (kRows == 1)
        sum[i] = fmaf(weight[l], lane, sum[i]);
      else
        partial[i] = l == 0 ? weight[l] * lane : fmaf(weight[l], lane, partial[i]);
    }
  }
  if constexpr (kRows > 1) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] += partial[i];
  }
}

template <int kVector, typename T>
__device__ inline void add_rows(const Staged& staged, int count, const T* rows, int64_t stride,
                                int64_t column, const float (&shift)[kVector],
                                float (&sum)[kVector]) {
  int j = 0;
  for (; j + 8 <= count; j += 8)
    add_block<8>(staged.weight + j, staged.row + j, rows, stride, column, shift, sum);
  if (count & 4) {
    add_block<4>(staged.weight + j, staged.row + j, rows, stride, column, shift, sum);
    j += 4;
  }
  if (count & 2) {
    add_block<2>(staged.weight + j, staged.row + j, rows, stride, column, shift, sum);
    j += 2;
  }
  if (count & 1) add_block<1>(staged.weight + j, staged.row + j, rows, stride, column, shift, sum);
}

}  // namespace cuda
}  // namespace fastsae
