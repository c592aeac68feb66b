// The only file that knows Python. It takes addresses, shapes and strides as integers (no header of torch), and picks the
// build of the CPU kernels that suits the processor. Callers in kd_kernels/*/cpp_impl.py have checked shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "codec/codec.h"
#include "cpu/accept.h"
#include "cpu/row_loss.h"
#include "cpu/sampled_targets.h"
#include "cpu/sampling.h"
#include "cpu/token_stats.h"
#include "cpu/topk.h"
#include "kd/philox.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T> T* pointer(Address address) { return reinterpret_cast<T*>(address); }

enum class Isa { baseline, avx2, avx512 };

// The best instruction set that the processor has. KD_ISA=baseline|avx2 asks for a lesser one, for tests.
Isa detect() {
  Isa best = Isa::baseline;
#if KD_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
  if (const char* asked = std::getenv("KD_ISA")) {
    const std::string name = asked;
    if (name == "baseline") best = Isa::baseline;
    else if (name == "avx2" && best != Isa::baseline) best = Isa::avx2;
    else if (name != "avx512" || best != Isa::avx512)
      throw std::runtime_error("kd_kernels: KD_ISA must be one that this processor has (baseline, avx2, avx512), got " + name);
  }
#endif
  return best;
}
const Isa kIsa = detect();

#if KD_X86
#define KD_DISPATCH(call)                         \
  switch (kIsa) {                                 \
    case Isa::avx512: return kd::avx512::call;    \
    case Isa::avx2: return kd::avx2::call;        \
    default: return kd::baseline::call;           \
  }
#else
#define KD_DISPATCH(call) return kd::baseline::call;
#endif

// raw address, row stride, bias address or 0, scale, softcap or 0
using RawTuple = std::tuple<Address, int64_t, Address, double, double>;

template <class S> kd::RawLogits<S> raw_logits(const RawTuple& t) {
  return {pointer<const S>(std::get<0>(t)), std::get<1>(t), pointer<const S>(std::get<2>(t)), std::get<3>(t), std::get<4>(t)};
}

struct Job {
  int64_t rows, vocab;
  RawTuple student;
  std::string formula;
  std::vector<double> params;
  double temperature, kd_weight, ce_weight;
  Address labels, weight, gradient;
  bool gradient_is_bf16;
  int64_t gradient_stride;
  Address loss, stats, status;
  int threads;
};

int formula_number(const std::string& name) { KD_DISPATCH(formula_number(name.c_str())) }

template <class S> kd::RowLoss<S> row_loss(const Job& job) {
  const int formula = formula_number(job.formula);
  if (formula < 0) throw std::invalid_argument("kd_kernels._C: no formula named " + job.formula);
  return {job.rows, job.vocab, raw_logits<S>(job.student), formula, job.params.data(), job.temperature, job.kd_weight,
          job.ce_weight, pointer<const int64_t>(job.labels), pointer<const double>(job.weight),
          pointer<S>(job.gradient_is_bf16 ? 0 : job.gradient), pointer<uint16_t>(job.gradient_is_bf16 ? job.gradient : 0),
          job.gradient_stride, pointer<double>(job.loss), pointer<double>(job.stats), pointer<int32_t>(job.status),
          job.threads};
}

template <class S> void dense(const Job& job, const RawTuple& teacher) {
  KD_DISPATCH(dense_rows(row_loss<S>(job), raw_logits<S>(teacher)))
}

// starts, ends, ids, logprobs, tail or 0, importance or 0, treatment
using SparseTuple = std::tuple<Address, Address, Address, Address, Address, Address, int>;

template <class S> void sparse(const Job& job, const SparseTuple& t) {
  const kd::SparseRows<S> teacher{pointer<const int64_t>(std::get<0>(t)), pointer<const int64_t>(std::get<1>(t)),
                                  pointer<const int64_t>(std::get<2>(t)), pointer<const S>(std::get<3>(t)),
                                  pointer<const S>(std::get<4>(t)),       pointer<const S>(std::get<5>(t)),
                                  static_cast<kd::Tail>(std::get<6>(t))};
  KD_DISPATCH(sparse_rows(row_loss<S>(job), teacher))
}

