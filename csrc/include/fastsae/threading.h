// Threads come from the OpenMP runtime that torch has loaded, so torch.set_num_threads rules here
// too. No result depends on how many there are: every output element is written by one thread, and
// sums have an order of their own.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastsae {

inline int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace fastsae
