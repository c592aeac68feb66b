#include "codec.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

namespace kd {
namespace {

constexpr uint32_t kFractions = 256;  // of a step, for the first entry of a row
constexpr double kTailFinesse = 4;    // the tail's log-odds are stored to step / 4
constexpr double kLogZFinesse = 16;   // log Z to step / 16
constexpr uint64_t kMaxLevel = 1u << 30;
constexpr uint32_t kPlaces = 8, kTies = 14, kRankLevels = 64;
constexpr uint32_t kTop = 16, kDeep = 8192;  // ranks below kTop are final; from kDeep on they rise faster

// Contexts. Gaps and ranks depend on the place in the row; the rank of an entry as likely as the one before, on that one.
enum Context : uint32_t { kCount, kTail, kCutTail, kNext, kNextLevel, kIdLevel, kWeight, kGap, kRank = kGap + kPlaces,
                          kTie = kRank + kPlaces, kLogZ = kTie + kTies };

// An id that came moves from its rank to this one.
uint32_t promoted(uint32_t rank) { return rank < kTop ? rank : rank < kDeep ? rank / 2 : rank / 4; }

uint32_t context_count(const RowLayout& layout) { return kLogZ + layout.temperatures; }

uint32_t place_of(int64_t j) { return j == 0 ? 0 : std::min(1 + log2_floor(static_cast<uint32_t>(j)), kPlaces - 1); }

// kTie + class_of(rank) / 4, without a branch.
uint32_t tie_context(uint32_t rank) { return kTie + (rank < 16 ? rank / 4 : 2 + log2_floor(rank | 1) / 2); }

enum Next : uint32_t { kNotKnown, kImpossible, kNotKept, kEntry };  // kEntry + j: the row's entry j

uint32_t zigzag(int64_t v) { return static_cast<uint32_t>(v < 0 ? -2 * v - 1 : 2 * v); }
int64_t unzigzag(uint32_t v) { return v & 1 ? -static_cast<int64_t>(v / 2) - 1 : v / 2; }

// A tail of mass t as log(t / (1 - t)): as exact for the entries' mass as for the tail's own.
double log_odds(double log_tail) { return std::min(log_tail - std::log(-std::expm1(std::min(log_tail, 0.0))), 89.0); }

// What the rows before say of the next one's tail and log Z.
struct Predictions {
  int64_t cut_tail = 0;
  std::vector<int64_t> log_z;

  // Of k entries the tail goes with the last. A row that was cut short of k was cut at some mass, like others before it.
  int64_t tail(bool is_cut, uint64_t last_level) const {
    return is_cut ? cut_tail : -static_cast<int64_t>(kTailFinesse) * static_cast<int64_t>(std::min<uint64_t>(last_level, 1 << 20));
  }
};

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Entries of one level stand with the lower id first.
class RunSorter {
 public:
  void sort(const RowsOut& out, int64_t begin, int64_t end) {
    if (!out.weights && !out.counts) {
      if (end - begin > 16) return std::sort(out.ids + begin, out.ids + end);
      for (int64_t i = begin + 1; i < end; ++i) {
        const int64_t id = out.ids[i];
        int64_t j = i;
        for (; j > begin && out.ids[j - 1] > id; --j) out.ids[j] = out.ids[j - 1];
        out.ids[j] = id;
      }
      return;
    }
    entries_.clear();
    for (int64_t i = begin; i < end; ++i)
      entries_.push_back({out.ids[i], out.weights ? out.weights[i] : 0, out.counts ? out.counts[i] : 0});
    std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return a.id < b.id; });
    for (int64_t i = begin; i < end; ++i) {
      const Entry& entry = entries_[i - begin];
      out.ids[i] = entry.id;
      if (out.weights) out.weights[i] = entry.weight;
      if (out.counts) out.counts[i] = entry.count;
    }
  }

 private:
  struct Entry {
    int64_t id;
    float weight;
    int32_t count;
  };
  std::vector<Entry> entries_;
};

