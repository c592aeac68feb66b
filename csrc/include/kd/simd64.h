// fp64 in vectors, exp and log: for the few sums and differences of an fp32 row that fp32 would spoil.
#pragma once

#include "kd/simd.h"

namespace kd {
namespace KD_ISA {

typedef double DoubleVector __attribute__((vector_size(KD_VECTOR_BYTES)));
typedef uint64_t WordVector __attribute__((vector_size(KD_VECTOR_BYTES)));
typedef float HalfVector __attribute__((vector_size(KD_VECTOR_BYTES / 2)));

constexpr int64_t kDoubles = KD_VECTOR_BYTES / 8;

template <class D> struct Words64;
template <> struct Words64<DoubleVector> { using type = WordVector; };
template <> struct Words64<double> { using type = uint64_t; };

// One number, or as many as a vector takes, of either type, widened.
template <class D> KD_INLINE D widened(const double* p) { return load<D>(p); }
template <class D> KD_INLINE D widened(const float* p) {
  if constexpr (sizeof(D) == sizeof(double)) return *p;
  else return __builtin_convertvector(load<HalfVector>(p), D);
}
template <class D> KD_INLINE void narrow(double* p, D x) { store(p, x); }
template <class D> KD_INLINE void narrow(float* p, D x) {
  if constexpr (sizeof(D) == sizeof(double)) *p = static_cast<float>(x);
  else store(p, __builtin_convertvector(x, HalfVector));
}

// Calls body(DoubleVector or double, column) over [0, n).
template <class Body> KD_INLINE void over_doubles(int64_t n, Body body) {
  int64_t v = 0;
  for (; v + kDoubles <= n; v += kDoubles) body(DoubleVector{}, v);
  for (; v < n; ++v) body(double{}, v);
}

KD_INLINE double lane_sum(DoubleVector v) {
  double sum = 0;
  for (int64_t i = 0; i < kDoubles; ++i) sum += v[i];
  return sum;
}

// e^x for x <= 0, within 2 ulp; 0 below -708, -inf included.
template <class D> KD_INLINE D exp_fall64(D x) {
  using W = typename Words64<D>::type;
  const D magic = D{} + 6755399441055744.0;  // 1.5 * 2^52
  const D shifted = x * (D{} + 1.44269504088896340736) + magic;
  const D n = shifted - magic;
  const D r = (x - n * (D{} + 0.693147180369123816490)) - n * (D{} + 1.90821492927058770002e-10);
  D poly = D{} + 1.0 / 6227020800.0;  // the series of e^r, up to r^13
  for (const double term : {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0,
                            1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0})
    poly = poly * r + term;
  const D scale = bit_cast<D>((bit_cast<W>(shifted) + 1023) << 52);  // of the magic number, the shift leaves no bit
  return where(x < D{} - 708.0, D{}, poly * scale);
}

// ln x within 2 ulp, for normal x > 0; -inf at 0.
template <class D> KD_INLINE D log64(D x) {
  using W = typename Words64<D>::type;
  constexpr uint64_t root = 0x3fe6a09e667f3bcd;  // sqrt(1/2): m lies within it and its double
  const W offset = bit_cast<W>(x) - root + (uint64_t{1023} << 52);
  const D m = bit_cast<D>((offset & ((uint64_t{1} << 52) - 1)) + root);
  const D e = bit_cast<D>((offset >> 52) | 0x4330000000000000) - (4503599627370496.0 + 1023.0);
  const D s = (m - 1.0) / (m + 1.0), square = s * s;
  D poly = D{} + 1.0 / 21.0;  // 2 artanh s
  for (const double term : {1.0 / 19.0, 1.0 / 17.0, 1.0 / 15.0, 1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0})
    poly = poly * square + term;
  const D y = e * 0.693147180369123816490 + (2.0 * (s + s * square * poly) + e * 1.90821492927058770002e-10);
  return where(x > D{}, y, D{} - std::numeric_limits<double>::infinity());
}

}  // namespace KD_ISA
}  // namespace kd
