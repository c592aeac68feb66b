// Bytes to numbers, for host and device. Nothing here trusts the bytes that it reads: a reader that runs past their end goes
// on with zeros, and says so when it is asked.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "rans.h"

namespace kd {
namespace KD_ISA {

// Bytes behind a code that a reader may look at, whatever they are.
constexpr size_t kCodePad = 128;

// Numbers of a run that are all of one context.
struct OneContext {
  const Symbol* slots;  // [kTotal]
  KD_HOST_DEVICE Symbol at(uint32_t, uint32_t slot) const { return slots[slot]; }
#if defined(__AVX2__)
  __m256i base(uint32_t, __m256i) const { return _mm256_setzero_si256(); }
#endif
};

// Numbers each of which has its own.
struct OwnContexts {
  const Symbol* slots;       // [contexts, kTotal]
  const uint32_t* contexts;  // [count of the run]
  KD_HOST_DEVICE Symbol at(uint32_t i, uint32_t slot) const { return slots[contexts[i] * kTotal + slot]; }
#if defined(__AVX2__)
  __m256i base(uint32_t i, __m256i which) const {
    return _mm256_slli_epi32(_mm256_maskload_epi32(reinterpret_cast<const int*>(contexts + i), which), kTotalBits);
  }
#endif
};

#if defined(__AVX2__)

// Eight lanes take words one after the other, if those of a mask do: the bytes of 16 that each lane of 32 bits gets. The other
// lanes, and upper halves, get none.
struct BytesOfLanes {
  alignas(32) uint8_t of[256][32];
  constexpr BytesOfLanes() : of() {
    for (uint32_t mask = 0; mask < 256; ++mask)
      for (uint32_t lane = 0, word = 0; lane < 8; word += mask >> lane++ & 1)
        for (uint32_t byte = 0; byte < 4; ++byte)
          of[mask][4 * lane + byte] = byte < 2 && mask >> lane & 1 ? static_cast<uint8_t>(2 * word + byte) : 0x80;
  }
};
inline constexpr BytesOfLanes kBytesOfLanes;

// The words of 32 bits at eight places from `base` on, which are counted in T. By hand: AMD's processors gather no faster, and many
// of Intel's, whose microcode stops CVE-2022-40982, much slower.
template <class T> KD_FORCE_INLINE __m256i words_at(const T* base, __m256i places) {
  const __m128i low = _mm256_castsi256_si128(places), high = _mm256_extracti128_si256(places, 1);
  const auto word = [base](uint64_t place) {
    int32_t value;
    std::memcpy(&value, base + static_cast<uint32_t>(place), 4);
    return value;
  };
  const auto two = [word](uint64_t pair) { return _mm_insert_epi32(_mm_cvtsi32_si128(word(pair)), word(pair >> 32), 1); };
  const auto four = [two](__m128i quad) {
    const int64_t first = _mm_cvtsi128_si64(quad), second = _mm_extract_epi64(quad, 1);
    return _mm_unpacklo_epi64(two(static_cast<uint64_t>(first)), two(static_cast<uint64_t>(second)));
  };
  return _mm256_set_m128i(four(high), four(low));
}

// The first `count` of eight lanes, all of them where it is 8 or more: ones in these.
KD_FORCE_INLINE __m256i first_lanes(uint32_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// 0, a[0], a[0] + a[1], ..: what stands before each of eight.
KD_FORCE_INLINE __m256i sums_before(__m256i a) {
  __m256i sum = _mm256_add_epi32(a, _mm256_slli_si256(a, 4));
  sum = _mm256_add_epi32(sum, _mm256_slli_si256(sum, 8));
  const __m256i low_half = _mm256_permute2x128_si256(sum, sum, 0x08);
  return _mm256_sub_epi32(_mm256_add_epi32(sum, _mm256_shuffle_epi32(low_half, 0xff)), a);
}

#endif

// Reads a code: states of the lanes, number of words, words, bits.
class CodeReader {
 public:
  // False where the code is shorter than it says. Behind the code stand kCodePad bytes that may be read.
  KD_HOST_DEVICE bool open(Span code) {
    if (code.size < kCodeHeadBytes) return false;
    std::memcpy(states_, code.data, sizeof states_);
    uint32_t words;
    std::memcpy(&words, code.data + sizeof states_, sizeof words);
    if (words > (code.size - kCodeHeadBytes) / 2) return false;
    word_ = code.data + kCodeHeadBytes;
    words_end_ = bits_ = word_ + 2 * static_cast<size_t>(words);
    bits_size_ = 8 * static_cast<uint64_t>(code.data + code.size - bits_);
    return true;
  }

  KD_HOST_DEVICE uint32_t bits(uint32_t count) {  // count <= 32
    if (at_ > bits_size_) return 0;
    const uint32_t value = static_cast<uint32_t>(window(at_) & ((uint64_t{1} << count) - 1));
    at_ += count;
    return value;
  }

  KD_HOST_DEVICE uint32_t gamma() {  // at least 1; Elias 1975
    uint32_t zeros = 0;
    while (zeros < 31 && bits(1) == 0) ++zeros;
    return (1u << zeros) | bits(zeros);
  }

  // A run of numbers. Lanes are decoded at the same time, so the context of a number must not depend on others of the run.
  // numbers: room for as many as count says, up to a multiple of kLanes: what is written behind them means nothing.
  template <class Contexts> KD_HOST_DEVICE void run(uint32_t count, const Contexts& contexts, uint32_t* numbers) {
    CodeReader reader = *this;  // a copy, whose members no store through a pointer can change
    reader.read_run(count, contexts, numbers);
    *this = reader;
  }

  KD_HOST_DEVICE bool is_short() const { return word_ > words_end_ || at_ > bits_size_; }

  // Whether all was read, and the lanes are back where the writer began.
  KD_HOST_DEVICE bool is_at_end() {
    for (const uint32_t state : states_)
      if (state != kLow) return false;
    if (is_short() || word_ != words_end_ || bits_size_ - at_ > 7) return false;
    return bits(static_cast<uint32_t>(bits_size_ - at_)) == 0;
  }

 private:
  // At least 57 bits from bit `at` on.
  KD_HOST_DEVICE uint64_t window(uint64_t at) const {
    uint64_t window;
    std::memcpy(&window, bits_ + (at >> 3), 8);
    return window >> (at & 7);
  }

  KD_HOST_DEVICE static void clear(uint32_t* numbers, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) numbers[i] = 0;
  }

  // From class to number, by the bits that follow.
  KD_HOST_DEVICE uint32_t number(uint32_t number_class) {
    const ClassRange& range = range_of(number_class);
    const uint32_t value = range.base + (static_cast<uint32_t>(window(at_)) & range.mask);
    at_ += range.bits;
    return value;
  }

#if defined(__AVX2__)

  template <class Contexts>
  KD_FORCE_INLINE void read_run(uint32_t count, const Contexts& contexts, uint32_t* numbers) {
    static_assert(kLanes == 16, "two vectors");
    auto* const states = reinterpret_cast<__m256i*>(states_);
    __m256i low = _mm256_loadu_si256(states), high = _mm256_loadu_si256(states + 1);
    uint32_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      if (is_short()) return clear(numbers + i, count - i);
      const __m256i first = symbols<true>(low, contexts, i, 8), second = symbols<true>(high, contexts, i + 8, 8);
      finish(first, second, numbers + i);
    }
    if (i < count) {
      if (is_short()) return clear(numbers + i, count - i);
      const uint32_t left = count - i;
      const __m256i first = symbols<false>(low, contexts, i, left);
      const __m256i second = left > 8 ? symbols<false>(high, contexts, i + 8, left - 8) : _mm256_setzero_si256();
      finish(first, second, numbers + i);
    }
    _mm256_storeu_si256(states, low);
    _mm256_storeu_si256(states + 1, high);
  }

