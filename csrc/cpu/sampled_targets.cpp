// n draws a row, with replacement. The uniforms are sorted, so that one walk over the groups and over the ids of those
// that are hit meets the draws in order, and equal ids come together: no table of counts, and 128 exponentials a group
// that is hit.
#include "sampled_targets.h"

#include "groups.h"

namespace kd {
namespace KD_ISA {
namespace {

struct Rising {
  bool operator()(double a, double b) const { return a < b; }
};

template <class S> class TargetRow {
 public:
  explicit TargetRow(const SampledTargets<S>& job)
      : job_(job), n_(job.vocab), own_(n_), tempered_(n_), mass_(own_.count()), before_(own_.count() + 1),
        left_(job.certain ? n_ : 0), uniforms_(job.draws) {}

  void draw(int64_t row, const S* z) {
    const S max = add_groups(z, n_, S{1}, own_, nullptr);
    const double sum = total(own_, max, 1.0);
    if (!(sum > 0 && sum < kInf<double>)) {
      job_.counts[row] = -1;
      return;
    }
    entries_.clear();
    const S* left = z;
    if (job_.certain) {
      collect_first(z, n_, own_, job_.certain, maxima_, entries_);
      std::copy(z, z + n_, left_.begin());
      for (Kept<S>& x : entries_) left_[x.id] = -kInf<S>, x.weight = 1.0;
      left = left_.data();
    }
    const bool is_own = !job_.certain && job_.inverse == 1;
    const S peak = is_own ? max : add_groups(left, n_, static_cast<S>(job_.inverse), tempered_, nullptr);
    if (peak > -kInf<S>) count_draws(row, left, is_own ? own_ : tempered_, peak);
    std::sort(entries_.begin(), entries_.end(), Before());
    job_.counts[row] = static_cast<int64_t>(entries_.size());
    int64_t at = row * job_.width;
    for (const Kept<S>& x : entries_) {
      job_.ids[at] = x.id;
      job_.logprobs[at] = static_cast<S>(static_cast<double>(x.logit) - max - std::log(sum));
      job_.importance[at++] = static_cast<S>(x.weight);
    }
  }

 private:
  // Appends what is drawn, each id with its importance.
  void count_draws(int64_t row, const S* z, const Groups<S>& groups, S peak) {
    const Place place = job_.places.of(row);
    const double r = job_.inverse;
    before_[0] = 0;
    for (int64_t g = 0; g < groups.count(); ++g) {
      mass_[g] = groups.sum[g] != 0 ? std::exp((static_cast<double>(groups.top[g]) - peak) * r) * groups.sum[g] : 0.0;
      before_[g + 1] = before_[g] + mass_[g];
    }
    const double all = before_[groups.count()];
    for (int64_t d = 0; d < job_.draws; ++d)
      uniforms_[d] = fine_uniform(place.words(kTargets, 0, static_cast<uint32_t>(d)));
    std::sort(uniforms_.begin(), uniforms_.end(), Rising());

    int64_t group = -1, begin = 0, j = 0, last = 0;
    double running[kGroupIds];
    for (const double u : uniforms_) {
      const double target = u * all;
      if (group < 0 || before_[group + 1] <= target) {
        do ++group;
        while (before_[group + 1] <= target);
        begin = group * kGroupIds, j = 0;
        last = add_weights(z, begin, groups.top[group], r, running);
      }
      const double part = (target - before_[group]) / mass_[group] * running[last];
      while (j < last && running[j] <= part) ++j;
      const S logit = z[begin + j];
      if (entries_.empty() || entries_.back().id != begin + j) entries_.push_back({logit, begin + j, 0.0});
      const double weight = std::exp((static_cast<double>(logit) - peak) * r);
      entries_.back().weight += all / (static_cast<double>(job_.draws) * weight);
    }
  }

  // Running sums of exp((z - top) r) over a group. Returns the last column that has a weight.
  int64_t add_weights(const S* z, int64_t begin, double top, double r, double* running) const {
    int64_t last = 0;
    double sum = 0;
    for (int64_t v = begin, end = std::min(begin + kGroupIds, n_); v < end; ++v) {
      const double weight = std::exp((z[v] - top) * r);
      running[v - begin] = sum += weight;
      if (weight > 0) last = v - begin;
    }
    return last;
  }

  const SampledTargets<S>& job_;
  const int64_t n_;
  Groups<S> own_, tempered_;  // at temperature 1, of all ids; at the proposal's, of those that are drawn from
  std::vector<double> mass_, before_;  // of each group, and of those before it
  std::vector<S> left_, maxima_;
  std::vector<double> uniforms_;
  std::vector<Kept<S>> entries_;
};

template <class S> void all_rows(const SampledTargets<S>& job) {
#pragma omp parallel num_threads(threads_for(job.rows, job.threads))
  {
    Scratch<S> scratch(job.logits.is_plain() ? 0 : job.vocab);
    TargetRow<S> state(job);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < job.rows; ++row)
      state.draw(row, tempered(job.logits, row, 1.0, scratch.data, job.vocab));
  }
}

}  // namespace

void target_rows(const SampledTargets<float>& job) { all_rows(job); }
void target_rows(const SampledTargets<double>& job) { all_rows(job); }

}  // namespace KD_ISA
}  // namespace kd
