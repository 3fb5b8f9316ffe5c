// decode:        y_n = sum_j v_nj W_dec[i_nj] + b_dec
// squared_error: r_n = y_n - target_n, and |r_n|^2, without y ever being written.
//
// Access: token-major. The rows of W_dec that a token names are gathered with prefetch (gather.h);
// the running sum of a token stays in the first-level cache and is written once. A row of W_dec is
// read once for each entry, so the floor is nnz rows at the rate of random row reads. Threads share
// the tokens by their entries (balance.h). Where `dense` says that tokens name a good part of the
// rows each, blocks of 128 tokens share the reading (tiled_rows.h), with the same bits.
#include "balance.h"
#include "gather.h"
#include "isa_kernels.h"
#include "tiled_rows.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// Reading a target and writing a row, in gathered rows.
constexpr int64_t kTokenCost = 2;
// Tokens of a block in tiles: their sums, 393 KB at d = 768, stay in the second-level cache.
constexpr int64_t kBlockTokens = 128;
constexpr int64_t kTiledSpansPerThread = 4;

// Where the codes are, what they are decoded with.
template <typename T>
struct Decoder {
  const T* values;
  const Codes& codes;
  const T* w;
  int64_t stride, d_sae, d;
  const float* b_dec;

  int64_t begin(int64_t n) const { return codes.begin(n); }

  // The columns [first, first + columns) of token n.
  void sum(int64_t n, int64_t first, int64_t columns, float* out) const {
    std::memset(out, 0, static_cast<size_t>(columns) * sizeof(float));
    add_columns(n, first, columns, out);
    add_bias(first, columns, out);
  }

  // Tokens n .. n + count, [count, d].
  void sum_tiled(int64_t n, int64_t count, float* out) const {
    std::memset(out, 0, static_cast<size_t>(count * d) * sizeof(float));
    const auto block = block_of(
        count, [&](int64_t s) { return begin(n + s); }, codes.indices,
        [&](int64_t e) { return to_float(values[e]); });
    const int64_t done =
        add_weighted_rows_tiled<false>(w, d_sae, stride, d, nullptr, block, out, nullptr);
    for (int64_t s = 0; s < count; ++s) {
      if (done < d) add_columns(n + s, done, d - done, out + s * d + done);
      add_bias(0, d, out + s * d);
    }
  }

 private:
  void add_columns(int64_t n, int64_t first, int64_t columns, float* out) const {
    const int64_t at = begin(n);
    add_weighted_rows<false>(
        w + first, stride, columns, nullptr, begin(n + 1) - at,
        [&](int64_t j) { return to_float(values[at + j]); },
        [&](int64_t j) { return codes.indices[at + j]; }, out);
  }

  // b_dec is added last: a chain that starts from it rounds at its magnitude in every step.
  void add_bias(int64_t first, int64_t columns, float* out) const {
    if (!b_dec) return;
    for (int64_t i = 0; i < columns; ++i) out[i] += b_dec[first + i];
  }
};

template <typename T, typename Finish>
void for_each_token(const Decoder<T>& decoder, bool dense, Finish finish) {
  const int64_t n_tokens = decoder.codes.n_tokens, d = decoder.d;
  const auto begin = [&](int64_t n) { return decoder.begin(n); };
  const auto sum = [&](int64_t n, int64_t first, int64_t columns, float* out, float*) {
    decoder.sum(n, first, columns, out);
  };
  if (!dense) return for_each_row(n_tokens, begin, kTokenCost, d, sum, finish);
  const auto many = [&](int64_t first, int64_t end, float*, float*) {
    Scratch<float> sums((end - first < kBlockTokens ? end - first : kBlockTokens) * d);
    for (int64_t n = first; n < end; n += kBlockTokens) {
      const int64_t count = end - n < kBlockTokens ? end - n : kBlockTokens;
      decoder.sum_tiled(n, count, sums.get());
      for (int64_t s = 0; s < count; ++s) finish(n + s, sums.get() + s * d);
    }
  };
  for_each_span(n_tokens, begin, kTokenCost, d, kTiledSpansPerThread, many, sum, finish);
}

template <typename T>
Decoder<T> decoder_of(const T* values, const Codes& codes, Matrix w_dec, int64_t d_sae, int64_t d,
                      const float* b_dec) {
  return {values, codes, static_cast<const T*>(w_dec.data), w_dec.stride, d_sae, d, b_dec};
}

template <typename T>
void decode_as(const Decoder<T>& decoder, bool dense, MutableMatrix out) {
  for_each_token(decoder, dense, [&](int64_t n, float* sum) {
    write_row(sum, decoder.d, static_cast<T*>(out.data) + n * out.stride);
  });
}

template <typename T>
void squared_error_as(const Decoder<T>& decoder, bool dense, Matrix target, MutableMatrix residual,
                      float* squared_error) {
  const int64_t d = decoder.d;
  for_each_token(decoder, dense, [&](int64_t n, float* sum) {
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

void decode(const void* values, Codes codes, Matrix w_dec, int64_t d_sae, int64_t d,
            const float* b_dec, bool dense, MutableMatrix out) {
  const auto run = [&](auto* typed) {
    decode_as(decoder_of(typed, codes, w_dec, d_sae, d, b_dec), dense, out);
  };
  if (w_dec.dtype == DType::float32)
    run(static_cast<const float*>(values));
  else
    run(static_cast<const bfloat16*>(values));
}

void squared_error(const void* values, Codes codes, Matrix w_dec, int64_t d_sae, int64_t d,
                   const float* b_dec, bool dense, Matrix target, MutableMatrix residual,
                   float* squared_error) {
  const auto run = [&](auto* typed) {
    squared_error_as(decoder_of(typed, codes, w_dec, d_sae, d, b_dec), dense, target, residual,
                     squared_error);
  };
  if (w_dec.dtype == DType::float32)
    run(static_cast<const float*>(values));
  else
    run(static_cast<const bfloat16*>(values));
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
