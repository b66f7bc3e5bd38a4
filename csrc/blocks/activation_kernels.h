// The inner loops of the activations, written once over GCC's vectors; each activation_<instruction set>.cpp instantiates them.
#pragma once

#include "blocks/activation_tables.h"
#include "simd/lanes_scalar.h"
#include "simd/storage.h"

namespace mmgen_kernels::blocks {
namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

// tanh(u) = 2 sigmoid(2 u) - 1, so that gelu_tanh(x) = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3): one exponential, and
// no difference that would lose digits where x is far below 0.
template <class Lanes>
struct Activations {
  using Real = typename Lanes::Real;
  using Vec = typename Lanes::Vec;
  static constexpr int W = Lanes::width;
  static constexpr Real linear = static_cast<Real>(-1.59576912160573071176), cubic = linear * static_cast<Real>(0.044715);  // of -2u

  // sigmoid(u), and 1 - sigmoid(u) without the difference, whose rounding an x of 3 would show eight times. Where e^-u overflows they
  // are 0 and 1: what is left of a bounded exponential would be multiplied by slopes without bound.
  struct Sigmoid {
    static constexpr Real most = sizeof(Real) == sizeof(double) ? 700 : 88;
    Vec at, rest;
    explicit Sigmoid(Vec minus_u) {
      const Vec e = simd::exponential<Lanes>(minus_u), part = Real(1) / (e + Real(1));
      at = minus_u > most ? Vec{} : part;
      rest = minus_u > most ? Lanes::broadcast(Real(1)) : e * part;
    }
  };

  template <class T, class F>
  static void each(int64_t count, const F& f) {
    int64_t i = 0;
    for (; i + W <= count; i += W) f(simd::Whole<Lanes>{}, i);
    if (i < count) f(simd::Part<Lanes>{count - i}, i);
  }

  template <class T>
  static void gelu_tanh(const void* hidden, int64_t count, void* activated) {
    each<T>(count, [&](const auto& place, int64_t i) {
      const Vec x = read<T>(place, hidden, i);
      const Sigmoid s(x * Lanes::fmadd(x * x, Lanes::broadcast(cubic), Lanes::broadcast(linear)));
      write<T>(place, activated, i, x * s.at);
    });
  }

  template <class T>
  static void gelu_tanh_gradient(const void* grad, const void* hidden, int64_t count, void* activated, void* grad_hidden) {
    each<T>(count, [&](const auto& place, int64_t i) {
      const Vec x = read<T>(place, hidden, i), square = x * x;
      const Sigmoid s(x * Lanes::fmadd(square, Lanes::broadcast(cubic), Lanes::broadcast(linear)));
      const Vec slope = Lanes::fmadd(square, Lanes::broadcast(-3 * cubic), Lanes::broadcast(-linear));  // d 2u / dx
      const Vec value = x * s.at, flat = value * s.rest;
      write<T>(place, activated, i, value);
      // where the function is a line to the last bit, an infinite slope must not make 0 * Inf of it
      write<T>(place, grad_hidden, i, read<T>(place, grad, i) * (flat == 0 ? s.at : Lanes::fmadd(flat, slope, s.at)));
    });
  }

  template <class T>
  static void swiglu(const void* gate, const void* value, int64_t count, void* activated) {
    each<T>(count, [&](const auto& place, int64_t i) {
      const Vec x = read<T>(place, gate, i);
      write<T>(place, activated, i, x * Sigmoid(-x).at * read<T>(place, value, i));
    });
  }

  template <class T>
  static void swiglu_gradient(const void* grad, const void* gate, const void* value, int64_t count, void* activated, void* grad_gate,
                              void* grad_value) {
    each<T>(count, [&](const auto& place, int64_t i) {
      const Vec x = read<T>(place, gate, i), v = read<T>(place, value, i), g = read<T>(place, grad, i);
      const Sigmoid s(-x);
      const Vec silu = x * s.at;
      write<T>(place, activated, i, silu * v);
      write<T>(place, grad_value, i, g * silu);
      write<T>(place, grad_gate, i, g * v * Lanes::fmadd(silu, s.rest, s.at));
    });
  }

 private:
  template <class T, class Place>
  static Vec read(const Place& place, const void* row, int64_t i) {
    return simd::load<Lanes, T>(place, static_cast<const T*>(row) + i);
  }
  template <class T, class Place>
  static void write(const Place& place, void* row, int64_t i, Vec v) {
    simd::store<Lanes, T>(place, static_cast<T*>(row) + i, v);
  }
};

#define BY_DTYPE(function)                                                                                          \
  {Wide::template function<double>, Of::template function<float>, Of::template function<simd::Bf16>, \
   Of::template function<simd::Fp16>}

template <class Lanes>
constexpr ActivationKernels activation_kernels() {
  using Of = Activations<Lanes>;
  using Wide = Activations<simd::LanesScalar<double>>;
  return {.gelu_tanh = BY_DTYPE(gelu_tanh),
          .gelu_tanh_gradient = BY_DTYPE(gelu_tanh_gradient),
          .swiglu = BY_DTYPE(swiglu),
          .swiglu_gradient = BY_DTYPE(swiglu_gradient)};
}

}  // namespace
}  // namespace mmgen_kernels::blocks
