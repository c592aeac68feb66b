// The k largest of each row with the exact mass of the rest, in one pass over the logits.
//
// A row has a bound, which is at most its k-th largest logit. Logits above the bound are collected as candidates; all
// others go into the sum of the tail at once, so there is one exponential a logit (and one more for each further
// temperature). When the candidates' room is full, the k best stay, the others join the tail, and the bound rises to
// the k-th. The tail is thus summed over the very columns that are left out, relative to its own maximum: a tail of
// e^-200 is as exact as one of 1/2.
#include "topk.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kd/simd.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // columns that are looked at in one go: they stay in the first-level cache
constexpr int64_t kVectors = 8;   // a group of so many vectors is the least that is tested for candidates

template <class S> constexpr S kInf = std::numeric_limits<S>::infinity();
template <class S> constexpr int64_t kGroup = kVectors * Lanes<S>::width;
static_assert(kGroup<float> <= kTopkSlack && kBlock % kGroup<float> == 0, "a group must fit");

// As an argument of std::nth_element and std::sort, a type of this file keeps what is instantiated private to this
// file. Were it shared, the linker could put AVX-512 code into the baseline.
struct Better {
  template <class S> bool operator()(const Candidate<S>& a, const Candidate<S>& b) const {
    return (a.logit > b.logit) | ((a.logit == b.logit) & (a.id < b.id));
  }
};

