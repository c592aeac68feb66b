// Vectors, exp and log: the whole of the library's instruction-set dependence.
//
// Every source under csrc/cpu is compiled once for each instruction set, with KD_ISA naming the namespace and KD_VECTOR_BYTES
// the register width. Code is written once against `Lanes<float>::V`, a compiler vector; a plain float is a vector of one, so
// the same function serves the last columns of a row, with the same rounding. fp64 is the exact, slow path: vectors of one
// and the C library's exp and log.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "host_device.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef KD_VECTOR_BYTES
#define KD_VECTOR_BYTES 16
#endif

#define KD_INLINE static KD_FORCE_INLINE

namespace kd {
namespace KD_ISA {

typedef float FloatVector __attribute__((vector_size(KD_VECTOR_BYTES)));
typedef int32_t IntVector __attribute__((vector_size(KD_VECTOR_BYTES)));
typedef uint32_t NaturalVector __attribute__((vector_size(KD_VECTOR_BYTES)));

template <class S> struct Lanes;
template <> struct Lanes<float> {
  using V = FloatVector;
  static constexpr int64_t width = KD_VECTOR_BYTES / 4;
};
template <> struct Lanes<double> {
  using V = double;
  static constexpr int64_t width = 1;
};

template <class T> struct Bits;
template <> struct Bits<FloatVector> {
  using type = IntVector;
  using natural = NaturalVector;
};
template <> struct Bits<float> {
  using type = int32_t;
  using natural = uint32_t;
};

template <class To, class From> KD_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <class T> KD_INLINE T splat(double x) { return T{} + static_cast<float>(x); }
template <> inline __attribute__((always_inline)) double splat<double>(double x) { return x; }

template <class V, class S> KD_INLINE V load(const S* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class V, class S> KD_INLINE void store(S* p, V v) { std::memcpy(p, &v, sizeof(v)); }

// Rounded to nearest, ties to even, as torch does; NaN stays NaN. A loop over it becomes vectors.
KD_INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

template <class M, class T> KD_INLINE T where(M mask, T a, T b) { return mask ? a : b; }
template <class T> KD_INLINE T maximum(T a, T b) { return where(a > b, a, b); }
template <class T> KD_INLINE T minimum(T a, T b) { return where(a < b, a, b); }
template <class T> KD_INLINE T abs(T x) { return where(x < splat<T>(0), -x, x); }

constexpr double kExpMagic = 12582912.0;  // 1.5 * 2^23

// x = n ln2 + r with |r| <= ln2 / 2. `shifted`: 1.5 * 2^23 + n, an integer in the low bits; `fraction`: e^r by a polynomial of
// degree 7.
template <class T> struct ExpParts {
  T shifted, fraction;
};

template <class T> KD_INLINE ExpParts<T> exp_parts(T x) {
  const T magic = splat<T>(kExpMagic);
  const T shifted = x * splat<T>(1.44269504088896341) + magic;
  const T n = shifted - magic;
  const T r = (x - n * splat<T>(0.693359375)) - n * splat<T>(-2.12194440e-4);
  T poly = splat<T>(1.9875691500e-4);
  poly = poly * r + splat<T>(1.3981999507e-3);
  poly = poly * r + splat<T>(8.3334519073e-3);
  poly = poly * r + splat<T>(4.1665795894e-2);
  poly = poly * r + splat<T>(1.6666665459e-1);
  poly = poly * r + splat<T>(5.0000001201e-1);
  return {shifted, poly * (r * r) + r + splat<T>(1.0)};
}

// e^x within 2 ulp. Below -87.3 the result is 0 (no subnormals: they would cost more than they mean), above 88.7 it is inf; NaN
// stays NaN.
template <class T> KD_INLINE T exp(T x) {
  using I = typename Bits<T>::type;
  const T bounded = where(x < splat<T>(-104.0), splat<T>(-104.0), where(x > splat<T>(89.0), splat<T>(89.0), x));
  const ExpParts<T> parts = exp_parts(bounded);
  const I exponent = bit_cast<I>(parts.shifted) - bit_cast<I>(splat<T>(kExpMagic));
  const T half_scale = bit_cast<T>((exponent + 126) << 23);  // half, so that n = 128 does not overflow
  const T y = parts.fraction * half_scale * splat<T>(2.0);
  const T low = where(x < splat<T>(-87.33654), splat<T>(0), y);
  return where(x > splat<T>(88.72283), splat<T>(std::numeric_limits<float>::infinity()), low);
}
template <> inline __attribute__((always_inline)) double exp<double>(double x) { return std::exp(x); }

// The same for x <= 0, in two thirds of the operations: no bounds, and the scale 2^n is a normal number down to where the result
// is 0. What lies far below that is spoiled on the way, -inf included, and then is 0.
template <class T> KD_INLINE T exp_fall(T x) {
  using N = typename Bits<T>::natural;
  const ExpParts<T> parts = exp_parts(x);
  const T scale = bit_cast<T>((bit_cast<N>(parts.shifted) + 127) << 23);  // of the magic number, the shift leaves no bit
  return where(x < splat<T>(-87.33654), splat<T>(0), parts.fraction * scale);
}
template <> inline __attribute__((always_inline)) double exp_fall<double>(double x) { return std::exp(x); }

// ln x within 2 ulp for x > 0, subnormals included. -inf at 0, inf at inf, NaN below 0.
template <class T> KD_INLINE T log(T x) {
  using I = typename Bits<T>::type;
  const auto tiny = x < splat<T>(1.17549435e-38);
  const T scaled = where(tiny, x * splat<T>(16777216.0), x);
  I bits = bit_cast<I>(scaled);
  // Take the mantissa into [sqrt(1/2), sqrt(2)): there log(m) is small and keeps its digits.
  const I offset = bits - 0x3f3504f3;
  const I exponent = offset >> 23;
  bits = (offset & 0x007fffff) + 0x3f3504f3;
  const T m = bit_cast<T>(bits) - splat<T>(1.0);
  T e;
  if constexpr (sizeof(T) == sizeof(float)) e = static_cast<float>(exponent);
  else e = __builtin_convertvector(exponent, T);
  e = where(tiny, e - splat<T>(24.0), e);
  const T m2 = m * m;
  T poly = splat<T>(7.0376836292e-2);
  poly = poly * m + splat<T>(-1.1514610310e-1);
  poly = poly * m + splat<T>(1.1676998740e-1);
  poly = poly * m + splat<T>(-1.2420140846e-1);
  poly = poly * m + splat<T>(1.4249322787e-1);
  poly = poly * m + splat<T>(-1.6668057665e-1);
  poly = poly * m + splat<T>(2.0000714765e-1);
  poly = poly * m + splat<T>(-2.4999993993e-1);
  poly = poly * m + splat<T>(3.3333331174e-1);
  T y = poly * m * m2 + e * splat<T>(-2.12194440e-4) - splat<T>(0.5) * m2;
  y = (m + y) + e * splat<T>(0.693359375);
  const float inf = std::numeric_limits<float>::infinity();
  y = where(x == splat<T>(inf), splat<T>(inf), y);
  y = where(x == splat<T>(0), splat<T>(-inf), y);
  return where(x < splat<T>(0), splat<T>(std::numeric_limits<float>::quiet_NaN()), where(x == x, y, x));
}
template <> inline __attribute__((always_inline)) double log<double>(double x) { return std::log(x); }

// Bit i is set where lane i of x is above the bound.
KD_INLINE uint32_t lanes_above(FloatVector x, FloatVector bound) {
#if KD_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ);
#elif KD_VECTOR_BYTES == 32 && defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps(x, bound, _CMP_GT_OQ));
#elif KD_VECTOR_BYTES == 16 && defined(__SSE__)
  return _mm_movemask_ps(_mm_cmpgt_ps(x, bound));
#else
  uint32_t bits = 0;
  for (int64_t i = 0; i < Lanes<float>::width; ++i) bits |= static_cast<uint32_t>(x[i] > bound[i]) << i;
  return bits;
#endif
}
KD_INLINE uint32_t lanes_above(double x, double bound) { return x > bound; }

// Sum and maximum over the lanes of a vector. The sum is taken in double.
KD_INLINE double lane_sum(double v) { return v; }
KD_INLINE double lane_sum(FloatVector v) {
  double sum = 0;
  for (unsigned i = 0; i < sizeof(v) / sizeof(float); ++i) sum += v[i];
  return sum;
}
template <class S, class V> KD_INLINE S lane_max(V v) {
  S lanes[Lanes<S>::width];
  std::memcpy(lanes, &v, sizeof(lanes));
  S best = lanes[0];
  for (S x : lanes) best = x > best ? x : best;
  return best;
}

}  // namespace KD_ISA
}  // namespace kd