template <class S>
void topk(Address panel, int64_t stride, int64_t rows, int64_t first_column, int64_t columns, bool is_last, int64_t k,
          double mass, const std::vector<double>& temperatures, Address candidates, int64_t capacity, Address running,
          Address counts, Address ids, Address logprobs, Address tail_logprob, Address log_z, int threads) {
  std::vector<double> inverses;
  for (const double t : temperatures) inverses.push_back(1.0 / t);
  const kd::TopkRows<S> job{pointer<const S>(panel), stride, rows, first_column, columns, is_last, k, mass,
                            inverses.data(), static_cast<int64_t>(inverses.size()),
                            pointer<kd::Candidate<S>>(candidates), capacity, pointer<double>(running),
                            pointer<int64_t>(counts), pointer<int64_t>(ids), pointer<S>(logprobs),
                            pointer<S>(tail_logprob), pointer<S>(log_z), threads};
  KD_DISPATCH(topk_rows(job))
}

template <class S> void define_topk(py::module_& m, const char* name) {
  m.def(name, &topk<S>, py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("panel"), py::arg("stride"),
        py::arg("rows"), py::arg("first_column"), py::arg("columns"), py::arg("is_last"), py::arg("k"), py::arg("mass"),
        py::arg("temperatures"), py::arg("candidates"), py::arg("capacity"), py::arg("running"), py::arg("counts"),
        py::arg("ids"), py::arg("logprobs"), py::arg("tail_logprob"), py::arg("log_z"), py::arg("threads"));
}

template <class S>
void token_stats(const RawTuple& logits, int64_t rows, int64_t vocab, Address ids, Address logprob, Address lse,
                 Address entropy, Address max, Address argmax, Address rank, int threads) {
  const kd::TokenStats<S> job{rows, vocab, raw_logits<S>(logits), pointer<const int64_t>(ids), pointer<S>(logprob),
                              pointer<S>(lse), pointer<S>(entropy), pointer<S>(max), pointer<int64_t>(argmax),
                              pointer<int64_t>(rank), threads};
  KD_DISPATCH(token_stats(job))
}

template <class S> void define_token_stats(py::module_& m, const char* name) {
  m.def(name, &token_stats<S>, py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("logits"), py::arg("rows"),
        py::arg("vocab"), py::arg("ids"), py::arg("logprob"), py::arg("lse"), py::arg("entropy"), py::arg("max"),
        py::arg("argmax"), py::arg("rank"), py::arg("threads"));
}

using PlacesTuple = std::tuple<Address, Address, Address>;         // seeds, keys, positions
using WarpTuple = std::tuple<Address, Address, Address, Address>;  // inverse, top_k, top_p, min_p

kd::Places places_of(const PlacesTuple& addresses) {
  const auto& [seeds, keys, positions] = addresses;
  return {pointer<const int64_t>(seeds), pointer<const int64_t>(keys), pointer<const int64_t>(positions)};
}

template <class S> kd::Warp<S> warp_of(const WarpTuple& addresses) {
  const auto& [inverse, top_k, top_p, min_p] = addresses;
  return {pointer<const S>(inverse), pointer<const int64_t>(top_k), pointer<const double>(top_p), pointer<const double>(min_p)};
}

template <class S>
void sample(const RawTuple& logits, int64_t rows, int64_t vocab, int64_t first_column, int64_t columns, Address picked,
            Address running, const PlacesTuple& places, const WarpTuple& warp, uint32_t race, Address ids, Address logprobs,
            Address model_logprobs, Address entropy, Address lse, int threads) {
  const kd::Sampling<S> job{rows, vocab, raw_logits<S>(logits), first_column, columns, pointer<const int64_t>(picked),
                            pointer<kd::Running<S>>(running), places_of(places), warp_of<S>(warp),
                            race, pointer<int64_t>(ids), pointer<S>(logprobs), pointer<S>(model_logprobs),
                            pointer<S>(entropy), pointer<S>(lse), threads};
  KD_DISPATCH(sample_rows(job))
}

template <class S> void define_sample(py::module_& m, const char* name) {
  m.def(name, &sample<S>, py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("logits"), py::arg("rows"),
        py::arg("vocab"), py::arg("first_column"), py::arg("columns"), py::arg("picked"), py::arg("running"),
        py::arg("places"), py::arg("warp"), py::arg("race"), py::arg("ids"), py::arg("logprobs"),
        py::arg("model_logprobs"), py::arg("entropy"), py::arg("lse"), py::arg("threads"));
}

