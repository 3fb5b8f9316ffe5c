// quantize_rows: rows (less a shift, times powers of two by dimension) as int8 multiples of a scale
// of each row's own, with upper bounds of |row|, |row - scale q| and of the norm before equalising.
//
// scale = max |row| / 127, q = round(row / scale). Whatever the rounding does, the residual is
// measured, so a bound never rests on it.
//
// Layouts are those of the products in integer_screen.cpp: rows of x lie one after the other as
// q + 128, an unsigned byte; rows of W_enc by panels of 64, four dimensions of each row side by
// side: [panel][d / 4][64][4]. Dimensions are padded with zeros to a multiple of four, panels with
// rows of zeros.
//
// Access: a row is read once and widened in the first-level cache; a panel (48 KB at d = 768) is
// written while it is in the second-level cache.
#include "dot.h"
#include "fastsae/scratch.h"
#include "isa_kernels.h"
#include "norm_above.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// Below this a row's reciprocal scale may overflow; its quantized form is then zero.
constexpr float kLeastMaximum = 1e-30f;
// Adding and subtracting it rounds what is less than 2^22 to the nearest integer.
constexpr float kRounder = 0x1.8p23f;

template <typename T>
class Quantizer {
 public:
  Quantizer(Matrix rows, const float* shift, const float* powers, int64_t d, QuantizedRows out)
      : rows_(rows),
        shift_(shift),
        powers_(powers),
        d_(d),
        padded_((d + kLanes - 1) / kLanes * kLanes),
        out_(out),
        row_(padded_) {
    for (int64_t i = d_; i < padded_; ++i) row_[i] = 0.0f;
  }

  // Row n as whole numbers in `numbers` [d, padded], and everything that is known of it.
  void run(int64_t n, float* numbers) {
    load_row(static_cast<const T*>(rows_.data) + n * rows_.stride, shift_, d_, row_.get());
    if (out_.true_norm) out_.true_norm[n] = norm(row_.get());
    if (powers_)
      for (int64_t i = 0; i < d_; ++i) row_[i] *= powers_[i];
    F16 most = zero(), zeros = zero();
    for (int64_t i = 0; i < padded_; i += kLanes) {
      const F16 value = load(row_.get() + i);
      most = max(abs(value), most);
      // What is not finite is not zero when multiplied by it, and neither is a sum with that.
      zeros = fma(value, zero(), zeros);
    }
    const bool finite = reduce(zeros) == 0.0f;
    float lanes[kLanes], largest = 0.0f;
    store(lanes, most);
    for (float lane : lanes) largest = lane > largest ? lane : largest;

    const bool usable = finite && largest >= kLeastMaximum;
    const float scale = usable ? largest / 127.0f : 0.0f;
    const F16 times = broadcast(usable ? 127.0f / largest : 0.0f), rounder = broadcast(kRounder);
    F16 squares = zero(), residual_squares = zero();
    for (int64_t i = 0; i < padded_; i += kLanes) {
      const F16 value = load(row_.get() + i);
      const F16 number = usable ? sub(fma(value, times, rounder), rounder) : zero();
      store(numbers + i, number);
      const F16 lost = fma(number, broadcast(-scale), value);
      squares = fma(value, value, squares);
      residual_squares = fma(lost, lost, residual_squares);
    }
    // A row of zeros has no norm and no residual, exactly: then its ties are decided by the screen.
    const bool any = !(largest == 0.0f && finite);
    out_.scale[n] = scale;
    out_.norm[n] = any ? norm_above(reduce(squares), d_) : 0.0f;
    out_.residual[n] = any ? norm_above(reduce(residual_squares), d_) : 0.0f;
    if (out_.not_finite) out_.not_finite[n] = finite ? kScreened : kExhaustive;
  }

  int64_t padded() const { return padded_; }

 private:
  float norm(const float* row) const {
    F16 squares = zero();
    for (int64_t i = 0; i < padded_; i += kLanes) {
      const F16 value = load(row + i);
      squares = fma(value, value, squares);
    }
    return norm_above(reduce(squares), d_);
  }

  Matrix rows_;
  const float *shift_, *powers_;
  int64_t d_, padded_;
  QuantizedRows out_;
  Scratch<float> row_;
};

template <typename T>
void quantize(Matrix rows, const float* shift, const float* powers, int64_t n_rows, int64_t d,
              const QuantizedRows& out) {
  const int64_t bytes = (d + 3) / 4 * 4;
#pragma omp parallel
  {
    Quantizer<T> quantizer(rows, shift, powers, d, out);
    Scratch<float> numbers(quantizer.padded());
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_rows; ++n) {
      quantizer.run(n, numbers.get());
      uint8_t* to = static_cast<uint8_t*>(out.packed) + n * bytes;
      for (int64_t i = 0; i < d; ++i)
        to[i] = static_cast<uint8_t>(static_cast<int>(numbers[i]) + 128);
      for (int64_t i = d; i < bytes; ++i) to[i] = 128;
    }
  }
}

template <typename T>
void quantize_by_panels(Matrix rows, const float* powers, int64_t n_rows, int64_t d,
                        const QuantizedRows& out) {
  const int64_t bytes = (d + 3) / 4 * 4, panels = (n_rows + kPanel - 1) / kPanel;
#pragma omp parallel
  {
    Quantizer<T> quantizer(rows, nullptr, powers, d, out);
    Scratch<float> numbers(quantizer.padded());
    Scratch<int8_t> row(bytes);
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) {
      int8_t* to = static_cast<int8_t*>(out.packed) + panel * kPanel * bytes;
      for (int64_t l = 0; l < kPanel; ++l) {
        const int64_t f = panel * kPanel + l;
        std::memset(row.get(), 0, static_cast<size_t>(bytes));
        int32_t sum = 0;
        if (f < n_rows) {
          quantizer.run(f, numbers.get());
          for (int64_t i = 0; i < d; ++i) {
            row[i] = static_cast<int8_t>(static_cast<int>(numbers[i]));
            sum += row[i];
          }
        } else {
          out.scale[f] = out.norm[f] = out.residual[f] = 0.0f;
        }
        out.offset[f] = 128 * sum;
        for (int64_t i = 0; i < bytes; i += 4)
          std::memcpy(to + i * kPanel + 4 * l, row.get() + i, 4);
      }
    }
  }
}

}  // namespace

void quantize_rows(Matrix rows, const float* shift, const float* powers, int64_t n, int64_t d,
                   bool by_panels, const QuantizedRows& out) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    return by_panels ? quantize_by_panels<T>(rows, powers, n, d, out)
                     : quantize<T>(rows, shift, powers, n, d, out);
  };
  if (rows.dtype == DType::float32)
    run(static_cast<float*>(nullptr));
  else
    run(static_cast<bfloat16*>(nullptr));
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
