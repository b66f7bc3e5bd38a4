// The lookup's first pass on bf16 matrix tiles, summed in fp32. What bf16 leaves out of each vector is measured while packing, so
// that the bound of docs/vq.md holds for any data.
#pragma once

#include <bit>
#include <utility>

#include "vq/tile_pass.h"

namespace mmgen_kernels::vq {
namespace {  // internal linkage: see rows.h

inline uint16_t to_bf16(float value) {  // to nearest even; callers have no NaN
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// first = values in bf16; returns an upper bound of the norm of what that leaves out.
inline float round_to_bf16(const float* values, int64_t dim, uint16_t* first) {
  for (int64_t d = 0; d < dim; ++d) first[d] = to_bf16(values[d]);
  return left_out(dim, [&](int64_t d) { return values[d] - from_bf16(first[d]); });
}

// The same with second = what first leaves out, in bf16; returns the bound for both together, and for the first alone.
inline std::pair<float, float> round_to_two_bf16(const float* values, int64_t dim, uint16_t* first, uint16_t* second) {
  const float without_second = round_to_bf16(values, dim, first);
  for (int64_t d = 0; d < dim; ++d) second[d] = to_bf16(values[d] - from_bf16(first[d]));
  return {left_out(dim, [&](int64_t d) { return values[d] - from_bf16(first[d]) - from_bf16(second[d]); }), without_second};
}

template <class V>
struct Bf16Format {
  using Vec = V;
  static constexpr int64_t products = 32;   // of a step
  static constexpr int64_t norm_parts = 3;  // in bf16, which hold an fp32 number

  // Vectors this narrow take part as two bf16 each, v1 + v2: the score's products x1 c1 + x1 c2 + x2 c1 and its norm fit one step,
  // which costs what a step of fewer products does.
  static constexpr bool in_two_parts(int64_t dim) { return 3 * dim + norm_parts <= products; }
  static constexpr int64_t products_of(int64_t dim) { return in_two_parts(dim) ? 3 * dim : dim; }
  static constexpr int64_t steps_of(int64_t dim) { return (products_of(dim) + products - 1) / products; }
  static constexpr int64_t summed_products(int64_t dim) { return steps_of(dim) * products; }
  // Whether three products of the last step are free for the norm's parts.
  static constexpr bool norm_rides_along(int64_t dim) { return products_of(dim) + norm_parts <= summed_products(dim); }

  // A row's products: x, or x1, x1, x2; then ones for the norm. Returns an upper bound of the norm of what is left out, to which
  // the product of both second parts, which no score has, adds |x2| |c2| / |c| <= 2^-8 (1 + 2^-8) |x2|.
  static float row(const float* values, int64_t dim, std::byte* bytes) {
    auto* out = reinterpret_cast<uint16_t*>(bytes);
    std::fill(out + products_of(dim), out + summed_products(dim), uint16_t{0});
    if (norm_rides_along(dim)) std::fill_n(out + products_of(dim), norm_parts, to_bf16(1.0f));
    if (!in_two_parts(dim)) return round_to_bf16(values, dim, out);
    const auto [rest, second] = round_to_two_bf16(values, dim, out, out + 2 * dim);
    std::copy_n(out, dim, out + dim);
    return rest + 0.004f * second;
  }

  // A code's: c, or c1, c2, c1; then the norm.
  static float code(const float* values, float norm, int64_t dim, std::byte* bytes) {
    auto* out = reinterpret_cast<uint16_t*>(bytes);
    std::fill(out + products_of(dim), out + summed_products(dim), uint16_t{0});
    if (norm_rides_along(dim)) {
      uint16_t* part = out + products_of(dim);
      for (int i = 0; i < norm_parts; ++i) {
        part[i] = to_bf16(norm);
        norm -= from_bf16(part[i]);  // exact, and 0 after three parts
      }
    }
    if (!in_two_parts(dim)) return round_to_bf16(values, dim, out);
    const float rest = round_to_two_bf16(values, dim, out, out + dim).first;
    std::copy_n(out, dim, out + 2 * dim);
    return rest;
  }
};

}  // namespace
}  // namespace mmgen_kernels::vq
