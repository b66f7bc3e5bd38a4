// A matrix of any float dtype read row by row as fp64, in which every fp32, bf16 and fp16 value and every product of two is exact.
// Everything here has internal linkage: the header is compiled once per instruction set, and the copies must not be merged.
#pragma once

#include <cstdint>
#include <cstring>

#include "floats.h"
#include "simt/host_device.h"

namespace mmgen_kernels::vq {

struct Rows {
  const void* data;
  Float dtype;
  int64_t count;       // rows
  int64_t dim;         // columns, contiguous
  int64_t row_stride;  // elements
};

static inline HOST_DEVICE double widen(double x) { return x; }
static inline HOST_DEVICE double widen(float x) { return x; }
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
static inline HOST_DEVICE double widen(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static inline HOST_DEVICE double widen(Fp16 x) {
  // Shift the exponent field to fp32's place; a multiplication by 2^112 corrects the bias and renormalises subnormals.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  uint32_t bits = uint32_t(x.bits & 0x7fff) << 13;
  if ((x.bits & 0x7c00) == 0x7c00) {
    bits |= 0x7f800000u | sign;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  float f;
  memcpy(&f, &bits, 4);
  const double magnitude = double(f) * 0x1p112;
  return sign ? -magnitude : magnitude;
}

// Calls f(pointer to the row's first element in its own type).
template <class F>
static inline HOST_DEVICE auto with_row(const Rows& m, int64_t row, const F& f) {
  const int64_t offset = row * m.row_stride;
  switch (m.dtype) {
    case Float::fp64:
      return f(static_cast<const double*>(m.data) + offset);
    case Float::fp32:
      return f(static_cast<const float*>(m.data) + offset);
    case Float::bf16:
      return f(static_cast<const Bf16*>(m.data) + offset);
    default:
      return f(static_cast<const Fp16*>(m.data) + offset);
  }
}

static inline void read_row(const Rows& m, int64_t row, double* out) {
  with_row(m, row, [&](const auto* p) {
    for (int64_t d = 0; d < m.dim; ++d) out[d] = widen(p[d]);
  });
}

}  // namespace mmgen_kernels::vq
