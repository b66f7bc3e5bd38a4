// Everything of vector_quantize around the lookup: gather and losses forward, gradients backward. All sums in fp64 and in row
// order (per chunk of rows, chunks in order), so that nothing depends on the number of threads.
#include "vq/vector_quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "parallel.h"
#include "vq/outputs.h"
#include "vq/rows_by_code.h"

namespace mmgen_kernels::vq {
namespace {

constexpr int64_t chunk = 256;  // rows whose losses are summed before the chunks are

Tensor scalar(const Tensor& like, double value, ScalarType dtype) {
  Tensor out = empty_like_with(like, {}, dtype);
  if (dtype == ScalarType::Double) *static_cast<double*>(out.mutable_data_ptr()) = value;
  else *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
  return out;
}

double value_of(const std::optional<Tensor>& scalar_tensor) {
  if (!scalar_tensor.has_value()) return 0;
  double value;
  read_row({scalar_tensor->const_data_ptr(), float_of(scalar_tensor->scalar_type()), 1, 1, 1}, 0, &value);
  return value;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vector_quantize_cpu(const Tensor& x, const Tensor& codebook,
                                                                       const std::optional<Tensor>& mask, double beta,
                                                                       bool legacy_beta, std::string gradient,
                                                                       std::string metric, std::string precision) {
  const bool has_heads = codebook.dim() == 3;
  Tensor indices = nearest_code_cpu(x, codebook, mask, metric, precision);
  const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr());
  const HeadRows rows(x, has_heads), codes(codebook, has_heads);
  const int64_t count = rows.first.count, dim = rows.first.dim, total = rows.heads * count;
  const ScalarType dtype = promote(x.scalar_type(), codebook.scalar_type());
  Tensor quantized = empty_like_with(x, {x.sizes().begin(), x.sizes().end()}, dtype);
  void* out = quantized.mutable_data_ptr();

  const int64_t chunks = (total + chunk - 1) / chunk;
  std::vector<double> squares(chunks, 0.0);
  std::vector<int64_t> valid(chunks, 0);
  parallel(chunks, chunk * dim, [&](int64_t begin, int64_t end) {
    std::vector<double> row(dim), code(dim);
    for (int64_t i = begin * chunk; i < std::min(total, end * chunk); ++i) {
      const int64_t h = i / count;
      if (index[i] < 0) {
        std::fill(code.begin(), code.end(), 0.0);
      } else {
        read_row(rows.head(h), i - h * count, row.data());
        read_row(codes.head(h), index[i], code.data());
        double squared = 0;
        for (int64_t d = 0; d < dim; ++d) squared += (row[d] - code[d]) * (row[d] - code[d]);
        squares[i / chunk] += squared;
        valid[i / chunk] += 1;
        if (!std::isfinite(squared)) std::fill(code.begin(), code.end(), std::numeric_limits<double>::quiet_NaN());
      }
      write_row(out, float_of(dtype), i, dim, code.data());
    }
  });
  const double terms = double(std::max<int64_t>(1, std::accumulate(valid.begin(), valid.end(), int64_t{0}))) * dim;
  const double mean = std::accumulate(squares.begin(), squares.end(), 0.0) / terms;
  const ScalarType wide = at_least_float(dtype);
  // both losses have one value; they differ in where their gradients go
  return {quantized, indices, scalar(x, legacy_beta ? beta * mean + mean : mean + beta * mean, wide), scalar(x, mean, wide),
          scalar(x, mean, wide)};
}

std::tuple<Tensor, Tensor> vector_quantize_backward_cpu(
    const std::optional<Tensor>& grad_quantized, const std::optional<Tensor>& grad_loss,
    const std::optional<Tensor>& grad_commitment_loss, const std::optional<Tensor>& grad_codebook_loss, const Tensor& x,
    const Tensor& quantized, const Tensor& indices, std::vector<int64_t> codebook_shape, double beta, bool legacy_beta,
    std::string gradient, bool need_grad_x, bool need_grad_codebook) {
  const bool has_heads = codebook_shape.size() == 3;
  const HeadRows rows(x, has_heads), codes(quantized, has_heads);
  const Tensor dense_indices = torch::stable::contiguous(indices);
  const int64_t* index = static_cast<const int64_t*>(dense_indices.const_data_ptr());
  const int64_t count = rows.first.count, dim = rows.first.dim, total = rows.heads * count;
  const int64_t valid = std::count_if(index, index + total, [](int64_t i) { return i >= 0; });
  const double per_term = 2.0 / (double(std::max<int64_t>(1, valid)) * dim);
  const double to_x = per_term * (value_of(grad_commitment_loss) + value_of(grad_loss) * (legacy_beta ? 1.0 : beta));
  const double to_codebook = per_term * (value_of(grad_codebook_loss) + value_of(grad_loss) * (legacy_beta ? beta : 1.0));

  Tensor grad_x = empty_like_with(x, {0}, x.scalar_type());
  if (need_grad_x) {
    grad_x = empty_like_with(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type());
    void* out = grad_x.mutable_data_ptr();
    const Float dtype = float_of(x.scalar_type());
    std::optional<HeadRows> grads;
    if (grad_quantized.has_value()) grads.emplace(*grad_quantized, has_heads);
    const bool rotate = gradient == "rotation";
    parallel(total, dim, [&](int64_t begin, int64_t end) {
      std::vector<double> row(dim), code(dim), g(dim);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t h = i / count, n = i - h * count;
        std::fill(g.begin(), g.end(), 0.0);
        if (index[i] >= 0) {
          read_row(rows.head(h), n, row.data());
          read_row(codes.head(h), n, code.data());
          if (grads) {
            read_row(grads->head(h), n, g.data());
            if (rotate) rotate_back(row.data(), code.data(), g.data(), dim);
          }
          for (int64_t d = 0; d < dim; ++d) g[d] += to_x * (row[d] - code[d]);
        }
        write_row(out, dtype, i, dim, g.data());
      }
    });
  }

  Tensor grad_codebook = empty_like_with(quantized, {0}, quantized.scalar_type());
  if (need_grad_codebook) {
    grad_codebook = empty_like_with(quantized, codebook_shape, quantized.scalar_type());
    void* out = grad_codebook.mutable_data_ptr();
    const Float dtype = float_of(quantized.scalar_type());
    const RowsByCode sorted(index, nullptr, rows.heads, count, codebook_shape[codebook_shape.size() - 2]);
    const auto add = [&](int64_t i, double* sum) {
      const int64_t h = i / count, n = i - h * count;
      thread_local std::vector<double> row, code;
      row.resize(dim), code.resize(dim);
      read_row(rows.head(h), n, row.data());
      read_row(codes.head(h), n, code.data());
      for (int64_t d = 0; d < dim; ++d) sum[d] += to_codebook * (code[d] - row[d]);
    };
    sum_by_code(sorted, dim, add, [&](int64_t slot, const double* sum) { write_row(out, dtype, slot, dim, sum); });
  }
  return {grad_x, grad_codebook};
}

}  // namespace mmgen_kernels::vq
