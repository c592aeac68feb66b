// Groups of 128 ids of a row, as kd_kernels/sampling/DRAWS.md cuts it; the search for its largest logits, by their maxima.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kd/philox.h"
#include "kd/simd.h"
#include "rows.h"

namespace kd {
namespace KD_ISA {
namespace {

// Maximum and sum of exp((z - maximum) r) of each group, the terms added by halving.
template <class S> struct Groups {
  std::vector<S> top, sum;
  explicit Groups(int64_t vocab) : top((vocab + kGroupIds - 1) / kGroupIds), sum(top.size()) {}
  int64_t count() const { return static_cast<int64_t>(top.size()); }
};

// An id that is looked at by itself. A type of this file, as an argument of std::sort and the like (see topk.cpp).
template <class S> struct Kept {
  S logit;
  int64_t id;
  double weight;  // for whoever collects it to say
};
struct Before {
  template <class S> bool operator()(const Kept<S>& a, const Kept<S>& b) const {
    return (a.logit > b.logit) | ((a.logit == b.logit) & (a.id < b.id));
  }
};
struct Falling {
  template <class S> bool operator()(S a, S b) const { return a > b; }
};

template <class S> KD_INLINE S sum_by_halving(S* terms) {
  for (int half = kGroupIds / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) terms[j] += terms[j + half];
  return terms[0];
}

// Returns the row's maximum. With `weighted`, also each group's sum of exp(z - m) (z - m): for the entropy, at r = 1.
template <class S> S add_groups(const S* z, int64_t n, S r, Groups<S>& groups, double* weighted) {
  S max = -kInf<S>;
  alignas(64) S terms[kGroupIds];
  for (int64_t g = 0; g < groups.count(); ++g) {
    const int64_t begin = g * kGroupIds, end = std::min(begin + kGroupIds, n);
    const S top = block_max(z, begin, end), shift = top > -kInf<S> ? top : S{};
    if (end - begin < kGroupIds) std::fill(terms, terms + kGroupIds, S{});
    typename Lanes<S>::V lanes{};
    double rest = 0;
    over_columns<S>(begin, end, [&](auto lane, int64_t v) {
      using T = decltype(lane);
      const T gap = load<T>(z + v) - (T{} + shift), e = exp(gap * (T{} + r));
      store(terms + (v - begin), e);
      if (!weighted) return;
      const T product = where(gap > splat<T>(-1e30), e * gap, T{});
      if constexpr (sizeof(T) == sizeof(lanes)) lanes += product;
      else rest += product;
    });
    groups.top[g] = top;
    groups.sum[g] = sum_by_halving(terms);
    if (weighted) weighted[g] = lane_sum(lanes) + rest;
    max = top > max ? top : max;
  }
  return max;
}

// Sum over the groups of exp((m_g - max) r) s_g.
template <class S> double total(const Groups<S>& groups, S max, double r) {
  double sum = 0;
  for (int64_t g = 0; g < groups.count(); ++g)
    if (groups.sum[g] != 0) sum += std::exp((static_cast<double>(groups.top[g]) - max) * r) * groups.sum[g];
  return sum;
}

// The ids with a logit of at least `bound`, but those that are masked.
template <class S> void collect(const S* z, int64_t n, const Groups<S>& groups, S bound, std::vector<Kept<S>>& kept) {
  kept.clear();
  for (int64_t g = 0; g < groups.count(); ++g) {
    if (!(groups.top[g] >= bound) || groups.sum[g] == 0) continue;
    for (int64_t v = g * kGroupIds, end = std::min(v + kGroupIds, n); v < end; ++v)
      if (z[v] >= bound && z[v] > -kInf<S>) kept.push_back({z[v], v, 0.0});
  }
}

// The first k ids by falling logit, in no order; fewer where fewer are not masked.
template <class S>
void collect_first(const S* z, int64_t n, const Groups<S>& groups, int64_t k, std::vector<S>& maxima,
                   std::vector<Kept<S>>& kept) {
  S bound = -kInf<S>;
  if (k < groups.count()) {
    maxima = groups.top;
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), Falling());
    bound = maxima[k - 1];  // k groups have a maximum of at least this, and so at least k ids a logit of at least this
  }
  collect(z, n, groups, bound, kept);
  if (k < static_cast<int64_t>(kept.size())) {
    std::nth_element(kept.begin(), kept.begin() + k, kept.end(), Before());
    kept.resize(k);
  }
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
