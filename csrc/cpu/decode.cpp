// decode:        y_n = sum_j v_nj W_dec[i_nj] + b_dec
// squared_error: r_n = y_n - target_n, and |r_n|^2, without y ever being written.
//
// Access: token-major. The rows of W_dec that a token names are gathered with prefetch (gather.h);
// the running sum of a token stays in the first-level cache and is written once. A row of W_dec is
// read once for each entry, so the floor is nnz rows at the rate of random row reads. Threads share
// the tokens by their entries (balance.h).
#include "balance.h"
#include "gather.h"
#include "isa_kernels.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// Reading a target and writing a row, in gathered rows.
constexpr int64_t kTokenCost = 2;

template <typename T, typename Finish>
void for_each_token(const T* values, const Codes& codes, Matrix w_dec, int64_t d,
                    const float* b_dec, Finish finish) {
  const auto sum = [&](int64_t n, int64_t first, int64_t columns, float* out, float*) {
    const int64_t begin = codes.begin(n), count = codes.begin(n + 1) - begin;
    std::memset(out, 0, static_cast<size_t>(columns) * sizeof(float));
    add_weighted_rows<false>(
        static_cast<const T*>(w_dec.data) + first, w_dec.stride, columns, nullptr, count,
        [&](int64_t j) { return to_float(values[begin + j]); },
        [&](int64_t j) { return codes.indices[begin + j]; }, out);
    // b_dec is added last: a chain that starts from it rounds at its magnitude in every step.
    if (!b_dec) return;
    for (int64_t i = 0; i < columns; ++i) out[i] += b_dec[first + i];
  };
  const auto begin = [&](int64_t n) { return codes.begin(n); };
  for_each_row(codes.n_tokens, begin, kTokenCost, d, sum, finish);
}

template <typename T>
void decode_as(const T* values, const Codes& codes, Matrix w_dec, int64_t d, const float* b_dec,
               MutableMatrix out) {
  for_each_token(values, codes, w_dec, d, b_dec, [&](int64_t n, float* sum) {
    write_row(sum, d, static_cast<T*>(out.data) + n * out.stride);
  });
}

template <typename T>
void squared_error_as(const T* values, const Codes& codes, Matrix w_dec, int64_t d,
                      const float* b_dec, Matrix target, MutableMatrix residual,
                      float* squared_error) {
  for_each_token(values, codes, w_dec, d, b_dec, [&](int64_t n, float* sum) {
    const T* t = static_cast<const T*>(target.data) + n * target.stride;
    F16 squares = zero();
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
      const F16 r = sub(load(sum + i), load(t + i));
      store(sum + i, r);
      squares = fma(r, r, squares);
    }
    if (i < d) {
      const F16 r = sub(load_partial(sum + i, d - i), load_partial(t + i, d - i));
      store_partial(sum + i, r, d - i);
      squares = fma(r, r, squares);
    }
    squared_error[n] = reduce(squares);
    write_row(sum, d, static_cast<T*>(residual.data) + n * residual.stride);
  });
}

}  // namespace

void decode(const void* values, Codes codes, Matrix w_dec, int64_t d, const float* b_dec,
            MutableMatrix out) {
  if (w_dec.dtype == DType::float32)
    decode_as(static_cast<const float*>(values), codes, w_dec, d, b_dec, out);
  else
    decode_as(static_cast<const bfloat16*>(values), codes, w_dec, d, b_dec, out);
}

void squared_error(const void* values, Codes codes, Matrix w_dec, int64_t d, const float* b_dec,
                   Matrix target, MutableMatrix residual, float* squared_error) {
  if (w_dec.dtype == DType::float32)
    squared_error_as(static_cast<const float*>(values), codes, w_dec, d, b_dec, target, residual,
                     squared_error);
  else
    squared_error_as(static_cast<const bfloat16*>(values), codes, w_dec, d, b_dec, target, residual,
                     squared_error);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