template <class S>
void judge(const RawTuple& teacher, const RawTuple& student, int64_t rows, int64_t vocab, const WarpTuple& teacher_warp,
           const WarpTuple& student_warp, const PlacesTuple& places, Address drafts, Address ids, Address accepted,
           Address faults, Address logprobs, Address model_logprobs, int threads) {
  const kd::Drafts<S> job{rows, vocab, raw_logits<S>(teacher), raw_logits<S>(student), warp_of<S>(teacher_warp),
                          warp_of<S>(student_warp), places_of(places), pointer<const int64_t>(drafts), pointer<int64_t>(ids),
                          pointer<bool>(accepted), pointer<uint8_t>(faults), pointer<S>(logprobs),
                          pointer<S>(model_logprobs), threads};
  KD_DISPATCH(judge_rows(job))
}

template <class S> void define_judge(py::module_& m, const char* name) {
  m.def(name, &judge<S>, py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("teacher"), py::arg("student"),
        py::arg("rows"), py::arg("vocab"), py::arg("teacher_warp"), py::arg("student_warp"), py::arg("places"),
        py::arg("drafts"), py::arg("ids"), py::arg("accepted"), py::arg("faults"), py::arg("logprobs"),
        py::arg("model_logprobs"), py::arg("threads"));
}

template <class S>
void sampled_targets(const RawTuple& logits, int64_t rows, int64_t vocab, const PlacesTuple& places, double inverse,
                     int64_t draws, int64_t certain, int64_t width, Address counts, Address ids, Address logprobs,
                     Address importance, int threads) {
  const kd::SampledTargets<S> job{rows, vocab, raw_logits<S>(logits), places_of(places), inverse, draws, certain, width,
                                  pointer<int64_t>(counts), pointer<int64_t>(ids), pointer<S>(logprobs),
                                  pointer<S>(importance), threads};
  KD_DISPATCH(target_rows(job))
}

template <class S> void define_sampled_targets(py::module_& m, const char* name) {
  m.def(name, &sampled_targets<S>, py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("logits"),
        py::arg("rows"), py::arg("vocab"), py::arg("places"), py::arg("inverse"), py::arg("draws"), py::arg("certain"),
        py::arg("width"), py::arg("counts"), py::arg("ids"), py::arg("logprobs"), py::arg("importance"),
        py::arg("threads"));
}

std::vector<uint32_t> philox(const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key) {
  const kd::Words words = kd::philox(counter.at(0), counter.at(1), counter.at(2), counter.at(3), key.at(0), key.at(1));
  return {words.w, words.w + 4};
}

kd::RowLayout row_layout(uint32_t vocab, uint32_t k, double step, uint32_t temperatures, bool tail, bool weights) {
  return {vocab, k, step, temperatures, tail, weights};
}

kd::Span span(const py::buffer_info& buffer) {
  return {static_cast<const uint8_t*>(buffer.ptr), static_cast<size_t>(buffer.size * buffer.itemsize)};
}

py::bytes bytes(const std::vector<uint8_t>& data) { return {reinterpret_cast<const char*>(data.data()), data.size()}; }

// None, or (what, expected, found).
py::object complaint(const kd::Complaint& wrong) {
  if (!wrong) return py::none();
  return py::make_tuple(wrong.what, wrong.expected, wrong.found);
}

// rows, offsets, ids, logprobs, tail or 0, log_z, next, weights or 0
using RowsTuple = std::tuple<int64_t, Address, Address, Address, Address, Address, Address, Address>;

kd::RowsIn rows_in(const RowsTuple& t) {
  return {std::get<0>(t), pointer<const int64_t>(std::get<1>(t)), pointer<const int64_t>(std::get<2>(t)),
          pointer<const float>(std::get<3>(t)), pointer<const float>(std::get<4>(t)), pointer<const float>(std::get<5>(t)),
          pointer<const float>(std::get<6>(t)), pointer<const float>(std::get<7>(t))};
}

kd::RowsOut rows_out(const RowsTuple& t) {
  const int64_t rows = std::get<0>(t);
  return {rows, 0, pointer<int64_t>(std::get<1>(t)), pointer<int64_t>(std::get<2>(t)), pointer<float>(std::get<3>(t)),
          pointer<float>(std::get<4>(t)), pointer<float>(std::get<5>(t)), rows, pointer<float>(std::get<6>(t)),
          pointer<float>(std::get<7>(t))};
}

py::bytes learn_model(const kd::RowLayout& layout, const std::vector<RowsTuple>& rows, Address id_counts) {
  std::vector<kd::RowsIn> parts;
  for (const RowsTuple& part : rows) parts.push_back(rows_in(part));
  std::vector<uint8_t> payload;
  {
    py::gil_scoped_release released;
    payload = kd::learn_model(layout, parts, pointer<const int32_t>(id_counts));
  }
  return bytes(payload);
}

