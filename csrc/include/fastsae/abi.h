// The types that cross from the bindings into a kernel: raw pointers, 64-bit sizes, no torch.
#pragma once

#include <cstdint>

namespace fastsae {

enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// A row-major matrix whose rows are contiguous; `stride` is the distance between rows in elements.
struct Matrix {
  const void* data;
  int64_t stride;
  DType dtype;
};

struct MutableMatrix {
  void* data;
  int64_t stride;
  DType dtype;
};

// Codes of `n_tokens` rows. Row n owns the entries [begin(n), begin(n + 1)). With exactly k entries
// in each row `offsets` is null.
struct Codes {
  const int32_t* indices;
  const int64_t* offsets;
  int64_t n_tokens;
  int64_t k;

  constexpr int64_t begin(int64_t n) const { return offsets ? offsets[n] : n * k; }
};

// Entries sorted by latent: latent f owns [offsets[f], offsets[f + 1]) of `tokens` (the row each
// entry came from) and `entries` (its place in the codes' values).
struct LatentMajor {
  const int64_t* offsets;
  const int32_t* tokens;
  const int64_t* entries;
  int64_t d_sae;
};

// What the screen of `encode` knows of each row, and of each latent of the chunk at hand;
// docs/maths.md, "Certified selection".
struct ScreenBounds {
  const float* row_residual;     // A[n]
  const float* row_norm;         // B[n]
  const float* latent_norm;      // alpha[f]
  const float* latent_residual;  // beta[f]
  float score_rounding;          // share of |score| that storing the score may have changed
  float absolute;                // underflow
};

// Running state of a block of rows: up to `capacity` candidates a row, each with the two ends of
// the interval that holds its pre-activation. A row whose `redo` is not zero takes no part in the
// screen.
enum Redo : uint8_t {
  kScreened = 0,
  kExhaustive = 1,  // holds inf or NaN, or screening was not worth it
  kOverflowed = 2,  // more candidates than fit
  kLeftOut = 3,     // another screen sees to it
};
struct SelectionState {
  float* lower;
  float* upper;
  int32_t* indices;
  int32_t* counts;
  float* thresholds;
  uint8_t* redo;
  int64_t capacity;
};

// In what a one-pass screen multiplies.
enum class ScreenKind : int32_t { bfloat16 = 0, int8 = 1, int16 = 2 };

// What pack_panels writes, a number for each row: `packed` in one of its two layouts, the row's
// scale, upper bounds of its norm after and before evening (`true_norm`, may be null) and of what
// packing loses; for panels of int8 `offset`, 128 times the sum of a row's integers. `bytes` is the
// length of a packed row, a multiple of 64. For panels `fingerprints`, one for each kStrip rows, of
// what was packed last: where they are the same nothing is written. Null: all is packed.
constexpr int64_t kPanel = 64, kStrip = 16;
struct PackedRows {
  void* packed;
  int64_t bytes;
  float* scale;
  float* norm;
  float* residual;
  float* true_norm;
  int32_t* offset;
  uint8_t* not_finite;
  uint64_t* fingerprints;
};

// x [n_rows, bytes] and W_enc by panels as pack_panels writes them, with what is known of their
// rows: |pre - score| <= x_residual w_norm + x_norm w_residual + score_rounding |score| +
// x_absolute. `most_` are the largest of a panel, bias by magnitude. All vectors over latents are
// padded to whole panels, x to whole tiles.
struct PanelScreen {
  ScreenKind kind;
  const uint8_t* x;
  const float* x_scale;
  const float* x_norm;
  const float* x_residual;
  const float* x_absolute;
  const uint8_t* w;
  const float* w_scale;
  const int32_t* w_offset;
  const float* w_norm;
  const float* w_residual;
  const float* most_norm;
  const float* most_residual;
  const float* most_bias;
  float score_rounding;
  int64_t n_rows;
  int64_t bytes;
  int64_t d_sae;
  const float* b_enc;
  const float* scale;
  int64_t k;
};

// The survivors of encode_threshold's screen: up to `capacity` of each row, 16 places more in
// memory. counts[n] < 0 says that row n has more, or takes no part.
struct Survivors {
  const float* threshold;
  int32_t* indices;
  int64_t capacity;
  int32_t* counts;
};

// Products of `rows` rows with a panel of 64 latents: sums [rows, 64], whole numbers or float32.
// `begin` and `end` stand around a thread's use of them.
struct PanelProducts {
  int64_t rows;
  void (*begin)();
  void (*multiply)(const uint8_t* x, const uint8_t* panel, int64_t bytes, int32_t* sums);
  void (*end)();
};

// A chunk of latents for encode_threshold: f_count of them from f_begin on, `w_enc`, `b_enc`,
// `threshold` and the latents' bounds those of the chunk; bounds and not_finite are read only where
// there are scores. Row n of the block writes up to f_count
// entries from n * f_count on, indices counted from latent 0, and how many they are into counts[n].
struct ThresholdChunk {
  int64_t f_begin;
  int64_t f_count;
  ScreenBounds bounds;
  const float* threshold;
  Matrix x;
  const float* b_dec;
  Matrix w_enc;
  const float* b_enc;
  int64_t d;
  const uint8_t* not_finite;
  float* values;
  int32_t* indices;
  int32_t* counts;
};

// One chunk of latents for encode_groupmax, in groups of `size`: as above, but the best so far of
// each row's k groups stands in values and indices [n, k], from 0 and the group's first latent on.
struct GroupChunk {
  int64_t f_begin;
  int64_t f_count;
  int64_t size;
  int64_t k;
  ScreenBounds bounds;
  Matrix x;
  const float* b_dec;
  Matrix w_enc;
  const float* b_enc;
  int64_t d;
  const uint8_t* not_finite;
  float* values;
  int32_t* indices;
};

// Adam with its bias corrections folded in: step_size = lr / (1 - beta1^t), inverse_correction =
// 1 / sqrt(1 - beta2^t).
struct Adam {
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;
  float inverse_correction;
  float eps;
  float weight_decay;
};

// The gradients of W_enc, b_enc and W_dec, latent by latent; csrc/cpu/latent_gradient.h states the
// maths. A clip of infinity is none.
struct LatentGradients {
  const void* values;
  const void* grad_values;
  LatentMajor codes;
  Matrix g;
  const float* row_scale;
  Matrix x;
  const float* b_dec;
  int64_t d_in;
  int64_t d_out;
  // Whose direction a row of the decoder's gradient loses with unit_norm.
  MutableMatrix w_dec;
  bool unit_norm;
  float clip_value;
  float clip_row_norm;
};

// The random bits of one parameter's moments in one step; csrc/cpu/stochastic_rounding.h.
struct RandomStream {
  uint32_t first;
  uint32_t second;
};

// Everything fused_update reads and writes; csrc/cpu/fused_update.cpp states the maths. Vectors are
// matrices of one column.
struct FusedUpdate : LatentGradients {
  // Weights in one dtype: that of g, or float32 where the parameters are rounded copies of these.
  // Moments in the same, or in bfloat16 beside float32, then rounded at random.
  MutableMatrix w_enc, w_enc_first, w_enc_second;
  MutableMatrix b_enc, b_enc_first, b_enc_second;
  MutableMatrix w_dec_first, w_dec_second;
  RandomStream w_enc_stream, b_enc_stream, w_dec_stream;
  // The rounded copies, in the dtype of g; no data where there are none.
  MutableMatrix w_enc_copy, b_enc_copy, w_dec_copy;
  Adam adam;
  // What every gradient is multiplied by before the step.
  float gradient_scale;
  // Latents without an entry are left as they are.
  bool lazy;
};

}  // namespace fastsae
