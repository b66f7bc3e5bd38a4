// Classifier-free guidance: what its two passes share.
#pragma once

#include <cmath>

#include "schedule/pass.h"

namespace mmgen_kernels::schedule {

// What scales the guided prediction of each sample so that its deviation is the conditional one's, by `rescale`.
template <class Real>
std::vector<double> rescaling(const Kernels<Real>& kernels, const Samples& cond, const Samples& uncond, double scale, double rescale) {
  const int64_t count = cond.count, size = cond.size, chunks = (size + chunk - 1) / chunk;
  std::vector<Sums> sums(static_cast<size_t>(count * chunks));
  parallel(count * chunks, std::min(size, chunk) * 2, [&](int64_t begin, int64_t end) {
    std::vector<Real, Aligned<Real>> a(chunk), u(chunk);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / chunks, at = i % chunks * chunk, n = std::min(chunk, size - at);
      kernels.widen[cond.dtype](cond.at(sample, at), n, a.data());
      kernels.widen[uncond.dtype](uncond.at(sample, at), n, u.data());
      sums[static_cast<size_t>(i)] = kernels.guided_sums(a.data(), u.data(), static_cast<Real>(scale), n);
    }
  });
  std::vector<double> factors;
  for (int64_t b = 0; b < count; ++b) {
    Sums total;
    for (int64_t i = b * chunks; i < (b + 1) * chunks; ++i) {
      const Sums& s = sums[static_cast<size_t>(i)];
      total.first += s.first, total.first_squares += s.first_squares;
      total.second += s.second, total.second_squares += s.second_squares;
    }
    const auto deviation = [&](double sum, double squares) {
      const double variance = (squares - sum * sum / double(size)) / double(size - 1);
      return std::sqrt(variance < 0 ? 0 : variance);  // NaN stays NaN
    };
    const double ratio = deviation(total.first, total.first_squares) / deviation(total.second, total.second_squares);
    factors.push_back(rescale * ratio + (1 - rescale));
  }
  return factors;
}

}  // namespace mmgen_kernels::schedule
