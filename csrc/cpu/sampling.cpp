// One id a row: a race between groups of 128 ids, and a pick inside of the one that wins. Each logit is read once for the sums of
// the model's own distribution and once for those at the row's temperature, group by group while they are in the first-level
// cache. Filters look at the groups' maxima first, so that only ids near the cut are ever compared; nothing is sorted whole.
#include "sampling.h"

#include "groups.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kSmallRow = 4096;  // of so many ids, all are compared
constexpr int64_t kFew = 256;        // ids inside of a bracket that is no longer halved
constexpr double kDeepest = 128;     // nats below the maximum: what lies deeper has no mass in fp32

template <class S> class Row {
 public:
  explicit Row(const Sampling<S>& job)
      : job_(job), n_(job.vocab), own_(n_), tempered_(n_), weighted_(job.entropy ? own_.count() : 0),
        masked_(job.top_k || job.top_p || job.min_p ? job.vocab : 0) {}

  void draw(int64_t row, const S* z) {
    const S max = add_groups(z, n_, S{1}, own_, job_.entropy ? weighted_.data() : nullptr);
    const double sum = total(own_, max, 1.0), r = job_.inverse[row];
    if (!(sum > 0 && sum < kInf<double>) || std::isnan(r)) return write_nothing(row);
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
      const Place place{static_cast<uint64_t>(job_.seeds[row]), static_cast<uint64_t>(job_.keys[row]),
                        static_cast<uint32_t>(job_.positions[row])};
      if (!job_.given) id = pick(left, race(groups, max, r, place), groups, r, place);
      logprob = (static_cast<double>(left[id]) - max) * r - std::log(total(groups, max, r));
    }
    job_.ids[row] = id;
    job_.logprobs[row] = static_cast<S>(logprob);
    job_.model_logprobs[row] = static_cast<S>(static_cast<double>(z[id]) - max - std::log(sum));
  }

 private:
  void write_nothing(int64_t row) {
    const S nan = std::numeric_limits<S>::quiet_NaN();
    job_.ids[row] = -1;
    job_.logprobs[row] = job_.model_logprobs[row] = nan;
    if (job_.entropy) job_.entropy[row] = job_.lse[row] = nan;
  }

  void write_stats(int64_t row, S max, double sum) {
    double products = 0;
    for (int64_t g = 0; g < own_.count(); ++g) {
      const double fall = static_cast<double>(own_.top[g]) - max;
      if (own_.sum[g] != 0) products += std::exp(fall) * (weighted_[g] + fall * own_.sum[g]);
    }
    job_.entropy[row] = static_cast<S>(std::log(sum) - products / sum);
    job_.lse[row] = static_cast<S>(max + std::log(sum));
  }

  int64_t race(const Groups<S>& groups, S max, double r, const Place& place) const {
    double best = -kInf<double>;
    int64_t winner = 0;
    Words words{};
    for (int64_t g = 0; g < groups.count(); ++g) {
      if (g % 4 == 0) words = place.words(job_.race, static_cast<uint32_t>(g / 4));
      if (groups.sum[g] == 0) continue;
      const double exponential = -std::log1p(-uniform(words.w[g % 4]));
      const double score = (static_cast<double>(groups.top[g]) - max) * r + std::log(groups.sum[g] / exponential);
      if (score > best) best = score, winner = g;
    }
    return winner;
  }

  int64_t pick(const S* z, int64_t group, const Groups<S>& groups, double r, const Place& place) const {
    const int64_t begin = group * kGroupIds, end = std::min(begin + kGroupIds, n_);
    const double top = groups.top[group];
    double running[kGroupIds], sum = 0;
    for (int64_t v = begin; v < end; ++v) running[v - begin] = sum += std::exp((z[v] - top) * r);
    const double target = uniform(place.words(job_.race + 1, static_cast<uint32_t>(group / 4)).w[group % 4]) * sum;
    int64_t v = begin;
    while (running[v - begin] <= target) ++v;
    return v;
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
        const T e = exp((load<T>(z + v) - (T{} + max)) * (T{} + r));
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
    Scratch<S> scratch(job.logits.is_plain() ? 0 : job.vocab);
    Row<S> state(job);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < job.rows; ++row) state.draw(row, tempered(job.logits, row, 1.0, scratch.data, job.vocab));
  }
}

}  // namespace

void sample_rows(const Sampling<float>& job) { all_rows(job); }
void sample_rows(const Sampling<double>& job) { all_rows(job); }

}  // namespace KD_ISA
}  // namespace kd
