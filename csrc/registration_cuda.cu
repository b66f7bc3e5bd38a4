// The operator implementations that CUDA C++ brings: operators of a namespace of their own, called by the launchers in
// mmgen_kernels/<family>/cuda.py.
#include <torch/csrc/stable/library.h>

#include "boxed.h"
#include "philox/tensors.h"
#include "schedule/schedule.h"
#include "vq/tensors.h"

STABLE_TORCH_LIBRARY(mmgen_kernels_cuda, m) {
  m.def("nearest_code(Tensor x, Tensor codebook, Tensor? mask, str metric, str precision) -> Tensor");
  m.def("philox_integers(Tensor key, SymInt[] shape) -> Tensor");
  m.def("philox_uniform(Tensor key, SymInt[] shape, ScalarType dtype) -> Tensor");
  m.def("philox_normal(Tensor key, SymInt[] shape, ScalarType dtype) -> Tensor");
  m.def("fold_in(Tensor key, Tensor i) -> Tensor");
  m.def("scheduler_step(Tensor input_0, Tensor coefficients, SymInt step, ScalarType dtype_0, Tensor? input_1, ScalarType? dtype_1, Tensor? input_2,"
        " Tensor? input_3, Tensor? input_4, ScalarType? dtype_2, float? clamp, Tensor? noise, Tensor? key, Tensor? index, Tensor? uncond,"
        " int guided, float guidance_scale, float guidance_rescale, Tensor? variance, float? threshold, float threshold_max)"
        " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mmgen_kernels_cuda, CUDA, m) {
  m.impl("nearest_code", BOXED(&mmgen_kernels::vq::nearest_code_cuda));
  m.impl("philox_integers", BOXED(&mmgen_kernels::philox::integers_cuda));
  m.impl("philox_uniform", BOXED(&mmgen_kernels::philox::uniform_cuda));
  m.impl("philox_normal", BOXED(&mmgen_kernels::philox::normal_cuda));
  m.impl("fold_in", BOXED(&mmgen_kernels::philox::fold_in_cuda));
  m.impl("scheduler_step", BOXED(&mmgen_kernels::schedule::scheduler_step_cuda));
}
