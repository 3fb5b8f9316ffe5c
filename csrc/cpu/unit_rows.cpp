// normalize_rows: w_f <- w_f / max(|w_f|, eps)
// project_rows:   g_f <- g_f - (<g_f, w_f> / <w_f, w_f>) w_f, the part of a gradient that would
// change a norm
//
// Access: each row is read into cache once and written once, in place; both are bound by memory.
#include <cmath>

#include "dot.h"
#include "fastsae/scratch.h"
#include "gather.h"
#include "isa_kernels.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

template <typename T>
void normalize_rows_as(MutableMatrix rows, int64_t n_rows, int64_t d, float eps) {
#pragma omp parallel
  {
    Scratch<float> row(d);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_rows; ++n) {
      T* at = static_cast<T*>(rows.data) + n * rows.stride;
      load_row(at, nullptr, d, row.get());
      const float norm = std::sqrt(dot(row.get(), row.get(), d));
      const float scale = 1.0f / (norm < eps ? eps : norm);
      for (int64_t i = 0; i < d; ++i) row[i] *= scale;
      write_row(row.get(), d, at);
    }
  }
}

template <typename T>
void project_rows_as(MutableMatrix grad, Matrix rows, int64_t n_rows, int64_t d) {
#pragma omp parallel
  {
    Scratch<float> row(d), g(d);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_rows; ++n) {
      T* at = static_cast<T*>(grad.data) + n * grad.stride;
      load_row(static_cast<const T*>(rows.data) + n * rows.stride, nullptr, d, row.get());
      load_row(at, nullptr, d, g.get());
      const float squared_norm = dot(row.get(), row.get(), d);
      if (squared_norm == 0.0f) continue;
      const float along = dot(row.get(), g.get(), d) / squared_norm;
      add_row<false>(-along, row.get(), nullptr, d, g.get());
      write_row(g.get(), d, at);
    }
  }
}

}  // namespace

void normalize_rows(MutableMatrix rows, int64_t n, int64_t d, float eps) {
  if (rows.dtype == DType::float32)
    normalize_rows_as<float>(rows, n, d, eps);
  else
    normalize_rows_as<bfloat16>(rows, n, d, eps);
}

void project_rows(MutableMatrix grad, Matrix rows, int64_t n, int64_t d) {
  if (rows.dtype == DType::float32)
    project_rows_as<float>(grad, rows, n, d);
  else
    project_rows_as<bfloat16>(grad, rows, n, d);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