// Puts the numbers of rows into a sink, in the order in which they are coded.
template <class Sink> class RowWalk {
 public:
  RowWalk(const RowLayout& layout, const RowsIn& rows, Ranks* ranks, Sink& sink)
      : layout_(layout), rows_(rows), ranks_(ranks), sink_(sink) {
    before_.log_z.resize(layout.temperatures);
  }

  void all() {
    for (int64_t row = 0; row < rows_.rows; ++row) {
      const int64_t begin = rows_.offsets[row], count = rows_.offsets[row + 1] - begin;
      sink_.number(kCount, count == 0 ? 0 : 1 + static_cast<uint32_t>(layout_.k - count));
      if (count == 0) continue;
      const uint64_t last_level = layout_.step > 0 ? rounded(begin, count) : exact(begin, count);
      if (layout_.tail) tail(rows_.tail[row], count < layout_.k, last_level);
      for (uint32_t t = 0; t < layout_.temperatures; ++t) log_z(t, rows_.log_z[t * rows_.rows + row]);
      next(rows_.next[row], begin, count);
      if (!ranks_) continue;
      coded_.clear();
      for (const uint64_t each : order_) coded_.push_back(static_cast<uint32_t>(each >> 32));
      ranks_->promote(coded_.data(), coded_.size());
    }
    if (ranks_) ranks_->restore();
  }

 private:
  uint32_t rank(int64_t entry) const {
    const uint32_t id = static_cast<uint32_t>(rows_.ids[entry]);
    return ranks_ ? ranks_->rank_of_id[id] : id;
  }

  void weight(int64_t entry) {
    if (layout_.weights == Weights::fp32) sink_.bits(kWeight, bits_of(rows_.weights[entry]), 32);
    if (layout_.weights == Weights::counts) sink_.number(kWeight, static_cast<uint32_t>(rows_.counts[entry]));
  }

  uint64_t exact(int64_t begin, int64_t count) {
    order_.resize(count);
    for (int64_t j = 0; j < count; ++j) {
      order_[j] = static_cast<uint64_t>(rank(begin + j)) << 32 | static_cast<uint64_t>(j);
      sink_.bits(kGap, bits_of(rows_.logprobs[begin + j]), 32);
      sink_.number(kRank + place_of(j), rank(begin + j));
      weight(begin + j);
    }
    return 0;
  }

  uint64_t rounded(int64_t begin, int64_t count) {
    const double scale = -1.0 / layout_.step;
    const double first = std::max(0.0, std::nearbyint(rows_.logprobs[begin] * scale * kFractions));
    const uint32_t fraction = static_cast<uint32_t>(static_cast<uint64_t>(first) % kFractions);
    const double shift = fraction / static_cast<double>(kFractions);
    levels_.resize(count);
    order_.resize(count);
    for (int64_t j = 0; j < count; ++j) {
      levels_[j] = static_cast<uint64_t>(std::max(0.0, std::nearbyint(rows_.logprobs[begin + j] * scale - shift)));
      order_[j] = static_cast<uint64_t>(rank(begin + j)) << 32 | static_cast<uint64_t>(j);
    }
    for (int64_t j = 1, stop; j < count; j = stop) {
      for (stop = j + 1; stop < count && levels_[stop] == levels_[j];) ++stop;
      if (stop - j > 1) std::sort(order_.begin() + j, order_.begin() + stop);
    }
    uint64_t level = 0;
    uint32_t before = 0;
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t gap = static_cast<uint32_t>(levels_[j] - level), r = static_cast<uint32_t>(order_[j] >> 32);
      const bool is_tie = gap == 0 && j > 1;
      level = levels_[j];
      sink_.number(kGap + place_of(j), gap);
      if (j == 0) sink_.bits(kGap, fraction, 8);
      if (is_tie) sink_.number(tie_context(before), r - before - 1);
      else sink_.number(kRank + place_of(j), r);
      weight(begin + static_cast<int64_t>(order_[j] & 0xffffffffu));
      before = r;
    }
    return level;
  }

  void tail(float log_tail, bool is_cut, uint64_t last_level) {
    if (layout_.step == 0) return sink_.bits(kTail, bits_of(log_tail), 32);
    const double odds = log_odds(log_tail) * kTailFinesse / layout_.step;
    const uint32_t context = is_cut ? kCutTail : kTail;
    if (odds < -static_cast<double>(kMaxLevel / 2)) return sink_.number(context, 0);  // mass 0
    const int64_t units = std::llround(odds);
    sink_.number(context, 1 + zigzag(units - before_.tail(is_cut, last_level)));
    if (is_cut) before_.cut_tail = units;
  }

  void log_z(uint32_t t, float value) {
    if (layout_.step == 0) return sink_.bits(kLogZ + t, bits_of(value), 32);
    const int64_t units = std::llround(value * kLogZFinesse / layout_.step);
    sink_.number(kLogZ + t, zigzag(units - before_.log_z[t]));
    before_.log_z[t] = units;
  }

  void next(float value, int64_t begin, int64_t count) {
    if (std::isnan(value)) return sink_.number(kNext, kNotKnown);
    if (std::isinf(value)) return sink_.number(kNext, kImpossible);
    for (int64_t j = 0; j < count; ++j)
      if (rows_.logprobs[begin + static_cast<int64_t>(order_[j] & 0xffffffffu)] == value)
        return sink_.number(kNext, kEntry + static_cast<uint32_t>(j));
    sink_.number(kNext, kNotKept);
    if (layout_.step == 0) sink_.bits(kNextLevel, bits_of(value), 32);
    else sink_.number(kNextLevel, static_cast<uint32_t>(std::max(0.0, std::nearbyint(-value / layout_.step))));
  }

  const RowLayout& layout_;
  const RowsIn& rows_;
  Ranks* ranks_;  // null: every id is its own rank
  Sink& sink_;
  Predictions before_;
  std::vector<uint32_t> coded_;  // ranks of a row, in the order in which they are coded
  std::vector<uint64_t> levels_, order_;  // order: rank, and place in the row as it was given
};

