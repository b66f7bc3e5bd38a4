// What becomes of the words of a stream: integers, uniforms, normals in every dtype. `Lanes` is one thread of a GPU or a vector of a
// CPU; it has what philox.h asks for and `width`, `interleave` (words of a group to the order of its elements) and `to_half`.
#pragma once

#include <cmath>
#include <numbers>

#include "floats.h"
#include "philox.h"

namespace mmgen_kernels::philox {
namespace {  // internal linkage: compiled once per instruction set

template <Float F>
struct Memory {
  using Type = uint16_t;
};
template <>
struct Memory<Float::fp32> {
  using Type = float;
};
template <>
struct Memory<Float::fp64> {
  using Type = double;
};

// Rounds to nearest even; never called with NaN.
PHILOX_HOST_DEVICE uint16_t to_bf16(float value) {
  const uint32_t bits = OneLane::bits_of(value);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The same for fp16, below its largest value.
PHILOX_HOST_DEVICE uint16_t to_fp16(float value) {
  const uint32_t bits = OneLane::bits_of(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  constexpr uint32_t smallest_normal = 0x38800000, half = 0x3f000000;
  if (magnitude < smallest_normal)  // adding 1/2 rounds to a multiple of 2^-24
    return uint16_t(sign | (OneLane::bits_of(OneLane::from_bits(magnitude) + 0.5f) - half));
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

template <class Lanes, Float F, int COUNT>
PHILOX_HOST_DEVICE void narrow(const float (&values)[COUNT], typename Memory<F>::Type* out) {
  if constexpr (F == Float::fp16) {
    Lanes::template to_half<COUNT>(values, out);
  } else {
    for (int i = 0; i < COUNT; ++i) {
      if constexpr (F == Float::bf16) out[i] = to_bf16(values[i]);
      else out[i] = values[i];
    }
  }
}

template <class Lanes>
struct Integers {
  using Out = int64_t;
  static PHILOX_HOST_DEVICE void write(typename Lanes::Word (&words)[4], Out* out) {
    uint32_t flat[4 * Lanes::width];
    Lanes::interleave(words, flat);
    for (int i = 0; i < 4 * Lanes::width; ++i) out[i] = flat[i];
  }
};

// word / 2^32, cut off after as many digits as F has: exact, and below 1.
template <class Lanes, Float F>
struct Uniform {
  using Out = typename Memory<F>::Type;
  static PHILOX_HOST_DEVICE void write(typename Lanes::Word (&words)[4], Out* out) {
    constexpr int count = 4 * Lanes::width, digits = F == Float::fp32 ? 24 : F == Float::bf16 ? 8 : 11;
    uint32_t flat[count];
    Lanes::interleave(words, flat);
    if constexpr (F == Float::fp64) {
      for (int i = 0; i < count; ++i) out[i] = flat[i] * 0x1p-32;
    } else {
      float values[count];
      for (int i = 0; i < count; ++i) values[i] = float(int32_t(flat[i] >> (32 - digits))) / float(1 << digits);
      narrow<Lanes, F>(values, out);
    }
  }
};

// log_uniform and box_muller of philox.h by libm: fp64 is not meant to be fast.
PHILOX_HOST_DEVICE double log_uniform_fp64(uint32_t word) {
  return word >> 31 ? std::log1p(-(~word + 0.5) * 0x1p-32) : std::log((word + 0.5) * 0x1p-32);
}
PHILOX_HOST_DEVICE void box_muller_fp64(uint32_t radius, uint32_t angle, double* out) {
  const double R = std::sqrt(-2 * log_uniform_fp64(radius));
  const uint32_t turned = angle + 0x20000000u, quadrant = turned >> 30;
  const double half_turns = (double(turned & 0x3fffffffu) - 0x1p29 + 0.5) * 0x1p-31;
#if defined(__CUDA_ARCH__)  // whose sin and cos keep a table on the stack for angles that do not come here
  const double s = R * sinpi(half_turns), c = R * cospi(half_turns);
#else
  const double x = half_turns * std::numbers::pi, s = R * std::sin(x), c = R * std::cos(x);
#endif
  const double of_cosine = quadrant & 1 ? s : c, of_sine = quadrant & 1 ? c : s;
  out[0] = quadrant == 1 || quadrant == 2 ? -of_cosine : of_cosine;
  out[1] = quadrant >= 2 ? -of_sine : of_sine;
}

template <class Lanes, Float F>
struct Normal {
  using Out = typename Memory<F>::Type;
  static PHILOX_HOST_DEVICE void write(typename Lanes::Word (&words)[4], Out* out) {
    constexpr int count = 4 * Lanes::width;
    if constexpr (F == Float::fp64) {
      uint32_t flat[count];
      Lanes::interleave(words, flat);
      for (int i = 0; i < count; i += 2) box_muller_fp64(flat[i], flat[i + 1], out + i);
    } else {
      typename Lanes::Float z[4];
      box_muller<Lanes>(words[0], words[1], z[0], z[1]);
      box_muller<Lanes>(words[2], words[3], z[2], z[3]);
      typename Lanes::Word bits[4];
      for (int k = 0; k < 4; ++k) bits[k] = Lanes::bits_of(z[k]);
      if constexpr (F == Float::fp32) {
        Lanes::interleave(bits, reinterpret_cast<uint32_t*>(out));
      } else {
        float values[count];
        Lanes::interleave(bits, reinterpret_cast<uint32_t*>(values));
        narrow<Lanes, F>(values, out);
      }
    }
  }
};

// Standard exponentials.
template <class Lanes, Float F>
struct Exponential {
  using Out = typename Memory<F>::Type;
  static PHILOX_HOST_DEVICE void write(typename Lanes::Word (&words)[4], Out* out) {
    if constexpr (F == Float::fp64) {
      constexpr int count = 4 * Lanes::width;
      uint32_t flat[count];
      Lanes::interleave(words, flat);
      for (int i = 0; i < count; ++i) out[i] = -log_uniform_fp64(flat[i]);
    } else {
      typename Lanes::Word bits[4];
      for (int k = 0; k < 4; ++k) bits[k] = Lanes::bits_of(-log_uniform<Lanes>(words[k]));
      Lanes::interleave(bits, reinterpret_cast<uint32_t*>(out));
    }
  }
};

}  // namespace
}  // namespace mmgen_kernels::philox
