// Draws from rows of logits, by the contract in kd_kernels/sampling/DRAWS.md.
//
// A row is seen in groups of 128 ids. One walk gives each group's maximum and sum of exponentials; the draw is then a race
// between groups and a pick inside of the one that wins, which costs two logarithms a group and 128 exponentials a row. Filters
// only ever keep a prefix of the row in falling order, so each of them comes down to a cut, the last id that is kept; groups
// whose maximum is below the cut are not looked at again. No row is sorted.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kd/philox.h"
#include "kd/simd.h"
#include "rows.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kIds = 128;        // of a group
constexpr int64_t kBuckets = 1024;   // of the masses by logit

// The last id that is kept, in the order of falling logits and rising ids.
template <class S> struct Cut {
  S logit = -kInf<S>;
  int64_t id = std::numeric_limits<int64_t>::max();
  bool keeps(S x, int64_t i) const { return x > logit || (x == logit && i <= id); }
};

template <class S> struct Ranked {
  S logit;
  int32_t id;
};

// Comparisons of this file keep what the standard library makes of them private to it: see topk.cpp.
struct Before {
  template <class S> bool operator()(const Ranked<S>& a, const Ranked<S>& b) const {
    return (a.logit > b.logit) | ((a.logit == b.logit) & (a.id < b.id));
  }
};
struct Larger {
  template <class S> bool operator()(S a, S b) const { return a > b; }
};

template <class S> KD_INLINE S group_max(const S* x) {
  using V = typename Lanes<S>::V;
  V lanes = V{} - kInf<S>;
  for (int64_t j = 0; j < kIds; j += Lanes<S>::width) lanes = maximum(load<V>(x + j), lanes);
  return lane_max<S>(lanes);
}

// The sum of exp((x - top) inverse), by halving: j + 64, j + 32, .. With `weighted`, also that of exp(gap) gap.
template <bool kWeighted, class S> KD_INLINE S group_sum(const S* x, S top, S inverse, double* weighted) {
  using V = typename Lanes<S>::V;
  constexpr int64_t width = Lanes<S>::width, count = kIds / width;
  const V shift = V{} + (top > -kInf<S> ? top : S{}), factor = V{} + inverse;  // so that -inf stays -inf
  V share[count], lanes{};
  for (int64_t i = 0; i < count; ++i) {
    const V gap = (load<V>(x + i * width) - shift) * factor;
    share[i] = exp(gap);
    if constexpr (kWeighted) lanes += where(gap > splat<V>(-1e30), share[i] * gap, V{});
  }
  if constexpr (kWeighted) *weighted = lane_sum(lanes);
  for (int64_t half = count / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) share[i] += share[i + half];
  S last[width];
  store(last, share[0]);
  for (int64_t half = width / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) last[i] += last[i + half];
  return last[0];
}