  // The classes of eight numbers from i on, or, not whole, of as many as are left, and 0 behind them.
  template <bool is_whole, class Contexts>
  KD_FORCE_INLINE __m256i symbols(__m256i& states, const Contexts& contexts, uint32_t i, uint32_t left) {
    const __m256i which = is_whole ? _mm256_set1_epi32(-1) : first_lanes(left);
    const __m256i index = _mm256_or_si256(contexts.base(i, which), _mm256_and_si256(states, _mm256_set1_epi32(kTotal - 1)));
    const __m256i symbol = words_at(contexts.slots, index);
    const __m256i frequency = _mm256_and_si256(_mm256_srli_epi32(symbol, kTotalBits), _mm256_set1_epi32(2 * kTotal - 1));
    const __m256i past = _mm256_and_si256(symbol, _mm256_set1_epi32(kTotal - 1));
    const __m256i x = _mm256_add_epi32(_mm256_mullo_epi32(frequency, _mm256_srli_epi32(states, kTotalBits)), past);
    const __m256i is_below = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
    const __m256i takes = is_whole ? is_below : _mm256_and_si256(is_below, which);
    const uint32_t mask = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(takes)));
    const __m256i words = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(word_)));
    const __m256i next =
        _mm256_shuffle_epi8(words, _mm256_load_si256(reinterpret_cast<const __m256i*>(kBytesOfLanes.of[mask])));
    const __m256i shifted = _mm256_sllv_epi32(x, _mm256_and_si256(takes, _mm256_set1_epi32(16)));
    const __m256i filled = _mm256_or_si256(shifted, next);
    states = is_whole ? filled : _mm256_blendv_epi8(states, filled, which);
    word_ += 2 * static_cast<size_t>(__builtin_popcount(mask));
    const __m256i classes = _mm256_srli_epi32(symbol, 2 * kTotalBits + 1);
    return is_whole ? classes : _mm256_and_si256(classes, which);
  }

  // From sixteen classes to numbers, by the bits that follow.
  KD_FORCE_INLINE void finish(__m256i first, __m256i second, uint32_t* numbers) {
    auto* const to = reinterpret_cast<__m256i*>(numbers);
    const __m256i most = _mm256_max_epu32(first, second);
    if (_mm256_testz_si256(most, _mm256_set1_epi32(~15))) {
      _mm256_storeu_si256(to, first);
      _mm256_storeu_si256(to + 1, second);
    } else if (const __m256i is_long = _mm256_cmpgt_epi32(most, _mm256_set1_epi32(kWindowClass));
               __builtin_expect(!_mm256_testz_si256(is_long, is_long), 0)) {
      _mm256_storeu_si256(to, first);
      _mm256_storeu_si256(to + 1, second);
      for (uint32_t i = 0; i < kLanes; ++i) numbers[i] = number(numbers[i]);
    } else {
      _mm256_storeu_si256(to, finish(first));
      _mm256_storeu_si256(to + 1, finish(second));
    }
  }

  // Up to this class a window of 32 bits from any byte on holds what follows, from whatever bit of it.
  static constexpr int kWindowClass = 16 + 2 * (25 - 3) + 1;

  KD_FORCE_INLINE __m256i finish(__m256i classes) {
    const __m256i has_bits = _mm256_cmpgt_epi32(classes, _mm256_set1_epi32(15)), one = _mm256_set1_epi32(1);
    const __m256i bits =
        _mm256_and_si256(_mm256_sub_epi32(_mm256_srli_epi32(classes, 1), _mm256_set1_epi32(5)), has_bits);
    const __m256i before = sums_before(bits);
    const __m256i at = _mm256_add_epi32(before, _mm256_set1_epi32(static_cast<int>(at_ & 7)));
    const __m256i windows = words_at(bits_ + (at_ >> 3), _mm256_srli_epi32(at, 3));
    const __m256i mask = _mm256_sub_epi32(_mm256_sllv_epi32(one, bits), one);
    const __m256i found = _mm256_and_si256(_mm256_srlv_epi32(windows, _mm256_and_si256(at, _mm256_set1_epi32(7))), mask);
    const __m256i base = _mm256_sllv_epi32(_mm256_or_si256(_mm256_and_si256(classes, one), _mm256_set1_epi32(2)), bits);
    at_ += static_cast<uint32_t>(_mm256_extract_epi32(_mm256_add_epi32(before, bits), 7));
    return _mm256_add_epi32(_mm256_blendv_epi8(classes, base, has_bits), found);
  }

