// A coverage-guided fuzzer, for compilers that have no libFuzzer (GCC). The target is libFuzzer's own:
//
//   extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
//
// so with clang the same target builds with -fsanitize=fuzzer,address and without this file. Here the target is compiled
// with -fsanitize-coverage=trace-pc,trace-cmp -fsanitize=address,undefined, and this file with none of them.
//
//   fuzz [seconds=10] [seed=1] [max_bytes=65536] [crash=FILE] FOLDER...     fuzz, from the files in the folders
//   fuzz FILE...                                                            run these inputs, once each
//
// An input joins the corpus when it takes an edge (a pair of basic blocks) that none took before, or takes one another
// order of magnitude of times. Operands of the target's comparisons are offered to the mutations: that is how magic
// numbers, counts and lengths are found. At the end: inputs run, edges, corpus. On a crash the input is in FILE.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" void __asan_set_death_callback(void (*callback)());

namespace {

using Bytes = std::vector<uint8_t>;

constexpr size_t kEdges = 1 << 16;
constexpr size_t kOperands = 1 << 10;

uint8_t hits[kEdges];   // of the running input
uint8_t known[kEdges];  // of all before: a bit for each order of magnitude
uintptr_t last_block;
uint64_t operands[kOperands];  // of the target's latest comparisons
size_t operand_count;

Bytes running;
std::string crash_file = "crash.bin";

void save_running() { std::ofstream(crash_file, std::ios::binary).write(reinterpret_cast<char*>(running.data()), running.size()); }

uint8_t magnitude(uint8_t count) {  // 1, 2, 3, 4-7, 8-15, 16-31, 32-127, 128 and more, as a bit each
  if (count <= 3) return count == 0 ? 0 : uint8_t(1 << (count - 1));
  return count < 8 ? 8 : count < 16 ? 16 : count < 32 ? 32 : count < 128 ? 64 : 128;
}

bool run(const Bytes& input) {  // whether it did something new
  std::memset(hits, 0, sizeof hits);
  last_block = 0;
  running = input;
  // a copy of exactly this size on the heap, so that one byte too far is an error
  uint8_t* copy = new uint8_t[input.size()];
  std::copy(input.begin(), input.end(), copy);
  LLVMFuzzerTestOneInput(copy, input.size());
  delete[] copy;
  bool found = false;
  for (size_t i = 0; i < kEdges; ++i) {
    const uint8_t bit = magnitude(hits[i]);
    found |= (bit & ~known[i]) != 0;
    known[i] |= bit;
  }
  return found;
}

class Mutator {
 public:
  Mutator(uint64_t seed, size_t max_bytes) : draw_(seed), max_bytes_(max_bytes) {}

  size_t below(size_t n) { return n == 0 ? 0 : draw_() % n; }

  Bytes operator()(Bytes input, const std::vector<Bytes>& corpus) {
    for (size_t times = size_t(1) << below(5); times > 0; --times) once(input, corpus);
    if (input.size() > max_bytes_) input.resize(max_bytes_);
    return input;
  }

 private:
  void once(Bytes& input, const std::vector<Bytes>& corpus) {
    const size_t at = below(input.size() + 1);
    switch (below(10)) {
      case 0: return with(input, 1, [&](uint8_t* p) { *p ^= uint8_t(1 << below(8)); });
      case 1: return with(input, 1, [&](uint8_t* p) { *p = uint8_t(draw_()); });
      case 2: return add<uint16_t>(input);
      case 3: return add<uint32_t>(input);
      case 4: return compared(input);
      case 5: return interesting(input);
      case 6: {  // leave out
        const size_t length = std::min(input.size() - std::min(at, input.size()), size_t(1) + below(32));
        input.erase(input.begin() + at, input.begin() + at + length);
        return;
      }
      case 7: {  // put in
        Bytes added(1 + below(16));
        for (auto& byte : added) byte = uint8_t(draw_());
        input.insert(input.begin() + at, added.begin(), added.end());
        return;
      }
      case 8: {  // copy a part of the input over another
        if (input.size() < 2) return;
        const size_t from = below(input.size()), length = 1 + below(std::min(size_t(64), input.size() - from));
        const size_t to = below(input.size() - length + 1);
        std::memmove(&input[to], &input[from], length);
        return;
      }
      default: {  // end as another input does
        const Bytes& other = corpus[below(corpus.size())];
        const size_t from = below(other.size() + 1);
        input.resize(at);
        input.insert(input.end(), other.begin() + from, other.end());
        return;
      }
    }
  }

  template <class F>
  void with(Bytes& input, size_t width, F change) {
    if (input.size() >= width) change(&input[below(input.size() - width + 1)]);
  }