// One row, and what is known of it. Its memory is the thread's.
template <class S> class Row {
 public:
  static int64_t groups(int64_t vocab) { return (vocab + kIds - 1) / kIds; }

  // S's that a row takes: its logits, three numbers a group, and ranked ids.
  static int64_t scratch(const SampleRows<S>& job) {
    const bool ranks = job.top_k || job.top_p;
    const int64_t ranked = ranks ? (job.vocab * sizeof(Ranked<S>) + sizeof(S) - 1) / sizeof(S) : 0;
    return (job.logits.is_plain() ? 0 : job.vocab + 16) + 3 * groups(job.vocab) + 16 + ranked;
  }

  Row(const SampleRows<S>& job, int64_t row, S* memory)
      : job_(job), row_(row), vocab_(job.vocab), groups_(groups(job.vocab)), inverse_(job.inverse[row]),
        place_{static_cast<uint64_t>(job.seeds[row]), static_cast<uint64_t>(job.keys[row]),
               static_cast<uint32_t>(job.positions[row])} {
    const int64_t ranked = (job.top_k || job.top_p) ? vocab_ : 0;
    ranked_ = reinterpret_cast<Ranked<S>*>(memory);
    memory += (ranked * sizeof(Ranked<S>) + sizeof(S) - 1) / sizeof(S);
    top_ = memory;
    model_sum_ = top_ + groups_;
    sum_ = model_sum_ + groups_;
    x_ = tempered(job.logits, row, 1.0, sum_ + groups_, vocab_);
  }

  void run() {
    const bool stats = job_.entropy != nullptr;
    if (!(stats ? summarise<true>() : summarise<false>()) || std::isnan(inverse_)) return write(-1, kNaN, kNaN, kNaN, kNaN);
    const double model_log_sum = std::log(total(model_sum_, 1.0)), entropy = stats ? model_entropy(model_log_sum) : 0;
    const int64_t best = first_of_max();
    const bool greedy = inverse_ == kInf<S>;
    if (!greedy) filter();
    const int64_t id = job_.given ? job_.given[row_] : greedy ? best : draw();
    double logprob;
    if (greedy) logprob = id == best ? 0.0 : -kInf<double>;
    else if (!cut_.keeps(x_[id], id)) logprob = -kInf<double>;
    else logprob = fall(x_[id]) * inverse_ - std::log(total(sum_, inverse_));
    write(id, logprob, fall(x_[id]) - model_log_sum, entropy, max_ + model_log_sum);
  }

 private:
  static constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

  void write(int64_t id, double logprob, double model_logprob, double entropy, double lse) {
    job_.ids[row_] = id;
    job_.logprobs[row_] = static_cast<S>(logprob);
    job_.model_logprobs[row_] = static_cast<S>(model_logprob);
    if (!job_.entropy) return;
    job_.entropy[row_] = static_cast<S>(entropy);
    job_.lse[row_] = static_cast<S>(lse);
  }

  double fall(S x) const { return static_cast<double>(x) - max_; }

  // The logits of a group: where they are, or in `buffer` where ids are cut off or do not exist.
  const S* group(int64_t g, const Cut<S>& cut, S* buffer) const {
    const int64_t begin = g * kIds, n = std::min(kIds, vocab_ - begin);
    const bool is_cut = cut.logit > -kInf<S>;
    if (n == kIds && !is_cut) return x_ + begin;
    for (int64_t j = 0; j < kIds; ++j) buffer[j] = j < n && cut.keeps(x_[begin + j], begin + j) ? x_[begin + j] : -kInf<S>;
    return buffer;
  }

  // Maxima and sums of all groups at temperature 1. False if the row is no distribution.
  template <bool kStats> bool summarise() {
    S buffer[kIds];
    max_ = -kInf<S>;
    double spoiled = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      const S* x = group(g, Cut<S>(), buffer);
      top_[g] = group_max(x);
      double weighted = 0;
      model_sum_[g] = group_sum<kStats>(x, top_[g], S{1}, &weighted);
      if (kStats) sum_[g] = static_cast<S>(weighted);
      spoiled += model_sum_[g];
      max_ = std::max(max_, top_[g]);
    }
    return max_ > -kInf<S> && !std::isnan(spoiled);
  }

  // Of the sums that summarise<true> left in sum_.
  double model_entropy(double log_sum) const {
    double weighted = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      if (model_sum_[g] == 0) continue;
      const double gap = fall(top_[g]);
      weighted += std::exp(gap) * (sum_[g] + gap * model_sum_[g]);
    }
    return log_sum - weighted * std::exp(-log_sum);
  }

  int64_t first_of_max() const {
    for (int64_t g = 0;; ++g)
      if (top_[g] == max_) return g * kIds + first_index_of(x_ + g * kIds, max_, std::min(kIds, vocab_ - g * kIds));
  }

  // Sum over the groups of exp((top - max) inverse) sum.
  double total(const S* sum, double inverse) const {
    double all = 0;
    for (int64_t g = 0; g < groups_; ++g)
      if (sum[g] > 0) all += std::exp(fall(top_[g]) * inverse) * sum[g];
    return all;
  }

  // Sums of what the cut leaves, at the row's temperature.
  void sum_up() {
    if (cut_.logit == -kInf<S> && inverse_ == 1) {
      std::copy(model_sum_, model_sum_ + groups_, sum_);
      return;
    }
    S buffer[kIds];
    for (int64_t g = 0; g < groups_; ++g)
      sum_[g] = top_[g] < cut_.logit ? S{} : group_sum<false>(group(g, cut_, buffer), top_[g], inverse_, nullptr);
  }

  void filter() {
    if (job_.top_k && job_.top_k[row_] < vocab_) cut_ = cut_of_top_k(job_.top_k[row_]);
    if (job_.top_p && job_.top_p[row_] < 1) {
      sum_up();
      cut_ = cut_of_top_p(job_.top_p[row_]);
    }
    if (job_.min_p && job_.min_p[row_] > 0) {
      const S least = least_of_min_p(std::log(job_.min_p[row_]));
      if (least > cut_.logit) cut_ = {least, vocab_};
    }
    sum_up();
  }

  // The k-th largest of the groups' maxima is at most the k-th largest logit, and only groups that reach it matter.
  Cut<S> cut_of_top_k(int64_t k) {
    S bound = std::numeric_limits<S>::lowest();
    if (k <= groups_) {
      std::copy(top_, top_ + groups_, sum_);
      std::nth_element(sum_, sum_ + k - 1, sum_ + groups_, Larger());
      bound = std::max(bound, sum_[k - 1]);
    }
    int64_t count = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      if (top_[g] < bound) continue;
      const int64_t end = std::min(vocab_, (g + 1) * kIds);
      for (int64_t i = g * kIds; i < end; ++i)
        if (x_[i] >= bound) ranked_[count++] = {x_[i], static_cast<int32_t>(i)};
    }
    if (count <= k) return {};
    std::nth_element(ranked_, ranked_ + k - 1, ranked_ + count, Before());
    return {ranked_[k - 1].logit, ranked_[k - 1].id};
  }

  // Masses by logit in buckets; then, one by one, those of the bucket in which the prefix ends. Ids below `floor` have less than
  // 1 - top_p of the mass together, so the prefix ends above them.
  Cut<S> cut_of_top_p(double top_p) {
    const double all = total(sum_, inverse_), target = top_p * all;
    const double reach = std::log(vocab_ / ((1 - top_p) * all)) + 1e-3;
    const S lowest = std::max(static_cast<double>(least()), max_ - reach / inverse_), floor = std::nextafter(lowest, -kInf<S>);
    const S scale = static_cast<S>((kBuckets - 1) / std::max(max_ - static_cast<double>(floor), 1e-30));
    double mass[kBuckets] = {};
    over_ids<true>(floor, scale, [&](int64_t bucket, S share, int64_t) { mass[bucket] += share; });
    int64_t last = 0;
    double before = 0, after = mass[0];
    for (int64_t b = 1; b < kBuckets && after < target; ++b)
      if (mass[b] > 0) before = after, after += mass[b], last = b;

    int64_t count = 0, end = 0;
    over_ids<false>(floor, scale, [&](int64_t bucket, S, int64_t i) {
      if (bucket == last) ranked_[count++] = {x_[i], static_cast<int32_t>(i)};
    });
    std::sort(ranked_, ranked_ + count, Before());
    while (end < count - 1 && (before += std::exp(fall(ranked_[end].logit) * inverse_)) < target) ++end;
    return {ranked_[end].logit, ranked_[end].id};
  }

  // Calls body(bucket, exp((x - max) inverse), id) for the ids that the cut keeps and that are not below the floor.
  template <bool kShares, class Body> void over_ids(S floor, S scale, Body body) const {
    S buffer[kIds], share[kIds] = {};
    int32_t bucket[kIds];
    for (int64_t g = 0; g < groups_; ++g) {
      if (top_[g] < floor) continue;
      const S* x = group(g, cut_, buffer);
      for (int64_t j = 0; j < kIds; ++j) bucket[j] = x[j] >= floor ? static_cast<int32_t>((max_ - x[j]) * scale) : -1;
      if (kShares) shares(x, share);
      for (int64_t j = 0; j < kIds; ++j)
        if (bucket[j] >= 0) body(bucket[j], share[j], g * kIds + j);
    }
  }

  void shares(const S* x, S* out) const {
    using V = typename Lanes<S>::V;
    for (int64_t j = 0; j < kIds; j += Lanes<S>::width)
      store(out + j, exp((load<V>(x + j) - (V{} + max_)) * (V{} + inverse_)));
  }

  // The smallest logit but -inf.
  S least() const {
    S least = max_;
    for (int64_t i = 0; i < vocab_; ++i) least = std::min(least, x_[i] > -kInf<S> ? x_[i] : least);
    return least;
  }

  // The smallest number x with (x - max) inverse >= log(min_p).
  S least_of_min_p(double log_min_p) const {
    const auto is_kept = [&](S x) { return fall(x) * inverse_ >= log_min_p; };
    S x = static_cast<S>(std::max<double>(max_ + log_min_p / inverse_, std::numeric_limits<S>::lowest()));
    while (!is_kept(x)) x = std::nextafter(x, kInf<S>);
    for (S below; (below = std::nextafter(x, -kInf<S>)) > -kInf<S> && is_kept(below);) x = below;
    return x;
  }

  int64_t draw() const {
    int64_t winner = 0;
    double best = -kInf<double>;
    for (int64_t block = 0; 4 * block < groups_; ++block) {
      const Words w = words(place_, job_.race, static_cast<uint32_t>(block), 0);
      for (int64_t g = 4 * block; g < std::min(4 * block + 4, groups_); ++g) {
        if (!(sum_[g] > 0)) continue;
        const double noise = -std::log1p(-uniform(w.word[g % 4]));
        const double score = fall(top_[g]) * inverse_ + std::log(sum_[g] / noise);
        if (score > best) best = score, winner = g;
      }
    }
    return pick(winner);
  }

  int64_t pick(int64_t g) const {
    S buffer[kIds];
    const S* x = group(g, cut_, buffer);
    double running[kIds], sum = 0;
    for (int64_t j = 0; j < kIds; ++j) {
      if (x[j] > -kInf<S>) sum += std::exp((static_cast<double>(x[j]) - top_[g]) * inverse_);
      running[j] = sum;
    }
    const Words w = words(place_, job_.race + 1, static_cast<uint32_t>(g / 4), 0);
    const double target = uniform(w.word[g % 4]) * sum;
    int64_t j = 0;
    while (!(running[j] > target)) ++j;
    return g * kIds + j;
  }

  const SampleRows<S>& job_;
  const int64_t row_, vocab_, groups_;
  const S inverse_;
  const Place place_;
  Ranked<S>* ranked_;             // [vocab]
  S *top_, *model_sum_, *sum_;    // [groups]: maxima, and sums at temperature 1 and at the row's
  const S* x_;                    // [vocab]
  S max_;
  Cut<S> cut_;
};

template <class S> void all_rows(const SampleRows<S>& job) {
#pragma omp parallel num_threads(job.threads)
  {
    Scratch<S> scratch(Row<S>::scratch(job));
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < job.rows; ++row) Row<S>(job, row, scratch.data).run();
  }
}

}  // namespace

void sample_rows(const SampleRows<float>& job) { all_rows(job); }
void sample_rows(const SampleRows<double>& job) { all_rows(job); }

}  // namespace KD_ISA
}  // namespace kd