// What is known of a row between two panels. The tail's sums are of exp((z - reference) / T), at T = 1 first.
template <class S> class Row {
 public:
  Row(const TopkRows<S>& job, int64_t row)
      : job_(job), candidates_(job.candidates + row * job.capacity), count_(job.counts[row]),
        state_(job.running + row * (3 + job.temperatures)) {
    if (job.first_column > 0) return;
    count_ = 0;
    bound() = reference() = -kInf<double>;
    std::fill(sums(), sums() + 1 + job.temperatures, 0.0);
  }

  // n columns of the row, the first of which has the id `first`.
  void add(const S* x, int64_t n, int64_t first) {
    const int64_t whole = n - n % kGroup<S>;
    for (int64_t begin = 0; begin < whole; begin += kBlock)
      add_block(x + begin, std::min(kBlock, whole - begin), first + begin);
    if (whole == n) return;
    S last[kGroup<S>];
    pad(last, x + whole, n - whole);
    add_block(last, kGroup<S>, first + whole);
  }

  // Writes the results.
  void finish(int64_t* ids, S* logprobs, S* tail_logprob, S* log_z) {
    prune();
    std::sort(candidates_, candidates_ + count_, Better());
    const double top = count_ > 0 ? candidates_[0].logit : -kInf<double>;
    if (top == kInf<double>) count_ = kTopkInfinite;
    else if (std::isnan(sums()[0])) count_ = kTopkNaN;
    if (count_ <= 0) return;

    const double tail_height = reference() - top;  // of the tail's maximum; -inf where there is no tail
    const double kept = sum_candidates(0, top, 1.0), tail = std::exp(tail_height) * sums()[0];
    const double log_sum = std::log(kept + tail);
    for (int64_t t = 0; t < job_.temperatures; ++t) {
      const double inverse = job_.inverses[t];
      const double sum = sum_candidates(0, top, inverse) + std::exp(tail_height * inverse) * sums()[1 + t];
      log_z[t] = static_cast<S>(std::log(sum) - log_sum * inverse);
    }

    const int64_t length = job_.mass < kInf<double> ? shortest_prefix(job_.mass * (kept + tail), top) : count_;
    for (int64_t i = 0; i < length; ++i) {
      ids[i] = candidates_[i].id;
      logprobs[i] = static_cast<S>((candidates_[i].logit - top) - log_sum);
    }
    // The largest of what is left out: the first candidate that the mass made superfluous, or the tail's maximum.
    const double left = length < count_ ? candidates_[length].logit : reference();
    const double tail_sum = sums()[0] > 0 ? std::exp(reference() - left) * sums()[0] : 0;
    const double left_sum = sum_candidates(length, left, 1.0) + tail_sum;
    const double left_logprob = left_sum > 0 ? (left - top) + std::log(left_sum) - log_sum : -kInf<double>;
    *tail_logprob = static_cast<S>(std::min(0.0, left_logprob));
    count_ = length;
  }

 private:
  using V = typename Lanes<S>::V;

  double& bound() { return state_[0]; }
  double& reference() { return state_[1]; }
  double* sums() { return state_ + 2; }

  static void pad(S* group, const S* x, int64_t n) {
    for (int64_t i = 0; i < kGroup<S>; ++i) group[i] = i < n ? x[i] : -kInf<S>;
  }

  // `n` is a multiple of the group. NaN is above nothing and thus goes into the tail, whose sum it spoils for good.
  void add_block(const S* x, int64_t n, int64_t first) {
    const int64_t groups = n / kGroup<S>;
    V maxima[kBlock / kGroup<S>];
    for (int64_t g = 0; g < groups; ++g) {
      maxima[g] = V{} - kInf<S>;
      for (int64_t i = 0; i < kVectors; ++i)
        maxima[g] = maximum(load<V>(x + g * kGroup<S> + i * Lanes<S>::width), maxima[g]);
    }
    // One bound for the whole block: a column is either a candidate or in the tail, even if the bound rises meanwhile.
    if (bound() == -kInf<double> && count_ == 0) bound() = first_bound(maxima, groups);
    const S limit = static_cast<S>(bound());
    V most = V{} - kInf<S>;  // of the columns in the tail
    for (int64_t g = 0; g < groups; ++g) {
      if (lanes_above(maxima[g], V{} + limit) == 0) {
        most = maximum(maxima[g], most);
        continue;
      }
      if (count_ + kGroup<S> > job_.capacity) prune();
      most = maximum(collect(x + g * kGroup<S>, limit, first + g * kGroup<S>), most);
    }
    add_to_tail(x, n, limit, lane_max<S>(most), x + n);
  }

  // Collects the candidates of one group, and returns the maximum of the others.
  V collect(const S* x, S limit, int64_t first) {
    const V bound = V{} + limit;
    V most = V{} - kInf<S>;
    Candidate<S>* end = candidates_ + count_;
    for (int64_t i = 0; i < kGroup<S>; i += Lanes<S>::width) {
      const V z = load<V>(x + i);
      most = maximum(tail_only(z, bound), most);
      for (uint32_t above = lanes_above(z, bound); above != 0; above &= above - 1) {
        const int64_t column = i + __builtin_ctz(above);
        *end++ = {x[column], static_cast<int32_t>(first + column)};
      }
    }
    count_ = end - candidates_;
    return most;
  }

  // Maxima of k disjoint sets: the least of them is at most the k-th largest of all. Returns a number just below the
  // least of the k largest maxima, or -inf where there are too few.
  double first_bound(const V* maxima, int64_t groups) const {
    constexpr int64_t width = Lanes<S>::width;
    if (groups * width < job_.k) return -kInf<double>;
    V sets[kBlock / kGroup<S>];
    std::memcpy(sets, maxima, groups * sizeof(V));
    for (int64_t half; groups > 1 && (half = (groups + 1) / 2) * width >= 2 * job_.k; groups = half)
      for (int64_t g = half; g < groups; ++g) sets[g - half] = maximum(sets[g], sets[g - half]);
    S values[kBlock / kVectors];
    std::memcpy(values, sets, groups * sizeof(V));
    Candidate<S> best[kBlock / kVectors];
    for (int64_t i = 0; i < groups * width; ++i) best[i] = {values[i], 0};
    std::nth_element(best, best + job_.k - 1, best + groups * width, Better());
    const double least = std::min(best[job_.k - 1].logit, std::numeric_limits<S>::max());
    return least - std::max(std::abs(least) * 1e-6, 1e-30);
  }

  // Keeps the k best candidates.
  void prune() {
    if (count_ <= job_.k) return;
    std::nth_element(candidates_, candidates_ + job_.k - 1, candidates_ + count_, Better());
    bound() = candidates_[job_.k - 1].logit;
    S group[kGroup<S>];
    for (int64_t begin = job_.k; begin < count_; begin += kGroup<S>) {
      S most = -kInf<S>;
      for (int64_t i = 0; i < kGroup<S>; ++i) {
        group[i] = begin + i < count_ ? candidates_[begin + i].logit : -kInf<S>;
        most = std::max(most, group[i]);
      }
      add_to_tail(group, kGroup<S>, kInf<S>, most, group);
    }
    count_ = job_.k;
  }

  // The columns that are not above the bound; -inf for the others, which adds nothing to a sum of exponentials.
  static V tail_only(V z, V bound) { return where(z > bound, V{} - kInf<S>, z); }

  // Adds the columns that are not above the limit, the greatest of which is `most`. What is read `next` is fetched
  // into cache meanwhile.
  void add_to_tail(const S* x, int64_t n, S limit, S most, const S* next) {
    raise_reference(most);
    const V bound = V{} + limit;
    const bool empty = reference() == -kInf<double>;  // -inf minus any number will do, minus itself it would be NaN
    const S height = empty ? S{0} : static_cast<S>(reference());
    sums()[0] += sum_exp(x, n, bound, height, next, [](V gap) { return gap; });
    for (int64_t t = 0; t < job_.temperatures; ++t) {
      const V inverse = splat<V>(job_.inverses[t]);
      sums()[1 + t] += sum_exp(x, n, bound, height, next, [=](V gap) { return gap * inverse; });
    }
  }

  void raise_reference(double to) {
    if (!(to > reference())) return;
    const double gap = reference() - to;
    sums()[0] *= std::exp(gap);
    for (int64_t t = 0; t < job_.temperatures; ++t) sums()[1 + t] *= std::exp(gap * job_.inverses[t]);
    reference() = to;
  }

  template <class Temper>
  static double sum_exp(const S* x, int64_t n, V bound, S height, const S* next, Temper temper) {
    constexpr int64_t width = Lanes<S>::width;
    V lanes[4] = {};  // four sums at a time: they need not wait for each other, and each stays short
    for (int64_t v = 0; v < n; v += 4 * width)
      for (int64_t i = 0; i < 4; ++i) {
        const V z = load<V>(x + v + i * width);
        __builtin_prefetch(next + v + i * width);
        lanes[i] += exp(temper(tail_only(z, bound) - height));
      }
    return lane_sum((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
  }

  // How many candidates it takes for their sum of exp(z - height) to reach `sum`; at most all.
  int64_t shortest_prefix(double sum, double height) const {
    double reached = 0;
    int64_t length = 0;
    while (length < count_ && reached < sum) reached += std::exp(candidates_[length++].logit - height);
    return length;
  }

  double sum_candidates(int64_t from, double height, double inverse) const {
    double sum = 0;
    for (int64_t i = from; i < count_; ++i) sum += std::exp((candidates_[i].logit - height) * inverse);
    return sum;
  }

  const TopkRows<S>& job_;
  Candidate<S>* candidates_;
  int64_t& count_;
  double* state_;  // bound, reference, sums
};

template <class S> void all_rows(const TopkRows<S>& job) {
#pragma omp parallel for num_threads(job.threads) schedule(static)
  for (int64_t r = 0; r < job.rows; ++r) {
    Row<S> row(job, r);
    row.add(job.panel + r * job.stride, job.columns, job.first_column);
    if (job.is_last)
      row.finish(job.ids + r * job.k, job.logprobs + r * job.k, job.tail_logprob + r, job.log_z + r * job.temperatures);
  }
}

}  // namespace

void topk_rows(const TopkRows<float>& job) { all_rows(job); }
void topk_rows(const TopkRows<double>& job) { all_rows(job); }

}  // namespace KD_ISA
}  // namespace kd
