// scheduler_step for GPUs in the words of simt/simt.h. A thread has ELEMENTS of a sample: it asks for all of its inputs, 16 bytes at
// a time where they lie so, before it needs the first; meanwhile the block makes the step's factors of its row.
//
// The operations and their order are those of kernels.h, so that the bits are the CPU's.
#pragma once

#include "floats.h"
#include "philox/philox_simt.h"
#include "simt/simt.h"

namespace mmgen_kernels::schedule::gpu {

constexpr int threads = 128;
constexpr int max_inputs = 5, max_outputs = 3;
constexpr int max_columns = max_inputs + 2, max_rows = max_outputs + 2;

struct Source {
  const void* data = nullptr;  // null: there is none
  int64_t stride = 0;          // elements from sample to sample
  Float dtype = Float::fp32;
  bool aligned = false;  // whatever a thread reads at once begins where one load can
};

struct Result {
  void* data = nullptr;
  Float dtype = Float::fp32;
};

struct Step {
  // Inputs that some term has, the guided one first, with the column of its terms.
  Source inputs[max_inputs];
  int column[max_inputs] = {};
  int count = 0;
  Source unconditional, noise, variance;
  Result results[max_outputs];
  int outputs = 0;
  bool guides = false, clamps = false;
  double scale = 1, bound = 0;
  // The row: here, or in a table on the device, (steps, rows, columns).
  double row[max_rows * max_columns] = {};
  const double* table = nullptr;
  int rows = 0, columns = 0;
  const int64_t* index = nullptr;  // null: `step`
  bool step_per_sample = false, key_per_sample = false;
  int64_t step = 0, steps = 1;
  const uint64_t* keys = nullptr;  // null: none
  int64_t samples = 0, size = 0;
  uint32_t blocks_per_sample = 0;  // all blocks of a launch are fewer than 2^31
};

template <class Real>
struct Factors {  // in shared memory
  static constexpr int derived = max_inputs, noise = max_inputs + 1;
  Real of[1 + max_outputs][max_inputs + 2];  // 0: the term is not there
};

// -- what lies in memory ----------------------------------------------------------------------------------------------

HOST_DEVICE constexpr int bytes_of(Float dtype) { return dtype == Float::fp64 ? 8 : dtype == Float::fp32 ? 4 : 2; }

using philox::OneLane;

DEVICE float from_half(uint32_t bits) {
  const uint32_t magnitude = (bits & 0x7fff) << 13;
  const float value = (bits & 0x7c00) == 0x7c00 ? OneLane::from_bits(magnitude | 0x7f800000u) : OneLane::from_bits(magnitude) * 0x1p112f;
  return bits & 0x8000 ? -value : value;
}
DEVICE uint32_t to_half(float value) {
  const uint32_t bits = OneLane::bits_of(value), magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7e00;
  if (magnitude >= 0x477ff000) return (bits >> 16 & 0x8000) | 0x7c00;  // 65520 and above
  return philox::to_fp16(value);
}
DEVICE uint32_t to_bf16(float value) { return (OneLane::bits_of(value) & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : philox::to_bf16(value); }

// ELEMENTS as they lie in memory. In fp32 they are 16 bytes of the widest input: four of fp32, or eight if all inputs have 16 bits.
template <class Real, int ELEMENTS>
struct alignas(16) Raw {
  static constexpr int words = ELEMENTS == 8 ? 4 : ELEMENTS * static_cast<int>(sizeof(Real)) / 4;
  uint32_t word[words];
};

// 0 outside of the sample. Every index of a word is known to the compiler: what it must look up it keeps in memory.
template <class Real, int ELEMENTS>
DEVICE void fetch(const Source& s, int64_t sample, int64_t i, int64_t size, bool whole, Raw<Real, ELEMENTS>& raw) {
  const char* at = static_cast<const char*>(s.data) + (sample * s.stride + i) * bytes_of(s.dtype);
  const auto inside = [&](int e) { return i + e >= 0 && i + e < size; };
  if (s.dtype == Float::bf16 || s.dtype == Float::fp16) {
    if (whole && s.aligned) return simt::copy<ELEMENTS * 2>(raw.word, at);
    UNROLL for (int e = 0; e < ELEMENTS; e += 2) {
      const auto* from = reinterpret_cast<const uint16_t*>(at) + e;
      raw.word[e / 2] = (inside(e) ? uint32_t{from[0]} : 0) | (inside(e + 1) ? uint32_t{from[1]} << 16 : 0);
    }
  } else if constexpr (ELEMENTS == 4) {
    if (s.dtype == Float::fp32) {
      if (whole && s.aligned) return simt::copy<16>(raw.word, at);
      UNROLL for (int e = 0; e < 4; ++e) raw.word[e] = inside(e) ? reinterpret_cast<const uint32_t*>(at)[e] : 0;
    } else if constexpr (sizeof(Real) == 8) {
      if (whole && s.aligned) return simt::copy<32>(raw.word, at);
      UNROLL for (int e = 0; e < 8; ++e) raw.word[e] = inside(e / 2) ? reinterpret_cast<const uint32_t*>(at)[e] : 0;
    }
  }
}

template <class Real, int ELEMENTS>
DEVICE void widen(const Raw<Real, ELEMENTS>& raw, Float dtype, Real (&x)[ELEMENTS]) {
  if (dtype == Float::bf16) {
    UNROLL for (int e = 0; e < ELEMENTS; ++e) x[e] = OneLane::from_bits(raw.word[e / 2] >> (16 * (e % 2)) << 16);
  } else if (dtype == Float::fp16) {
    UNROLL for (int e = 0; e < ELEMENTS; ++e) x[e] = from_half(raw.word[e / 2] >> (16 * (e % 2)));
  } else if constexpr (ELEMENTS == 4) {
    if (dtype == Float::fp32) {
      UNROLL for (int e = 0; e < 4; ++e) x[e] = OneLane::from_bits(raw.word[e]);
    } else if constexpr (sizeof(Real) == 8) {
      UNROLL for (int e = 0; e < 4; ++e) {
        const uint64_t bits = raw.word[2 * e] | uint64_t{raw.word[2 * e + 1]} << 32;
        memcpy(&x[e], &bits, sizeof bits);
      }
    }
  }
}

template <class Real, int ELEMENTS>
DEVICE void put(const Result& r, const Real (&values)[ELEMENTS], int64_t sample, int64_t i, int64_t size, bool whole) {
  char* const at = static_cast<char*>(r.data) + (sample * size + i) * bytes_of(r.dtype);
  const auto write = [&](const auto& narrow) {
    using Out = decltype(narrow(values[0]));
    alignas(16) Out out[ELEMENTS];
    UNROLL for (int e = 0; e < ELEMENTS; ++e) out[e] = narrow(values[e]);
    if (whole && size % ELEMENTS == 0) return simt::copy<sizeof out>(at, out);  // every sample begins where one store can
    UNROLL for (int e = 0; e < ELEMENTS; ++e)
      if (i + e >= 0 && i + e < size) reinterpret_cast<Out*>(at)[e] = out[e];
  };
  switch (r.dtype) {
    case Float::fp64: return write([](Real v) { return static_cast<double>(v); });
    case Float::fp32: return write([](Real v) { return static_cast<float>(v); });
    case Float::bf16: return write([](Real v) { return static_cast<uint16_t>(to_bf16(static_cast<float>(v))); });
    case Float::fp16: return write([](Real v) { return static_cast<uint16_t>(to_half(static_cast<float>(v))); });
  }
}

// -- arithmetic -------------------------------------------------------------------------------------------------------

DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

DEVICE double exponential(double x) { return exp(x); }
// As simd/vectors.h has it.
DEVICE float exponential(float x) {
  constexpr float to_integer = 0x1.8p23f, ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
  const float limited = x > 88.37f ? 88.37f : x;
  const float shifted = fmaf(limited, 0x1.715476p0f, to_integer), n = shifted - to_integer;
  const float r = fmaf(n, -ln2_low, fmaf(n, -ln2_high, limited));
  float q = fmaf(r, 0x1.6a23cep-10f, 0x1.123a2p-7f);
  q = fmaf(r, q, 0x1.5558f2p-5f);
  q = fmaf(r, q, 0x1.555492p-3f);
  q = fmaf(r, q, 0x1.fffffcp-2f);
  const float power = OneLane::from_bits((OneLane::bits_of(shifted) + 127) << 23);
  return x < -87.33654f ? 0 : (fmaf(r * r, q, r) + 1.0f) * power;
}

// Normals of philox_normal(shape, fold_in(key, step)): ELEMENTS from the stream's block `first` on.
template <class Real, int ELEMENTS>
DEVICE void draw(const uint64_t* key, int64_t step, int64_t first, Real (&z)[ELEMENTS]) {
  uint64_t w[4];
  philox::block<OneLane>(key[0], key[1] + static_cast<uint64_t>(step), w);
  const uint64_t seed = (w[0] & 0xffffffffu) | w[1] << 32, offset = (w[2] & 0xffffffffu) | w[3] << 32;
  UNROLL for (int b = 0; b < ELEMENTS / 4; ++b) {
    philox::block<OneLane>(seed, offset + static_cast<uint64_t>(first + b), w);
    uint32_t words[4];
    UNROLL for (int k = 0; k < 4; ++k) words[k] = static_cast<uint32_t>(w[k]);
    philox::Normal<philox::gpu::Thread, sizeof(Real) == 8 ? Float::fp64 : Float::fp32>::write(words, z + 4 * b);
  }
}

// -- the kernel -------------------------------------------------------------------------------------------------------

// The factors of a row of fp64 numbers: where nothing limits the derived value, its share is added to the outputs' factors.
template <class Real>
DEVICE void make_factors(const Step& p, const double* row, Factors<Real>& s) {
  constexpr int derived = Factors<Real>::derived, terms = max_inputs + 2;
  const int t = simt::thread(), k = t / terms, term = t % terms, n = p.columns - 2;
  if (k > p.outputs) return;
  const int column = term == derived ? n : term == derived + 1 ? n + 1 : p.column[term];
  double factor = term < p.count || term > derived ? row[k * p.columns + column] : 0;
  if (term == derived && p.clamps && k > 0) factor = row[k * p.columns + n];
  if (!p.clamps && k > 0 && (term < p.count || term > derived)) {
    const double share = row[k * p.columns + n], first = row[column];
    if (share != 0 && first != 0) factor += share * first;
  }
  if (k == 0 && !p.clamps) factor = 0;
  s.of[k][term] = static_cast<Real>(factor);
}

template <class Real, int ELEMENTS, bool DRAWS>
DEVICE void take_step(const Step& p, Factors<Real>& s) {
  constexpr int derived = Factors<Real>::derived, of_noise = Factors<Real>::noise;
  const auto block = static_cast<uint32_t>(simt::block_x());
  const int64_t sample = block / p.blocks_per_sample, piece = block % p.blocks_per_sample;
  // with one key for all, a sample may begin within a block of the stream
  const int64_t start = DRAWS && !p.key_per_sample ? sample * p.size : 0, tile = piece * threads + simt::thread();
  const int64_t i = tile * ELEMENTS - start % 4;
  const bool whole = start % 4 == 0 && i + ELEMENTS <= p.size;

  Raw<Real, ELEMENTS> raw[max_inputs], unconditional, noise, variance;
  UNROLL for (int j = 0; j < max_inputs; ++j)
    if (j < p.count) fetch(p.inputs[j], sample, i, p.size, whole, raw[j]);
  if (p.guides) fetch(p.unconditional, sample, i, p.size, whole, unconditional);
  if (!DRAWS && p.noise.data) fetch(p.noise, sample, i, p.size, whole, noise);
  if (p.variance.data) fetch(p.variance, sample, i, p.size, whole, variance);

  int64_t step = p.index ? p.index[p.step_per_sample ? sample : 0] : p.step;
  step = step < 0 ? 0 : step >= p.steps ? p.steps - 1 : step;
  const double* row = p.table ? p.table + step * p.rows * p.columns : p.row;
  make_factors(p, row, s);
  simt::sync();

  Real sum[1 + max_outputs][ELEMENTS] = {}, x[ELEMENTS];
  const auto add = [&](int k, int term) {
    const Real factor = s.of[k][term];
    if (factor != 0) {
      UNROLL for (int e = 0; e < ELEMENTS; ++e) sum[k][e] = multiply_add(factor, x[e], sum[k][e]);
    }
  };
  const auto add_to_all = [&](int term) {
    UNROLL for (int k = 0; k <= max_outputs; ++k)
      if (k <= p.outputs) add(k, term);
  };
  UNROLL for (int j = 0; j < max_inputs; ++j) {
    if (j >= p.count) continue;
    widen(raw[j], p.inputs[j].dtype, x);
    if (j == 0 && p.guides) {
      Real u[ELEMENTS];
      widen(unconditional, p.unconditional.dtype, u);
      UNROLL for (int e = 0; e < ELEMENTS; ++e) x[e] = multiply_add(static_cast<Real>(p.scale), x[e] - u[e], u[e]);
    }
    add_to_all(j);
  }
  if (DRAWS || p.noise.data) {
    Real v[ELEMENTS];
    if (p.variance.data) widen(variance, p.variance.dtype, v);
    if constexpr (DRAWS) draw(p.keys + (p.key_per_sample ? 2 * sample : 0), step, start / 4 + tile * (ELEMENTS / 4), x);
    else widen(noise, p.noise.dtype, x);
    if (p.variance.data) {  // deviation = exp((low + (high - low) (v + 1) / 2) / 2)
      const double low = row[(p.rows - 1) * p.columns], high = row[(p.rows - 1) * p.columns + 1];
      const Real middle = static_cast<Real>((low + high) / 4), slope = static_cast<Real>((high - low) / 4);
      UNROLL for (int e = 0; e < ELEMENTS; ++e) x[e] *= exponential(multiply_add(slope, v[e], middle));
    }
    add_to_all(of_noise);
  }
  if (p.clamps) {
    const Real bound = static_cast<Real>(p.bound);
    UNROLL for (int e = 0; e < ELEMENTS; ++e) {
      x[e] = sum[0][e] > bound ? bound : sum[0][e];  // NaN stays
      x[e] = x[e] < -bound ? -bound : x[e];
    }
    UNROLL for (int k = 1; k <= max_outputs; ++k)
      if (k <= p.outputs) add(k, derived);
  }
  UNROLL for (int k = 1; k <= max_outputs; ++k)
    if (k <= p.outputs) put(p.results[k - 1], sum[k], sample, i, p.size, whole);
}

// Launch starts a kernel on so many blocks. `wide`: computed in fp64; `short_inputs`: all of them have 16 bits.
template <class Launch>
void launch_step(Step& p, bool wide, bool short_inputs, const Launch& launch) {
  const auto by = [&]<class Real, int ELEMENTS>() {
    const int64_t of_block = threads * ELEMENTS, leads = p.keys && !p.key_per_sample && p.samples > 1 ? 3 : 0;
    p.blocks_per_sample = static_cast<uint32_t>((p.size + leads + of_block - 1) / of_block);
    const int64_t blocks = p.samples * p.blocks_per_sample;
    if (p.keys) launch.template operator()<Real, take_step<Real, ELEMENTS, true>>(p, blocks);
    else launch.template operator()<Real, take_step<Real, ELEMENTS, false>>(p, blocks);
  };
  if (wide) by.template operator()<double, 4>();
  else if (short_inputs) by.template operator()<float, 8>();
  else by.template operator()<float, 4>();
}

}  // namespace mmgen_kernels::schedule::gpu
