// A whole row as what is drawn from it: tempered, and cut by filters. They look at the groups' maxima first, so that only ids near
// the cut are ever compared; nothing is sorted whole.
#pragma once

#include "groups.h"
#include "kd/simd64.h"
#include "sampling.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kSmallRow = 4096;  // of so many ids, all are compared
constexpr int64_t kFew = 256;        // ids inside of a bracket that is no longer halved
constexpr double kDeepest = 128;     // nats below the maximum: what lies deeper has no mass in fp32

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

// One id of a row z: the race between its groups, and a pick inside of the one that wins.
template <class S>
int64_t drawn(const S* z, int64_t n, const Groups<S>& groups, double r, uint32_t race, const Place& place) {
  Leader<S> leader{S{}, 0, -1};
  Words words{};
  for (int64_t g = 0; g < groups.count(); ++g) {
    if (g % 4 == 0) words = place.words(race, static_cast<uint32_t>(g / 4));
    join_race(leader, groups.top[g], groups.sum[g], uniform(words.w[g % 4]), g, r);
  }
  const int64_t begin = leader.group * kGroupIds;
  return pick(z + begin, std::min<int64_t>(kGroupIds, n - begin), leader.top, r, leader.group, race + 1, place);
}

template <class S> class Law {
 public:
  Law(int64_t vocab, const Warp<S>& warp, bool has_entropy = false)
      : warp_(warp), n_(vocab), own_(n_), tempered_(n_), weighted_(has_entropy ? own_.count() : 0), masked_(warp.cuts() ? n_ : 0) {}

  // False: the row is no distribution, and nothing else may be asked of it.
  bool read(int64_t row, const S* z) {
    z_ = left_ = z;
    r_ = warp_.inverse[row];
    max_ = add_groups(z, n_, S{1}, own_, weighted_.empty() ? nullptr : weighted_.data());
    own_mass_ = total(own_, max_, 1.0);
    if (!(own_mass_ > 0 && own_mass_ < kInf<double>) || std::isnan(r_)) return false;
    own_log_mass_ = std::log(own_mass_);
    is_greedy_ = r_ == kInf<double>;
    if (is_greedy_) {
      best_ = first_index_of(z, max_, n_);
      return true;
    }
    if (filter(row, z, max_, r_)) left_ = masked_.data();
    groups_ = left_ == z && r_ == 1 ? &own_ : &tempered_;
    if (groups_ == &tempered_) add_groups(left_, n_, warp_.inverse[row], tempered_, nullptr);
    log_mass_ = std::log(total(*groups_, max_, r_));
    return true;
  }

  int64_t draw(uint32_t race, const Place& place) const {
    return is_greedy_ ? best_ : drawn(left_, n_, *groups_, r_, race, place);
  }

  // Whether one id has all.
  bool is_greedy() const { return is_greedy_; }
  int64_t best() const { return best_; }

  // What the filters leave of a row that is not greedy, tempered, relative to the largest; -inf: nothing.
  struct Heights {
    const S* z;
    double max, r;
    template <class D> KD_FORCE_INLINE D at(int64_t v, D) const { return (widened<D>(z + v) - max) * r; }
  };
  Heights heights() const { return {left_, static_cast<double>(max_), r_}; }
  double logprob(int64_t id) const {
    return is_greedy_ ? (id == best_ ? 0.0 : -kInf<double>) : heights().at(id, 0.0) - log_mass_;
  }

  // Of the model: temperature 1, no filter.
  double model_logprob(int64_t id) const { return static_cast<double>(z_[id]) - max_ - own_log_mass_; }
  double lse() const { return max_ + own_log_mass_; }
  double entropy() const {
    double products = 0;
    for (int64_t g = 0; g < own_.count(); ++g) {
      const double fall = static_cast<double>(own_.top[g]) - max_;
      if (own_.sum[g] != 0) products += std::exp(fall) * (weighted_[g] + fall * own_.sum[g]);
    }
    return own_log_mass_ - products / own_mass_;
  }

 private:
  // Writes to masked_ the ids that the filters leave; false: they leave all.
  //
  // What they leave is all ids with a logit of at least `above_`, and those in kept_, whose logits are lower.
  bool filter(int64_t row, const S* z, S max, double r) {
    const int64_t k = warp_.top_k ? warp_.top_k[row] : n_;
    const double p = warp_.top_p ? warp_.top_p[row] : 1.0, least = warp_.min_p ? warp_.min_p[row] : 0.0;
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

  const Warp<S> warp_;
  const int64_t n_;
  Groups<S> own_, tempered_;  // at temperature 1, of all ids; at the row's, of those that are left
  std::vector<double> weighted_;
  std::vector<S> masked_, maxima_, weights_;
  std::vector<Kept<S>> kept_;
  S above_ = kInf<S>;
  // Of the row that was read.
  const S *z_ = nullptr, *left_ = nullptr;
  const Groups<S>* groups_ = nullptr;
  S max_{};
  double r_ = 1, own_mass_ = 0, own_log_mass_ = 0, log_mass_ = 0;
  bool is_greedy_ = false;
  int64_t best_ = -1;
};

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
