// One row of student logits against one row of a teacher: loss, statistics, and the gradient with respect to the raw
// products. A row stays in cache from its first read to its last: normaliser, sum of (f, g), gradient.
//
// With f and g of the divergence (terms.h) and G = sum g, the gradient with respect to a tempered logit is g - q G. A sparse
// teacher goes through the same two numbers: its kept ids, and the tail as one more event, are a short row of their own.
#include "row_loss.h"

#include "kd/simd.h"
#include "kd/terms.h"
#include "rows.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr double kMassTolerance = 0.1;  // a cache rounds log-probabilities to a step; unnormalised scores miss by far more

// A row of tempered logits with its normaliser: log-probability = (z - max) - log_sum.
template <class S> struct Normalised {
  const S* z;
  S max;
  double sum;  // of exp(z - max)
  S log_sum;
  S logprob(int64_t v) const { return (z[v] - max) - log_sum; }
  bool is_finite() const { return sum > 0 && sum < kInf<double>; }
};

// A sum with what rounding has lost of it (Kahan). Where one column has nearly all of the mass, 1 - q and g - q G are
// what the others add to a lane that is a thousand times larger.
template <class T> struct Carried {
  T sum{}, lost{};
  inline __attribute__((always_inline)) void add(T x) {
    const T y = x - lost, next = sum + y;
    lost = (next - sum) - y;
    sum = next;
  }
  double total() const { return lane_sum(sum) - lane_sum(lost); }
};

// over_columns with a running sum: body returns one addend a column. Blocks are summed in S, the row in double.
template <class S, class Body> KD_INLINE double sum_columns(int64_t n, Body body) {
  using V = typename Lanes<S>::V;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    Carried<V> lanes;
    double rest = 0;
    over_columns<S>(begin, end, [&](auto lane, int64_t v) {
      if constexpr (sizeof(lane) == sizeof(V)) lanes.add(body(lane, v));
      else rest += body(lane, v);
    });
    total += lanes.total() + rest;
  }
  return total;
}

// sum exp(factor (z - max)).
template <class S> KD_INLINE double sum_exp(const S* z, S max, double factor, int64_t n) {
  if (factor == 1.0)
    return sum_columns<S>(n, [=](auto lane, int64_t v) {
      using T = decltype(lane);
      return exp(load<T>(z + v) - (T{} + max));
    });
  return sum_columns<S>(n, [=](auto lane, int64_t v) {
    using T = decltype(lane);
    return exp((load<T>(z + v) - (T{} + max)) * splat<T>(factor));
  });
}

// Maximum and sum of exp(z - max) in one read: a block is summed against the largest logit so far, while it is in the first
// cache. The sum is 0 where all are -inf, NaN where one is NaN or +inf.
template <class S> Normalised<S> normalised(const S* z, int64_t n) {
  S max = -kInf<S>;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    const S here = block_max(z, begin, end);
    if (here > max) {
      sum *= std::exp(static_cast<double>(max) - here);
      max = here;
    }
    const S shift = max > -kInf<S> ? max : S{};  // so that -inf stays -inf
    sum += sum_exp(z + begin, shift, 1.0, end - begin);
  }
  return {z, max, sum, static_cast<S>(std::log(sum))};
}

// Sum of f and of g over n columns, g written down. `weight` (importance) may be null.
struct Sums { double f, g; };
template <class Formula, class S>
Sums sweep(const Normalised<S>& p, const Normalised<S>& q, const S* weight, const double* params, int64_t n, S* g_out) {
  using V = typename Lanes<S>::V;
  Sums total{0, 0};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    V f_lanes{};
    Carried<V> g_lanes;
    double f_rest = 0, g_rest = 0;
    over_columns<S>(begin, end, [&](auto lane, int64_t v) {
      using T = decltype(lane);
      const T logp = (load<T>(p.z + v) - (T{} + p.max)) - (T{} + p.log_sum);
      const T logq = (load<T>(q.z + v) - (T{} + q.max)) - (T{} + q.log_sum);
      T f, g;
      Formula::template terms<T>(logp, logq, params, f, g);
      if (weight) {
        f *= load<T>(weight + v);
        g *= load<T>(weight + v);
      }
      store(g_out + v, g);
      if constexpr (sizeof(T) == sizeof(V)) f_lanes += f, g_lanes.add(g);
      else f_rest += f, g_rest += g;
    });
    total.f += lane_sum(f_lanes) + f_rest;
    total.g += g_lanes.total() + g_rest;
  }
  return total;
}

