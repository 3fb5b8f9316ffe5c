// The kernels of one instruction set, as one table. Every function states its maths in its own
// file.
#pragma once

#include <cstddef>

#include "fastsae/abi.h"

namespace fastsae {

struct KernelTable {
  const char* isa;

  void (*pack_rows)(Matrix rows, const float* shift, int64_t n, int64_t d, void* packed,
                    DType packed_dtype, float* norm, float* residual_norm, uint8_t* not_finite);
  void (*select_chunk)(Matrix scores, int64_t n, int64_t f_begin, int64_t f_count,
                       const float* b_enc, const float* scale, ScreenBounds bounds, int64_t k,
                       SelectionState state);
  void (*select_finish)(Matrix x, const float* b_dec, Matrix w_enc, const float* b_enc,
                        const float* scale, int64_t n, int64_t d, int64_t d_sae, int64_t k,
                        bool relu_first, SelectionState state, void* values, int32_t* indices);
  void (*pack_panels)(Matrix rows, const float* shift, const float* powers, int64_t n, int64_t d,
                      ScreenKind kind, bool by_panels, const PackedRows& out);
  void (*panel_screen)(const PanelScreen& screen, const PanelProducts& products,
                       SelectionState state);
  void (*panel_survivors)(const PanelScreen& screen, const PanelProducts& products,
                          Survivors survivors);
  void (*survivors_finish)(Matrix x, const float* b_dec, Matrix w_enc, const float* b_enc,
                           int64_t n_rows, int64_t d, Survivors survivors, float* values);
  const PanelProducts* panel_products;  // one for each ScreenKind
  void (*threshold_chunk)(Matrix scores, int64_t n_rows, const ThresholdChunk& chunk);
  void (*group_chunk)(Matrix scores, int64_t n_rows, const GroupChunk& chunk);
  // Row n of a ragged array, counts[n] entries from from[n] on, goes to to[n].
  void (*move_rows)(const float* values, const int32_t* indices, const int64_t* from,
                    const int32_t* counts, int64_t n_rows, const int64_t* to, void* out,
                    DType dtype, int32_t* out_indices);
  // `dense` asks for the way that suits codes which name a good part of the rows; same bits.
  void (*decode)(const void* values, Codes codes, Matrix w_dec, int64_t d_sae, int64_t d,
                 const float* b_dec, bool dense, MutableMatrix out);
  void (*squared_error)(const void* values, Codes codes, Matrix w_dec, int64_t d_sae, int64_t d,
                        const float* b_dec, bool dense, Matrix target, MutableMatrix residual,
                        float* squared_error);
  void (*sampled_dot)(Matrix g, Codes codes, Matrix w_dec, int64_t d_sae, int64_t d,
                      const float* row_scale, bool dense, void* out);
  void (*accumulate_rows)(const void* values, LatentMajor codes, Matrix g, int64_t n_tokens,
                          int64_t d, const float* shift, const float* row_scale, bool dense,
                          MutableMatrix out, void* value_sums);
  void (*fused_update)(const FusedUpdate& update);
  double (*gradient_norm)(const LatentGradients& of);
  void (*normalize_rows)(MutableMatrix rows, int64_t n, int64_t d, float eps);
  void (*project_rows)(MutableMatrix grad, Matrix rows, int64_t n, int64_t d);
};

// Stable counting sort of the entries by latent; one version serves every instruction set.
void transpose(Codes codes, int64_t d_sae, int64_t* offsets, int32_t* tokens, int64_t* entries);

// Whether the indices of every row ascend.
bool ascending(Codes codes);

// Whether every index lies in [0, d_sae).
bool indices_within(const int32_t* indices, int64_t nnz, int64_t d_sae);

// Memory for a large result, as it was left; std::bad_alloc if there is none. Goes back with its
// size.
void* take_memory(size_t bytes);
void give_memory(void* data, size_t bytes);

// The table in use: the widest that the processor has, or the one that `select_isa` chose.
const KernelTable& kernels();
// False if this build or this processor has no such instruction set.
bool select_isa(const char* isa);
// Whether instruction set `i` was built and can run here; null past the last.
struct IsaStatus {
  const char* name;
  bool built;
  bool runs_here;
};
const IsaStatus* isa_status(int i);

}  // namespace fastsae