struct CodeSink {
  const std::vector<Distribution>& contexts;
  CodeWriter writer;
  void number(uint32_t context, uint32_t value) { writer.number(contexts[context], value); }
  void bits(uint32_t, uint32_t value, uint32_t count) { writer.bits(value, count); }
};

struct CountSink {
  std::vector<std::vector<double>> counts;
  explicit CountSink(uint32_t contexts) : counts(contexts, std::vector<double>(kClasses)) {}
  void number(uint32_t context, uint32_t value) { ++counts[context][class_of(value)]; }
  void bits(uint32_t, uint32_t, uint32_t) {}
};

constexpr double kPrior = 16;  // a context that is new leans on the others of its kind with so many numbers

// Adds to the contexts [begin, end) that were seen at all what they have in common.
void lean_on_each_other(std::vector<std::vector<double>>& counts, uint32_t begin, uint32_t end) {
  std::vector<double> sum(kClasses);
  double total = 0;
  for (uint32_t c = begin; c < end; ++c)
    for (uint32_t s = 0; s < kClasses; ++s) sum[s] += counts[c][s], total += counts[c][s];
  for (uint32_t c = begin; c < end; ++c) {
    if (std::all_of(counts[c].begin(), counts[c].end(), [](double n) { return n == 0; })) continue;
    for (uint32_t s = 0; s < kClasses; ++s) counts[c][s] += kPrior * sum[s] / total;
  }
}

struct CostSink {
  const std::vector<Distribution>& contexts;
  std::vector<double> cost;
  void number(uint32_t context, uint32_t value) {
    const Distribution::Symbol& s = contexts[context].of(value);
    cost[context] += kTotalBits - std::log2(s.frequency) + s.bits;
  }
  void bits(uint32_t context, uint32_t, uint32_t count) { cost[context] += count; }
};

// Frequencies in the proportion of the counts, each at least 1, with an escape after the highest class that was seen.
std::vector<uint16_t> normalised(const std::vector<double>& counts) {
  double total = 0;
  size_t alphabet = 1, most = 0;
  for (size_t c = 0; c < counts.size(); ++c) {
    total += counts[c];
    if (counts[c] > 0) alphabet = c + 2;
    if (counts[c] > counts[most]) most = c;
  }
  std::vector<uint16_t> frequencies(alphabet, 1);
  const uint32_t room = kTotal - static_cast<uint32_t>(alphabet);
  uint32_t left = room;
  for (size_t c = 0; c + 1 < alphabet; ++c) {
    const uint32_t share = std::min(static_cast<uint32_t>(counts[c] / total * room), left);
    frequencies[c] = static_cast<uint16_t>(1 + share);
    left -= share;
  }
  frequencies[most] = static_cast<uint16_t>(frequencies[most] + left);
  return frequencies;
}