template <class S> using Sweep = Sums (*)(const Normalised<S>&, const Normalised<S>&, const S*, const double*, int64_t, S*);
template <class S> Sweep<S> sweep_of(int formula) {
#define KD_ENTRY(Formula) &sweep<Formula, S>,
  static constexpr Sweep<S> table[] = {KD_FOR_EACH_FORMULA(KD_ENTRY)};
#undef KD_ENTRY
  return table[formula];
}

// -sum q log q, as log_sum - sum q (z - max): no logarithm a column.
template <class S> double entropy(const Normalised<S>& q, int64_t n) {
  const double weighted = sum_columns<S>(n, [&](auto lane, int64_t v) {
    using T = decltype(lane);
    const T gap = load<T>(q.z + v) - (T{} + q.max);
    return where(gap > splat<T>(-1e30), exp(gap) * gap, T{});
  });
  return std::log(q.sum) - weighted / q.sum;
}

// The parts that dense and sparse rows share: cross-entropy, and the derivative of softcap and scale.
template <class S> struct StudentRow {
  const RowLoss<S>& job;
  Normalised<S> q;
  int64_t label;          // -1 where none is wanted
  double untempered_sum;  // of exp(T (z - max)): the normaliser of the cross-entropy
  bool wants_ce;

  double label_logprob(S z_label) const {
    return (static_cast<double>(z_label) - q.max) * job.temperature - std::log(untempered_sum);
  }
  // d logit / d raw, given the tempered logit.
  template <class T> T slope(T z) const {
    const T scale = splat<T>(job.student.scale);
    if (job.student.softcap == 0) return scale;
    const T relative = z * splat<T>(job.temperature / job.student.softcap);
    return scale * (splat<T>(1.0) - relative * relative);
  }
  // ce_weight * softmax at temperature 1.
  template <class T> T ce_share(T z, T q_tempered) const {
    if (job.temperature == 1.0) return q_tempered * splat<T>(job.ce_weight);
    const T gap = (z - (T{} + q.max)) * splat<T>(job.temperature);
    return exp(gap) * splat<T>(job.ce_weight / untempered_sum);
  }
};

template <class S> bool open_row(const RowLoss<S>& job, int64_t row) {
  job.loss[row] = 0;
  job.status[row] = 0;
  if (job.stats)
    for (int i = 0; i < kStats; ++i) job.stats[row * kStats + i] = std::nan("");
  if (job.weight[row] != 0) return true;
  if (job.gradient) std::memset(job.gradient + row * job.gradient_stride, 0, sizeof(S) * job.vocab);
  if (job.bf16_gradient) std::memset(job.bf16_gradient + row * job.gradient_stride, 0, sizeof(uint16_t) * job.vocab);
  return false;
}

// Where the gradient of a row is formed: in its place, or in scratch, from where close_row rounds it into its place.
template <class S> S* slots_of(const RowLoss<S>& job, int64_t row, S* scratch) {
  return job.gradient ? job.gradient + row * job.gradient_stride : scratch;
}
template <class S> void close_row(const RowLoss<S>& job, int64_t row, const S* slots) {
  if (!job.bf16_gradient) return;
  uint16_t* out = job.bf16_gradient + row * job.gradient_stride;
  for (int64_t v = 0; v < job.vocab; ++v) out[v] = to_bf16(static_cast<float>(slots[v]));
}

// The label if the row needs one; -1 if not, or if it is out of range (then the row's status says so).
template <class S> int64_t label_of(const RowLoss<S>& job, int64_t row) {
  if (!job.labels || (job.ce_weight == 0 && !job.stats)) return -1;
  const int64_t label = job.labels[row];
  if (label >= 0 && label < job.vocab) return label;
  job.status[row] |= kBadLabel;
  return -1;
}

