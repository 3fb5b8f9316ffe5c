// Rows of a ragged array, shared out over threads by the entries in them.
//
// The rows are cut into spans of equal work, some for each thread (entries, and a cost for the row
// itself), which threads take as they come free. A row that alone is more than an eighth of a
// thread's share is left for the end, where all threads work on it, each on columns of its own. A
// column's sum is the same sum whoever makes it, so no bit depends on the number of threads.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "fastsae/scratch.h"
#include "fastsae/threading.h"

namespace fastsae {
namespace FASTSAE_ISA {

// Columns are handed out by whole cache lines of either dtype.
constexpr int64_t kColumnGroup = 64;
// A row of less than this many multiply-adds (about 10 us) is not worth a meeting of the threads.
constexpr int64_t kLeastSharedWork = int64_t{1} << 15;
constexpr int64_t kSpansPerThread = 16;

template <typename Begin>
class Spans {
 public:
  // Row n owns the entries [begin(n), begin(n + 1)); `row_cost` is a row's own cost in entries.
  Spans(int64_t rows, Begin begin, int64_t row_cost, int64_t width, int64_t spans_per_thread)
      : rows_(rows), begin_(begin), row_cost_(row_cost) {
    const int64_t threads = max_threads();
    count_ = threads > 1 && rows > 1 ? spans_per_thread * threads : 1;
    const int64_t share = before(rows) / (8 * threads), least = kLeastSharedWork / (width + 1);
    shared_ = threads == 1 || width <= kColumnGroup ? INT64_MAX : share > least ? share : least;
  }

  int64_t count() const { return count_; }
  // The first row of span `i`; that of span `count()` is the number of rows.
  int64_t first_row(int64_t i) const {
    const int64_t target = before(rows_) / count_ * i + before(rows_) % count_ * i / count_;
    int64_t low = 0, high = rows_;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (before(middle) < target)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  bool shared(int64_t n) const { return begin_(n + 1) - begin_(n) > shared_; }
  // More rows than these cannot be shared.
  int64_t most_shared() const { return 8 * max_threads(); }

 private:
  int64_t before(int64_t n) const { return begin_(n) - begin_(0) + n * row_cost_; }

  int64_t rows_, count_, shared_;
  Begin begin_;
  int64_t row_cost_;
};

// many(first, end, out, partial) sees to the rows [first, end), a few shared ones excepted. For
// these sum(n, first, columns, out, partial) writes the columns [first, first + columns) of the
// row's sums to out[0 .. columns), then finish(n, out) takes all `width` of them. `out` and
// `partial` of many are [width], working memory of the thread.
template <typename Begin, typename Many, typename Sum, typename Finish>
void for_each_span(int64_t rows, Begin begin, int64_t row_cost, int64_t width,
                   int64_t spans_per_thread, Many many, Sum sum, Finish finish) {
  const Spans<Begin> spans(rows, begin, row_cost, width, spans_per_thread);
  const int64_t pieces = (width + kColumnGroup - 1) / kColumnGroup;
  Scratch<int64_t> shared(spans.most_shared());
  int64_t n_shared = 0;
  float* shared_sums = nullptr;
#pragma omp parallel
  {
    Scratch<float> out(width), partial(width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < spans.count(); ++i) {
      const int64_t end = spans.first_row(i + 1);
      for (int64_t n = spans.first_row(i); n < end;) {
        const int64_t first = n;
        while (n < end && !spans.shared(n)) ++n;
        if (first < n) many(first, n, out.get(), partial.get());
        if (n == end) break;
        int64_t at;
#pragma omp atomic capture
        at = n_shared++;
        shared[at] = n++;
      }
    }
    if (n_shared > 0) {
#pragma omp single
      {
        shared_sums =
            static_cast<float*>(std::malloc(static_cast<size_t>(n_shared * width) * sizeof(float)));
        if (!shared_sums) std::abort();
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < n_shared * pieces; ++i) {
        const int64_t first = i % pieces * kColumnGroup;
        const int64_t columns = width - first < kColumnGroup ? width - first : kColumnGroup;
        sum(shared[i / pieces], first, columns, shared_sums + i / pieces * width + first,
            partial.get());
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < n_shared; ++i) finish(shared[i], shared_sums + i * width);
    }
  }
  std::free(shared_sums);
}

// The same, row by row.
template <typename Begin, typename Sum, typename Finish>
void for_each_row(int64_t rows, Begin begin, int64_t row_cost, int64_t width, Sum sum,
                  Finish finish) {
  const auto many = [&](int64_t first, int64_t end, float* out, float* partial) {
    for (int64_t n = first; n < end; ++n) {
      sum(n, 0, width, out, partial);
      finish(n, out);
    }
  };
  for_each_span(rows, begin, row_cost, width, kSpansPerThread, many, sum, finish);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