// Ranks to learn from. An id that was seen once would not have been seen without the entry that is looked at: in rows to
// come such ids stand among those not seen yet. So they change places with some of these, evenly spread.
Ranks ranks_to_learn_from(const std::vector<uint8_t>& levels, const int32_t* id_counts) {
  Ranks ranks(levels);
  const size_t total = levels.size();
  const auto seen = [&](int32_t least) {
    return static_cast<uint64_t>(std::count_if(id_counts, id_counts + total, [=](int32_t n) { return n >= least; }));
  };
  const uint64_t first_once = seen(2), first_new = seen(1), once = first_new - first_once, fresh = total - first_new;
  ranks.find_ranks();
  if (fresh >= once)
    for (uint64_t i = 0; i < once; ++i)
      ranks.swap(static_cast<uint32_t>(first_once + i), static_cast<uint32_t>(first_new + i * fresh / once));
  return ranks;
}

}  // namespace

Ranks::Ranks(const std::vector<uint8_t>& levels) : id_of_rank(levels.size()) {
  uint32_t begin[kRankLevels + 1] = {};
  for (const uint8_t level : levels) ++begin[kRankLevels - level];
  for (uint32_t i = 1; i <= kRankLevels; ++i) begin[i] += begin[i - 1];
  for (uint32_t id = 0; id < levels.size(); ++id) id_of_rank[begin[kRankLevels - 1 - levels[id]]++] = id;
}

void Ranks::find_ranks() {
  rank_of_id.resize(id_of_rank.size());
  for (uint32_t rank = 0; rank < id_of_rank.size(); ++rank) rank_of_id[id_of_rank[rank]] = rank;
}

inline void Ranks::swap(uint32_t a, uint32_t b) {
  std::swap(id_of_rank[a], id_of_rank[b]);
  if (rank_of_id.empty()) return;
  rank_of_id[id_of_rank[a]] = a;
  rank_of_id[id_of_rank[b]] = b;
}

void Ranks::promote(const uint32_t* ranks, size_t count) {
  promoted_.insert(promoted_.end(), ranks, ranks + count);
  for (size_t i = 0; i < count; ++i) swap(ranks[i], promoted(ranks[i]));
}

void Ranks::restore() {
  for (; !promoted_.empty(); promoted_.pop_back()) swap(promoted_.back(), promoted(promoted_.back()));
}

std::vector<uint8_t> learn_model(const RowLayout& layout, const std::vector<RowsIn>& rows, const int32_t* id_counts) {
  std::vector<uint8_t> levels;
  std::unique_ptr<Ranks> ranks;
  CountSink sink(context_count(layout));
  if (id_counts) {
    levels.resize(layout.vocab);
    for (uint32_t id = 0; id < layout.vocab; ++id) {
      levels[id] = static_cast<uint8_t>(2.0 * std::log2(1.0 + id_counts[id]));
      sink.number(kIdLevel, levels[id]);
    }
    ranks = std::make_unique<Ranks>(ranks_to_learn_from(levels, id_counts));
  }
  for (const RowsIn& part : rows) RowWalk<CountSink>(layout, part, ranks.get(), sink).all();
  lean_on_each_other(sink.counts, kGap, kRank);
  lean_on_each_other(sink.counts, kRank, kLogZ);

  CodeWriter writer;
  std::vector<Distribution> contexts(context_count(layout));
  for (size_t c = 0; c < contexts.size(); ++c) {
    const std::vector<uint16_t> frequencies = normalised(sink.counts[c]);
    contexts[c].assign(frequencies);
    writer.gamma(static_cast<uint32_t>(frequencies.size()));
    for (size_t s = 0; s + 1 < frequencies.size(); ++s) writer.gamma(frequencies[s]);
  }
  writer.bits(id_counts != nullptr, 1);
  for (const uint8_t level : levels) writer.number(contexts[kIdLevel], level);
  return writer.finish();
}