template <class S> void dense_row(const RowLoss<S>& job, const RawLogits<S>& teacher, int64_t row, S* scratch) {
  const int64_t n = job.vocab;
  S* g = scratch;
  S* z_scratch = scratch + n;
  // The teacher's tempered row may share its memory with g: sweep reads a column before it writes it.
  const Normalised<S> p = normalised(tempered(teacher, row, job.temperature, g, n), n);
  const Normalised<S> q = normalised(tempered(job.student, row, job.temperature, z_scratch, n), n);
  if (!p.is_finite()) job.status[row] |= kBadTeacher;
  if (!q.is_finite()) job.status[row] |= kBadStudent;
  const int64_t label = label_of(job, row);
  if (job.status[row]) return;

  StudentRow<S> student{job, q, label, q.sum, job.ce_weight != 0 && label >= 0};
  if (label >= 0 && job.temperature != 1.0) student.untempered_sum = sum_exp(q.z, q.max, job.temperature, n);
  const double label_logprob = label >= 0 ? student.label_logprob(q.z[label]) : std::nan("");

  if (job.stats) {  // before the sweep: g may overwrite the teacher's row
    double* stats = job.stats + row * kStats;
    const int64_t student_top1 = first_index_of(q.z, q.max, n), teacher_top1 = first_index_of(p.z, p.max, n);
    stats[kStudentEntropy] = entropy(q, n);
    stats[kTeacherEntropy] = entropy(p, n);
    stats[kAgreement] = student_top1 == teacher_top1;
    stats[kCapturedMass] = 1;
    stats[kLabelLogprob] = label_logprob;
    if (label >= 0) stats[kTeacherLabelLogprob] = p.logprob(label);
    stats[kStudentTop1] = static_cast<double>(student_top1);
    stats[kTeacherTop1] = static_cast<double>(teacher_top1);
    stats[kStudentConfidence] = 1 / q.sum;
    stats[kTeacherConfidence] = 1 / p.sum;
  }
  const Sums sums = sweep_of<S>(job.formula)(p, q, nullptr, job.params, n, g);
  const bool wants_kd = job.kd_weight != 0;  // 0 times an infinite divergence is nothing
  job.loss[row] = wants_kd ? job.kd_weight * sums.f : 0;
  if (student.wants_ce) job.loss[row] -= job.ce_weight * label_logprob;
  if (job.stats) job.stats[row * kStats + kDivergence] = sums.f;
  if (!job.wants_gradient()) return;

  S* out = slots_of(job, row, g);  // a column of g is read before it is written
  const double kd = job.kd_weight / job.temperature, inverse_sum = 1 / q.sum;
  const S slope_at_label = label >= 0 ? student.slope(q.z[label]) : S{};
  over_columns<S>(0, n, [&](auto lane, int64_t v) {
    using T = decltype(lane);
    const T z = load<T>(q.z + v);
    const T q_v = exp(z - (T{} + q.max)) * splat<T>(inverse_sum);
    T slot = wants_kd ? (load<T>(g + v) - q_v * splat<T>(sums.g)) * splat<T>(kd) : T{};
    if (student.wants_ce) slot += student.ce_share(z, q_v);
    store(out + v, slot * student.slope(z) * splat<T>(job.weight[row]));
  });
  if (student.wants_ce) out[label] -= static_cast<S>(job.weight[row] * job.ce_weight) * slope_at_label;
  close_row(job, row, out);
}

