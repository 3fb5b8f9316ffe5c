// One instruction set's kernels, gathered into a table. Compiled once per instruction set.
#include "isa_kernels.h"
#include "kernels.h"

#define FASTSAE_STRING_OF(name) #name
#define FASTSAE_STRING(name) FASTSAE_STRING_OF(name)

namespace fastsae {
namespace FASTSAE_ISA {

extern const KernelTable table;
const KernelTable table = {
    FASTSAE_STRING(FASTSAE_ISA),
    pack_rows,
    select_chunk,
    select_finish,
    pack_panels,
    panel_screen,
    panel_survivors,
    survivors_finish,
    panel_products,
    threshold_chunk,
    group_chunk,
    move_rows,
    decode,
    squared_error,
    sampled_dot,
    accumulate_rows,
    fused_update,
    gradient_norm,
    normalize_rows,
    project_rows,
};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
