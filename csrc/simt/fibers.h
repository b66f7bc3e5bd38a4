// GPU kernels on the CPU, for tests: the threads of a block are fibers that take turns. A fiber runs until a barrier or an
// exchange; the scheduler lets all others run up to theirs before it goes on. Fibers may be run in either order, so that a
// missing barrier shows as a wrong result, and a barrier that some threads never reach is an error. It cannot see what the
// hardware does to memory order, nor what the compiler for it makes of the code: those need a GPU.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

namespace mmgen_kernels::simt {

struct Grid {
  int64_t x, y, z;
};

namespace fibers {

constexpr int warp_size = 32;
constexpr size_t stack_bytes = 128 << 10;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<std::byte[]> stack{new std::byte[stack_bytes]};
  State state = State::ready;
  int index = 0;
  // What it shows to its warp. Two slots: one may be read while the next is written.
  std::byte shown[2][32];
  int slot = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  int64_t x = 0, y = 0, z = 0;
  std::function<void()> kernel;

  explicit Block(int threads) : fibers(threads) {
    if (threads % warp_size != 0) throw std::invalid_argument("threads must come in whole warps");
  }

  void run(bool backwards) {
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[i];
      fiber.state = State::ready;
      fiber.index = static_cast<int>(i);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = stack_bytes;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    for (bool alive = true; alive;) {
      bool ran = false;
      for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[backwards ? fibers.size() - 1 - i : i];
        if (fiber.state != State::ready) continue;
        running = &fiber;
        swapcontext(&scheduler, &fiber.context);
        ran = true;
      }
      alive = release();
      if (alive && !ran && std::none_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::ready; }))
        throw std::logic_error("a barrier that not all threads reach");
    }
  }

  void wait(State barrier) {
    Fiber* self = running;
    self->state = barrier;
    swapcontext(&self->context, &scheduler);
  }

  Fiber& lane(int number) { return fibers[running->index / warp_size * warp_size + number]; }

 private:
  static void enter();

  // Opens the barriers that everybody has reached; false if no thread is left.
  bool release() {
    const auto all = [&](size_t first, size_t count, State state) {
      return std::all_of(&fibers[first], &fibers[first] + count, [&](const Fiber& f) { return f.state == state; });
    };
    const auto open = [&](size_t first, size_t count) {
      for (size_t i = first; i < first + count; ++i) fibers[i].state = State::ready;
    };
    if (all(0, fibers.size(), State::done)) return false;
    if (all(0, fibers.size(), State::at_block_barrier)) open(0, fibers.size());
    for (size_t w = 0; w < fibers.size(); w += warp_size)
      if (all(w, warp_size, State::at_warp_barrier)) open(w, warp_size);
    return true;
  }
};

inline thread_local Block* current = nullptr;

inline void Block::enter() {
  Block* block = current;
  block->kernel();
  block->running->state = State::done;
}

// Shows `value` to the warp; what lane i shows is then in shown_by<T>(i).
template <class T>
void show(const T& value) {
  static_assert(sizeof(T) <= sizeof(Fiber::shown[0]));
  Fiber& self = *current->running;
  std::memcpy(self.shown[self.slot], &value, sizeof(T));
  self.slot = 1 - self.slot;
  current->wait(State::at_warp_barrier);
}
template <class T>
T shown_by(int lane) {
  T value;
  std::memcpy(&value, current->lane(lane).shown[1 - current->running->slot], sizeof(T));
  return value;
}

// value without what lies below `unit`, towards zero
inline double cut(double value, double unit) { return std::trunc(value / unit) * unit; }

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return static_cast<float>(bits & 0x8000 ? -magnitude : magnitude);
}

// c and 16 products as the least exact of NVIDIA's matrix units add them (Fasi et al. 2021): four products at a time, all addends
// aligned to the largest and cut off below its 24 bits, the sum cut off again.
inline float matrix_sum(float c, const float (&products)[16]) {
  for (int first = 0; first < 16; first += 4) {
    double largest = std::abs(double(c));
    for (int i = first; i < first + 4; ++i) largest = std::max(largest, std::abs(double(products[i])));
    if (largest == 0 || !std::isfinite(largest)) {
      for (int i = first; i < first + 4; ++i) c += products[i];
      continue;
    }
    const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
    double sum = cut(c, unit);
    for (int i = first; i < first + 4; ++i) sum += cut(products[i], unit);
    c = static_cast<float>(sum == 0 ? 0.0 : cut(sum, std::ldexp(1.0, std::ilogb(sum) - 23)));
  }
  return c;
}

}  // namespace fibers

inline int thread() { return fibers::current->running->index; }
inline int threads() { return static_cast<int>(fibers::current->fibers.size()); }
inline int64_t block_x() { return fibers::current->x; }
inline int64_t block_y() { return fibers::current->y; }
inline int64_t block_z() { return fibers::current->z; }
inline void sync() { fibers::current->wait(fibers::State::at_block_barrier); }
inline void sync_warp() { fibers::current->wait(fibers::State::at_warp_barrier); }

template <class T>
T exchange(T value, int mask) {
  fibers::show(value);
  return fibers::shown_by<T>((thread() % fibers::warp_size) ^ mask);
}
inline uint32_t ballot(bool yes) {
  fibers::show(yes);
  uint32_t mask = 0;
  for (int i = 0; i < fibers::warp_size; ++i) mask |= uint32_t{fibers::shown_by<bool>(i)} << i;
  return mask;
}
inline int lowest_bit(uint32_t mask) { return __builtin_ctz(mask); }

template <int BYTES>
void copy(void* to, const void* from) {
  static_assert(BYTES == 8 || BYTES % 16 == 0);
  constexpr uintptr_t alignment = BYTES == 8 ? 8 : 16;
  if (reinterpret_cast<uintptr_t>(to) % alignment != 0 || reinterpret_cast<uintptr_t>(from) % alignment != 0)
    throw std::logic_error("a copy between addresses that are not aligned");
  std::memcpy(to, from, BYTES);
}

inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  Operands mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  fibers::show(mine);
  const int g = thread() % fibers::warp_size / 4, t = thread() % 4;
  const auto half = [](uint32_t pair, int i) { return fibers::half_to_float(static_cast<uint16_t>(pair >> (16 * i))); };
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    float products[16];
    for (int k = 0; k < 16; ++k) {
      const auto of_row = fibers::shown_by<Operands>(row % 8 * 4 + k % 8 / 2);
      const auto of_column = fibers::shown_by<Operands>(column * 4 + k % 8 / 2);
      products[k] = half(of_row.a[row / 8 + k / 8 * 2], k % 2) * half(of_column.b[k / 8], k % 2);
    }
    sum[i] = fibers::matrix_sum(sum[i], products);
  }
}

// Runs kernel(problem, shared) on every block of the grid, one after the other.
template <class Shared, class Problem>
void launch(void (*kernel)(const Problem&, Shared&), Grid grid, int threads, const Problem& problem, bool backwards = false) {
  fibers::Block block(threads);
  const auto shared = std::make_unique<Shared>();
  block.kernel = [&] { kernel(problem, *shared); };
  fibers::Block* before = fibers::current;
  fibers::current = &block;
  for (block.z = 0; block.z < grid.z; ++block.z)
    for (block.y = 0; block.y < grid.y; ++block.y)
      for (block.x = 0; block.x < grid.x; ++block.x) {
        std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(Shared));  // whatever was there: NaN, mostly
        block.run(backwards);
      }
  fibers::current = before;
}

}  // namespace mmgen_kernels::simt
