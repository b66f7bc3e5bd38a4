// One pass over the samples: whatever is affine in the inputs, noise and a limited derived value, with every tensor read once and
// every result written once.
#pragma once

#include <array>
#include <fstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "aligned.h"
#include "parallel.h"
#include "philox.h"
#include "philox/kernels.h"
#include "schedule/samples.h"
#include "schedule/tables.h"

namespace mmgen_kernels::schedule {

constexpr int64_t chunk = 1024;  // elements of every tensor that stay in L1 together

// From how many bytes of all tensors on results are streamed past the caches. Below, what follows finds them there: a step of
// 12 MiB and its reader take 1.2 times as long with streamed results. Where they do not fit in the last cache together, ordinary
// stores first read what they overwrite: on an AMD EPYC with 32 MiB, fp32 steps of 24, 32 and 40 MiB take 0.55, 0.8 and 0.8 of the
// time, the first 0.9 with a reader.
inline int64_t streamed_from() {
  static const int64_t bytes = [] {
    int64_t kibibytes = 0;  // of the cache that a core has; sysconf says what all cores of the machine have
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kibibytes;
    return (kibibytes > 0 ? kibibytes : 32 << 10) * 1024 / 4 * 3;
  }();
  return bytes;
}

// A result: contiguous, and what the loops need of it.
struct Result {
  Tensor tensor;
  char* data;
  int64_t bytes;
  int dtype;

  Result(const Tensor& like, ScalarType as) : tensor(quick_empty(like, like.sizes(), as)) {
    data = static_cast<char*>(tensor.mutable_data_ptr());
    bytes = static_cast<int64_t>(tensor.element_size());
    dtype = static_cast<int>(float_of(as));
  }
};

// Normals of philox_normal(shape, key), or of fold_in(key, step) in its place, in the type that is computed in.
struct Stream {
  const uint64_t* keys = nullptr;  // null: there is none
  bool per_sample = false;
  philox::Fill fill = nullptr;
  bool folds = true;

  // `count` of them from element i of `sample` on; room for chunk + 4. Returns where the first one lies in it.
  template <class Real>
  Real* draw(int64_t sample, int64_t size, int64_t step, int64_t i, int64_t count, Real* room) const {
    const uint64_t* key = keys + (per_sample ? 2 * sample : 0);
    uint64_t seed = key[0], offset = key[1];
    if (folds) philox::fold_in(seed, offset, static_cast<uint64_t>(step));
    const int64_t first = per_sample ? i : sample * size + i, begin = first / 4 * 4;  // a stream is entered at its blocks
    fill(seed, offset, begin, first + count, room);
    return room + (first - begin);
  }
};

// What becomes of one sample.
template <class Real>
struct Formula {
  Combination<Real> terms;
  std::array<int, max_inputs> source{};  // which of the tensors each input is
  int64_t step = 0;                      // for the stream
  bool draws = false;
  Real middle = 0, slope = 0;  // of the exponent of a learned deviation
};

template <class Real>
struct Pass {
  const Kernels<Real>& kernels;
  std::vector<Samples> sources;
  std::vector<Result> results;
  Stream stream;
  const Samples* spread = nullptr;  // of which a learned deviation is made, and the noise that it multiplies if no stream gives it
  const Samples* spread_noise = nullptr;

  static constexpr int own = static_cast<int>(sizeof(Real) == 8 ? Float::fp64 : Float::fp32);

  // a formula for each sample of `size` elements
  void run(const std::vector<Formula<Real>>& formulas, int64_t size) const {
    const auto count = static_cast<int64_t>(formulas.size());
    if (count == 0 || size == 0) return;
    const int64_t chunks = (size + chunk - 1) / chunk;
    int64_t moved = 0;
    for (const Samples& s : sources) moved += count * size * s.bytes;
    for (const Result& r : results) moved += count * size * r.bytes;
    const bool streams = moved >= streamed_from();
    parallel(count * chunks, std::min(size, chunk) * (stream.keys ? 8 : 2), [&](int64_t begin, int64_t end) {
      alignas(64) Real scratch[(max_inputs + max_outputs + 2) * room];  // not cleared
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i % chunks * chunk;
        piece(formulas[static_cast<size_t>(i / chunks)], i / chunks, size, at, std::min(chunk, size - at), scratch, streams);
      }
#if defined(__x86_64__)
      if (streams) __builtin_ia32_sfence();  // before another thread may read them
#endif
    });
  }

 private:
  static constexpr int64_t room = chunk + 16;  // a stream begins up to 3 elements before

  void piece(const Formula<Real>& f, int64_t sample, int64_t size, int64_t at, int64_t count, Real* scratch,
             bool streams) const {
    auto c = f.terms;
    c.streams = streams;
    int dtype = sources[f.source[0]].dtype;
    for (int j = 1; j < c.inputs; ++j)
      if (sources[f.source[j]].dtype != dtype) dtype = own;
    if (!kernels.combine[dtype][0]) dtype = own;

    const auto take = [&] { return std::exchange(scratch, scratch + room); };
    const void* in[max_inputs];
    void* out[max_outputs];
    for (int j = 0; j < c.inputs; ++j) {
      const Samples& s = sources[f.source[j]];
      in[j] = s.at(sample, at);
      if (s.dtype == dtype) continue;
      Real* wide = take();
      kernels.widen[s.dtype](in[j], count, wide);
      in[j] = wide;
    }
    Real* z = nullptr;
    if (f.draws) {
      z = take();
      if (stream.keys) z = stream.draw(sample, size, f.step, at, count, z);
      else kernels.widen[spread_noise->dtype](spread_noise->at(sample, at), count, z);
      if (spread) {
        Real* v = take();
        kernels.widen[spread->dtype](spread->at(sample, at), count, v);
        kernels.spread(v, f.middle, f.slope, count, z);
      }
    }
    const int64_t element = sample * size + at;
    const auto direct = [&](const Result& r) { return r.dtype == dtype || r.dtype == own; };
    for (size_t k = 0; k < results.size(); ++k) {
      const Result& r = results[k];
      out[k] = direct(r) ? static_cast<void*>(r.data + element * r.bytes) : take();
      c.wide |= uint32_t(r.dtype != dtype) << k;
      c.streams &= direct(r) && reinterpret_cast<uintptr_t>(out[k]) % 64 == 0;
    }
    kernels.combine[dtype][c.inputs - 1](c, in, z, out, count);
    for (size_t k = 0; k < results.size(); ++k)
      if (const Result& r = results[k]; !direct(r))
        kernels.narrow[r.dtype](static_cast<const Real*>(out[k]), count, r.data + element * r.bytes);
  }
};

}  // namespace mmgen_kernels::schedule
