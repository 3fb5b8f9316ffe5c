// pack_panels: rows (less a shift, times powers of two by dimension) as the one-pass screen
// multiplies them, with upper bounds of |row|, |row - packed row| and of the norm before evening.
//
//   bfloat16: each entry rounded.
//   int8:     scale = max |row| / 127, q = round(row / scale).
//   int16:    scale = max(|row| / m, max |row_d| / 32,766), q = round(row / scale), with m +
//             sqrt(d) / 2 just under 46,340: no sum of products of two such rows, whole or in part,
//             passes 2^31.
// Whatever the rounding does, the residual is measured, so a bound never rests on it.
//
// Layouts are those of panel_products.h: rows of x lie one after the other, in int8 as q + 128, an
// unsigned byte; rows of W_enc by panels of 64, four bytes of each row side by side:
// [panel][bytes / 4][64][4]. Rows are padded with zeros to `bytes`, panels with rows of zeros.
//
// Memory that has been packed before is packed again only where its rows have changed, which their
// fingerprints tell: reading them costs a fifth of packing them.
//
// Access: a row is read once and widened in the first-level cache. Of a panel 16 rows are packed
// side by side, then turned in blocks of 16 x 64 bytes, whole lines in and out.
#include <algorithm>

#include "dot.h"
#include "fastsae/scratch.h"
#include "fingerprint.h"
#include "isa_kernels.h"
#include "norm_above.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// Below this a row's reciprocal scale may overflow; its packed form is then zero.
constexpr float kLeastMaximum = 1e-30f;
// Adding and subtracting it rounds what is less than 2^22 to the nearest integer.
constexpr float kRounder = 0x1.8p23f;

inline void store_number(int8_t* to, float number) {
  *to = static_cast<int8_t>(static_cast<int>(number));
}
inline void store_number(uint8_t* to, float number) {
  *to = static_cast<uint8_t>(static_cast<int>(number) + 128);
}
inline void store_number(int16_t* to, float number) {
  *to = static_cast<int16_t>(static_cast<int>(number));
}

#if defined(__AVX512F__)
inline void store_numbers(int8_t* to, F16 numbers) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(numbers.v)));
}
inline void store_numbers(uint8_t* to, F16 numbers) {
  const __m512i shifted = _mm512_add_epi32(_mm512_cvtps_epi32(numbers.v), _mm512_set1_epi32(128));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(shifted));
}
inline void store_numbers(int16_t* to, F16 numbers) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(numbers.v)));
}
#else
template <typename Packed>
inline void store_numbers(Packed* to, F16 numbers) {
  float lanes[kLanes];
  store(lanes, numbers);
  for (int64_t l = 0; l < kLanes; ++l) store_number(to + l, lanes[l]);
}
#endif

template <typename Packed>
constexpr bool kIsInt16 = std::is_same<Packed, int16_t>::value;

// One row after another of what `rows` holds, as `Packed`.
template <typename T, typename Packed>
class Packer {
 public:
  Packer(Matrix rows, const float* shift, const float* powers, int64_t d, const PackedRows& out)
      : rows_(rows),
        shift_(shift),
        powers_(powers),
        d_(d),
        padded_((d + kLanes - 1) / kLanes * kLanes),
        out_(out),
        row_(padded_) {
    for (int64_t i = d_; i < padded_; ++i) row_[i] = 0.0f;
  }

  // Row n into `to` [bytes], and everything that is known of it.
  void run(int64_t n, void* to) {
    load_row(static_cast<const T*>(rows_.data) + n * rows_.stride, shift_, d_, row_.get());
    if (powers_) {
      if (out_.true_norm) out_.true_norm[n] = norm();
      for (int64_t i = 0; i < d_; ++i) row_[i] *= powers_[i];
    }
    F16 most = zero(), zeros = zero(), squares = zero();
    for (int64_t i = 0; i < padded_; i += kLanes) {
      const F16 value = load(row_.get() + i);
      most = max(abs(value), most);
      // What is not finite is not zero when multiplied by it, and neither is a sum with that.
      zeros = fma(value, zero(), zeros);
      squares = fma(value, value, squares);
    }
    const bool finite = reduce(zeros) == 0.0f;
    float lanes[kLanes], largest = 0.0f;
    store(lanes, most);
    for (float lane : lanes) largest = lane > largest ? lane : largest;
    // A row of zeros has no norm and no residual, exactly: then its ties are decided by the screen.
    const bool any = !(largest == 0.0f && finite);
    const float row_norm = any ? norm_above(reduce(squares), d_) : 0.0f;
    out_.norm[n] = row_norm;
    if (!powers_ && out_.true_norm) out_.true_norm[n] = row_norm;
    const float lost = pack(static_cast<Packed*>(to), largest, row_norm, finite, n);
    out_.residual[n] = any ? norm_above(lost, d_) : 0.0f;
    if (out_.not_finite) out_.not_finite[n] = finite ? kScreened : kExhaustive;
    const int64_t used = padded_ * static_cast<int64_t>(sizeof(Packed));
    if (used < out_.bytes)
      std::memset(static_cast<uint8_t*>(to) + used, 0, static_cast<size_t>(out_.bytes - used));
  }

