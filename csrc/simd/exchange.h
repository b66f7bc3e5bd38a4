// Lanes of as many vectors as a vector has lanes, exchanged in log2(lanes) steps.
#pragma once

#include <utility>

namespace mmgen_kernels::simd {
namespace {  // internal linkage: compiled once per instruction set, and the copies must not be merged

template <class V>
constexpr int lanes_of = sizeof(V) / sizeof(V{}[0]);

// Of a and b, cut into pieces of H lanes, the even pieces or the odd ones: a's first, b's first, a's second...
template <int H, bool ODD, class V, int... LANE>
V pieces(V a, V b, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(a, b, (LANE % (2 * H) < H ? LANE : LANE - H + lanes_of<V>) + (ODD ? H : 0)...);
}
template <int H, bool ODD, class V>
V pieces(V a, V b) {
  return pieces<H, ODD>(a, b, std::make_integer_sequence<int, lanes_of<V>>());
}

// Lane j of rows[i] goes to lane i of rows[j].
template <class V, int H = lanes_of<V> / 2>
void transpose(V* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes_of<V>; ++i) {
    if (i & H) continue;
    const V even = pieces<H, false>(rows[i], rows[i + H]), odd = pieces<H, true>(rows[i], rows[i + H]);
    rows[i] = even, rows[i + H] = odd;
  }
  if constexpr (H > 1) transpose<V, H / 2>(rows);
}

// Lane i of the result is `combine` over the lanes of rows[i], which are written over.
template <class V, class Combine, int H = lanes_of<V> / 2>
V fold(V* rows, const Combine& combine) {
  if constexpr (H == 0) return rows[0];
  else {
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i)
      rows[i] = combine(pieces<H, false>(rows[i], rows[i + H]), pieces<H, true>(rows[i], rows[i + H]));
    return fold<V, Combine, H / 2>(rows, combine);
  }
}

}  // namespace
}  // namespace mmgen_kernels::simd
