// Bytes to rows of a teacher, for host and device: no allocation, and no exception. FORMAT.md, section 4, is the
// normative text.
#pragma once

#include <cmath>

#include "code_reader.h"
#include "contexts.h"

namespace kd {
namespace KD_ISA {

// Of a key: the id or rank, and above it the levels of the row so far, counted modulo 128.
constexpr uint32_t kIdBits = 25;  // one more than ids have
constexpr uint32_t kIdMask = (1u << kIdBits) - 1;

#if defined(__AVX2__)

// Words of eight rows, from eight columns.
inline void transpose8(__m256i (&words)[8]) {
  __m256i pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(words[i], words[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(words[i], words[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int half = 0; half < 2; ++half) {
      fours[i + 2 * half] = _mm256_unpacklo_epi64(pairs[i + half], pairs[i + 2 + half]);
      fours[i + 2 * half + 1] = _mm256_unpackhi_epi64(pairs[i + half], pairs[i + 2 + half]);
    }
  for (int i = 0; i < 4; ++i) {
    words[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
    words[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
  }
}

#endif

// Decodes the payload of a block. What was written counts only if there is no complaint, but id_of_rank is then and
// now as it was.
class RowDecoder {
 public:
  // slots [context_count(layout), kTotal]: of Distribution::spread. id_of_rank [vocab], or null: every id is its own rank,
  // always.
  KD_HOST_DEVICE RowDecoder(const RowLayout& layout, const Symbol* slots, uint32_t* id_of_rank, const RowsOut& out,
                            RowScratch& scratch)
      : layout_(layout), slots_(slots), id_of_rank_(id_of_rank), out_(out), scratch_(scratch) {}

  // Behind the payload stand kCodePad bytes that may be read.

  KD_HOST_DEVICE Complaint decode(Span payload) {
    if (out_.rows > kBlockRows) return {"rows of a block, at most", kBlockRows, out_.rows};
    if (!reader_.open(payload)) return {"bytes of a payload", kCodeHeadBytes, static_cast<int64_t>(payload.size)};
    if (const Complaint wrong = counts()) return wrong;
    if (const Complaint wrong = is_exact() ? exact_logprobs() : rounded_logprobs()) return wrong;
    if (const Complaint wrong = ranks()) return wrong;
    if (out_.weights) weights();
    ids();
    not_cached();
    if (out_.tail) tails();
    log_z();
    if (const Complaint wrong = next()) return wrong;
    if (!reader_.is_at_end()) return {"end of a payload", 1, 0};
    return {};
  }

 private:
  KD_HOST_DEVICE bool is_exact() const { return layout_.step == 0; }
  KD_HOST_DEVICE uint32_t rows() const { return static_cast<uint32_t>(out_.rows); }

  KD_HOST_DEVICE void run(uint32_t count, uint32_t context, uint32_t* numbers) {
    reader_.run(count, OneContext{slots_ + context * kTotal}, numbers);
  }

  KD_HOST_DEVICE Complaint counts() {
    run(rows(), kCount, scratch_.numbers);
    int64_t entries = 0;
    out_.offsets[0] = 0;
    for (uint32_t row = 0; row < rows(); ++row) {
      const uint32_t missing = scratch_.numbers[row], count = missing == 0 ? 0 : 1 + layout_.k - missing;
      if (missing > layout_.k) return {"entries that a row lacks, below k", layout_.k, int64_t{missing} - 1};
      scratch_.counts[row] = count;
      entries += count;
      out_.offsets[row + 1] = entries;
      scratch_.cached[cached_] = static_cast<uint8_t>(row);
      cached_ += count > 0;
    }
    if (entries != out_.entries) return {"entries of a block", out_.entries, entries};
    sort_rows();
    uint32_t at = 0;
    for (uint32_t active = cached_; active > 0; ++columns_) {
      scratch_.columns[columns_] = at;
      at += active;
      while (active > 0 && scratch_.counts[scratch_.order[active - 1]] == columns_ + 1) --active;
    }
    scratch_.columns[columns_] = at;
    return {};
  }

  // By radix, so that rows that are as long stay in their order: by the low byte of what they lack, then the high one.
  KD_HOST_DEVICE void sort_rows() {
    uint32_t* const begin = scratch_.levels;
    const uint8_t* from = scratch_.cached;
    for (uint32_t shift = 0; shift == 0 || layout_.k >> shift > 0; shift += 8) {
      const auto key = [&](uint8_t row) { return (layout_.k - scratch_.counts[row]) >> shift & 255; };
      for (uint32_t i = 0; i < 256; ++i) begin[i] = 0;
      for (uint32_t i = 0; i < cached_; ++i) ++begin[key(from[i])];
      for (uint32_t i = 0, sum = 0; i < 256; ++i) {
        const uint32_t n = begin[i];
        begin[i] = sum;
        sum += n;
      }
      for (uint32_t i = 0; i < cached_; ++i) scratch_.order[begin[key(from[i])]++] = from[i];
      for (uint32_t i = 0; i < cached_; ++i) scratch_.position[i] = scratch_.order[i];
      from = scratch_.position;
    }
    for (uint32_t i = 0; i < cached_; ++i) scratch_.position[scratch_.order[i]] = static_cast<uint8_t>(i);
  }

  KD_HOST_DEVICE uint32_t height(uint32_t j) const { return scratch_.columns[j + 1] - scratch_.columns[j]; }

  // From columns to rows. Tile by tile, as lines of the cache are few where they are as far apart as rows.
  template <class T> KD_HOST_DEVICE void transpose(const uint32_t* columns, T* by_row) const {
    static_assert(sizeof(T) == sizeof(uint32_t), "words");
    constexpr uint32_t kTile = 8;
    for (uint32_t j = 0; j < columns_; j += kTile) {
      const uint32_t* tile[kTile];
      for (uint32_t i = 0; i < kTile && j + i < columns_; ++i) tile[i] = columns + scratch_.columns[j + i];
      uint32_t p = 0;
#if defined(__AVX2__)
      const uint32_t whole = j + kTile <= columns_ ? height(j + kTile - 1) : 0;
      for (; p + kTile <= whole; p += kTile) {
        __m256i words[kTile];
        for (uint32_t i = 0; i < kTile; ++i) words[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile[i] + p));
        transpose8(words);
        for (uint32_t i = 0; i < kTile; ++i)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_row + out_.offsets[scratch_.order[p + i]] + j), words[i]);
      }
#endif
      for (const uint32_t n = height(j); p < n; ++p) {
        const uint32_t row = scratch_.order[p], left = scratch_.counts[row] - j;
        T* to = by_row + out_.offsets[row] + j;
        for (uint32_t i = 0; i < (left < kTile ? left : kTile); ++i) std::memcpy(to + i, tile[i] + p, sizeof(T));
      }
    }
  }

  KD_HOST_DEVICE Complaint exact_logprobs() {
    for (int64_t i = 0; i < out_.entries; ++i) {
      out_.logprobs[i] = float_of(reader_.bits(32));
      scratch_.gaps[i] = 1;  // no ties
    }
    return {};
  }

  KD_HOST_DEVICE Complaint rounded_logprobs() {
    const double unit = layout_.step / kFractions;
    uint32_t *const levels = scratch_.levels, *const fractions = scratch_.fractions;
    int32_t *const lengths = scratch_.lengths, *const longest = scratch_.longest;
    for (uint32_t i = 0; i < cached_; ++i) fractions[i] = reader_.bits(8);
    for (uint32_t i = 0; i < cached_; ++i) levels[i] = 0, lengths[i] = longest[i] = 0;
    for (uint32_t j = 0; j < columns_; ++j) {
      uint32_t* const gaps = scratch_.gaps + scratch_.columns[j];
      uint32_t* const logprobs = scratch_.by_row + scratch_.columns[j];
      const uint32_t n = height(j);
      run(n, kGap + place_of(j), gaps);
      uint32_t wrong = 0;
      for (uint32_t i = 0; i < n; ++i) {
        const uint32_t gap = gaps[i], level = levels[i] + gap;
        levels[i] = level;
        wrong |= gap >> 31 | (level + kMaxLevel - 1) >> 31;
        const double whole = static_cast<int32_t>(level), fraction = static_cast<int32_t>(fractions[i]);
        logprobs[i] = bits_of(static_cast<float>(0.0 - (whole * kFractions + fraction) * unit));
      }
      for (uint32_t i = 0; i < n; ++i) {
        const int32_t tie = j > 1 && gaps[i] == 0 ? -1 : 0, length = (lengths[i] & tie) + 1;
        lengths[i] = length;
        longest[i] = longest[i] < length ? length : longest[i];
      }
      if (wrong) return {"levels, at most", kMaxLevel, int64_t{kMaxLevel} + 1};
    }
    transpose(scratch_.by_row, out_.logprobs);
    return {};
  }

  // Keys of ranks, by columns and then by rows.
  KD_HOST_DEVICE Complaint ranks() {
    uint32_t *const contexts = scratch_.numbers, *const levels = scratch_.key_levels;
    const uint32_t vocab = layout_.vocab;
    for (uint32_t i = 0; i < cached_; ++i) levels[i] = 0;
    for (uint32_t j = 0; j < columns_; ++j) {
      const uint32_t n = height(j), followers = j > 0 && j + 1 < columns_ ? height(j + 1) : 0, place = place_of(j);
      const uint32_t *const gaps = scratch_.gaps + scratch_.columns[j], *const after = gaps + n;
      uint32_t* const keys = scratch_.ranks + scratch_.columns[j];
      const uint32_t* const before = j < 2 ? nullptr : keys - height(j - 1);
      for (uint32_t i = 0; i < n; ++i)
        contexts[i] = before ? rank_context(place, gaps[i] == 0 ? kIsTie : 0, before[i] & kIdMask)
                             : rank_context(place, 0, 0);
      for (uint32_t i = 0; i < followers; ++i) contexts[i] += after[i] == 0;
      reader_.run(n, OwnContexts{slots_, contexts}, keys);
      uint32_t wrong = 0;
      for (uint32_t i = 0; i < n; ++i) {
        const uint32_t tie = before && gaps[i] == 0 ? ~0u : 0, number = keys[i];
        const uint32_t rank = number + (before ? ((before[i] & kIdMask) + 1) & tie : 0);
        wrong |= number >> kIdBits | (vocab - 1 - rank) >> 31;
        levels[i] += (1u << kIdBits) & ~tie;
        keys[i] = levels[i] | (rank & kIdMask);
      }
      if (wrong) return {"ids, below", vocab, too_large(keys, n)};
      if (reader_.is_short()) return {"columns in a payload", columns_, j};
    }
    transpose(scratch_.ranks, scratch_.by_row);
    return {};
  }

  // The first of them that is not below the vocabulary's size.
  KD_HOST_DEVICE int64_t too_large(const uint32_t* keys, uint32_t count) const {
    for (uint32_t i = 0; i < count; ++i)
      if ((keys[i] & kIdMask) >= layout_.vocab) return keys[i] & kIdMask;
    return layout_.vocab;
  }

  // As they are coded: entries of one level are put in order when their ids are known.
  KD_HOST_DEVICE void weights() {
    for (int64_t i = 0; i < out_.entries; ++i) out_.weights[i] = float_of(reader_.bits(32));
  }

  // Ids of ranks, as each row finds them and leaves them for the next. Of entries of one level the one with the lower
  // id comes first.
  KD_HOST_DEVICE void ids() {
    for (uint32_t row = 0; row < rows(); ++row) {
      const uint32_t *const ranks = scratch_.by_row + out_.offsets[row], count = scratch_.counts[row];
      int64_t* const ids = out_.ids + out_.offsets[row];
      if (!id_of_rank_) {  // ranks of one level rise
        for (uint32_t j = 0; j < count; ++j) ids[j] = ranks[j] & kIdMask;
        continue;
      }
      uint32_t* const keys = scratch_.keys + kCountMost;
      const uint32_t longest = count > 0 && !is_exact() ? scratch_.longest[scratch_.position[row]] : 1;
      for (uint32_t j = 0; j < count; ++j) keys[j] = id_of_rank_[ranks[j] & kIdMask] | (ranks[j] & ~kIdMask);
      find_promoted(ranks, count);
      for (uint32_t j = 0; j < count; ++j) swap_ids(ranks[j] & kIdMask, scratch_.places[j]);
      find_places(count, longest);
      const uint32_t* const places = scratch_.places;
      for (uint32_t j = 0; j < count; ++j) ids[places[j]] = keys[j] & kIdMask;
      if (longest > 1 && out_.weights) move(out_.weights + out_.offsets[row], count);
    }
    for (uint32_t row = id_of_rank_ ? rows() : 0; row-- > 0;) {
      const uint32_t *const ranks = scratch_.by_row + out_.offsets[row], count = scratch_.counts[row];
      find_promoted(ranks, count);
      for (uint32_t j = count; j-- > 0;) swap_ids(ranks[j] & kIdMask, scratch_.places[j]);
    }
  }

  // Where the ranks of a row move up to, into scratch.places.
  KD_HOST_DEVICE void find_promoted(const uint32_t* ranks, uint32_t count) {
    uint32_t* const to = scratch_.places;
    for (uint32_t j = 0; j < count; ++j) to[j] = promoted(ranks[j] & kIdMask);
  }

  KD_HOST_DEVICE void swap_ids(uint32_t a, uint32_t b) {
    const uint32_t id = id_of_rank_[a];
    id_of_rank_[a] = id_of_rank_[b];
    id_of_rank_[b] = id;
  }

  KD_HOST_DEVICE void move(float* values, uint32_t count) {
    for (uint32_t j = 0; j < count; ++j) scratch_.moved[j] = values[j];
    for (uint32_t j = 0; j < count; ++j) values[scratch_.places[j]] = scratch_.moved[j];
  }

  // Where each entry of a row belongs: at its own place, less the greater entries before it, and the lesser ones behind
  // it more. Keys are ids and, above them, levels counted modulo 128: the sign of a difference tells the order of any
  // two that are near each other. Beside the row stand keys that are less and greater than all of it.
  KD_HOST_DEVICE void find_places(uint32_t count, uint32_t longest) {
    uint32_t *const keys = scratch_.keys + kCountMost, *const places = scratch_.places;
    if (longest > kCountMost) return sort_runs(count);
    for (uint32_t d = 1; d < longest; ++d) {
      keys[-static_cast<int32_t>(d)] = 0;
      keys[count + d - 1] = keys[count - 1] + (1u << kIdBits);
    }
#if defined(__AVX2__)
    const auto load = [](const uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); };
    __m256i own = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (uint32_t j = 0; j < count; j += kScratchLanes, own = _mm256_add_epi32(own, _mm256_set1_epi32(kScratchLanes))) {
      const __m256i key = load(keys + j);
      __m256i place = own;
      for (uint32_t d = 1; d < longest; ++d) {
        const __m256i lesser = _mm256_srli_epi32(_mm256_sub_epi32(load(keys + j + d), key), 31);
        const __m256i greater = _mm256_srli_epi32(_mm256_sub_epi32(key, load(keys + j - d)), 31);
        place = _mm256_add_epi32(place, _mm256_sub_epi32(lesser, greater));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(places + j), place);
    }
#else
    for (uint32_t j = 0; j < count; ++j) places[j] = j;
    for (uint32_t d = 1; d < longest; ++d) {
      const uint32_t *const before = keys - d, *const after = keys + d;
      for (uint32_t j = 0; j < count; ++j)
        places[j] += ((after[j] - keys[j]) >> 31) - ((keys[j] - before[j]) >> 31);
    }
#endif
  }

  // A row may have 65,535 entries of one level.
  KD_HOST_DEVICE void sort_runs(uint32_t count) {
    const uint32_t* const keys = scratch_.keys + kCountMost;
    for (uint32_t begin = 0, stop; begin < count; begin = stop) {
      uint64_t* const run = scratch_.run;
      for (stop = begin; stop < count && (keys[stop] ^ keys[begin]) >> kIdBits == 0; ++stop)
        run[stop - begin] = uint64_t{keys[stop] & kIdMask} << 32 | stop;
      heapsort(run, stop - begin);
      for (uint32_t j = begin; j < stop; ++j) scratch_.places[static_cast<uint32_t>(run[j - begin])] = j;
    }
  }

  KD_HOST_DEVICE static void heapsort(uint64_t* values, uint32_t count) {
    const auto swap = [&](uint32_t a, uint32_t b) {
      const uint64_t value = values[a];
      values[a] = values[b];
      values[b] = value;
    };
    const auto sift = [&](uint32_t root, uint32_t size) {
      for (uint32_t child; (child = 2 * root + 1) < size; root = child) {
        if (child + 1 < size && values[child] < values[child + 1]) ++child;
        if (values[root] >= values[child]) return;
        swap(root, child);
      }
    };
    for (uint32_t root = count / 2; root-- > 0;) sift(root, count);
    for (uint32_t size = count; --size > 0;) {
      swap(0, size);
      sift(0, size);
    }
  }

  // The tail, log Z and next token of rows that are not cached; those of the others follow.
  KD_HOST_DEVICE void not_cached() {
    for (uint32_t row = 0; row < rows(); ++row) {
      if (scratch_.counts[row] > 0) continue;
      if (out_.tail) out_.tail[row] = 0;
      for (uint32_t t = 0; t < layout_.temperatures; ++t) out_.log_z[t * out_.log_z_stride + row] = NAN;
      out_.next[row] = NAN;
    }
  }

  KD_HOST_DEVICE void exact(float* values) {
    for (uint32_t i = 0; i < cached_; ++i) values[scratch_.cached[i]] = float_of(reader_.bits(32));
  }

  // Of k entries the tail goes with the last. A row that was cut short of k was cut at some mass, like others before
  // it.
  KD_HOST_DEVICE void tails() {
    if (is_exact()) return exact(out_.tail);
    const auto is_cut = [&](uint32_t i) { return scratch_.counts[scratch_.cached[i]] < layout_.k; };
    uint32_t* const contexts = scratch_.key_levels;  // by now free
    for (uint32_t i = 0; i < cached_; ++i) contexts[i] = is_cut(i) ? kCutTail : kTail;
    reader_.run(cached_, OwnContexts{slots_, contexts}, scratch_.numbers);
    int64_t cut_tail = 0;
    for (uint32_t i = 0; i < cached_; ++i) {
      const uint32_t row = scratch_.cached[i], code = scratch_.numbers[i];
      out_.tail[row] = -INFINITY;
      if (code == 0) continue;
      const uint32_t last_level = scratch_.levels[scratch_.position[row]];
      const int64_t units = unzigzag(code - 1) + (is_cut(i) ? cut_tail : tail_of_level(last_level));
      const double odds = static_cast<double>(units) * layout_.step / kTailFinesse;
      out_.tail[row] = static_cast<float>(odds < -40 ? odds : -log1p(exp(-odds)));
      if (is_cut(i)) cut_tail = units;
    }
  }

  KD_HOST_DEVICE void log_z() {
    for (uint32_t t = 0; t < layout_.temperatures; ++t) {
      float* log_z = out_.log_z + t * out_.log_z_stride;
      if (is_exact()) {
        exact(log_z);
        continue;
      }
      run(cached_, kLogZ + t, scratch_.numbers);
      int64_t units = 0;
      for (uint32_t i = 0; i < cached_; ++i) {
        units += unzigzag(scratch_.numbers[i]);
        log_z[scratch_.cached[i]] = static_cast<float>(static_cast<double>(units) * layout_.step / kLogZFinesse);
      }
    }
  }

  KD_HOST_DEVICE Complaint next() {
    run(cached_, kNext, scratch_.numbers);
    uint8_t* const not_kept = scratch_.order;  // rows, by now free
    uint32_t count = 0;
    for (uint32_t i = 0; i < cached_; ++i) {
      const uint32_t row = scratch_.cached[i], kept = scratch_.counts[row], code = scratch_.numbers[i];
      if (code == kNotKnown) out_.next[row] = NAN;
      else if (code == kImpossible) out_.next[row] = -INFINITY;
      else if (code == kNotKept) not_kept[count++] = static_cast<uint8_t>(row);
      else if (code - kEntry < kept) out_.next[row] = out_.logprobs[out_.offsets[row] + (code - kEntry)];
      else return {"entry of the next token, below", kept, int64_t{code} - kEntry};
    }
    if (is_exact()) {
      for (uint32_t i = 0; i < count; ++i) out_.next[not_kept[i]] = float_of(reader_.bits(32));
      return {};
    }
    run(count, kNextLevel, scratch_.numbers);
    for (uint32_t i = 0; i < count; ++i)
      out_.next[not_kept[i]] = static_cast<float>(0.0 - static_cast<double>(scratch_.numbers[i]) * layout_.step);
    return {};
  }

  const RowLayout& layout_;
  const Symbol* slots_;
  uint32_t* id_of_rank_;
  const RowsOut& out_;
  RowScratch& scratch_;
  CodeReader reader_;
  uint32_t cached_ = 0, columns_ = 0;
};

}  // namespace KD_ISA
}  // namespace kd
