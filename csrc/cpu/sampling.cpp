// One id a row: a race between groups of 128 ids, and a pick inside of the one that wins. Without filters a row is met panel by
// panel, each logit once, while it is in cache; of what has passed, the group that leads is kept. Filters need whole rows. They
// look at the groups' maxima first, so that only ids near the cut are ever compared; nothing is sorted whole.
#include "sampling.h"

#include <memory>

#include "groups.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kSmallRow = 4096;  // of so many ids, all are compared
constexpr int64_t kFew = 256;        // ids inside of a bracket that is no longer halved
constexpr double kDeepest = 128;     // nats below the maximum: what lies deeper has no mass in fp32

template <class S> Place place_of(const Sampling<S>& job, int64_t row) {
  return {static_cast<uint64_t>(job.seeds[row]), static_cast<uint64_t>(job.keys[row]), static_cast<uint32_t>(job.positions[row])};
}

// More than ln x, for a normal x > 0, by 0.71 at most.
KD_INLINE double log_bound(double x) {
  const auto exponent = static_cast<int64_t>(bit_cast<uint64_t>(x) >> 52) - 1023;
  return (static_cast<double>(exponent) + 1.01) * 0.69314718055994531;
}

// Lets a group of sum s race, v its uniform. True: it leads now. Two groups are compared by themselves, so that the maximum of the
// row need not be known. e >= v gives a bound of the score: nearly all groups need no logarithm.
template <class S> KD_INLINE bool join_race(Leader<S>& leader, S top, S sum, double v, int64_t group, double r) {
  if (sum == 0) return false;
  const double rise = leader.group < 0 ? 0 : (static_cast<double>(top) - leader.top) * r;
  if (leader.group >= 0 && rise + log_bound(sum / v) <= leader.height) return false;
  const double height = std::log(sum / -std::log1p(-v));
  if (leader.group >= 0 && !(rise + height > leader.height)) return false;
  leader = {top, height, group};
  return true;
}

// The id of the winning group that is drawn, z its logits.
template <class S> int64_t pick(const S* z, int64_t ids, S top, double r, int64_t group, uint32_t purpose, const Place& place) {
  double running[kGroupIds], sum = 0;
  for (int64_t v = 0; v < ids; ++v) running[v] = sum += std::exp((z[v] - static_cast<double>(top)) * r);
  const double target = uniform(place.words(purpose, static_cast<uint32_t>(group / 4)).w[group % 4]) * sum;
  int64_t v = 0;
  while (running[v] <= target) ++v;
  return group * kGroupIds + v;
}

template <class S> void write_nothing(const Sampling<S>& job, int64_t row) {
  const S nan = std::numeric_limits<S>::quiet_NaN();
  job.ids[row] = -1;
  job.logprobs[row] = job.model_logprobs[row] = nan;
  if (job.entropy) job.entropy[row] = job.lse[row] = nan;
}

