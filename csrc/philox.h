// The noise law in device functions that g++ and nvcc compile alike: Philox 4x32-10 (Salmon et al. 2011) and Box-Muller.
//
// Element i of a stream with key (seed, offset) takes word i % 4 of the block whose counter is offset + i / 4. Everything is
// a template over `Ops`, one lane or a vector of them, so that every instruction set performs the same operations in the same
// order: integers, IEEE additions, multiplications and square roots, no FMA, hence the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PHILOX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PHILOX_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace mmgen_kernels::philox {

// One lane: what a CUDA thread uses.
struct OneLane {
  using Wide = uint64_t;
  using Word = uint32_t;
  using Int = int32_t;
  using Float = float;

  // Of `a` the low 32 bits count.
  static PHILOX_HOST_DEVICE Wide multiply(Wide a, uint32_t b) { return uint64_t{uint32_t(a)} * b; }
  static PHILOX_HOST_DEVICE Float to_float(Int i) { return float(i); }
  static PHILOX_HOST_DEVICE Float from_bits(Word bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
  }
  static PHILOX_HOST_DEVICE Word bits_of(Float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
  }
  // Two roundings.
  static PHILOX_HOST_DEVICE Float multiply_add(Float a, Float b, Float c) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(__fmul_rn(a, b), c);  // nvcc would contract a * b + c
#else
    return a * b + c;
#endif
  }
  static PHILOX_HOST_DEVICE Float root(Float f) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(f);
#else
    return std::sqrt(f);
#endif
  }
};

// The four words of the block `counter`, each in the low 32 bits of its lane; what is above them is left over.
template <class Ops>
PHILOX_HOST_DEVICE void block(uint64_t seed, typename Ops::Wide counter, typename Ops::Wide (&words)[4]) {
  constexpr uint32_t multiplier_0 = 0xD2511F53u, multiplier_1 = 0xCD9E8D57u;
  constexpr uint32_t weyl_0 = 0x9E3779B9u, weyl_1 = 0xBB67AE85u;
  uint32_t key_0 = uint32_t(seed), key_1 = uint32_t(seed >> 32);
  typename Ops::Wide x = counter, y = counter >> 32, z = counter ^ counter, w = z;
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const typename Ops::Wide p = Ops::multiply(x, multiplier_0), q = Ops::multiply(z, multiplier_1);
    x = (q >> 32) ^ y ^ uint64_t{key_0};
    z = (p >> 32) ^ w ^ uint64_t{key_1};
    y = q;
    w = p;
    key_0 += weyl_0;
    key_1 += weyl_1;
  }
  words[0] = x, words[1] = y, words[2] = z, words[3] = w;
}

// The key of step, layer or sample i: two 64-bit words of the block offset + i.
PHILOX_HOST_DEVICE void fold_in(uint64_t& seed, uint64_t& offset, uint64_t i) {
  uint64_t words[4];
  block<OneLane>(seed, offset + i, words);
  seed = (words[0] & 0xffffffffu) | words[1] << 32, offset = (words[2] & 0xffffffffu) | words[3] << 32;
}

// first + x (second + x (third + ...))
template <class Ops, class... Rest>
PHILOX_HOST_DEVICE typename Ops::Float polynomial(typename Ops::Float x, float first, float second, Rest... rest) {
  if constexpr (sizeof...(rest) == 0) return Ops::multiply_add(x, second, first);
  else return Ops::multiply_add(x, polynomial<Ops>(x, second, rest...), first);
}

// ln u with u = (word + 1/2) / 2^32, to an ulp or two of that exact value.
template <class Ops>
PHILOX_HOST_DEVICE typename Ops::Float log_uniform(typename Ops::Word word) {
  using Float = typename Ops::Float;
  using Int = typename Ops::Int;
  using Word = typename Ops::Word;

  // Above 1/2, u is held as its distance from 1: ln u near 0 hangs on it.
  const Int r = (Int)word;
  const Int above_half = r >> 31;
  const Float distance = (Ops::to_float(r ^ above_half) + 0.5f) * 0x1p-32f;
  const Float u = above_half < 0 ? 1.0f - distance : distance;
  // u = 2^exponent (1 + f), f in [-1/4, 1/2)
  constexpr int32_t three_quarters = 0x3f400000;
  const Int above = (Int)Ops::bits_of(u) - three_quarters;
  const Int exponent = above >> 23;
  const Float f = exponent == 0 ? -distance : Ops::from_bits((Word)((above & 0x7fffff) + three_quarters)) - 1.0f;
  // (ln(1 + f) - f) / f^2 to 2^-27 of ln(1 + f)
  const Float p = polynomial<Ops>(f, -0.5f, 0.33333453536f, -0.25000053644f, 0.19990606606f, -0.16647766531f, 0.14482061565f,
                                  -0.13162232935f, 0.10448331386f, -0.04490960762f);
  const Float n = Ops::to_float(exponent);
  constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // n * ln2_high is exact
  return Ops::multiply_add(n, ln2_high, f + Ops::multiply_add(f * f, p, n * ln2_low));
}

// R cos(2 pi v) and R sin(2 pi v) with R = sqrt(-2 ln u), u = (radius + 1/2) / 2^32, v = (angle + 1/2) / 2^32, to a few ulp of
// those exact values: u and v are never rounded to fp32 where that would cost relative accuracy of the result.
template <class Ops>
PHILOX_HOST_DEVICE void box_muller(typename Ops::Word radius, typename Ops::Word angle, typename Ops::Float& cosine,
                                  typename Ops::Float& sine) {
  using Float = typename Ops::Float;
  using Int = typename Ops::Int;
  using Word = typename Ops::Word;

  const Float R = Ops::root(-2.0f * log_uniform<Ops>(radius));

  // The angle is quadrant / 4 + x turns with x in [-1/8, 1/8), which is exact in integers.
  const Word turned = angle + 0x20000000u;
  const Word quadrant = turned >> 30;
  const Int rest = (Int)(turned & 0x3fffffffu) - 0x20000000;
  const Float x = Ops::to_float(rest * 2 + 1) * 0x1p-33f;
  const Float t = x * x;
  const Float s = x * polynomial<Ops>(t, 6.2831854820f, -41.341663361f, 81.592353821f, -75.393600464f);
  const Float c = polynomial<Ops>(t, 1.0f, -19.739208221f, 64.939323425f, -85.443237305f, 59.229244232f);
  const Int odd = (Int)(quadrant << 31);
  const Float of_cosine = odd < 0 ? s : c, of_sine = odd < 0 ? c : s;
  cosine = Ops::from_bits(Ops::bits_of(R * of_cosine) ^ (((quadrant + 1) & 2) << 30));
  sine = Ops::from_bits(Ops::bits_of(R * of_sine) ^ ((quadrant & 2) << 30));
}

}  // namespace mmgen_kernels::philox