#else

  template <class Contexts> KD_HOST_DEVICE void read_run(uint32_t count, const Contexts& contexts, uint32_t* numbers) {
    for (uint32_t i = 0; i < count; i += kLanes) {
      if (is_short()) return clear(numbers + i, count - i);
      const uint32_t left = count - i;
      uint32_t most = 0;
      if (left >= kLanes) {
        KD_UNROLL
        for (uint32_t lane = 0; lane < kLanes; ++lane) most |= numbers[i + lane] = symbol(states_[lane], contexts, i + lane);
      } else {
        KD_UNROLL
        for (uint32_t lane = 0; lane < kLanes; ++lane)
          if (lane < left) most |= numbers[i + lane] = symbol(states_[lane], contexts, i + lane);
      }
      if (most < 16) continue;  // these are their classes
      for (uint32_t j = i; j < count && j < i + kLanes; ++j) numbers[j] = number(numbers[j]);
    }
  }

  // The class of number i. Without a branch that depends on the data: which lanes take a word cannot be foreseen.
  template <class Contexts>
  KD_HOST_DEVICE uint32_t symbol(uint32_t& state, const Contexts& contexts, uint32_t i) {
    const Symbol s = contexts.at(i, state % kTotal);
    const uint32_t x = s.frequency() * (state >> kTotalBits) + s.slot();
    uint16_t next;
    std::memcpy(&next, word_, 2);
    const uint32_t is_low = mask_of(x < kLow);
    word_ += is_low & 2;
    state = x ^ ((x ^ (x << 16 | next)) & is_low);
    return s.number_class();
  }

#endif

  uint32_t states_[kLanes];
  const uint8_t *word_, *words_end_;  // the next word, and where they end: bits follow
  const uint8_t* bits_;
  uint64_t bits_size_, at_ = 0;  // in bits
};

}  // namespace KD_ISA
}  // namespace kd
