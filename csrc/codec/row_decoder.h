// Bytes to rows of a teacher, for host and device: no allocation, and no exception. FORMAT.md, section 4, is the
// normative text.
#pragma once

#include <cmath>

#include "rans.h"

namespace kd {

constexpr uint32_t kBlockRows = 256;      // at most
constexpr uint32_t kFractions = 256;      // of a step, for the first entry of a row
constexpr double kTailFinesse = 4;        // the tail's log-odds are stored to step / 4
constexpr double kLogZFinesse = 16;       // log Z to step / 16
constexpr uint32_t kMaxLevel = 1u << 30;
constexpr uint32_t kMaxTailLevel = 1 << 20;  // that a tail is predicted from
constexpr uint32_t kPlaces = 8, kOctaves = 14, kRankLevels = 32;
constexpr uint32_t kTieBit = 1u << 31;  // of a rank
constexpr uint32_t kIdBits = 25;        // one more than ids have
constexpr uint32_t kCountMost = 16;     // longer runs of one level are sorted by a heap
constexpr uint32_t kTop = 16, kDeep = 8192;  // ranks below kTop are final; from kDeep on they rise faster

enum class Weights : int { none, fp32, counts };

// What the rows of a cache have in common: of the manifest.
struct RowLayout {
  uint32_t vocab, k;
  double step;            // nats; 0: log-probabilities are stored as they are
  uint32_t temperatures;  // whose log Z is stored
  bool tail;
  Weights weights;
};

// What is wrong with bytes. `what` is null where nothing is.
struct Complaint {
  const char* what = nullptr;
  int64_t expected = 0, found = 0;
  KD_HOST_DEVICE explicit operator bool() const { return what != nullptr; }
};

// Room for decoded rows. Rows that are not cached get a tail of 0, and NaN for the rest.
struct RowsOut {
  int64_t rows, entries;
  int64_t* offsets;  // [rows + 1]
  int64_t* ids;      // [entries]
  float* logprobs;   // [entries]
  float* tail;       // [rows], or null
  float* log_z;      // [temperatures, rows]
  float* next;       // [rows]
  float* weights;    // [entries], or null
  int32_t* counts;   // [entries], or null
};

// Room for what is known of a block while it is decoded. Entries stand by columns, as they are coded, or by rows.
struct RowScratch {
  uint32_t* columns;  // [k + 1]: where the entries of a column begin
  uint32_t* gaps;     // [entries], by columns
  uint32_t* ranks;    // [entries], by columns, with kTieBit
  uint32_t* by_row;   // [entries]: log-probabilities by columns, and then ranks by rows
  uint32_t *keys, *places, *moved;  // of the entries of a row: [k + 2 kCountMost], [k], [k]
  uint64_t* run;                    // [k]: the entries of one level
  uint32_t counts[kBlockRows];
  uint8_t order[kBlockRows];     // cached rows by falling count
  uint8_t position[kBlockRows];  // of a row in this order
  uint8_t cached[kBlockRows];    // rows that are
  // Of the rows in this order: the last level so far, how many entries have it, and the most that have one.
  uint32_t fractions[kBlockRows], levels[kBlockRows];
  int32_t lengths[kBlockRows], longest[kBlockRows];
  uint32_t numbers[kBlockRows];
};

KD_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

KD_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Contexts. A gap depends on the place in the row; a rank on that, too, or, where the entry has the level of the one
// before, on the octave of the rank before; and on whether the next entry has the same level.
enum Context : uint32_t { kCount, kTail, kCutTail, kNext, kNextLevel, kIdLevel, kWeight, kGap, kRank = kGap + kPlaces,
                          kTie = kRank + 2 * kPlaces, kLogZ = kTie + 2 * kOctaves };

enum Next : uint32_t { kNotKnown, kImpossible, kNotKept, kEntry };  // kEntry + j: the row's entry j

KD_HOST_DEVICE inline uint32_t context_count(const RowLayout& layout) { return kLogZ + layout.temperatures; }

KD_HOST_DEVICE inline uint32_t place_of(uint32_t j) {
  const uint32_t place = j == 0 ? 0 : 1 + log2_floor(j);
  return place < kPlaces ? place : kPlaces - 1;
}

// Where an entry has the level of the one before it, and where the next one has its. Entry 0 is apart: it stays the
// first.
enum Company : uint8_t { kIsFollowed = 1, kIsTie = 2 };

// before: the rank of the entry before, below 2^24, so that fp32 holds it. Its exponent is the octave.
KD_HOST_DEVICE inline uint32_t rank_context(uint32_t place, uint32_t company, uint32_t before) {
  const uint32_t octave = (bits_of(static_cast<float>(static_cast<int32_t>(before | 1))) >> 23) - 127;
  const uint32_t tie = kPlaces + (octave < kOctaves ? octave : kOctaves - 1);
  return kRank + (company & kIsFollowed) + 2 * (company & kIsTie ? tie : place);
}

// An id that came moves from its rank to this one, and that one's id to its.
KD_HOST_DEVICE inline uint32_t promoted(uint32_t rank) { return rank >> ((rank >= kTop) + (rank >= kDeep)); }

KD_HOST_DEVICE inline void promote(uint32_t* id_of_rank, uint32_t rank) {
  const uint32_t to = promoted(rank), id = id_of_rank[rank];
  id_of_rank[rank] = id_of_rank[to];
  id_of_rank[to] = id;
}

// What a tail is expected to be, from the level of the last entry.
KD_HOST_DEVICE inline int64_t tail_of_level(uint32_t level) {
  return -static_cast<int64_t>(kTailFinesse) * (level < kMaxTailLevel ? level : kMaxTailLevel);
}

KD_HOST_DEVICE inline int64_t unzigzag(uint32_t v) { return v & 1 ? -static_cast<int64_t>(v / 2) - 1 : v / 2; }


// Decodes the payload of a block. What was written counts only if there is no complaint, but id_of_rank is then and
// now as it was.
class RowDecoder {
 public:
  // contexts [context_count(layout)]; id_of_rank [vocab], or null: every id is its own rank, always.
  // gap_tables [kPlaces]: of the contexts from kGap on; null: without.
  KD_HOST_DEVICE RowDecoder(const RowLayout& layout, const Distribution* contexts, const SlotTable* gap_tables,
                            uint32_t* id_of_rank, const RowsOut& out, RowScratch& scratch)
      : layout_(layout), contexts_(contexts), gap_tables_(gap_tables), id_of_rank_(id_of_rank), out_(out),
        scratch_(scratch) {}

