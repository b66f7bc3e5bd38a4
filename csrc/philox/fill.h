// The loops of kernels.h, written once over vectors of lanes; each philox_<instruction set>.cpp instantiates them.
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

#include "philox.h"
#include "philox/kernels.h"

namespace mmgen_kernels::philox {
namespace {  // internal linkage: compiled once per instruction set

// What vectors of WIDTH lanes have in common; Lanes adds multiply, to_float, root, interleave and to_half.
template <int WIDTH>
struct Vectors {
  static constexpr int width = WIDTH;
  using Wide __attribute__((vector_size(WIDTH * 4))) = uint64_t;  // half as many lanes
  using Word __attribute__((vector_size(WIDTH * 4))) = uint32_t;
  using Int __attribute__((vector_size(WIDTH * 4))) = int32_t;
  using Float __attribute__((vector_size(WIDTH * 4))) = float;

  static PHILOX_HOST_DEVICE Float from_bits(Word bits) { return (Float)bits; }
  static PHILOX_HOST_DEVICE Word bits_of(Float f) { return (Word)f; }
  template <class B, class C>
  static PHILOX_HOST_DEVICE Float multiply_add(Float a, B b, C c) {
    return a * b + c;  // -ffp-contract=off
  }
};

// Which block lane `l` of a group holds, so that the transposition of the four words stays within 128-bit lanes.
template <int WIDTH>
constexpr uint64_t block_of_lane(int l) {
  return uint64_t(WIDTH / 4 * (l % 4) + l / 4);
}

// `Lanes::width` blocks from `counter` on.
template <class Lanes>
PHILOX_HOST_DEVICE void blocks(uint64_t seed, uint64_t counter, typename Lanes::Word (&words)[4]) {
  using Wide = typename Lanes::Wide;
  Wide even, odd;
  for (int l = 0; l < Lanes::width / 2; ++l) {
    even[l] = block_of_lane<Lanes::width>(2 * l);
    odd[l] = block_of_lane<Lanes::width>(2 * l + 1);
  }
  Wide low[4], high[4];
  block<Lanes>(seed, even + counter, low);
  block<Lanes>(seed, odd + counter, high);
  for (int k = 0; k < 4; ++k) words[k] = (typename Lanes::Word)((low[k] & 0xffffffffu) | (high[k] << 32));
}

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
inline uint16_t to_bf16(float value) {
  const uint32_t bits = OneLane::bits_of(value);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The same for fp16, below its largest value.
inline uint16_t to_fp16(float value) {
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

// box_muller of philox.h by libm: fp64 is not meant to be fast.
inline void box_muller_fp64(uint32_t radius, uint32_t angle, double* out) {
  const double log_u = radius >> 31 ? std::log1p(-(~radius + 0.5) * 0x1p-32) : std::log((radius + 0.5) * 0x1p-32);
  const double R = std::sqrt(-2 * log_u);
  const uint32_t turned = angle + 0x20000000u, quadrant = turned >> 30;
  const double x = (double(turned & 0x3fffffffu) - 0x1p29 + 0.5) * (0x1p-31 * std::numbers::pi);
  const double s = R * std::sin(x), c = R * std::cos(x);
  const double cosines[] = {c, -s, -c, s};
  out[0] = cosines[quadrant];
  out[1] = cosines[(quadrant + 3) & 3];
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

template <class Lanes, class Sink>
void fill(uint64_t seed, uint64_t offset, int64_t begin, int64_t end, void* to) {
  constexpr int group = 4 * Lanes::width;
  auto* out = static_cast<typename Sink::Out*>(to);
  for (int64_t i = begin; i < end; i += group, out += group) {
    typename Lanes::Word words[4];
    blocks<Lanes>(seed, offset + uint64_t(i) / 4, words);
    if (end - i >= group) {
      Sink::write(words, out);
    } else {
      typename Sink::Out last[group];
      Sink::write(words, last);
      std::copy_n(last, end - i, out);
    }
  }
}

template <class Lanes>
constexpr Kernels kernels() {
  return {fill<Lanes, Integers<Lanes>>,
          {fill<Lanes, Uniform<Lanes, Float::fp64>>, fill<Lanes, Uniform<Lanes, Float::fp32>>,
           fill<Lanes, Uniform<Lanes, Float::bf16>>, fill<Lanes, Uniform<Lanes, Float::fp16>>},
          {fill<Lanes, Normal<Lanes, Float::fp64>>, fill<Lanes, Normal<Lanes, Float::fp32>>,
           fill<Lanes, Normal<Lanes, Float::bf16>>, fill<Lanes, Normal<Lanes, Float::fp16>>}};
}

}  // namespace
}  // namespace mmgen_kernels::philox
