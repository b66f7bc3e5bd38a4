// What tests and benchmarks want to see and nothing at run time needs: each instruction set's path by name, what a lookup did,
// and the CPU's limits. Built only with MMGEN_KERNELS_PROBE=1.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <thread>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "philox/philox_simt.h"
#include "schedule/step_problem.h"
#include "simd/fma_peak.h"
#include "simd/vec_scalar.h"
#pragma GCC diagnostic ignored "-Wunused-function"  // of a pass only its format is looked at here
#include "vq/bf16_pass.h"
#include "vq/code_entropy_tables.h"
#include "vq/nearest_code.h"
#include "vq/nearest_code_simt.h"

namespace py = pybind11;
using namespace mmgen_kernels;

namespace {

InstructionSet by_name(const std::string& wanted) {
  for (InstructionSet set : all_instruction_sets)
    if (wanted == name(set)) {
      if (!supported(set)) throw py::value_error("this CPU does not have " + wanted);
      return set;
    }
  throw py::value_error("instruction set must be " + list_of_names() + ", got '" + wanted + "'");
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (InstructionSet set : all_instruction_sets)
    if (supported(set)) names.emplace_back(name(set));
  return names;
}

vq::Metric metric_by_name(const std::string& metric) {
  return metric == "l2" ? vq::Metric::l2 : metric == "dot" ? vq::Metric::dot : vq::Metric::cosine;
}

using Matrix = py::array_t<float, py::array::c_style>;

std::pair<py::array_t<int64_t>, std::map<std::string, int64_t>> nearest_code(const Matrix& x, const Matrix& codebook,
                                                                            const std::string& metric,
                                                                            const std::string& set, bool exact) {
  if (x.ndim() != 2 || codebook.ndim() != 2 || x.shape(1) != codebook.shape(1))
    throw py::value_error("x and codebook must be (N, D) and (K, D)");
  const auto rows = [](const Matrix& m) { return vq::Rows{m.data(), Float::fp32, m.shape(0), m.shape(1), m.shape(1)}; };
  py::array_t<int64_t> indices(x.shape(0));
  vq::Counters counters;
  vq::nearest_code({rows(x), rows(codebook), nullptr, metric_by_name(metric), exact, indices.mutable_data()}, by_name(set), &counters);
  return {indices,
          {{"rescored_tiles", counters.rescored_tiles},
           {"exact_values", counters.exact_values},
           {"deferred_rows", counters.deferred_rows},
           {"brute_force_rows", counters.brute_force_rows}}};
}

// The products that the bf16 pass adds up for a row and a code, summed in fp64, and its bounds of what each of them leaves out.
std::tuple<double, float, float> bf16_product(const std::vector<float>& row, const std::vector<float>& code) {
  using Format = vq::Bf16Format<simd::Scalar<16>>;
  const int64_t dim = row.size(), products = Format::summed_products(dim);
  std::vector<uint16_t> packed_row(products), packed_code(products);
  const float row_rest = Format::row(row.data(), dim, reinterpret_cast<std::byte*>(packed_row.data()));
  const float code_rest = Format::code(code.data(), 0, dim, reinterpret_cast<std::byte*>(packed_code.data()));
  double sum = 0;
  for (int64_t i = 0; i < products; ++i) sum += double(vq::from_bf16(packed_row[i])) * vq::from_bf16(packed_code[i]);
  return {sum, row_rest, code_rest};
}

// x (H, N, D) and codebook (H, K, D) of the dtypes named, 16-bit ones as integers; the CUDA kernels on fibers.
py::array_t<int64_t> nearest_code_by_fibers(const py::array& x, const std::string& x_dtype, const py::array& codebook,
                                            const std::string& codebook_dtype, const std::optional<py::array_t<bool>>& mask,
                                            const std::string& metric, int64_t blocks, bool backwards) {
  const auto rows = [](const py::array& m, const std::string& dtype) {
    const Float type = dtype == "fp64"   ? Float::fp64
                           : dtype == "fp32" ? Float::fp32
                           : dtype == "bf16" ? Float::bf16
                                             : Float::fp16;
    return vq::Rows{m.data(), type, m.shape(1), m.shape(2), m.shape(2)};
  };
  vq::gpu::Problem p{};
  p.x = rows(x, x_dtype), p.x_head = x.shape(1) * x.shape(2);
  p.codebook = rows(codebook, codebook_dtype), p.codebook_head = codebook.shape(1) * codebook.shape(2);
  p.heads = x.shape(0);
  p.mask = mask ? mask->data() : nullptr;
  p.metric = metric_by_name(metric);
  py::array_t<int64_t> indices({x.shape(0), x.shape(1)});
  p.indices = indices.mutable_data();
  vq::gpu::divide(p, blocks);
  const vq::gpu::Scratch pieces = vq::gpu::scratch_of(p);
  std::vector<std::byte> scratch(pieces.bytes, std::byte{0xff});  // NaN where nothing was written
  vq::gpu::place(p, pieces, scratch.data());
  vq::gpu::launch_all(p, [&]<class Shared, void (*kernel)(const vq::gpu::Problem&, Shared&)>(int64_t bx, int64_t by, int64_t bz,
                                                                                         int threads) {
    simt::launch<Shared>(kernel, {bx, by, bz}, threads, p, backwards);
  });
  return indices;
}

// keys (count, 2) to the bytes of (count, size): kind is integers, uniform, normal or fold; fold takes its data from `data`.
py::bytes philox_by_fibers(const std::string& kind, int dtype, const py::array_t<uint64_t>& keys, int64_t size, int element_size,
                           const py::array_t<uint64_t>& data) {
  const int64_t count = keys.shape(0);
  std::string out(count * size * element_size, '\xff');
  const auto launch = [&]<class Problem, void (*kernel)(const Problem&, philox::gpu::Nothing&)>(const Problem& p, int64_t blocks) {
    simt::launch<philox::gpu::Nothing>(kernel, {blocks, 1, 1}, philox::gpu::threads, p);
  };
  const philox::gpu::Stream stream{keys.data(), out.data(), count, size};
  if (kind == "integers") philox::gpu::launch_integers(stream, launch);
  else if (kind == "fold") philox::gpu::launch_fold({keys.data(), data.data(), reinterpret_cast<uint64_t*>(out.data()), count}, launch);
  else philox::gpu::launch_stream(stream, kind == "normal", static_cast<Float>(dtype), launch);
  return out;
}

// The operator on CPU tensors, by the CUDA kernel; threads run in the order of their numbers or the other way round.
template <bool BACKWARDS>
std::tuple<schedule::Tensor, schedule::Tensor, schedule::Tensor> scheduler_step_by_fibers(
    const schedule::Tensor& input_0, const schedule::Tensor& coefficients, int64_t step, schedule::ScalarType dtype_0,
    const schedule::Optional& input_1, schedule::OptionalType dtype_1, const schedule::Optional& input_2,
    const schedule::Optional& input_3, const schedule::Optional& input_4, schedule::OptionalType dtype_2, std::optional<double> clamp,
    const schedule::Optional& noise, const schedule::Optional& key, const schedule::Optional& index, const schedule::Optional& uncond,
    int64_t guided, double guidance_scale, double, const schedule::Optional& variance, std::optional<double>, double) {
  namespace gpu = schedule::gpu;
  return gpu::run_step({input_0, {&input_1, &input_2, &input_3, &input_4}, uncond, noise, variance, coefficients, index, key, step,
                        guided, guidance_scale, clamp, {dtype_0, dtype_1, dtype_2}},
                       []<class Real, void (*kernel)(const gpu::Step&, gpu::Factors<Real>&)>(const gpu::Step& p, int64_t blocks) {
                         simt::launch<gpu::Factors<Real>>(kernel, {blocks, 1, 1}, gpu::threads, p, BACKWARDS);
                       });
}

// Each thread takes what its neighbour wrote, after a barrier, without one, or with one that only some threads reach: what the
// fibers must see.
struct Neighbours {
  int64_t* out;
  int barrier;  // 0: none, 1: for all, 2: for some
};
struct NeighbourShared {
  int values[64];
};
void take_from_neighbour(const Neighbours& p, NeighbourShared& s) {
  const int t = simt::thread();
  s.values[t] = t;
  if (p.barrier == 1 || (p.barrier == 2 && t != 5)) simt::sync();
  p.out[t] = s.values[t ^ 1];
}
py::array_t<int64_t> neighbours_by_fibers(int barrier, bool backwards) {
  py::array_t<int64_t> out(64);
  simt::launch<NeighbourShared>(take_from_neighbour, {1, 1, 1}, 64, Neighbours{out.mutable_data(), barrier}, backwards);
  return out;
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

// e^x as code_entropy computes it.
py::array_t<float> exponentials(const Matrix& x, const std::string& set) {
  py::array_t<float> out(x.size());
  vq::entropy::kernels_of<float>(by_name(set)).exponentials(x.data(), x.size(), out.mutable_data());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(mmgen_kernels_probe, m) {
  const std::string arguments =
      "(Tensor input_0, Tensor coefficients, SymInt step, ScalarType dtype_0, Tensor? input_1, ScalarType? dtype_1, Tensor? input_2,"
      " Tensor? input_3, Tensor? input_4, ScalarType? dtype_2, float? clamp, Tensor? noise, Tensor? key, Tensor? index, Tensor? uncond,"
      " int guided, float guidance_scale, float guidance_rescale, Tensor? variance, float? threshold, float threshold_max)"
      " -> (Tensor, Tensor, Tensor)";
  m.def(("scheduler_step" + arguments).c_str());
  m.def(("scheduler_step_backwards" + arguments).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(mmgen_kernels_probe, CPU, m) {
  m.impl("scheduler_step", TORCH_BOX(&scheduler_step_by_fibers<false>));
  m.impl("scheduler_step_backwards", TORCH_BOX(&scheduler_step_by_fibers<true>));
}

PYBIND11_MODULE(_probe, m) {
  m.doc() = "Build facts, CPU capabilities and each path by name; for tests and benchmarks.";
  m.def("instruction_sets", &instruction_sets, "Those that this CPU can run and that were compiled in.");
  m.def("selected", [] { return std::string(name(selected())); }, "The one that operators use now.");
  m.def("nearest_code", &nearest_code, py::arg("x"), py::arg("codebook"), py::arg("metric") = "l2",
        py::arg("instruction_set"), py::arg("exact") = true, "(indices, counters) by one instruction set.");
  m.def("bf16_product", &bf16_product, "(products of the bf16 pass for a row and a code, what the row, what the code left out).");
  m.def("nearest_code_by_fibers", &nearest_code_by_fibers, py::arg("x"), py::arg("x_dtype"), py::arg("codebook"),
        py::arg("codebook_dtype"), py::arg("mask"), py::arg("metric"), py::arg("blocks"), py::arg("backwards"),
        "Indices (H, N) by the CUDA kernels, run by g++; `blocks` fill the chip.");
  m.def("philox_by_fibers", &philox_by_fibers, "Bytes of streams by the CUDA kernels, run by g++.");
  m.def("neighbours_by_fibers", &neighbours_by_fibers, "What a missing or divergent barrier looks like on fibers.");
  m.def("exponentials", &exponentials, py::arg("x"), py::arg("instruction_set"), "e^x as code_entropy computes it.");
  m.def("fma_peak", &fma_peak, py::arg("seconds") = 0.5, py::arg("threads") = 1, "GFLOP/s of fp32 FMAs in registers.");
  m.attr("compiler") = __VERSION__;
}
