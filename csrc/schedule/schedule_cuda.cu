// scheduler_step on NVIDIA GPUs in CUDA C++: memory and launches. The kernel is in schedule_simt.h.
#include "schedule/step_problem.h"
#include "simt/cuda.h"

namespace mmgen_kernels::schedule {

std::tuple<Tensor, Tensor, Tensor> scheduler_step_cuda(
    const Tensor& input_0, const Tensor& coefficients, int64_t step, ScalarType dtype_0, const Optional& input_1, OptionalType dtype_1,
    const Optional& input_2, const Optional& input_3, const Optional& input_4, OptionalType dtype_2, std::optional<double> clamp,
    const Optional& noise, const Optional& key, const Optional& index, const Optional& uncond, int64_t guided, double guidance_scale,
    double guidance_rescale, const Optional& variance, std::optional<double> threshold, double) {
  if (threshold || (uncond && guidance_rescale != 0)) gpu::refuse_step("the CUDA C++ kernel has no number of a whole sample");
  const simt::Device device(input_0);
  return gpu::run_step({input_0, {&input_1, &input_2, &input_3, &input_4}, uncond, noise, variance, coefficients, index, key, step,
                        guided, guidance_scale, clamp, {dtype_0, dtype_1, dtype_2}},
                       [&]<class Real, void (*kernel)(const gpu::Step&, gpu::Factors<Real>&)>(const gpu::Step& p, int64_t blocks) {
                         device.launch<gpu::Step, gpu::Factors<Real>, kernel>(p, blocks, 1, 1, gpu::threads);
                       });
}

}  // namespace mmgen_kernels::schedule
