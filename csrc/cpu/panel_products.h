// What the one-pass screen multiplies with, one for each ScreenKind.
#pragma once

#include "fastsae/abi.h"

namespace fastsae {

// A tile has at most so many rows; packed rows of x are padded to whole tiles of any size.
constexpr int64_t kMostTileRows = 32;

// By the processor's tile registers (AMX); csrc/cpu/amx_products.cpp. Null products where the
// compiler knows no AMX.
bool amx_runs_here();
extern const PanelProducts amx_products[3];

}  // namespace fastsae
