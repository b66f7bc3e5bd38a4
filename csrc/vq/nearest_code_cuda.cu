// The operator nearest_code on NVIDIA GPUs in CUDA C++: memory and launches. The kernels are in nearest_code_simt.h.
#include "simt/cuda.h"
#include "vq/nearest_code_simt.h"
#include "vq/tensors.h"

namespace mmgen_kernels::vq {
namespace {

// A block of the sweep has four warps: four blocks give each of a multiprocessor's schedulers four warps to choose from.
constexpr int64_t blocks_per_multiprocessor = 4;
constexpr int64_t max_heads = 65535;  // of a grid's axis

}  // namespace

Tensor nearest_code_cuda(const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& mask, const std::string& metric,
                         const std::string&) {
  const int64_t dim = x.size(x.dim() - 1);
  if (dim > gpu::max_dim) throw std::runtime_error("the CUDA C++ lookup takes D up to 64, got " + std::to_string(dim));
  const simt::Device device(x);
  const bool has_heads = codebook.dim() == 3;
  const HeadRows rows(x, has_heads), codes(codebook, has_heads);
  Tensor indices = empty_like_with(x, leading_sizes(x), ScalarType::Long);
  const int64_t count = rows.first.count;
  if (count == 0 || rows.heads == 0) return indices;
  std::optional<Tensor> valid;
  if (mask.has_value()) valid = torch::stable::contiguous(*mask);

  for (int64_t h = 0; h < rows.heads; h += max_heads) {
    gpu::Problem p{};
    p.x = rows.head(h), p.x_head = rows.head_stride;
    p.codebook = codes.head(h), p.codebook_head = codes.head_stride;
    p.heads = std::min(max_heads, rows.heads - h);
    p.mask = valid ? static_cast<const bool*>(valid->const_data_ptr()) + h * count : nullptr;
    p.metric = metric_of(metric);
    p.indices = static_cast<int64_t*>(indices.mutable_data_ptr()) + h * count;
    gpu::divide(p, blocks_per_multiprocessor * device.multiprocessors());
    const gpu::Scratch pieces = gpu::scratch_of(p);
    // Freed while the kernels are still to run: whoever gets the memory next on this stream writes it after them.
    Tensor scratch = empty_like_with(x, {pieces.bytes}, ScalarType::Byte);
    gpu::place(p, pieces, scratch.mutable_data_ptr());
    gpu::launch_all(p, [&]<class Shared, void (*kernel)(const gpu::Problem&, Shared&)>(int64_t bx, int64_t by, int64_t bz, int threads) {
      device.launch<gpu::Problem, Shared, kernel>(p, bx, by, bz, threads);
    });
  }
  return indices;
}

}  // namespace mmgen_kernels::vq
