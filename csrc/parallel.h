// torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace mmgen_kernels {

constexpr int64_t worth_a_thread = 32 * 1024;  // work

// f(begin, end) over [0, count); `work` is the work of one item, so that small loops stay on one thread.
template <class F>
void parallel(int64_t count, int64_t work, const F& f) {
  if (count > 0) torch::stable::parallel_for(0, count, std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, work)), f);
}

// make() a worker per thread, then worker(i) for i in [0, count), handed out one by one: a thread that shares its core with
// somebody else takes fewer. Only for work whose result does not depend on who does it. `work` is that of one item, as above.
template <class Make>
void parallel_on_demand(int64_t count, const Make& make, int64_t work = worth_a_thread) {
  std::atomic<int64_t> next{0};
  const int64_t worth = std::max<int64_t>(1, count * std::min(work, worth_a_thread) / worth_a_thread);
  const int64_t threads = std::min<int64_t>({count, worth, torch::stable::get_num_threads()});
  if (count == 0) return;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto worker = make();
    for (int64_t i = next++; i < count; i = next++) worker(i);
  });
}

}  // namespace mmgen_kernels
