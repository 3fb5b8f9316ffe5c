// The pieces of long segments; segments.cuh has the maths and the access pattern.
#include "segments.cuh"

namespace fastsae {
namespace cuda {
namespace {

template <typename T, int kVector>
__global__ void __launch_bounds__(kMostThreads, kFewestBlocks) pieces_kernel(Terms<T> of) {
  const int64_t row = blockIdx.x;
  const Segment piece = piece_of_row(of.codes, of.nnz, row);
  if (piece.begin == piece.end) return;
  for (int64_t base = 0; base < of.d; base += blockDim.x * kVector) {
    const int64_t column = base + threadIdx.x * kVector;
    float total[kVector] = {};
    double values[1] = {0.0};
    sum_segment(of, piece, column, column < of.d, total, values[0]);
    if (column < of.d)
      for (int i = 0; i < kVector; ++i) of.pieces.rows[row * of.d + column + i] = total[i];
    if (base > 0) continue;
    block_sum(values);
    if (threadIdx.x == 0) of.pieces.values[row] = values[0];
  }
}

}  // namespace

int64_t entries_of_a_piece() { return kPiece; }

template <typename T>
void sum_pieces(const Call& call, const Terms<T>& of, bool wide) {
  const int64_t rows = of.nnz / kPiece;
  if (wide)
    launch(call, pieces_kernel<T, kWide<T>>, rows, threads_for(of.d, kWide<T>), 0, of);
  else
    launch(call, pieces_kernel<T, 1>, rows, threads_for(of.d, 1), 0, of);
}

template void sum_pieces(const Call&, const Terms<float>&, bool);
template void sum_pieces(const Call&, const Terms<__nv_bfloat16>&, bool);
template void sum_pieces(const Call&, const Terms<__half>&, bool);

}  // namespace cuda
}  // namespace fastsae
