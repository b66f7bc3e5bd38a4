// Rows that are read after the products of the present block, asked for while those run. They lie whole tokens apart, each on
// pages of its own, where no processor expects them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mmgen_kernels::attn {

class Ahead {
 public:
  explicit Ahead(int64_t row_bytes) : row_bytes(row_bytes) {}

  // Forgets what was asked for before; `steps` will come.
  void begin(int64_t steps) { this->steps = std::max<int64_t>(1, steps), at = end = 0, rows = 0; }
  void ask(const char* row, int64_t stride, int64_t count) {
    ranges[end++] = {row, stride, count};
    rows += count, each = (rows + steps - 1) / steps;
  }

  void step() {
    for (int64_t i = 0; i < each && at < end; ++i) {
      Range& of = ranges[at];
      const char* line = of.row - reinterpret_cast<uintptr_t>(of.row) % 64;
      for (; line < of.row + row_bytes; line += 64) __builtin_prefetch(line, 0, 2);  // into L2: L1 is full of the present block
      of.row += of.stride;
      if (--of.count == 0) ++at;
    }
  }

 private:
  struct Range {
    const char* row;
    int64_t stride, count;
  };
  Range ranges[12];  // of queries, upstream gradients, results, keys and values, in two streams each
  int at = 0, end = 0;
  int64_t row_bytes, steps = 1, rows = 0, each = 0;
};

}  // namespace mmgen_kernels::attn
