// Which instruction set runs: the widest that this processor has, unless one is asked for by name.
#include <cstring>

#include "kernels.h"
#include "panel_products.h"

namespace fastsae {

#define FASTSAE_DECLARE(isa)      \
  namespace isa {                 \
  extern const KernelTable table; \
  }
FASTSAE_DECLARE(portable)
#ifdef FASTSAE_X86
FASTSAE_DECLARE(avx2)
FASTSAE_DECLARE(avx512)
FASTSAE_DECLARE(avx512_bf16)
#endif

namespace {

struct Isa {
  IsaStatus status;
  const KernelTable* table;
};

#ifdef FASTSAE_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}

// The kernels of avx512_bf16, whose screens multiply in tile registers where they can.
const KernelTable* amx_table() {
  static const PanelProducts products[3] = {amx_products[0], amx_products[1],
                                            avx512_bf16::table.panel_products[2]};
  static const KernelTable table = [] {
    KernelTable amx = avx512_bf16::table;
    amx.isa = "avx512_amx";
    amx.panel_products = products;
    return amx;
  }();
  return &table;
}
#endif

const Isa* all() {
  static const Isa isas[] = {
      {{"portable", true, true}, &portable::table},
#ifdef FASTSAE_X86
      {{"avx2", true, has_avx2()}, &avx2::table},
      {{"avx512", true, has_avx512()}, &avx512::table},
      {{"avx512_bf16", true, has_avx512_bf16()}, &avx512_bf16::table},
      {{"avx512_amx", true, has_avx512_bf16() && amx_runs_here()}, amx_table()},
#else
      {{"avx2", false, false}, nullptr},
      {{"avx512", false, false}, nullptr},
      {{"avx512_bf16", false, false}, nullptr},
      {{"avx512_amx", false, false}, nullptr},
#endif
  };
  return isas;
}
constexpr int kIsas = 5;

const KernelTable* widest() {
  for (int i = kIsas - 1; i > 0; --i)
    if (all()[i].status.runs_here) return all()[i].table;
  return all()[0].table;
}

const KernelTable*& current() {
  static const KernelTable* table = widest();
  return table;
}

}  // namespace

const IsaStatus* isa_status(int i) { return i < kIsas ? &all()[i].status : nullptr; }

const KernelTable& kernels() { return *current(); }

bool select_isa(const char* isa) {
  for (int i = 0; i < kIsas; ++i) {
    if (std::strcmp(all()[i].status.name, isa) != 0 || !all()[i].status.runs_here) continue;
    current() = all()[i].table;
    return true;
  }
  return false;
}

}  // namespace fastsae