py::object read_model(kd::RowModel& model, const kd::RowLayout& layout, const py::buffer& payload) {
  return complaint(model.read(layout, span(payload.request())));
}

py::bytes encode_rows(const kd::RowModel& model, const RowsTuple& rows) {
  std::vector<uint8_t> payload;
  {
    py::gil_scoped_release released;
    payload = model.encode(rows_in(rows));
  }
  return bytes(payload);
}

// payload, rows, entries of each block
using BlockTuple = std::tuple<py::buffer, int64_t, int64_t>;

py::object decode_rows(const kd::RowModel& model, const std::vector<BlockTuple>& blocks, const RowsTuple& rows) {
  std::vector<py::buffer_info> buffers;
  std::vector<kd::Payload> payloads;
  for (const auto& [payload, block_rows, entries] : blocks) {
    buffers.push_back(payload.request());
    payloads.push_back({span(buffers.back()), block_rows, entries});
  }
  kd::Complaint wrong;
  {
    py::gil_scoped_release released;
    wrong = model.decode(payloads, rows_out(rows));
  }
  return complaint(wrong);
}

kd::DecodeRows decoder() { KD_DISPATCH(decode_rows) }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of kd_kernels on the CPU. Private: addresses go in unchecked.";
  m.attr("isa") = kIsa == Isa::avx512 ? "avx512" : kIsa == Isa::avx2 ? "avx2" : "baseline";
  py::class_<Job>(m, "Job")
      .def(py::init([](int64_t rows, int64_t vocab, RawTuple student, std::string formula, std::vector<double> params,
                       double temperature, double kd_weight, double ce_weight, Address labels, Address weight,
                       Address gradient, bool gradient_is_bf16, int64_t gradient_stride, Address loss, Address stats,
                       Address status, int threads) {
             return Job{rows, vocab, student, formula, params, temperature, kd_weight, ce_weight, labels, weight, gradient,
                        gradient_is_bf16, gradient_stride, loss, stats, status, threads};
           }),
           py::kw_only(), py::arg("rows"), py::arg("vocab"), py::arg("student"), py::arg("formula"), py::arg("params"),
           py::arg("temperature"), py::arg("kd_weight"), py::arg("ce_weight"), py::arg("labels"), py::arg("weight"),
           py::arg("gradient"), py::arg("gradient_is_bf16"), py::arg("gradient_stride"), py::arg("loss"),
           py::arg("stats"), py::arg("status"), py::arg("threads"));
  const auto released = py::call_guard<py::gil_scoped_release>();
  m.def("dense_rows_fp32", &dense<float>, released);
  m.def("dense_rows_fp64", &dense<double>, released);
  m.def("sparse_rows_fp32", &sparse<float>, released);
  m.def("sparse_rows_fp64", &sparse<double>, released);
  m.attr("topk_slack") = kd::kTopkSlack;
  define_topk<float>(m, "topk_rows_fp32");
  define_topk<double>(m, "topk_rows_fp64");
  define_token_stats<float>(m, "token_stats_fp32");
  define_token_stats<double>(m, "token_stats_fp64");
  m.attr("sample_bytes_fp32") = sizeof(kd::Running<float>);
  m.attr("sample_bytes_fp64") = sizeof(kd::Running<double>);
  define_sample<float>(m, "sample_fp32");
  define_sample<double>(m, "sample_fp64");
  define_judge<float>(m, "judge_fp32");
  define_judge<double>(m, "judge_fp64");
  define_sampled_targets<float>(m, "sampled_targets_fp32");
  define_sampled_targets<double>(m, "sampled_targets_fp64");
  py::class_<kd::RowLayout>(m, "RowLayout")
      .def(py::init(&row_layout), py::kw_only(), py::arg("vocab"), py::arg("k"), py::arg("step"), py::arg("temperatures"),
           py::arg("tail"), py::arg("weights"));
  py::class_<kd::RowModel>(m, "RowModel")
      .def(py::init([] { return std::make_unique<kd::RowModel>(decoder()); }))
      .def("read", &read_model)
      .def("encode", &encode_rows)
      .def("bits", [](const kd::RowModel& model, const RowsTuple& rows) { return model.bits_by_context(rows_in(rows)); })
      .def("decode", &decode_rows);
  m.def("learn_model", &learn_model);
  m.def("philox", &philox, "Four words of a counter and a key: for the known answers.");
}
