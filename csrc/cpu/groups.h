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

// Sum of e^((z - top) r) over a group, the terms added by halving. With `weighted`, at r = 1, also of e^(z - top) (z - top): for
// the entropy.
template <class S> KD_INLINE S sum_group(const S* z, S top, S r, double* weighted) {
  using V = typename Lanes<S>::V;
  constexpr int64_t width = Lanes<S>::width, count = kGroupIds / width;
  const V shift = V{} + (top > -kInf<S> ? top : S{}), inverse = V{} + r;
  V terms[count], products{};
  for (int64_t i = 0; i < count; ++i) {
    const V gap = load<V>(z + i * width) - shift;
    terms[i] = exp_fall(gap * inverse);
    if (weighted) products += where(gap > splat<V>(-1e30), terms[i] * gap, V{});
  }
  if (weighted) *weighted = lane_sum(products);
  for (int64_t half = count / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) terms[i] += terms[i + half];
  S lanes[width];
  store(lanes, terms[0]);
  for (int64_t half = width / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The logits of the group that begins with z: those of a row that ends in it are copied, and -inf takes the place of the rest.
template <class S> KD_INLINE const S* whole_group(const S* z, int64_t ids, S* copy) {
  if (ids >= kGroupIds) return z;
  std::fill(std::copy(z, z + ids, copy), copy + kGroupIds, -kInf<S>);
  return copy;
}

// Returns the row's maximum. `weighted`: null, or of each group as in sum_group.
template <class S> S add_groups(const S* z, int64_t n, S r, Groups<S>& groups, double* weighted) {
  S max = -kInf<S>, last[kGroupIds];
  for (int64_t g = 0; g < groups.count(); ++g) {
    const S* group = whole_group(z + g * kGroupIds, n - g * kGroupIds, last);
    const S top = groups.top[g] = block_max(group, 0, kGroupIds);
    groups.sum[g] = weighted ? sum_group(group, top, r, weighted + g) : sum_group<S>(group, top, r, nullptr);
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
  using V = typename Lanes<S>::V;
  constexpr int64_t width = Lanes<S>::width;
  S last[kGroupIds];
  for (int64_t g = 0; g < groups.count(); ++g) {
    if (!(groups.top[g] >= bound) || groups.sum[g] == 0) continue;
    const int64_t first = g * kGroupIds;
    const S* group = whole_group(z + first, n - first, last);
    for (int64_t v = 0; v < kGroupIds; v += width)
      for (uint32_t left = ~lanes_above(V{} + bound, load<V>(group + v)) & ((1u << width) - 1); left != 0; left &= left - 1) {
        const int64_t id = v + __builtin_ctz(left);
        if (group[id] > -kInf<S>) kept.push_back({group[id], first + id, 0.0});
      }
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