 private:
  float norm() {
    F16 squares = zero();
    for (int64_t i = 0; i < padded_; i += kLanes) {
      const F16 value = load(row_.get() + i);
      squares = fma(value, value, squares);
    }
    return norm_above(reduce(squares), d_);
  }

  // The sum of the squares of what packing loses.
  template <typename To>
  float pack(To* to, float largest, float row_norm, bool finite, int64_t n) {
    const bool usable = finite && largest >= kLeastMaximum && row_norm < 1e30f;
    const float most = 46338.0f - 0.5f * std::sqrt(static_cast<float>(d_));
    const float least =
        kIsInt16<To> ? std::max(row_norm / most, largest / 32766.0f) : largest / 127.0f;
    const float scale = usable ? least : 0.0f;
    const F16 times = broadcast(usable ? 1.0f / scale : 0.0f), rounder = broadcast(kRounder);
    F16 lost_squares = zero();
    for (int64_t i = 0; i < padded_; i += kLanes) {
      const F16 value = load(row_.get() + i);
      const F16 number = usable ? sub(fma(value, times, rounder), rounder) : zero();
      store_numbers(to + i, number);
      const F16 lost = fma(number, broadcast(-scale), value);
      lost_squares = fma(lost, lost, lost_squares);
    }
    out_.scale[n] = scale;
    return reduce(lost_squares);
  }
  float pack(bfloat16* to, float, float, bool, int64_t n) {
    F16 lost_squares = zero();
    for (int64_t i = 0; i < padded_; i += kLanes) {
      const F16 value = load(row_.get() + i);
      store(to + i, value);
      const F16 lost = sub(value, load(to + i));
      lost_squares = fma(lost, lost, lost_squares);
    }
    out_.scale[n] = 1.0f;
    return reduce(lost_squares);
  }

  Matrix rows_;
  const float *shift_, *powers_;
  int64_t d_, padded_;
  PackedRows out_;
  Scratch<float> row_;
};

template <typename T, typename Packed>
void pack_as_rows(Matrix rows, const float* shift, const float* powers, int64_t n_rows, int64_t d,
                  const PackedRows& out) {
#pragma omp parallel
  {
    Packer<T, Packed> packer(rows, shift, powers, d, out);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_rows; ++n)
      packer.run(n, static_cast<uint8_t*>(out.packed) + n * out.bytes);
  }
}

