// Normaliser, entropy, maximum and the rank of one id, in one walk over a row of logits. The id's logit is taken out of
// the very row that is walked, so it equals itself.
#include "token_stats.h"

#include <cmath>
#include <limits>

#include "kd/simd.h"
#include "rows.h"

namespace kd {
namespace KD_ISA {
namespace {

// Sums over columns, with e = exp(z - shift): of e, and of e (z - shift).
struct Sums {
  double exp = 0, weighted = 0;
};

template <class S> KD_INLINE void add_columns(const S* z, int64_t begin, int64_t end, S shift, Sums& sums) {
  using V = typename Lanes<S>::V;
  V exp_lanes{}, weighted_lanes{};
  over_columns<S>(begin, end, [&](auto lane, int64_t v) {
    using T = decltype(lane);
    const T gap = load<T>(z + v) - (T{} + shift), e = exp(gap);
    const T weighted = where(gap > splat<T>(-1e30), e * gap, T{});
    if constexpr (sizeof(T) == sizeof(V)) exp_lanes += e, weighted_lanes += weighted;
    else sums.exp += e, sums.weighted += weighted;
  });
  sums.exp += lane_sum(exp_lanes);
  sums.weighted += lane_sum(weighted_lanes);
}

// How many of at most kBlock columns are `counted`, a mask of their logits.
template <class S, class Counted>
KD_INLINE int64_t count_columns(const S* z, int64_t begin, int64_t end, Counted counted) {
  using V = typename Lanes<S>::V;
  V lanes{};
  double rest = 0;
  over_columns<S>(begin, end, [&](auto lane, int64_t v) {
    using T = decltype(lane);
    const T one = where(counted(load<T>(z + v)), splat<T>(1.0), T{});
    if constexpr (sizeof(T) == sizeof(V)) lanes += one;
    else rest += one;
  });
  return static_cast<int64_t>(lane_sum(lanes) + rest);
}

template <class S> void one_row(const TokenStats<S>& job, int64_t row, S* scratch) {
  const int64_t n = job.vocab, id = job.ids[row];
  const S* z = tempered(job.logits, row, 1.0, scratch, n);
  const S z_id = z[id];
  // Among equals the lower id comes first.
  const auto is_larger = [=](auto z_v) { return z_v > decltype(z_v){} + z_id; };
  const auto is_as_large = [=](auto z_v) { return z_v >= decltype(z_v){} + z_id; };
  S max = -kInf<S>;
  int64_t block_of_max = 0, rank = 0;
  Sums sums;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    const S here = block_max(z, begin, end);
    if (here > max) {
      if (max > -kInf<S>) {
        const double rise = static_cast<double>(here) - max, shrink = std::exp(-rise);
        sums.weighted = shrink * (sums.weighted - rise * sums.exp);
        sums.exp *= shrink;
      }
      max = here;
      block_of_max = begin;
    }
    const S shift = max > -kInf<S> ? max : S{};  // so that -inf stays -inf
    add_columns(z, begin, end, shift, sums);
    const int64_t split = id < begin ? begin : id < end ? id : end;
    rank += count_columns(z, begin, split, is_as_large) + count_columns(z, split, end, is_larger);
  }
  const bool is_finite = sums.exp > 0 && sums.exp < kInf<double>;
  const double nan = std::nan(""), log_sum = is_finite ? std::log(sums.exp) : nan;
  job.logprob[row] = static_cast<S>((static_cast<double>(z_id) - max) - log_sum);
  job.lse[row] = static_cast<S>(max + log_sum);
  job.entropy[row] = static_cast<S>(log_sum - sums.weighted / sums.exp);
  job.max[row] = is_finite ? max : static_cast<S>(nan);
  job.argmax[row] = is_finite ? block_of_max + first_index_of(z + block_of_max, max, n - block_of_max) : -1;
  job.rank[row] = is_finite ? rank : -1;
}

template <class S> void all_rows(const TokenStats<S>& job) {
#pragma omp parallel num_threads(threads_for(job.rows, job.threads))
  {
    Scratch<S> scratch(job.logits.is_plain() ? 0 : job.vocab);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < job.rows; ++row) one_row(job, row, scratch.data);
  }
}

}  // namespace

void token_stats(const TokenStats<float>& job) { all_rows(job); }
void token_stats(const TokenStats<double>& job) { all_rows(job); }

}  // namespace KD_ISA
}  // namespace kd