Complaint RowModel::read(const RowLayout& layout, Span payload) {
  layout_ = layout;
  CodeReader reader;
  if (!reader.open(payload)) return {"bytes of a model", kCodeHeadBytes, static_cast<int64_t>(payload.size)};
  contexts_.resize(context_count(layout));
  for (Distribution& context : contexts_) {
    const uint32_t alphabet = reader.gamma();
    if (alphabet > kMaxAlphabet) return {"symbols of a context, at most", kMaxAlphabet, alphabet};
    std::vector<uint16_t> frequencies(alphabet);
    uint32_t left = kTotal;
    for (uint32_t s = 0; s + 1 < alphabet; ++s) {
      const uint32_t frequency = reader.gamma();
      if (frequency >= left) return {"frequencies of a context, below", kTotal, int64_t{kTotal} - left + frequency};
      frequencies[s] = static_cast<uint16_t>(frequency);
      left -= frequency;
    }
    frequencies.back() = static_cast<uint16_t>(left);
    context.assign(frequencies);
  }
  levels_.assign(reader.bits(1) ? layout.vocab : 0, 0);
  for (uint8_t& level : levels_) {
    const uint32_t value = reader.number(contexts_[kIdLevel]);
    if (value >= kRankLevels) return {"level of an id, below", kRankLevels, value};
    level = static_cast<uint8_t>(value);
  }
  idle_.clear();
  if (!reader.is_at_end()) return {"end of a model", 1, 0};
  return {};
}

std::unique_ptr<Ranks> RowModel::take_ranks() const {
  if (levels_.empty()) return nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      std::unique_ptr<Ranks> ranks = std::move(idle_.back());
      idle_.pop_back();
      return ranks;
    }
  }
  return std::make_unique<Ranks>(levels_);
}

void RowModel::give_back(std::unique_ptr<Ranks> ranks) const {
  if (!ranks) return;
  ranks->restore();
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(ranks));
}

template <class Sink> void RowModel::walk(const RowsIn& rows, Sink& sink) const {
  std::unique_ptr<Ranks> ranks = take_ranks();
  if (ranks && ranks->rank_of_id.empty()) ranks->find_ranks();
  RowWalk<Sink>(layout_, rows, ranks.get(), sink).all();
  give_back(std::move(ranks));
}

std::vector<uint8_t> RowModel::encode(const RowsIn& rows) const {
  CodeSink sink{contexts_, {}};
  walk(rows, sink);
  return sink.writer.finish();
}

std::vector<double> RowModel::bits_by_context(const RowsIn& rows) const {
  CostSink sink{contexts_, std::vector<double>(contexts_.size())};
  walk(rows, sink);
  return sink.cost;
}

Complaint RowModel::decode(Span payload, const RowsOut& out) const {
  std::unique_ptr<Ranks> ranks = take_ranks();
  const Complaint wrong = decode(payload, out, ranks.get());
  give_back(std::move(ranks));
  return wrong;
}

