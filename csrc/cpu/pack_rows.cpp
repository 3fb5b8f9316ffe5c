// pack_rows: rows (less a shift) in the dtype of a screen, with upper bounds of |row| and |row -
// packed row|.
//
// Access: each row is read once, widened to float32 in the first-level cache, and written once in
// the narrower dtype.
#include <algorithm>
#include <cmath>

#include "dot.h"
#include "fastsae/scratch.h"
#include "isa_kernels.h"
#include "norm_above.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

template <typename T, typename Packed>
void pack_rows_as(Matrix rows, const float* shift, int64_t n_rows, int64_t d, Packed* packed,
                  float* norm, float* residual_norm, uint8_t* not_finite) {
#pragma omp parallel
  {
    Scratch<float> row(d + kLanes);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_rows; ++n) {
      load_row(static_cast<const T*>(rows.data) + n * rows.stride, shift, d, row.get());
      for (int64_t i = d; i < d + kLanes; ++i) row[i] = 0.0f;
      Packed* out = packed ? packed + n * d : nullptr;
      F16 squares = zero(), residual_squares = zero();
      uint32_t any = 0;
      for (int64_t i = 0; i < d; i += kLanes) {
        const F16 lanes = load(row.get() + i);
        squares = fma(lanes, lanes, squares);
        any |= not_less_equal(abs(lanes), zero());
        if (!out) continue;
        Packed tail[kLanes];
        Packed* to = i + kLanes <= d ? out + i : tail;
        store(to, lanes);
        const F16 lost = sub(lanes, load(to));
        residual_squares = fma(lost, lost, residual_squares);
        if (to == tail) std::memcpy(out + i, tail, static_cast<size_t>(d - i) * sizeof(Packed));
      }
      norm[n] = any ? norm_above(reduce(squares), d) : 0.0f;
      residual_norm[n] = out && any ? norm_above(reduce(residual_squares), d) : 0.0f;
      if (!not_finite) continue;
      bool finite = true;
      for (int64_t i = 0; i < d; ++i) finite &= std::isfinite(row[i]) != 0;
      not_finite[n] = finite ? kScreened : kExhaustive;
    }
  }
}

}  // namespace

void pack_rows(Matrix rows, const float* shift, int64_t n, int64_t d, void* packed,
               DType packed_dtype, float* norm, float* residual_norm, uint8_t* not_finite) {
  const bool narrow_in = rows.dtype == DType::bfloat16, narrow = packed_dtype == DType::bfloat16;
  auto* p16 = static_cast<bfloat16*>(packed);
  auto* p32 = static_cast<float*>(packed);
  if (narrow_in && narrow)
    pack_rows_as<bfloat16>(rows, shift, n, d, p16, norm, residual_norm, not_finite);
  else if (narrow_in)
    pack_rows_as<bfloat16>(rows, shift, n, d, p32, norm, residual_norm, not_finite);
  else if (narrow)
    pack_rows_as<float>(rows, shift, n, d, p16, norm, residual_norm, not_finite);
  else
    pack_rows_as<float>(rows, shift, n, d, p32, norm, residual_norm, not_finite);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
