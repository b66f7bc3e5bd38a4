// The operator nearest_code on the CPU: one lookup per head.
#include "vq/tensors.h"

namespace mmgen_kernels::vq {

Tensor nearest_code_cpu(const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& mask, const std::string& metric,
                        const std::string& precision) {
  const bool has_heads = codebook.dim() == 3;
  const HeadRows rows(x, has_heads), codes(codebook, has_heads);
  Tensor indices = empty_like_with(x, leading_sizes(x), ScalarType::Long);
  std::optional<Tensor> valid;
  if (mask.has_value()) valid = torch::stable::contiguous(*mask);
  const InstructionSet set = suited_to(rows.head(0), codes.head(0), precision == "exact");
  const int64_t count = rows.first.count;
  for (int64_t h = 0; h < rows.heads; ++h) {
    const bool* head_mask = valid ? static_cast<const bool*>(valid->const_data_ptr()) + h * count : nullptr;
    int64_t* out = static_cast<int64_t*>(indices.mutable_data_ptr()) + h * count;
    nearest_code({rows.head(h), codes.head(h), head_mask, metric_of(metric), precision == "exact", out}, set);
  }
  return indices;
}

}  // namespace mmgen_kernels::vq
