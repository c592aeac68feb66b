// A draft is tested against both rows while they are there, and a refused one is replaced out of the same logits: each head is
// multiplied once. What is left of the teacher's row is formed in fp64; only refused rows pay for that.
#include "accept.h"

#include "law.h"

namespace kd {
namespace KD_ISA {
namespace {

// max(p - q, 0) as a row of logits.
template <class S> class Residual {
 public:
  explicit Residual(int64_t vocab) : logits_(vocab), groups_(vocab) {}

  int64_t draw(const Law<S>& teacher, const Law<S>& student, const Place& place) {
    if (teacher.is_greedy()) return teacher.best();  // nothing else is left of it
    const auto p = teacher.heights();
    const double p_mass = log_mass(p);
    if (student.is_greedy()) {
      write([=](auto lane, int64_t v) { return p.at(v, lane) - p_mass; });
      logits_[student.best()] = -kInf<S>;
    } else {
      const auto q = student.heights();
      const double q_mass = log_mass(q);
      write([=](auto lane, int64_t v) {
        const auto log_p = p.at(v, lane) - p_mass, log_q = q.at(v, lane) - q_mass;
        return where(log_p > log_q, log_p + log64(1.0 - exp_fall64(log_q - log_p)), lane - kInf<double>);
      });
    }
    if (add_groups(logits_.data(), n(), S{1}, groups_, nullptr) == -kInf<S>) {  // p = q, but for rounding
      write([=](auto lane, int64_t v) { return p.at(v, lane) - p_mass; });
      add_groups(logits_.data(), n(), S{1}, groups_, nullptr);
    }
    return drawn(logits_.data(), n(), groups_, 1.0, kResampleRace, place);
  }

 private:
  int64_t n() const { return static_cast<int64_t>(logits_.size()); }

  template <class Body> void write(Body body) {
    S* logits = logits_.data();
    over_doubles(n(), [=](auto lane, int64_t v) { narrow(logits + v, body(lane, v)); });
  }

  // The mass of Law is summed in the work type, whose rounding may be as large as p - q where the student is near the teacher.
  template <class Heights> double log_mass(const Heights& heights) const {
    DoubleVector lanes{};
    double rest = 0;
    over_doubles(n(), [&](auto lane, int64_t v) {
      const auto weight = exp_fall64(heights.at(v, lane));
      if constexpr (sizeof(weight) == sizeof(lanes)) lanes += weight;
      else rest += weight;
    });
    return std::log(lane_sum(lanes) + rest);
  }

  std::vector<S> logits_;
  Groups<S> groups_;
};

template <class S> class Judge {
 public:
  explicit Judge(const Drafts<S>& job)
      : job_(job), teacher_(job.vocab, job.teacher_warp), student_(job.vocab, job.student_warp), residual_(job.vocab) {}

  void judge(int64_t row, const S* teacher, const S* student) {
    const int faults = (teacher_.read(row, teacher) ? 0 : kTeacherFault) | (student_.read(row, student) ? 0 : kStudentFault);
    job_.faults[row] = static_cast<uint8_t>(faults);
    if (faults != 0) {
      job_.ids[row] = -1;
      job_.accepted[row] = false;
      job_.logprobs[row] = job_.model_logprobs[row] = std::numeric_limits<S>::quiet_NaN();
      return;
    }
    const Place place = job_.places.of(row);
    int64_t id = job_.drafts[row];
    const double p = static_cast<S>(teacher_.logprob(id)), q = static_cast<S>(student_.logprob(id));
    const bool is_accepted = p > -kInf<double> && std::log(fine_uniform(place.words(kAccept, 0))) <= p - q;
    if (!is_accepted) id = residual_.draw(teacher_, student_, place);
    job_.ids[row] = id;
    job_.accepted[row] = is_accepted;
    job_.logprobs[row] = static_cast<S>(teacher_.logprob(id));
    job_.model_logprobs[row] = static_cast<S>(teacher_.model_logprob(id));
  }

 private:
  const Drafts<S>& job_;
  Law<S> teacher_, student_;
  Residual<S> residual_;
};

template <class S> void all_rows(const Drafts<S>& job) {
#pragma omp parallel num_threads(threads_for(job.rows, job.threads))
  {
    Scratch<S> teacher(job.teacher.is_plain() ? 0 : job.vocab), student(job.student.is_plain() ? 0 : job.vocab);
    Judge<S> judge(job);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < job.rows; ++row)
      judge.judge(
          row, tempered(job.teacher, row, 1.0, teacher.data, job.vocab), tempered(job.student, row, 1.0, student.data, job.vocab));
  }
}

}  // namespace

void judge_rows(const Drafts<float>& job) { all_rows(job); }
void judge_rows(const Drafts<double>& job) { all_rows(job); }

}  // namespace KD_ISA
}  // namespace kd