// A row without filters.
template <class S> class Stream {
 public:
  Stream(const Sampling<S>& job, int64_t row)
      : job_(job), row_(row), at_(job.running[row]), r_(job.inverse[row]), is_drawn_(r_ < kInf<double>),
        is_tempered_(is_drawn_ && r_ != 1) {}

  // The columns of the job. Each group is added by itself, so that no result depends on how a row is cut into panels.
  void add(const S* z) {
    if (job_.first_column == 0) at_ = {-kInf<S>, -kInf<S>, 0, 0, 0, 0, {S{}, 0, -1}, {}};
    if (job_.given) {
      const int64_t column = job_.given[row_] - job_.first_column;
      if (column >= 0 && column < job_.columns) at_.given = z[column];
    }
    const Place place = place_of(job_, row_);
    Words words{};
    S last[kGroupIds];
    for (int64_t begin = 0; begin < job_.columns; begin += kGroupIds) {
      const int64_t group = (job_.first_column + begin) / kGroupIds;
      const S* ids = whole_group(z + begin, job_.columns - begin, last);
      const S top = block_max(ids, 0, kGroupIds);
      double weighted = 0;
      const S own = job_.entropy ? sum_group(ids, top, S{1}, &weighted) : sum_group<S>(ids, top, S{1}, nullptr);
      const S tempered = is_tempered_ ? sum_group<S>(ids, top, static_cast<S>(r_), nullptr) : own;
      if (top > at_.max) raise(top, group, ids);
      if (own != 0) {
        const double fall = static_cast<double>(top) - at_.max, share = std::exp(fall);
        at_.own += share * own;
        at_.weighted += share * (weighted + fall * own);
        if (is_tempered_) at_.tempered += std::exp(fall * r_) * tempered;
      }
      if (!is_drawn_ || job_.given) continue;
      if (begin == 0 || group % 4 == 0) words = place.words(job_.race, static_cast<uint32_t>(group / 4));
      if (join_race(at_.leader, top, tempered, uniform(words.w[group % 4]), group, r_))
        std::copy(ids, ids + kGroupIds, at_.winner);
    }
  }

  void finish() {
    if (!(at_.own > 0 && at_.own < kInf<double>) || std::isnan(r_)) return write_nothing(job_, row_);
    const double log_sum = std::log(at_.own);
    int64_t id = at_.best;
    S logit = at_.max;
    if (job_.given) {
      id = job_.given[row_];
      logit = at_.given;
    } else if (is_drawn_) {
      const Leader<S>& leader = at_.leader;
      id = pick(at_.winner, kGroupIds, leader.top, r_, leader.group, job_.race + 1, place_of(job_, row_));
      logit = at_.winner[id % kGroupIds];
    }
    const double fall = static_cast<double>(logit) - at_.max;
    const double greedy = id == at_.best ? 0.0 : -kInf<double>;
    const double drawn = is_tempered_ ? fall * r_ - std::log(at_.tempered) : fall - log_sum;
    job_.ids[row_] = id;
    job_.logprobs[row_] = static_cast<S>(is_drawn_ ? drawn : greedy);
    job_.model_logprobs[row_] = static_cast<S>(fall - log_sum);
    if (!job_.entropy) return;
    job_.entropy[row_] = static_cast<S>(log_sum - at_.weighted / at_.own);
    job_.lse[row_] = static_cast<S>(at_.max + log_sum);
  }

 private:
  void raise(S top, int64_t group, const S* ids) {
    if (at_.max > -kInf<S>) {
      const double fall = static_cast<double>(at_.max) - top, share = std::exp(fall);
      at_.weighted = share * (at_.weighted + fall * at_.own);
      at_.own *= share;
      at_.tempered *= std::exp(fall * r_);
    }
    at_.max = top;
    at_.best = group * kGroupIds + first_index_of(ids, top, kGroupIds);
  }

  const Sampling<S>& job_;
  const int64_t row_;
  Running<S>& at_;
  const double r_;
  const bool is_drawn_, is_tempered_;
};