template <class S>
void sparse_row(const RowLoss<S>& job, const SparseRows<S>& teacher, int64_t row, S* z, S* events) {
  const int64_t n = job.vocab, first = teacher.starts[row], k = teacher.ends[row] - first;
  const int64_t* ids = teacher.ids + first;
  const S* given = teacher.logprobs + first;
  const bool bucket = teacher.treatment == kBucket && !teacher.importance;
  S *logp = events, *logq = logp + k + 1, *g = logq + k + 1, *kept_z = g + k + 1;

  // The row is worked on where its gradient will be, if that is where it already is.
  const S* raw = job.student.raw + row * job.student.stride;
  if (job.gradient && job.gradient + row * job.gradient_stride == raw) z = job.gradient + row * job.gradient_stride;
  const S* given_z = tempered(job.student, row, job.temperature, z, n);
  if (given_z != z) std::memcpy(z, given_z, sizeof(S) * n);
  const int64_t label = label_of(job, row);
  const S z_label = label >= 0 ? z[label] : S{};

  // Take the kept logits out of the row, so that what remains is the tail: its mass is summed, never 1 - sum.
  int64_t taken = 0;
  for (; taken < k; ++taken) {
    if (ids[taken] < 0 || ids[taken] >= n) break;
    kept_z[taken] = z[ids[taken]];
    if (kept_z[taken] != kept_z[taken]) break;  // NaN in the row, or an id that was taken before
    z[ids[taken]] = std::numeric_limits<S>::quiet_NaN();
  }
  S max = -kInf<S>;
  for (int64_t i = 0; i < taken; ++i) {
    z[ids[i]] = -kInf<S>;
    max = kept_z[i] > max ? kept_z[i] : max;
  }
  const Normalised<S> tail = normalised<S>(z, n);
  max = tail.max > max ? tail.max : max;
  const double tail_sum = tail.sum == 0 ? 0 : tail.sum * std::exp(static_cast<double>(tail.max) - max);
  double kept_sum = 0, kept_mass = 0;
  bool is_probability = true;
  for (int64_t i = 0; i < taken; ++i) {
    kept_sum += std::exp(static_cast<double>(kept_z[i]) - max);
    kept_mass += std::exp(static_cast<double>(given[i]));
    is_probability &= given[i] <= S(1e-4);
  }
  const double sum = tail_sum + kept_sum;
  const Normalised<S> q{z, max, sum, static_cast<S>(std::log(sum))};
  if (!q.is_finite() || !(max < kInf<S>)) job.status[row] |= kBadStudent;
  else if (taken < k) job.status[row] |= kBadIds;
  if (!is_probability || (!teacher.importance && kept_mass > 1 + kMassTolerance)) job.status[row] |= kBadTeacher;
  if (bucket && !(teacher.tail[row] <= S(1e-4))) job.status[row] |= kBadTail;
  if (bucket && kept_mass + std::exp(static_cast<double>(teacher.tail[row])) > 1 + kMassTolerance) job.status[row] |= kBadTeacher;
  if (teacher.importance)
    for (int64_t i = 0; i < k; ++i)
      if (!(teacher.importance[first + i] >= 0 && teacher.importance[first + i] < kInf<S>)) job.status[row] |= kBadImportance;
  if (job.status[row]) return;

  StudentRow<S> student{job, q, label, sum, job.ce_weight != 0 && label >= 0};
  if (label >= 0 && job.temperature != 1.0) {
    student.untempered_sum = sum_exp(z, max, job.temperature, n);
    for (int64_t i = 0; i < k; ++i)
      student.untempered_sum += std::exp((static_cast<double>(kept_z[i]) - max) * job.temperature);
  }
  const double label_logprob = label >= 0 ? student.label_logprob(z_label) : std::nan("");

  // The short row of events: kept ids, and with "bucket" the tail.
  const bool renormalise = teacher.treatment == kRenormalize && !teacher.importance;
  const S p_shift = renormalise ? static_cast<S>(std::log(kept_mass)) : S{};
  const S q_shift = renormalise ? static_cast<S>(std::log(kept_sum)) : q.log_sum;
  for (int64_t i = 0; i < k; ++i) {
    logp[i] = given[i] - p_shift;
    logq[i] = (kept_z[i] - max) - q_shift;
  }
  int64_t count = k;
  if (bucket) {
    logp[k] = teacher.tail[row];
    logq[k] = static_cast<S>(std::log(tail_sum) - std::log(sum));
    ++count;
  }
  const S* importance = teacher.importance ? teacher.importance + first : nullptr;
  const Sums sums = sweep_of<S>(job.formula)({logp, S{}, 1, S{}}, {logq, S{}, 1, S{}}, importance, job.params, count, g);
  const bool wants_kd = job.kd_weight != 0;
  job.loss[row] = wants_kd ? job.kd_weight * sums.f : 0;
  if (student.wants_ce) job.loss[row] -= job.ce_weight * label_logprob;

  if (job.stats) {
    double* stats = job.stats + row * kStats;
    double p_log_p = 0, q_log_q = 0;
    int64_t best = -1, student_top1 = tail.max == max ? first_index_of(z, max, n) : n;
    for (int64_t i = 0; i < k; ++i) {
      const double l = given[i], gap = static_cast<double>(kept_z[i]) - max;
      if (l > -1e30) p_log_p += std::exp(l) * l;
      if (gap > -1e30) q_log_q += std::exp(gap) * gap;
      if (kept_z[i] == max && ids[i] < student_top1) student_top1 = ids[i];
      if (best < 0 || given[i] > given[best] || (given[i] == given[best] && ids[i] < ids[best])) best = i;
    }
    q_log_q += sum_columns<S>(n, [&](auto lane, int64_t v) {
      using T = decltype(lane);
      const T gap = load<T>(z + v) - (T{} + max);
      return where(gap > splat<T>(-1e30), exp(gap) * gap, T{});
    });
    const double tail_logprob = teacher.tail ? static_cast<double>(teacher.tail[row]) : -kInf<double>;
    if (tail_logprob > -1e30) p_log_p += std::exp(tail_logprob) * tail_logprob;
    stats[kDivergence] = sums.f;
    stats[kStudentEntropy] = std::log(sum) - q_log_q / sum;
    stats[kTeacherEntropy] = -p_log_p;
    stats[kCapturedMass] = kept_mass;
    stats[kLabelLogprob] = label_logprob;
    stats[kStudentTop1] = static_cast<double>(student_top1);
    stats[kStudentConfidence] = 1 / sum;
    stats[kTeacherTop1] = -1;
    stats[kAgreement] = 0;
    if (best >= 0) {
      stats[kAgreement] = student_top1 == ids[best];
      stats[kTeacherTop1] = static_cast<double>(ids[best]);
      stats[kTeacherConfidence] = std::exp(static_cast<double>(given[best]));
    }
    for (int64_t i = 0; i < k; ++i)
      if (ids[i] == label) stats[kTeacherLabelLogprob] = given[i];
  }
  if (!job.wants_gradient()) return;

  S* out = slots_of(job, row, z);  // a column of z is read before it is written
  const double kd = job.kd_weight / job.temperature, inverse_sum = 1 / sum, weight = job.weight[row];
  // What an id outside the kept set gets is proportional to its q: the tail's own g spread over it, less its share of G.
  double spread = renormalise ? 0 : -sums.g;
  if (bucket && tail_sum > 0) spread += static_cast<double>(g[k]) * sum / tail_sum;
  if (!wants_kd) spread = 0;
  over_columns<S>(0, n, [&](auto lane, int64_t v) {
    using T = decltype(lane);
    const T z_v = load<T>(z + v);
    const T q_v = exp(z_v - (T{} + max)) * splat<T>(inverse_sum);
    T slot = q_v * splat<T>(kd * spread);
    if (student.wants_ce) slot += student.ce_share(z_v, q_v);
    slot = slot * splat<T>(weight);
    // -inf times a slope of -inf would be NaN under a softcap; a column of no mass has no gradient.
    if (job.student.softcap != 0) slot = where(q_v > T{}, slot * student.slope(z_v), T{});
    else slot = slot * splat<T>(job.student.scale);
    store(out + v, slot);
  });
  for (int64_t i = 0; i < k; ++i) {
    const S q_i = static_cast<S>(std::exp(static_cast<double>(kept_z[i]) - max) * inverse_sum);
    const S q_event = renormalise ? static_cast<S>(std::exp(static_cast<double>(kept_z[i]) - max) / kept_sum) : q_i;
    S slot = wants_kd ? static_cast<S>((g[i] - q_event * sums.g) * kd) : S{};
    if (student.wants_ce) slot += student.ce_share(kept_z[i], q_i);
    out[ids[i]] = slot * student.slope(kept_z[i]) * static_cast<S>(weight);
  }
  if (student.wants_ce) out[label] -= static_cast<S>(weight * job.ce_weight) * student.slope(z_label);
  close_row(job, row, out);
}