  template <class T>
  void add(Bytes& input) {
    with(input, sizeof(T), [&](uint8_t* p) {
      T value;
      std::memcpy(&value, p, sizeof value);
      value = T(value + 1 + below(32) - 16);
      std::memcpy(p, &value, sizeof value);
    });
  }

  // One operand of a comparison, in the place of the other where that stands in the input, or anywhere.
  void compared(Bytes& input) {
    if (operand_count == 0) return;
    const size_t pair = 2 * below(std::min(operand_count, kOperands) / 2);
    const size_t side = below(2), width = size_t(1) << below(4);
    const uint64_t from = operands[pair + side], to = operands[pair + 1 - side] + below(3) - 1;
    const auto* pattern = reinterpret_cast<const uint8_t*>(&from);
    const auto place = std::search(input.begin() + below(input.size() + 1), input.end(), pattern, pattern + width);
    if (place != input.end()) {
      std::memcpy(&*place, &to, width);
    } else {
      with(input, width, [&](uint8_t* p) { std::memcpy(p, &to, width); });
    }
  }

  void interesting(Bytes& input) {
    static constexpr uint64_t values[] = {0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, ~uint64_t(0)};
    const size_t width = size_t(1) << below(4);
    with(input, width, [&](uint8_t* p) { std::memcpy(p, &values[below(std::size(values))], width); });
  }

  std::mt19937_64 draw_;
  size_t max_bytes_;
};

Bytes read(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(stream), {});
}

void compare(uint64_t a, uint64_t b) {
  if (a == b) return;
  operands[operand_count % kOperands] = a;
  operands[(operand_count + 1) % kOperands] = b;
  operand_count += 2;
}

}  // namespace

extern "C" {
void __sanitizer_cov_trace_pc() {
  const auto block = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  uint8_t& count = hits[(block ^ (last_block >> 1)) % kEdges];
  count += count < 255;
  last_block = block;
}
void __sanitizer_cov_trace_cmp1(uint8_t a, uint8_t b) { compare(a, b); }
void __sanitizer_cov_trace_cmp2(uint16_t a, uint16_t b) { compare(a, b); }
void __sanitizer_cov_trace_cmp4(uint32_t a, uint32_t b) { compare(a, b); }
void __sanitizer_cov_trace_cmp8(uint64_t a, uint64_t b) { compare(a, b); }
void __sanitizer_cov_trace_const_cmp1(uint8_t a, uint8_t b) { compare(a, b); }
void __sanitizer_cov_trace_const_cmp2(uint16_t a, uint16_t b) { compare(a, b); }
void __sanitizer_cov_trace_const_cmp4(uint32_t a, uint32_t b) { compare(a, b); }
void __sanitizer_cov_trace_const_cmp8(uint64_t a, uint64_t b) { compare(a, b); }
void __sanitizer_cov_trace_cmpf(float, float) {}
void __sanitizer_cov_trace_cmpd(double, double) {}
void __sanitizer_cov_trace_switch(uint64_t value, uint64_t* cases) {
  for (uint64_t i = 0; i < cases[0]; ++i) compare(value, cases[2 + i]);
}
}

int main(int argc, char** argv) {
  double seconds = 10;
  uint64_t seed = 1;
  size_t max_bytes = 1 << 16;
  std::vector<Bytes> corpus;
  bool fuzzing = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals), value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    if (name == "seconds") seconds = std::stod(value);
    else if (name == "seed") seed = std::stoull(value);
    else if (name == "max_bytes") max_bytes = std::stoull(value);
    else if (name == "crash") crash_file = value;
    else if (std::filesystem::is_directory(argument)) {
      fuzzing = true;
      for (const auto& file : std::filesystem::directory_iterator(argument)) corpus.push_back(read(file.path()));
    } else corpus.push_back(read(argument));
  }
  if (fuzzing) __asan_set_death_callback(save_running);  // one that is run again is there already
  std::sort(corpus.begin(), corpus.end());  // a folder lists its files in any order
  for (const auto& input : corpus) run(input);
  if (!fuzzing) return 0;
  if (corpus.empty()) corpus.push_back({});

  Mutator mutate(seed, max_bytes);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  size_t runs = corpus.size();
  const size_t seeds = corpus.size();
  while (std::chrono::steady_clock::now() < end) {
    for (int i = 0; i < 64; ++i, ++runs) {
      // the newest half of the corpus gets half of the runs: that is where the way on is
      const size_t first = mutate.below(2) ? corpus.size() / 2 : 0;
      Bytes input = mutate(corpus[first + mutate.below(corpus.size() - first)], corpus);
      if (run(input)) corpus.push_back(std::move(input));
    }
  }
  const auto edges = std::count_if(known, known + kEdges, [](uint8_t bits) { return bits != 0; });
  std::printf("{\"runs\": %zu, \"edges\": %td, \"seeds\": %zu, \"corpus\": %zu}\n", runs, edges, seeds, corpus.size());
}
