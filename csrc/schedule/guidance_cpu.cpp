// guidance on the CPU.
#include "schedule/guidance.h"

#include "schedule/schedule.h"

namespace mmgen_kernels::schedule {
namespace {

template <class Real>
Tensor guide(Samples cond, Samples uncond, double scale, double rescale) {
  const Kernels<Real>& kernels = kernels_of<Real>(selected());
  std::vector<double> rescaled;
  if (rescale != 0) rescaled = rescaling(kernels, cond, uncond, scale, rescale);
  else if (cond.joined() && uncond.joined()) cond.flatten(), uncond.flatten();

  Pass<Real> pass{kernels, {cond, uncond}, {}, {}};
  pass.results.emplace_back(cond.tensor, cond.tensor.scalar_type());
  std::vector<Formula<Real>> formulas(static_cast<size_t>(cond.count));
  for (size_t b = 0; b < formulas.size(); ++b) {
    auto& c = formulas[b].terms;
    c.inputs = 2, c.outputs = 1, c.guides = true, c.scale = static_cast<Real>(scale);
    c.factor[1][0] = rescaled.empty() ? Real(1) : static_cast<Real>(rescaled[b]);
    c.find_present();
    formulas[b].source = {0, 1};
  }
  pass.run(formulas, cond.size);
  return pass.results[0].tensor;
}

}  // namespace

Tensor guidance_cpu(const Tensor& cond, const Tensor& uncond, double scale, double rescale) {
  const Samples a(cond), b(uncond);
  if (a.count != b.count || a.size != b.size) throw std::runtime_error("guidance: cond and uncond must have one shape");
  return is_double(cond) || is_double(uncond) ? guide<double>(a, b, scale, rescale) : guide<float>(a, b, scale, rescale);
}

}  // namespace mmgen_kernels::schedule
