// The loops that fill memory from a stream, one table per instruction set.
#pragma once

#include <cstdint>

#include "floats.h"
#include "simd/tables.h"

namespace mmgen_kernels::philox {

// Writes elements [begin, end) of the stream with key (seed, offset) to out[0 .. end - begin); begin is a multiple of 4.
using Fill = void (*)(uint64_t seed, uint64_t offset, int64_t begin, int64_t end, void* out);

struct Kernels {
  Fill integers;
  Fill uniform[4], normal[4];  // by Float
  Fill exponential[2];         // in fp64 and in fp32: -ln((word + 1/2) / 2^32)
};

extern const Kernels scalar_kernels, avx2_kernels, avx512_kernels;

inline const Kernels& kernels_of(InstructionSet set) { return table_of<scalar_kernels, avx2_kernels, avx512_kernels>(set); }

}  // namespace mmgen_kernels::philox