  KD_HOST_DEVICE Complaint decode(Span payload) {
    if (out_.rows > kBlockRows) return {"rows of a block, at most", kBlockRows, out_.rows};
    if (!reader_.open(payload)) return {"bytes of a payload", kCodeHeadBytes, static_cast<int64_t>(payload.size)};
    if (const Complaint wrong = counts()) return wrong;
    if (const Complaint wrong = is_exact() ? exact_logprobs() : rounded_logprobs()) return wrong;
    if (const Complaint wrong = ranks()) return wrong;
    if (out_.weights || out_.counts) weights();
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
    const Distribution& distribution = contexts_[context];
    reader_.run(count, [&](uint32_t) -> const Distribution& { return distribution; }, numbers);
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
    constexpr uint32_t kTile = 8;
    for (uint32_t j = 0; j < columns_; j += kTile) {
      const uint32_t* tile[kTile];
      for (uint32_t i = 0; i < kTile && j + i < columns_; ++i) tile[i] = columns + scratch_.columns[j + i];
      for (uint32_t p = 0, n = height(j); p < n; ++p) {
        const uint32_t row = scratch_.order[p], left = scratch_.counts[row] - j;
        T* to = by_row + out_.offsets[row] + j;
        if (left >= kTile) {
          for (uint32_t i = 0; i < kTile; ++i) std::memcpy(to + i, tile[i] + p, sizeof(T));
        } else {
          for (uint32_t i = 0; i < left; ++i) std::memcpy(to + i, tile[i] + p, sizeof(T));
        }
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

  KD_HOST_DEVICE void read_gaps(uint32_t count, uint32_t place, uint32_t* gaps) {
    if (!gap_tables_) return run(count, kGap + place, gaps);
    const SlotTable& table = gap_tables_[place];
    reader_.run(count, [&](uint32_t) -> const SlotTable& { return table; }, gaps);
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
      read_gaps(n, place_of(j), gaps);
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

  KD_HOST_DEVICE Complaint ranks() {
    const Distribution* const contexts = contexts_;
    uint32_t* const context = scratch_.numbers;
    const uint32_t vocab = layout_.vocab;
    for (uint32_t j = 0; j < columns_; ++j) {
      const uint32_t n = height(j), followers = j > 0 && j + 1 < columns_ ? height(j + 1) : 0, place = place_of(j);
      const uint32_t *const gaps = scratch_.gaps + scratch_.columns[j], *const after = gaps + n;
      uint32_t *const ranks = scratch_.ranks + scratch_.columns[j];
      if (j < 2) {
        for (uint32_t i = 0; i < n; ++i) context[i] = rank_context(place, 0, 0);
      } else {
        const uint32_t* const before = ranks - height(j - 1);
        for (uint32_t i = 0; i < n; ++i)
          context[i] = rank_context(place, gaps[i] == 0 ? kIsTie : 0, before[i] & ~kTieBit);
      }
      for (uint32_t i = 0; i < followers; ++i) context[i] += after[i] == 0;
      reader_.run(n, [=](uint32_t i) -> const Distribution& { return contexts[context[i]]; }, ranks);
      uint32_t wrong = 0;
      if (j < 2) {
        for (uint32_t i = 0; i < n; ++i) wrong |= ranks[i] >> 25 | (vocab - 1 - ranks[i]) >> 31;
      } else {
        const uint32_t* const before = ranks - height(j - 1);
        for (uint32_t i = 0; i < n; ++i) {
          const uint32_t tie = gaps[i] == 0 ? ~0u : 0, rank = ranks[i] + (((before[i] & ~kTieBit) + 1) & tie);
          wrong |= ranks[i] >> 25 | (vocab - 1 - rank) >> 31;
          ranks[i] = rank | (tie & kTieBit);
        }
      }
      if (wrong) return {"ids, below", vocab, too_large(ranks, n)};
      if (reader_.is_short()) return {"columns in a payload", columns_, j};
    }
    transpose(scratch_.ranks, scratch_.by_row);
    return {};
  }

  // The first of them that is not below the vocabulary's size.
  KD_HOST_DEVICE int64_t too_large(const uint32_t* ranks, uint32_t count) const {
    for (uint32_t i = 0; i < count; ++i)
      if ((ranks[i] & ~kTieBit) >= layout_.vocab) return ranks[i] & ~kTieBit;
    return layout_.vocab;
  }

  // As they are coded: entries of one level are put in order when their ids are known.
  KD_HOST_DEVICE void weights() {
    if (out_.weights)
      for (int64_t i = 0; i < out_.entries; ++i) out_.weights[i] = float_of(reader_.bits(32));
    if (!out_.counts) return;
    for (uint32_t row = 0; row < rows(); ++row)
      run(scratch_.counts[row], kWeight, reinterpret_cast<uint32_t*>(out_.counts) + out_.offsets[row]);
  }

  // Ids of ranks, as each row finds them and leaves them for the next. Of entries of one level the one with the lower
  // id comes first.
  KD_HOST_DEVICE void ids() {
    for (uint32_t row = 0; row < rows(); ++row) {
      const uint32_t *const ranks = scratch_.by_row + out_.offsets[row], count = scratch_.counts[row];
      int64_t* const ids = out_.ids + out_.offsets[row];
      if (!id_of_rank_) {  // ranks of one level rise
        for (uint32_t j = 0; j < count; ++j) ids[j] = ranks[j] & ~kTieBit;
        continue;
      }
      uint32_t* const keys = scratch_.keys + kCountMost;
      const uint32_t longest = count > 0 && !is_exact() ? scratch_.longest[scratch_.position[row]] : 1;
      uint32_t level = 0;
      for (uint32_t j = 0; j < count; ++j) {
        const uint32_t is_tie = ranks[j] / kTieBit;
        level += 1 - is_tie;
        keys[j] = id_of_rank_[ranks[j] & ~kTieBit] + (level << kIdBits);
      }
      for (uint32_t j = 0; j < count; ++j) promote(id_of_rank_, ranks[j] & ~kTieBit);
      find_places(ranks, count, longest);
      const uint32_t* const places = scratch_.places;
      for (uint32_t j = 0; j < count; ++j) ids[places[j]] = keys[j] & ((1u << kIdBits) - 1);
      if (longest == 1) continue;
      if (out_.weights) move(out_.weights + out_.offsets[row], count);
      if (out_.counts) move(out_.counts + out_.offsets[row], count);
    }
    for (int64_t i = out_.entries; id_of_rank_ && i-- > 0;) promote(id_of_rank_, scratch_.by_row[i] & ~kTieBit);
  }

  template <class T> KD_HOST_DEVICE void move(T* values, uint32_t count) {
    std::memcpy(scratch_.moved, values, count * sizeof(T));
    for (uint32_t j = 0; j < count; ++j) std::memcpy(values + scratch_.places[j], scratch_.moved + j, sizeof(T));
  }

  // Where each entry of a row belongs: at its own place, less the greater entries before it, and the lesser ones behind
  // it more. Keys are ids and, above them, levels counted modulo 128: the sign of a difference tells the order of any
  // two that are near each other. Beside the row stand keys that are less and greater than all of it.
  KD_HOST_DEVICE void find_places(const uint32_t* ranks, uint32_t count, uint32_t longest) {
    uint32_t *const keys = scratch_.keys + kCountMost, *const places = scratch_.places;
    for (uint32_t j = 0; j < count; ++j) places[j] = j;
    if (longest > kCountMost) return sort_runs(ranks, count);
    for (uint32_t d = 1; d < longest; ++d) {
      keys[-static_cast<int32_t>(d)] = 0;
      keys[count + d - 1] = keys[count - 1] + (1u << kIdBits);
    }
    for (uint32_t d = 1; d < longest; ++d) {
      const uint32_t *const before = keys - d, *const after = keys + d;
      for (uint32_t j = 0; j < count; ++j)
        places[j] += ((after[j] - keys[j]) >> 31) - ((keys[j] - before[j]) >> 31);
    }
  }

  // A row may have 65,535 entries of one level.
  KD_HOST_DEVICE void sort_runs(const uint32_t* ranks, uint32_t count) {
    for (uint32_t begin = 0, stop; begin < count; begin = stop) {
      uint64_t* const run = scratch_.run;
      for (stop = begin; stop == begin || (stop < count && ranks[stop] & kTieBit); ++stop)
        run[stop - begin] = uint64_t{scratch_.keys[kCountMost + stop] & ((1u << kIdBits) - 1)} << 32 | stop;
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
      for (uint32_t t = 0; t < layout_.temperatures; ++t) out_.log_z[t * out_.rows + row] = NAN;
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
    reader_.run(
        cached_, [&](uint32_t i) -> const Distribution& { return contexts_[is_cut(i) ? kCutTail : kTail]; },
        scratch_.numbers);
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
      float* log_z = out_.log_z + t * out_.rows;
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
  const Distribution* contexts_;
  const SlotTable* gap_tables_;
  uint32_t* id_of_rank_;
  const RowsOut& out_;
  RowScratch& scratch_;
  CodeReader reader_;
  uint32_t cached_ = 0, columns_ = 0;
};

}  // namespace kd