Complaint RowModel::decode(Span payload, const RowsOut& out, Ranks* ranks) const {
  CodeReader reader;
  if (!reader.open(payload)) return {"bytes of a payload", kCodeHeadBytes, static_cast<int64_t>(payload.size)};
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto number = [&](uint32_t context) { return reader.number(contexts_[context]); };
  const bool is_exact = layout_.step == 0;
  const double unit = layout_.step / kFractions;
  Predictions before_row;
  before_row.log_z.resize(layout_.temperatures);
  std::vector<uint32_t> coded;        // ranks of a row, as they come
  std::vector<int64_t> run_begins;    // where entries begin that have one level
  RunSorter sorter;
  out.offsets[0] = 0;
  for (int64_t row = 0; row < out.rows; ++row) {
    const int64_t begin = out.offsets[row], missing = number(kCount), count = missing == 0 ? 0 : 1 + int64_t{layout_.k} - missing;
    if (missing > layout_.k) return {"entries that a row lacks, below k", layout_.k, missing - 1};
    if (count > out.entries - begin) return {"entries of a block", out.entries, begin + count};
    out.offsets[row + 1] = begin + count;
    if (count == 0) {
      if (out.tail) out.tail[row] = 0;
      for (uint32_t t = 0; t < layout_.temperatures; ++t) out.log_z[t * out.rows + row] = nan;
      out.next[row] = nan;
      continue;
    }
    int64_t* ids = out.ids + begin;
    float* logprobs = out.logprobs + begin;
    uint64_t level = 0;
    uint32_t fraction = 0, before = 0;
    coded.resize(count);
    run_begins.resize(count + 1);
    size_t runs = 0;
    for (int64_t j = 0; j < count; ++j) {
      uint64_t rank;
      if (is_exact) {
        logprobs[j] = float_of(reader.bits(32));
        rank = number(kRank + place_of(j));
      } else {
        const uint32_t gap = number(kGap + place_of(j));
        if (j == 0) fraction = reader.bits(8);
        level += gap;
        const bool is_tie = (gap == 0) & (j > 1);
        rank = (is_tie ? uint64_t{before} + 1 : 0) + number(is_tie ? tie_context(before) : kRank + place_of(j));
        run_begins[runs] = j;
        runs += !is_tie;
        logprobs[j] = static_cast<float>(0.0 - static_cast<double>(level * kFractions + fraction) * unit);
      }
      if (rank >= layout_.vocab) return {"ids, below", layout_.vocab, static_cast<int64_t>(rank)};
      before = coded[j] = static_cast<uint32_t>(rank);
      ids[j] = ranks ? ranks->id_of_rank[before] : before;
      if (out.weights) out.weights[begin + j] = float_of(reader.bits(32));
      if (out.counts) out.counts[begin + j] = static_cast<int32_t>(number(kWeight));
    }
    run_begins[runs] = count;
    for (size_t i = 0; i < runs; ++i)
      if (run_begins[i + 1] - run_begins[i] > 1) sorter.sort(out, begin + run_begins[i], begin + run_begins[i + 1]);
    if (ranks) ranks->promote(coded.data(), coded.size());
    if (level > kMaxLevel) return {"levels, at most", kMaxLevel, static_cast<int64_t>(level)};

    if (out.tail) {
      if (is_exact) {
        out.tail[row] = float_of(reader.bits(32));
      } else {
        const bool is_cut = count < layout_.k;
        const uint32_t code = number(is_cut ? kCutTail : kTail);
        out.tail[row] = -std::numeric_limits<float>::infinity();
        if (code > 0) {
          const int64_t units = unzigzag(code - 1) + before_row.tail(is_cut, level);
          const double odds = static_cast<double>(units) * layout_.step / kTailFinesse;
          out.tail[row] = static_cast<float>(odds < -40 ? odds : -std::log1p(std::exp(-odds)));
          if (is_cut) before_row.cut_tail = units;
        }
      }
    }
    for (uint32_t t = 0; t < layout_.temperatures; ++t) {
      float& log_z = out.log_z[t * out.rows + row];
      if (is_exact) log_z = float_of(reader.bits(32));
      else log_z = static_cast<float>(static_cast<double>(before_row.log_z[t] += unzigzag(number(kLogZ + t))) * layout_.step / kLogZFinesse);
    }
    const uint32_t next = number(kNext);
    if (next == kNotKnown) out.next[row] = nan;
    else if (next == kImpossible) out.next[row] = -std::numeric_limits<float>::infinity();
    else if (next == kNotKept && is_exact) out.next[row] = float_of(reader.bits(32));
    else if (next == kNotKept) out.next[row] = static_cast<float>(0.0 - static_cast<double>(number(kNextLevel)) * layout_.step);
    else if (next - kEntry < static_cast<uint64_t>(count)) out.next[row] = logprobs[next - kEntry];
    else return {"entry of the next token, below", count, int64_t{next} - kEntry};
    if (reader.is_short()) return {"rows in a payload", out.rows, row};
  }
  if (out.offsets[out.rows] != out.entries) return {"entries of a block", out.entries, out.offsets[out.rows]};
  if (!reader.is_at_end()) return {"end of a payload", 1, 0};
  return {};
}

}  // namespace kd
