// The kernels as each instruction set declares them; isa_table.cpp gathers them into a KernelTable.
#pragma once

#include "fastsae/abi.h"
#include "fastsae/simd.h"

namespace fastsae {
namespace FASTSAE_ISA {

void pack_rows(Matrix rows, const float* shift, int64_t n, int64_t d, void* packed,
               DType packed_dtype, float* norm, float* residual_norm, uint8_t* not_finite);
void select_chunk(Matrix scores, int64_t n, int64_t f_begin, int64_t f_count, const float* b_enc,
                  const float* scale, ScreenBounds bounds, int64_t k, SelectionState state);
void select_finish(Matrix x, const float* b_dec, Matrix w_enc, const float* b_enc,
                   const float* scale, int64_t n, int64_t d, int64_t d_sae, int64_t k,
                   bool relu_first, SelectionState state, void* values, int32_t* indices);
void pack_panels(Matrix rows, const float* shift, const float* powers, int64_t n, int64_t d,
                 ScreenKind kind, bool by_panels, const PackedRows& out);
void panel_screen(const PanelScreen& screen, const PanelProducts& products, SelectionState state);
void panel_survivors(const PanelScreen& screen, const PanelProducts& products, Survivors survivors);
void survivors_finish(Matrix x, const float* b_dec, Matrix w_enc, const float* b_enc,
                      int64_t n_rows, int64_t d, Survivors survivors, float* values);
extern const PanelProducts panel_products[3];
void threshold_chunk(Matrix scores, int64_t n_rows, const ThresholdChunk& chunk);
void group_chunk(Matrix scores, int64_t n_rows, const GroupChunk& chunk);
void move_rows(const float* values, const int32_t* indices, const int64_t* from,
               const int32_t* counts, int64_t n_rows, const int64_t* to, void* out, DType dtype,
               int32_t* out_indices);
void decode(const void* values, Codes codes, Matrix w_dec, int64_t d_sae, int64_t d,
            const float* b_dec, bool dense, MutableMatrix out);
void squared_error(const void* values, Codes codes, Matrix w_dec, int64_t d_sae, int64_t d,
                   const float* b_dec, bool dense, Matrix target, MutableMatrix residual,
                   float* squared_error);
void sampled_dot(Matrix g, Codes codes, Matrix w_dec, int64_t d_sae, int64_t d,
                 const float* row_scale, bool dense, void* out);
void accumulate_rows(const void* values, LatentMajor codes, Matrix g, int64_t n_tokens, int64_t d,
                     const float* shift, const float* row_scale, bool dense, MutableMatrix out,
                     void* value_sums);
void fused_update(const FusedUpdate& update);
double gradient_norm(const LatentGradients& of);
void normalize_rows(MutableMatrix rows, int64_t n, int64_t d, float eps);
void project_rows(MutableMatrix grad, Matrix rows, int64_t n, int64_t d);

}  // namespace FASTSAE_ISA
}  // namespace fastsae
