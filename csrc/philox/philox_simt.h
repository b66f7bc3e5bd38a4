// The family's kernels for GPUs in the words of simt/simt.h: a thread per block of four elements.
#pragma once

#include "philox/sinks.h"
#include "simt/simt.h"

namespace mmgen_kernels::philox::gpu {

constexpr int threads = 256;

struct Nothing {};  // in shared memory

// Lanes of sinks.h
struct Thread : OneLane {
  static constexpr int width = 1;
  static PHILOX_HOST_DEVICE void interleave(const Word (&words)[4], uint32_t* out) {
    for (int k = 0; k < 4; ++k) out[k] = words[k];
  }
  template <int COUNT>
  static PHILOX_HOST_DEVICE void to_half(const float* values, uint16_t* out) {
    for (int i = 0; i < COUNT; ++i) out[i] = to_fp16(values[i]);
  }
};

struct Stream {
  const uint64_t* keys;  // (count, 2)
  void* out;             // (count, size)
  int64_t count, size;

  HOST_DEVICE int64_t blocks_per_key() const { return (size + 3) / 4; }
};

template <class Sink>
DEVICE void fill_stream(const Stream& p, Nothing&) {
  using Out = typename Sink::Out;
  const int64_t i = simt::block_x() * threads + simt::thread(), blocks = p.blocks_per_key();
  if (i >= p.count * blocks) return;
  const int64_t k = i / blocks, first = i % blocks * 4;
  uint64_t wide[4];
  block<OneLane>(p.keys[2 * k], p.keys[2 * k + 1] + static_cast<uint64_t>(i % blocks), wide);
  uint32_t words[4];
  for (int w = 0; w < 4; ++w) words[w] = static_cast<uint32_t>(wide[w]);
  alignas(16) Out values[4];
  Sink::write(words, values);
  Out* out = static_cast<Out*>(p.out) + k * p.size + first;
  if (p.size % 4 == 0) {  // whole blocks, at addresses that one store takes
    simt::copy<sizeof values>(out, values);
  } else {
    for (int j = 0; j < 4 && first + j < p.size; ++j) out[j] = values[j];
  }
}

struct Fold {
  const uint64_t *keys, *data;  // (count, 2), (count)
  uint64_t* out;                // (count, 2)
  int64_t count;
};

DEVICE void fold_keys(const Fold& p, Nothing&) {
  const int64_t k = simt::block_x() * threads + simt::thread();
  if (k >= p.count) return;
  uint64_t words[4];
  block<OneLane>(p.keys[2 * k], p.keys[2 * k + 1] + p.data[k], words);
  p.out[2 * k] = (words[0] & 0xffffffffu) | words[1] << 32;
  p.out[2 * k + 1] = (words[2] & 0xffffffffu) | words[3] << 32;
}

// Launch starts a kernel on so many blocks.
template <class Launch>
void launch_stream(const Stream& p, bool normal, Float dtype, const Launch& launch) {
  const int64_t blocks = (p.count * p.blocks_per_key() + threads - 1) / threads;
  const auto by = [&]<Float F>() {
    if (normal) launch.template operator()<Stream, fill_stream<Normal<Thread, F>>>(p, blocks);
    else launch.template operator()<Stream, fill_stream<Uniform<Thread, F>>>(p, blocks);
  };
  switch (dtype) {
    case Float::fp64: by.template operator()<Float::fp64>(); break;
    case Float::fp32: by.template operator()<Float::fp32>(); break;
    case Float::bf16: by.template operator()<Float::bf16>(); break;
    case Float::fp16: by.template operator()<Float::fp16>(); break;
  }
}
template <class Launch>
void launch_integers(const Stream& p, const Launch& launch) {
  launch.template operator()<Stream, fill_stream<Integers<Thread>>>(p, (p.count * p.blocks_per_key() + threads - 1) / threads);
}
template <class Launch>
void launch_fold(const Fold& p, const Launch& launch) {
  launch.template operator()<Fold, fold_keys>(p, (p.count + threads - 1) / threads);
}

}  // namespace mmgen_kernels::philox::gpu
