// The loops of kernels.h, written once over vectors of lanes; each philox_<instruction set>.cpp instantiates them.
#pragma once

#include <algorithm>

#include "philox/kernels.h"
#include "philox/sinks.h"

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
           fill<Lanes, Normal<Lanes, Float::bf16>>, fill<Lanes, Normal<Lanes, Float::fp16>>},
          {fill<Lanes, Exponential<Lanes, Float::fp64>>, fill<Lanes, Exponential<Lanes, Float::fp32>>}};
}

}  // namespace
}  // namespace mmgen_kernels::philox
