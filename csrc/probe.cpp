// What tests and benchmarks want to see and nothing at run time needs: each instruction set's path by name, what a lookup did,
// and the CPU's limits. Built only with MMGEN_KERNELS_PROBE=1.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <thread>
#include <vector>

#include "simd/fma_peak.h"
#include "vq/nearest_code.h"

namespace py = pybind11;
using namespace mmgen_kernels;

namespace {

InstructionSet by_name(const std::string& wanted) {
  for (InstructionSet set : all_instruction_sets)
    if (wanted == name(set)) {
      if (!supported(set)) throw py::value_error("this CPU does not have " + wanted);
      return set;
    }
  throw py::value_error("instruction set must be scalar, scalar_bf16, scalar_int16, avx2, avx512, avx512_vnni or amx, got '" + wanted + "'");
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (InstructionSet set : all_instruction_sets)
    if (supported(set)) names.emplace_back(name(set));
  return names;
}

using Matrix = py::array_t<float, py::array::c_style>;

std::pair<py::array_t<int64_t>, std::map<std::string, int64_t>> nearest_code(const Matrix& x, const Matrix& codebook,
                                                                            const std::string& metric,
                                                                            const std::string& set, bool exact) {
  if (x.ndim() != 2 || codebook.ndim() != 2 || x.shape(1) != codebook.shape(1))
    throw py::value_error("x and codebook must be (N, D) and (K, D)");
  const auto rows = [](const Matrix& m) { return vq::Rows{m.data(), vq::Float::fp32, m.shape(0), m.shape(1), m.shape(1)}; };
  const vq::Metric by = metric == "l2" ? vq::Metric::l2 : metric == "dot" ? vq::Metric::dot : vq::Metric::cosine;
  py::array_t<int64_t> indices(x.shape(0));
  vq::Counters counters;
  vq::nearest_code({rows(x), rows(codebook), nullptr, by, exact, indices.mutable_data()}, by_name(set), &counters);
  return {indices,
          {{"rescored_tiles", counters.rescored_tiles},
           {"exact_values", counters.exact_values},
           {"deferred_rows", counters.deferred_rows},
           {"brute_force_rows", counters.brute_force_rows}}};
}

// GFLOP/s of fp32 FMAs in registers: the best of several short rounds, all threads at once.
double fma_peak(double seconds, int threads) {
  FmaRounds rounds = fma_rounds_scalar;
#if defined(__x86_64__)
  if (supported(InstructionSet::avx512)) rounds = fma_rounds_avx512;
  else if (supported(InstructionSet::avx2)) rounds = fma_rounds_avx2;
#endif
  const auto now = [] { return std::chrono::steady_clock::now(); };
  const auto since = [&](auto start) { return std::chrono::duration<double>(now() - start).count(); };
  double best = 0;
  for (const auto start = now(); since(start) < seconds;) {
    std::vector<std::thread> pool;
    std::vector<double> done(threads);
    const auto round_start = now();
    for (int t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        float sink[64];
        done[t] = rounds(2'000'000, sink);
      });
    for (std::thread& thread : pool) thread.join();
    double total = 0;
    for (const double d : done) total += d;
    best = std::max(best, total / since(round_start) / 1e9);
  }
  return best;
}

}  // namespace

PYBIND11_MODULE(_probe, m) {
  m.doc() = "Build facts, CPU capabilities and each path by name; for tests and benchmarks.";
  m.def("instruction_sets", &instruction_sets, "Those that this CPU can run and that were compiled in.");
  m.def("selected", [] { return std::string(name(selected())); }, "The one that operators use now.");
  m.def("nearest_code", &nearest_code, py::arg("x"), py::arg("codebook"), py::arg("metric") = "l2",
        py::arg("instruction_set"), py::arg("exact") = true, "(indices, counters) by one instruction set.");
  m.def("fma_peak", &fma_peak, py::arg("seconds") = 0.5, py::arg("threads") = 1, "GFLOP/s of fp32 FMAs in registers.");
  m.attr("compiler") = __VERSION__;
}