template <class S> void run_dense(const RowLoss<S>& job, const RawLogits<S>& teacher) {
#pragma omp parallel num_threads(job.threads)
  {
    Scratch<S> scratch(2 * job.vocab);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < job.rows; ++row)
      if (open_row(job, row)) dense_row(job, teacher, row, scratch.data);
  }
}

template <class S> void run_sparse(const RowLoss<S>& job, const SparseRows<S>& teacher) {
  int64_t longest = 0;
  for (int64_t row = 0; row < job.rows; ++row) {
    const int64_t k = teacher.ends[row] - teacher.starts[row];
    longest = k > longest ? k : longest;
  }
#pragma omp parallel num_threads(job.threads)
  {
    Scratch<S> scratch(job.vocab + 4 * (longest + 1));
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < job.rows; ++row)
      if (open_row(job, row)) sparse_row(job, teacher, row, scratch.data, scratch.data + job.vocab);
  }
}

}  // namespace

void dense_rows(const RowLoss<float>& job, const RawLogits<float>& teacher) { run_dense(job, teacher); }
void dense_rows(const RowLoss<double>& job, const RawLogits<double>& teacher) { run_dense(job, teacher); }
void sparse_rows(const RowLoss<float>& job, const SparseRows<float>& teacher) { run_sparse(job, teacher); }
void sparse_rows(const RowLoss<double>& job, const SparseRows<double>& teacher) { run_sparse(job, teacher); }

int formula_number(const char* name) {
  int number = 0;
#define KD_COMPARE(Formula)                              \
  if (std::strcmp(name, Formula::name) == 0) return number; \
  ++number;
  KD_FOR_EACH_FORMULA(KD_COMPARE)
#undef KD_COMPARE
  return -1;
}

}  // namespace KD_ISA
}  // namespace kd