// Sixteen rows of 64 bytes, as 16 groups of four bytes, become sixteen places of a panel.
#if defined(__AVX512F__)
inline void turn(const uint8_t* rows, int64_t bytes, uint8_t* to) {
  __m512i a[kStrip], b[kStrip];
  for (int64_t r = 0; r < kStrip; ++r) a[r] = _mm512_loadu_si512(rows + r * bytes);
  for (int64_t r = 0; r < kStrip; r += 2) {
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
  for (int64_t r = 0; r < kStrip; r += 4)
    for (int64_t j = 0; j < 2; ++j) {
      a[r + 2 * j] = _mm512_unpacklo_epi64(b[r + j], b[r + 2 + j]);
      a[r + 2 * j + 1] = _mm512_unpackhi_epi64(b[r + j], b[r + 2 + j]);
    }
  // a[4 q + c] holds, in its quarter p, group 4 p + c of rows 4 q to 4 q + 3.
  for (int64_t c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
    const __m512i high = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
    const __m512i high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    const __m512i groups[4] = {
        _mm512_shuffle_i32x4(low, low2, 0x88), _mm512_shuffle_i32x4(low, low2, 0xdd),
        _mm512_shuffle_i32x4(high, high2, 0x88), _mm512_shuffle_i32x4(high, high2, 0xdd)};
    for (int64_t p = 0; p < 4; ++p) _mm512_storeu_si512(to + (4 * p + c) * 4 * kPanel, groups[p]);
  }
}
#else
inline void turn(const uint8_t* rows, int64_t bytes, uint8_t* to) {
  for (int64_t group = 0; group < kStrip; ++group)
    for (int64_t r = 0; r < kStrip; ++r)
      std::memcpy(to + group * 4 * kPanel + 4 * r, rows + r * bytes + 4 * group, 4);
}
#endif

template <typename Packed>
int32_t offset_of(const Packed*, int64_t) {
  return 0;
}
int32_t offset_of(const int8_t* row, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += row[i];
  return 128 * sum;
}

// Whether a strip of rows has changed since its fingerprint was taken; takes it anew.
template <typename T>
bool has_changed(Matrix rows, int64_t first, int64_t end, int64_t d, uint64_t& before) {
  Fingerprint now(1);
  for (int64_t f = first; f < end; ++f)
    now.add(static_cast<const T*>(rows.data) + f * rows.stride, d * int64_t{sizeof(T)});
  const uint64_t value = now.value();
  if (value == before) return false;
  before = value;
  return true;
}

template <typename T, typename Packed>
void pack_as_panels(Matrix rows, const float* powers, int64_t n_rows, int64_t d,
                    const PackedRows& out) {
  const int64_t bytes = out.bytes, strips = (n_rows + kPanel - 1) / kPanel * (kPanel / kStrip);
#pragma omp parallel
  {
    Packer<T, Packed> packer(rows, nullptr, powers, d, out);
    Scratch<uint8_t> strip(kStrip * bytes);
#pragma omp for schedule(static)
    for (int64_t s = 0; s < strips; ++s) {
      if (out.fingerprints && !has_changed<T>(rows, s * kStrip, std::min((s + 1) * kStrip, n_rows),
                                              d, out.fingerprints[s]))
        continue;
      for (int64_t r = 0; r < kStrip; ++r) {
        const int64_t f = s * kStrip + r;
        uint8_t* row = strip.get() + r * bytes;
        if (f < n_rows) {
          packer.run(f, row);
        } else {
          std::memset(row, 0, static_cast<size_t>(bytes));
          out.scale[f] = out.norm[f] = out.residual[f] = 0.0f;
        }
        if (out.offset)
          out.offset[f] = offset_of(reinterpret_cast<const Packed*>(row),
                                    bytes / static_cast<int64_t>(sizeof(Packed)));
      }
      uint8_t* to = static_cast<uint8_t*>(out.packed) + s / 4 * kPanel * bytes + s % 4 * 64;
      for (int64_t i = 0; i < bytes; i += 64) turn(strip.get() + i, bytes, to + i * kPanel);
    }
  }
}

}  // namespace

void pack_panels(Matrix rows, const float* shift, const float* powers, int64_t n, int64_t d,
                 ScreenKind kind, bool by_panels, const PackedRows& out) {
  const auto run = [&](auto* typed, auto* as_row, auto* in_panel) {
    using T = std::remove_pointer_t<decltype(typed)>;
    using Row = std::remove_pointer_t<decltype(as_row)>;
    using InPanel = std::remove_pointer_t<decltype(in_panel)>;
    return by_panels ? pack_as_panels<T, InPanel>(rows, powers, n, d, out)
                     : pack_as_rows<T, Row>(rows, shift, powers, n, d, out);
  };
  const auto run_kind = [&](auto* typed) {
    if (kind == ScreenKind::bfloat16)
      run(typed, static_cast<bfloat16*>(nullptr), static_cast<bfloat16*>(nullptr));
    else if (kind == ScreenKind::int8)
      run(typed, static_cast<uint8_t*>(nullptr), static_cast<int8_t*>(nullptr));
    else
      run(typed, static_cast<int16_t*>(nullptr), static_cast<int16_t*>(nullptr));
  };
  if (rows.dtype == DType::float32)
    run_kind(static_cast<float*>(nullptr));
  else
    run_kind(static_cast<bfloat16*>(nullptr));
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
