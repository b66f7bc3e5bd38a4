// What the inner loops of the losses are given and what they do, one table of them per instruction set.
#pragma once

#include <cstdint>

#include "schedule/tables.h"

namespace mmgen_kernels::schedule {

enum class Loss { mse, huber, smooth_l1, pseudo_huber };

// Of one sample of diffusion_loss.
template <class Real>
struct Difference {
  Real delta = 1;
  Real slope = 0;  // the gradient of the loss by rho
  // For sqrt(d^2 + delta^2), whose squares must neither overflow nor vanish: they are taken on a scale on which delta is near 1,
  // and beyond `far`, so many deltas that the root rounds to |d|, it is that. By the ratio of the two it takes a division more.
  Real scale = 1, unscale = 1, square = 1, far = 0;
};

// Of one sample of hybrid_loss. With d = target - prediction the means are factor d apart.
template <class Real>
struct Term {
  bool data = false, noise = false;  // whether the target has a share of them
  Real of_data = 0, of_noise = 0;
  Real factor = 0;
  bool clamps = false;  // the predicted data, x0 - ratio d, to [-bound, bound]; share is theirs in the mean
  Real ratio = 0, share = 0, bound = 0;
  bool learned = false;  // there is a v, and the logarithm of the model's variance is middle + slope v
  Real middle = 0, slope = 0;
  Real gap = 0;        // middle less the logarithm of the true variance
  Real precision = 0;  // 1 / the true variance
  Real squares = 0;    // factor^2 precision
  Real by_square = 0, by_term = 0;  // the gradients of the loss by d^2 and by an element's term
  bool bounds = true, moves_mean = false;  // whether by_term counts, and for the prediction too
};

struct LossSums {
  double squares = 0, terms = 0;
};

// Rows of `count` elements of one dtype, csrc/floats.h; what is null is not there.
struct HybridRows {
  const void *prediction = nullptr, *v = nullptr, *x0 = nullptr, *noise = nullptr;
  void *grad_prediction = nullptr, *grad_v = nullptr;
};

template <class Real>
struct LossKernels {
  // [loss][dtype]; `valid` are bytes, null where all are
  double (*losses[4][4])(const Difference<Real>&, const void* output, const void* target, const uint8_t* valid, int64_t count);
  // either gradient may be null
  void (*gradients[4][4])(const Difference<Real>&, const void* output, const void* target, const uint8_t* valid, int64_t count,
                          void* grad_output, void* grad_target);
  // [whether it is the first step, which decodes][dtype]
  LossSums (*terms[2][4])(const Term<Real>&, const HybridRows&, int64_t count);
  void (*term_gradients[2][4])(const Term<Real>&, const HybridRows&, int64_t count);
};

extern const LossKernels<double> fp64_losses;
extern const LossKernels<float> scalar_losses, avx2_losses, avx512_losses;

template <class Real>
const LossKernels<Real>& losses_of(InstructionSet set) {
  return table_of<Real, fp64_losses, scalar_losses, avx2_losses, avx512_losses>(set);
}

}  // namespace mmgen_kernels::schedule
