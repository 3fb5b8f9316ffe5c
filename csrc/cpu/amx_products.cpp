// The products of panel_screen.cpp by tile registers (AMX): 32 rows of x with a panel of 64
// latents, in bfloat16 (TDPBF16PS) or int8 (TDPBUSD).
//
// A tile register holds 16 rows of 64 bytes. Sums are 2 x 2 of them, 32 rows by 32 latents, twice
// a panel; for each 64 bytes of a row two registers of x and two of W_enc are loaded, 4 KB for four
// products of 16,384 multiply-adds in int8. Packed rows and panels are what the registers take:
// rows of x lie `bytes` apart, and 64 bytes of a panel's row hold four bytes of 16 latents.
// Measured on two cores of Sapphire Rapids, 2,048 rows, D = 768, F = 24,576: 34 ms in bfloat16 and
// 17 in int8, where torch's products take 135 and 172 and float32 349. All of it must lie on 64
// bytes: off them every load is two, and the products took ten times as long.
#include "panel_products.h"

#if defined(FASTSAE_X86) && defined(__linux__) && defined(__AMX_TILE__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fastsae {
namespace {

constexpr int64_t kTileBytes = 64;
constexpr int64_t kTileRows = 16;

struct Configuration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

void begin() {
  Configuration tiles;
  for (int i = 0; i < 8; ++i) {
    tiles.bytes[i] = kTileBytes;
    tiles.rows[i] = kTileRows;
  }
  // GCC's intrinsic tells the compiler of the first eight bytes alone; the others must be there
  // too.
  __asm__ volatile("" : : "m"(tiles) : "memory");
  _tile_loadconfig(&tiles);
}

void end() { _tile_release(); }

template <bool kInt8>
void multiply(const uint8_t* x, const uint8_t* panel, int64_t bytes, int32_t* sums) {
  constexpr int64_t kPanelRow = 4 * kPanel, kSumsRow = 4 * kPanel;
  const uint8_t* x_low = x + kTileRows * bytes;
  for (int64_t half = 0; half < kPanel; half += 32) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const uint8_t* w = panel + 4 * half;
    for (int64_t i = 0; i < bytes; i += kTileBytes, w += kTileRows * kPanelRow) {
      _tile_loadd(4, x + i, bytes);
      _tile_loadd(6, w, kPanelRow);
      _tile_loadd(7, w + kTileBytes, kPanelRow);
      _tile_loadd(5, x_low + i, bytes);
      if (kInt8) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    int32_t* out = sums + half;
    _tile_stored(0, out, kSumsRow);
    _tile_stored(1, out + 16, kSumsRow);
    _tile_stored(2, out + kTileRows * kPanel, kSumsRow);
    _tile_stored(3, out + kTileRows * kPanel + 16, kSumsRow);
  }
}

bool processor_has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if ((d & kBf16) == 0 || (d & kTile) == 0 || (d & kInt8) == 0) return false;
  __get_cpuid(1, &a, &b, &c, &d);
  if ((c & (1u << 27)) == 0) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3u) == 3u;
}

// Linux wants to be asked before a process first touches the tile registers.
bool system_permits_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool amx_runs_here() {
  static const bool runs = processor_has_amx() && system_permits_amx();
  return runs;
}

// No int16 in tile registers: there the vectors serve.
const PanelProducts amx_products[3] = {
    {2 * kTileRows, begin, multiply<false>, end}, {2 * kTileRows, begin, multiply<true>, end}, {}};

}  // namespace fastsae

#else

namespace fastsae {

bool amx_runs_here() { return false; }
const PanelProducts amx_products[3] = {};

}  // namespace fastsae
#endif
