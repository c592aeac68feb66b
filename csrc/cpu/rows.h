// What every pass over rows of logits is made of: columns in vectors, logits out of raw products, a thread's memory.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "kd/simd.h"
#include "raw_logits.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kBlock = 2048;  // columns summed in single precision before they join a double

template <class S> constexpr S kInf = std::numeric_limits<S>::infinity();

template <class T> KD_INLINE T tanh(T x) {  // odd; e^(-2|x|) keeps it from overflowing
  const T a = abs(x);
  const T e = exp(splat<T>(-2.0) * a);
  const T y = where(a < splat<T>(0.02), a - a * a * a * splat<T>(1.0 / 3.0), (splat<T>(1.0) - e) / (splat<T>(1.0) + e));
  return where(x < splat<T>(0), -y, y);
}
template <> inline __attribute__((always_inline)) double tanh<double>(double x) { return std::tanh(x); }

// Calls body(V or S, column) over [begin, end): whole vectors, then single columns.
template <class S, class Body> KD_INLINE void over_columns(int64_t begin, int64_t end, Body body) {
  using V = typename Lanes<S>::V;
  constexpr int64_t width = Lanes<S>::width;
  int64_t v = begin;
  for (; v + width <= end; v += width) body(V{}, v);
  if constexpr (width > 1)
    for (; v < end; ++v) body(S{}, v);
}

template <class S> KD_INLINE S block_max(const S* z, int64_t begin, int64_t end) {
  using V = typename Lanes<S>::V;
  V lanes = V{} - kInf<S>;
  S rest = -kInf<S>;
  over_columns<S>(begin, end, [&](auto lane, int64_t v) {
    if constexpr (sizeof(lane) == sizeof(V)) lanes = maximum(load<V>(z + v), lanes);
    else rest = z[v] > rest ? z[v] : rest;
  });
  const S best = lane_max<S>(lanes);
  return best > rest ? best : rest;
}

// Tempered logits of one row: the raw row itself where there is nothing to do, else written to scratch.
template <class S> const S* tempered(const RawLogits<S>& logits, int64_t row, double temperature, S* scratch, int64_t n) {
  const S* raw = logits.raw + row * logits.stride;
  if (logits.is_plain() && temperature == 1.0) return raw;
  const double factor = logits.softcap > 0 ? logits.scale / logits.softcap : logits.scale / temperature;
  const double height = logits.softcap / temperature;
  over_columns<S>(0, n, [&](auto lane, int64_t v) {
    using T = decltype(lane);
    T z = load<T>(raw + v);
    if (logits.bias) z += load<T>(logits.bias + v);
    z = z * splat<T>(factor);
    if (logits.softcap > 0) z = tanh(z) * splat<T>(height);
    store(scratch + v, z);
  });
  return scratch;
}

template <class S> int64_t first_index_of(const S* z, S value, int64_t n) {
  for (int64_t v = 0; v < n; ++v)
    if (z[v] == value) return v;
  return -1;
}

// A thread without a row would only be waited for.
inline int threads_for(int64_t rows, int threads) { return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(rows, threads))); }

// Memory of one thread, for as long as the pass lasts.
template <class S> struct Scratch {
  S* data;
  explicit Scratch(int64_t count)
      : data(static_cast<S*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(S) + 63) / 64 * 64 + 64))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
};

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
