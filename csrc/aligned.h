// Scratch for vector loads: starts at a cache line, and growing it writes nothing.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace mmgen_kernels {

template <class T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t line{64};

  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), line)); }
  void deallocate(T* p, size_t) { ::operator delete(p, line); }
  template <class U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;  // no value: not zeroed
  }
  template <class U, class... Args>
  void construct(U* p, Args&&... args) {
    ::new (static_cast<void*>(p)) U(static_cast<Args&&>(args)...);
  }
  bool operator==(const Aligned&) const { return true; }
};

using Scratch = std::vector<float, Aligned<float>>;

}  // namespace mmgen_kernels
