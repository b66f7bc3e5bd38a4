// The operators that train a codebook, on the CPU: mmgen_kernels/vq/ops/codebook.py.
#pragma once

#include <tuple>

#include "vq/tensors.h"

namespace mmgen_kernels::vq {

Tensor gather_codes_cpu(const Tensor& codebook, const Tensor& indices);
Tensor gather_codes_backward_cpu(const std::optional<Tensor>& grad_codes, const Tensor& indices,
                                 std::vector<int64_t> codebook_shape);

std::tuple<Tensor, Tensor> code_statistics_cpu(const Tensor& x, const Tensor& indices, const std::optional<Tensor>& mask,
                                               int64_t num_codes, bool heads, ScalarType dtype);
Tensor code_statistics_backward_cpu(const std::optional<Tensor>& grad_sums, const Tensor& x, const Tensor& indices,
                                    const std::optional<Tensor>& mask);

void update_codebook_ema_cpu(Tensor codebook, Tensor cluster_size, Tensor code_sum, const Tensor& counts, const Tensor& sums,
                             double decay, double eps, bool normalize);
void replace_dead_codes_cpu(Tensor codebook, Tensor cluster_size, Tensor code_sum, const Tensor& x,
                            const std::optional<Tensor>& mask, const Tensor& key, double threshold, double reset, bool normalize);

}  // namespace mmgen_kernels::vq
