// One id a row: a race between groups of 128 ids, and a pick inside of the one that wins. Without filters a row is met panel by
// panel, each logit once, while it is in cache; of what has passed, the group that leads is kept. Filters need whole rows: law.h.
#include "sampling.h"

#include <memory>

#include "law.h"

namespace kd {
namespace KD_ISA {
namespace {

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
      : job_(job), row_(row), at_(job.running[row]), r_(job.warp.inverse[row]), is_drawn_(r_ < kInf<double>),
        is_tempered_(is_drawn_ && r_ != 1) {}

  // The columns of the job. Each group is added by itself, so that no result depends on how a row is cut into panels.
  void add(const S* z) {
    if (job_.first_column == 0) at_ = {-kInf<S>, 0, 0, 0, 0, {S{}, 0, -1}, {}};
    const Place place = job_.places.of(row_);
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
      if (!is_drawn_) continue;
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
    if (is_drawn_) {
      const Leader<S>& leader = at_.leader;
      id = pick(at_.winner, kGroupIds, leader.top, r_, leader.group, job_.race + 1, job_.places.of(row_));
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

template <class S> void draw_whole(const Sampling<S>& job, int64_t row, const S* z, Law<S>& law) {
  if (!law.read(row, z)) return write_nothing(job, row);
  const int64_t id = job.ids[row] = law.draw(job.race, job.places.of(row));
  job.logprobs[row] = static_cast<S>(law.logprob(id));
  job.model_logprobs[row] = static_cast<S>(law.model_logprob(id));
  if (!job.entropy) return;
  job.entropy[row] = static_cast<S>(law.entropy());
  job.lse[row] = static_cast<S>(law.lse());
}

template <class S> void all_rows(const Sampling<S>& job) {
#pragma omp parallel num_threads(threads_for(job.rows, job.threads))
  {
    Scratch<S> scratch(job.logits.is_plain() ? 0 : job.columns);
    std::unique_ptr<Law<S>> whole;
    if (!job.running) whole = std::make_unique<Law<S>>(job.vocab, job.warp, job.entropy != nullptr);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < job.rows; ++row) {
      const int64_t place = job.picked ? job.picked[row] : row;
      const S* z = tempered(job.logits, place, 1.0, scratch.data, job.columns);
      if (whole) {
        draw_whole(job, row, z, *whole);
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
