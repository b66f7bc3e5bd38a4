// Rows as they lie in memory, of any float dtype, read into vectors of the type that is computed in, and rounded back once.
// Lanes adds to Vectors and Words: fmadd and, where GCC makes poor code of Words, its own conversions.
#pragma once

#include <type_traits>

#include "simd/vectors.h"

namespace mmgen_kernels::simd {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

// Its types are parameters because GCC looks into an expression of vectors too early unless the type of a lane is one.
template <int WIDTH, class U16 = uint16_t, class U32 = uint32_t, class F32 = float>
struct Words {
  typedef U16 Half __attribute__((vector_size(2 * WIDTH)));
  typedef U32 Word __attribute__((vector_size(4 * WIDTH)));
  typedef F32 Single __attribute__((vector_size(4 * WIDTH)));

  static Single from_bf16(Half h) { return (Single)(__builtin_convertvector(h, Word) << 16); }
  static Word bf16_bits(Single f) {
    const Word bits = (Word)f, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return (f == f ? rounded : (bits | 0x400000)) >> 16;
  }
  static Half to_bf16(Single f) { return __builtin_convertvector(bf16_bits(f), Half); }
  // The exponent goes to its place; a multiplication corrects its bias and makes subnormals normal.
  static Single from_half(Half h) {
    const Word wide = __builtin_convertvector(h, Word), sign = (wide & 0x8000) << 16, rest = (wide & 0x7fff) << 13;
    const Word finite = (Word)((Single)rest * 0x1p112f);
    return (Single)(sign | ((wide & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : finite));
  }
  static Half to_half(Single f) {
    const Word bits = (Word)f, magnitude = bits & 0x7fffffff;
    const Word subnormal = (Word)((Single)magnitude + 0.5f) - 0x3f000000;  // adding 1/2 rounds to a multiple of 2^-24
    const Word normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    Word half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? Word{} + 0x7c00 : half;  // rounds to 2^16 or is Inf
    half = magnitude > 0x7f800000 ? Word{} + 0x7e00 : half;
    return __builtin_convertvector(((bits >> 16) & 0x8000) | half, Half);
  }
};

// `Packed` is what lies in memory.
template <class Lanes, class T>
struct Storage {  // float or double, either of which the computation may be in
  typedef T Packed __attribute__((vector_size(Lanes::width * sizeof(T))));
  static typename Lanes::Vec unpack(Packed p) { return __builtin_convertvector(p, typename Lanes::Vec); }
  static Packed pack(typename Lanes::Vec v) { return __builtin_convertvector(v, Packed); }
};
template <class Lanes>
struct Storage<Lanes, Bf16> {
  using W = Words<Lanes::width>;
  using Packed = typename W::Half;
  static typename Lanes::Vec unpack(Packed p) { return __builtin_convertvector(Lanes::from_bf16(p), typename Lanes::Vec); }
  static Packed pack(typename Lanes::Vec v) { return Lanes::to_bf16(__builtin_convertvector(v, typename W::Single)); }
};
template <class Lanes>
struct Storage<Lanes, Fp16> {
  using W = Words<Lanes::width>;
  using Packed = typename W::Half;
  static typename Lanes::Vec unpack(Packed p) { return __builtin_convertvector(Lanes::from_half(p), typename Lanes::Vec); }
  static Packed pack(typename Lanes::Vec v) { return Lanes::to_half(__builtin_convertvector(v, typename W::Single)); }
};

// A whole vector of a row, and what is left of it at its end: lanes past that read 0 and are not written.
template <class Lanes>
struct Whole {
  using Vec = typename Lanes::Vec;
  template <class T>
  static auto packed(const T* p) {
    typename Storage<Lanes, T>::Packed v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  template <class T>
  static void write(T* p, typename Storage<Lanes, T>::Packed v) {
    std::memcpy(p, &v, sizeof v);
  }
  static Vec only(Vec v) { return v; }
};
template <class Lanes>
struct Part {
  using Vec = typename Lanes::Vec;
  int64_t count;
  static constexpr int64_t half = Lanes::width / 2;  // has an instruction; another count is a call of 6 ns
  template <class T>
  auto packed(const T* p) const {
    if constexpr (half >= 4)
      if (count == half) return first_half(p, std::make_integer_sequence<int, Lanes::width>());
    typename Storage<Lanes, T>::Packed v{};
    std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(T));
    return v;
  }
  template <class T>
  void write(T* p, typename Storage<Lanes, T>::Packed v) const {
    if (count == half) std::memcpy(p, &v, half * sizeof(T));
    else std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(T));
  }
  template <class T, int... LANE>
  static auto first_half(const T* p, std::integer_sequence<int, LANE...>) {
    using Packed = typename Storage<Lanes, T>::Packed;
    typedef std::remove_reference_t<decltype(Packed{}[0])> Half __attribute__((vector_size(half * sizeof(T))));
    Half v;
    std::memcpy(&v, p, sizeof v);
    return Packed(__builtin_shufflevector(v, Half{}, LANE...));
  }
  Vec only(Vec v) const {
    for (int64_t i = count; i < Lanes::width; ++i) v[i] = 0;
    return v;
  }
};

template <class Lanes, class T, class Place>
typename Lanes::Vec load(const Place& place, const T* p) {
  return Storage<Lanes, T>::unpack(place.packed(p));
}
template <class Lanes, class T, class Place>
void store(const Place& place, T* p, typename Lanes::Vec v) {
  place.write(p, Storage<Lanes, T>::pack(v));
}

}  // namespace
}  // namespace mmgen_kernels::simd