// A whole row.
template <class S> class Row {
 public:
  explicit Row(const Sampling<S>& job)
      : job_(job), n_(job.vocab), own_(n_), tempered_(n_), weighted_(job.entropy ? own_.count() : 0),
        masked_(job.top_k || job.top_p || job.min_p ? job.vocab : 0) {}

  void draw(int64_t row, const S* z) {
    const S max = add_groups(z, n_, S{1}, own_, job_.entropy ? weighted_.data() : nullptr);
    const double sum = total(own_, max, 1.0), r = job_.inverse[row];
    if (!(sum > 0 && sum < kInf<double>) || std::isnan(r)) return write_nothing(job_, row);
    if (job_.entropy) write_stats(row, max, sum);
    const bool is_greedy = r == kInf<double>;
    const bool is_filtered = !is_greedy && filter(row, z, max, r);
    const S* left = is_filtered ? masked_.data() : z;
    int64_t id = job_.given ? job_.given[row] : -1;
    double logprob;
    if (is_greedy) {
      const int64_t best = first_index_of(z, max, n_);
      if (!job_.given) id = best;
      logprob = id == best ? 0.0 : -kInf<double>;
    } else {
      const bool is_own = !is_filtered && job_.inverse[row] == 1;
      if (!is_own) add_groups(left, n_, job_.inverse[row], tempered_, nullptr);
      const Groups<S>& groups = is_own ? own_ : tempered_;
      if (!job_.given) {
        const Place place = place_of(job_, row);
        const Leader<S> leader = race(groups, r, place);
        const int64_t begin = leader.group * kGroupIds;
        id = pick(left + begin, std::min<int64_t>(kGroupIds, n_ - begin), leader.top, r, leader.group, job_.race + 1, place);
      }
      logprob = (static_cast<double>(left[id]) - max) * r - std::log(total(groups, max, r));
    }
    job_.ids[row] = id;
    job_.logprobs[row] = static_cast<S>(logprob);
    job_.model_logprobs[row] = static_cast<S>(static_cast<double>(z[id]) - max - std::log(sum));
  }

 private:
  void write_stats(int64_t row, S max, double sum) {
    double products = 0;
    for (int64_t g = 0; g < own_.count(); ++g) {
      const double fall = static_cast<double>(own_.top[g]) - max;
      if (own_.sum[g] != 0) products += std::exp(fall) * (weighted_[g] + fall * own_.sum[g]);
    }
    job_.entropy[row] = static_cast<S>(std::log(sum) - products / sum);
    job_.lse[row] = static_cast<S>(max + std::log(sum));
  }

  Leader<S> race(const Groups<S>& groups, double r, const Place& place) const {
    Leader<S> leader{S{}, 0, -1};
    Words words{};
    for (int64_t g = 0; g < groups.count(); ++g) {
      if (g % 4 == 0) words = place.words(job_.race, static_cast<uint32_t>(g / 4));
      join_race(leader, groups.top[g], groups.sum[g], uniform(words.w[g % 4]), g, r);
    }
    return leader;
  }

  // Writes to masked_ the ids that the filters leave; false: they leave all.
  //
  // What they leave is all ids with a logit of at least `above_`, and those in kept_, whose logits are lower.
  bool filter(int64_t row, const S* z, S max, double r) {
    const int64_t k = job_.top_k ? job_.top_k[row] : n_;
    const double p = job_.top_p ? job_.top_p[row] : 1.0, least = job_.min_p ? job_.min_p[row] : 0.0;
    const double lowest = std::log(least);  // -inf: off
    const auto is_low = [&](S logit) { return (static_cast<double>(logit) - max) * r < lowest; };
    if (k >= n_ && p >= 1.0 && least <= 0.0) return false;
    above_ = kInf<S>;
    if (k < n_) {
      collect_first(z, n_, own_, k, maxima_, kept_);
      if (p < 1.0) weigh_kept(max, r), cut_at_mass(p * mass());
    } else if (p < 1.0) {
      take_mass(z, p, max, r);
    } else {
      collect(z, n_, own_, static_cast<S>(max + (lowest * (1 + 1e-6) - 1e-6) / r), kept_);  // a little more than stays
    }
    if (above_ < kInf<S> && is_low(above_)) {
      collect(z, n_, own_, above_, kept_);
      above_ = kInf<S>;
    }
    kept_.erase(std::remove_if(kept_.begin(), kept_.end(), [&](const Kept<S>& x) { return is_low(x.logit); }), kept_.end());
    over_columns<S>(0, n_, [&](auto lane, int64_t v) {
      using T = decltype(lane);
      const T logit = load<T>(z + v);
      store(masked_.data() + v, where(logit >= T{} + above_, logit, T{} - kInf<S>));
    });
    for (const Kept<S>& x : kept_) masked_[x.id] = x.logit;
    return true;
  }

  void weigh_kept(S max, double r) {
    for (Kept<S>& x : kept_) x.weight = std::exp((static_cast<double>(x.logit) - max) * r);
  }

  // The shortest prefix of all ids that has the share p of the mass. Weights are formed once; then a bracket of the cut is halved
  // until few ids lie inside of it, and those alone are compared.
  void take_mass(const S* z, double p, S max, double r) {
    if (n_ <= kSmallRow) {
      collect(z, n_, own_, -kInf<S>, kept_);
      weigh_kept(max, r);
      return cut_at_mass(p * mass());
    }
    const double wanted = p * weigh(z, max, static_cast<S>(r));
    double low = 4, high = 0;  // depths below the maximum, in nats at the row's temperature
    const auto bound = [&](double depth) { return depth < kDeepest ? static_cast<S>(max - depth / r) : -kInf<S>; };
    Part below = part_above(z, bound(low)), over = {0, 0};
    above_ = kInf<S>;
    while (below.mass < wanted && low < kDeepest) {
      above_ = bound(low), over = below, high = low;
      below = part_above(z, bound(low *= 2));
    }
    for (int halving = 0; halving < 24 && below.count - over.count > kFew; ++halving) {
      const double middle = (low + high) / 2;
      const Part part = part_above(z, bound(middle));
      if (part.mass < wanted) above_ = bound(middle), over = part, high = middle;
      else below = part, low = middle;
    }
    collect(z, n_, own_, bound(low), kept_);
    kept_.erase(std::remove_if(kept_.begin(), kept_.end(), [&](const Kept<S>& x) { return x.logit >= above_; }), kept_.end());
    weigh_kept(max, r);
    cut_at_mass(wanted - over.mass);
  }

  // exp((z - max) r) of every id to weights_. Returns their sum.
  double weigh(const S* z, S max, S r) {
    weights_.resize(n_);
    double sum = 0;
    for (int64_t begin = 0; begin < n_; begin += kBlock) {
      typename Lanes<S>::V lanes{};
      over_columns<S>(begin, std::min(begin + kBlock, n_), [&](auto lane, int64_t v) {
        using T = decltype(lane);
        const T e = exp_fall((load<T>(z + v) - (T{} + max)) * (T{} + r));
        store(weights_.data() + v, e);
        if constexpr (sizeof(T) == sizeof(lanes)) lanes += e;
        else sum += e;
      });
      sum += lane_sum(lanes);
    }
    return sum;
  }

  struct Part {
    double mass;
    int64_t count;
  };

  // Of the ids with a logit of at least `bound`, -inf excepted.
  Part part_above(const S* z, S bound) const {
    Part part{0, 0};
    for (int64_t begin = 0; begin < n_; begin += kBlock) {
      typename Lanes<S>::V mass{}, count{};
      double rest = 0, rest_count = 0;
      over_columns<S>(begin, std::min(begin + kBlock, n_), [&](auto lane, int64_t v) {
        using T = decltype(lane);
        const T logit = load<T>(z + v);
        const auto is_above = logit >= T{} + bound;
        const T weight = where(is_above, load<T>(weights_.data() + v), T{}), one = where(is_above, splat<T>(1.0), T{});
        if constexpr (sizeof(T) == sizeof(mass)) mass += weight, count += one;
        else rest += weight, rest_count += one;
      });
      part.mass += lane_sum(mass) + rest;
      part.count += static_cast<int64_t>(lane_sum(count) + rest_count);
    }
    return part;
  }

  double mass() const {
    double sum = 0;
    for (const Kept<S>& x : kept_) sum += x.weight;
    return sum;
  }

  // Keeps the shortest prefix whose weights reach `wanted`, one id at least: quickselect by weight.
  void cut_at_mass(double wanted) {
    auto begin = kept_.begin(), end = kept_.end();
    double before = 0;
    while (end - begin > 1) {
      if (end - begin <= 32) {
        std::sort(begin, end, Before());
        while (begin != end && before + begin->weight < wanted) before += (begin++)->weight;
        break;
      }
      const auto middle = begin + (end - begin) / 2;
      std::nth_element(begin, middle, end, Before());
      double half = 0;
      for (auto x = begin; x != middle; ++x) half += x->weight;
      if (before + half >= wanted) end = middle;
      else before += half, begin = middle;
    }
    if (begin != kept_.end()) ++begin;
    kept_.erase(begin, kept_.end());
  }

  const Sampling<S>& job_;
  const int64_t n_;
  Groups<S> own_, tempered_;  // at temperature 1, of all ids; at the row's, of those that are left
  std::vector<double> weighted_;
  std::vector<S> masked_, maxima_, weights_;
  std::vector<Kept<S>> kept_;
  S above_ = kInf<S>;
};

template <class S> void all_rows(const Sampling<S>& job) {
#pragma omp parallel num_threads(threads_for(job.rows, job.threads))
  {
    Scratch<S> scratch(job.logits.is_plain() ? 0 : job.columns);
    std::unique_ptr<Row<S>> whole;
    if (!job.running) whole = std::make_unique<Row<S>>(job);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < job.rows; ++row) {
      const int64_t place = job.picked ? job.picked[row] : row;
      const S* z = tempered(job.logits, place, 1.0, scratch.data, job.columns);
      if (whole) {
        whole->draw(row, z);
        continue;
      }
      Stream<S> stream(job, row);
      stream.add(z);
      if (job.first_column + job.columns == job.vocab) stream.finish();
    }
  }
}

}  // namespace

void sample_rows(const Sampling<float>& job) { all_rows(job); }
void sample_rows(const Sampling<double>& job) { all_rows(job); }

}  // namespace KD_ISA
}  // namespace kd
