// The launchers, as the bindings call them. Addresses are of device memory; nothing waits for the
// device. Error texts are of fastsae/launch.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastsae/abi.h"
#include "fastsae/call.h"

namespace fastsae {
namespace cuda {

// Room for the sums of the pieces into which long segments are cut (segments.cuh): `rows`
// [pieces, d] and `values` [pieces], with pieces = nnz / kPiece.
struct PieceSums {
  float* rows;
  double* values;
};

void decode(Where where, const void* values, Codes codes, int64_t nnz, Matrix w_dec, int64_t d_sae,
            int64_t d, const float* b_dec, MutableMatrix out);
void squared_error(Where where, const void* values, Codes codes, int64_t nnz, Matrix w_dec,
                   int64_t d_sae, int64_t d, const float* b_dec, Matrix target,
                   MutableMatrix residual, float* squared_error);
void sampled_dot(Where where, Matrix g, Codes codes, int64_t nnz, Matrix w_dec, int64_t d_sae,
                 int64_t d, const float* row_scale, void* out);

size_t transpose_bytes(Where where, int64_t nnz, int64_t d_sae);
void transpose(Where where, Codes codes, int64_t nnz, int64_t d_sae, int64_t* latent_offsets,
               int32_t* tokens, int64_t* entries, void* scratch, size_t scratch_bytes);

int64_t entries_of_a_piece();
void accumulate_rows(Where where, const void* values, LatentMajor codes, int64_t nnz, Matrix g,
                     int64_t n_tokens, int64_t d, const float* shift, const float* row_scale,
                     MutableMatrix out, void* value_sums, PieceSums pieces);
// `decoder` and `encoder` hold the pieces of G_dec and of G_enc.
void fused_update(Where where, const FusedUpdate& update, int64_t nnz, int64_t n_tokens,
                  PieceSums decoder, PieceSums encoder);

}  // namespace cuda
}  // namespace fastsae
