// What trains a codebook. All arithmetic in fp64, rounded once; sums in row order (rows_by_code.h).
#include "vq/codebook_training.h"

#include <cmath>

#include "parallel.h"
#include "philox.h"
#include "vq/outputs.h"
#include "vq/rows_by_code.h"

namespace mmgen_kernels::vq {
namespace {

std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// Contiguous data of type T; the tensor keeps it alive.
template <class T>
struct Dense {
  Tensor tensor;
  const T* data;
  explicit Dense(const Tensor& t) : tensor(torch::stable::contiguous(t)), data(static_cast<const T*>(tensor.const_data_ptr())) {}
};

struct Mask {
  std::optional<Dense<bool>> dense;
  explicit Mask(const std::optional<Tensor>& mask) {
    if (mask.has_value()) dense.emplace(*mask);
  }
  const bool* data() const { return dense ? dense->data : nullptr; }
};

// out row i = codes row index[i] of its head, or 0.
void gather(const HeadRows& codes, const int64_t* index, const bool* mask, int64_t count, void* out, Float dtype) {
  const int64_t dim = codes.first.dim, last = codes.first.count - 1;
  parallel(codes.heads * count, dim, [&](int64_t begin, int64_t end) {
    std::vector<double> row(dim);
    for (int64_t i = begin; i < end; ++i) {
      if (index[i] < 0 || (mask != nullptr && !mask[i])) std::fill(row.begin(), row.end(), 0.0);
      else read_row(codes.head(i / count), std::min(index[i], last), row.data());
      write_row(out, dtype, i, dim, row.data());
    }
  });
}

// A small tensor of any dtype as fp64.
std::vector<double> values_of(const Tensor& t) {
  const Dense<char> dense(t);
  const int64_t count = t.numel();
  std::vector<double> values(count);
  if (t.scalar_type() == ScalarType::Long) {
    const auto* from = reinterpret_cast<const int64_t*>(dense.data);
    std::copy_n(from, count, values.begin());
  } else {
    read_row({dense.data, float_of(t.scalar_type()), 1, count, count}, 0, values.data());
  }
  return values;
}

// v / max(|v|, 1e-12)
void to_unit_length(double* values, int64_t dim) {
  double squared = 0;
  for (int64_t d = 0; d < dim; ++d) squared += values[d] * values[d];
  const double length = std::max(std::sqrt(squared), 1e-12);
  for (int64_t d = 0; d < dim; ++d) values[d] /= length;
}

void check_contiguous(const Tensor& t, const char* name) {
  if (!t.is_contiguous()) throw std::runtime_error(std::string(name) + " must be contiguous to be written");
}

}  // namespace

Tensor gather_codes_cpu(const Tensor& codebook, const Tensor& indices) {
  const HeadRows codes(codebook, codebook.dim() == 3);
  const Dense<int64_t> index(indices);
  std::vector<int64_t> sizes = sizes_of(indices);
  sizes.push_back(codes.first.dim);
  Tensor out = empty_like_with(codebook, sizes, codebook.scalar_type());
  if (out.numel() > 0)
    gather(codes, index.data, nullptr, indices.numel() / codes.heads, out.mutable_data_ptr(), float_of(codebook.scalar_type()));
  return out;
}

Tensor gather_codes_backward_cpu(const std::optional<Tensor>& grad_codes, const Tensor& indices,
                                 std::vector<int64_t> codebook_shape) {
  if (!grad_codes.has_value()) return torch::stable::fill_(empty_like_with(indices, codebook_shape, ScalarType::Float), 0);
  const int64_t num_codes = codebook_shape[codebook_shape.size() - 2];
  const ScalarType dtype = grad_codes->scalar_type();
  return std::get<0>(code_statistics_cpu(*grad_codes, indices, std::nullopt, num_codes, codebook_shape.size() == 3, dtype));
}

std::tuple<Tensor, Tensor> code_statistics_cpu(const Tensor& x, const Tensor& indices, const std::optional<Tensor>& mask,
                                               int64_t num_codes, bool heads, ScalarType dtype) {
  const HeadRows rows(x, heads);
  const Dense<int64_t> index(indices);
  const Mask valid(mask);
  const int64_t count = rows.first.count, dim = rows.first.dim;
  std::vector<int64_t> sizes{num_codes};
  if (heads) sizes.insert(sizes.begin(), rows.heads);
  Tensor counts = empty_like_with(x, sizes, ScalarType::Long);
  sizes.push_back(dim);
  Tensor sums = empty_like_with(x, sizes, dtype);
  auto* count_of = static_cast<int64_t*>(counts.mutable_data_ptr());
  void* out = sums.mutable_data_ptr();

  const RowsByCode sorted(index.data, valid.data(), rows.heads, count, num_codes);
  const auto add = [&](int64_t i, double* sum) {
    const int64_t h = i / count;
    with_row(rows.head(h), i - h * count, [&](const auto* row) {
      for (int64_t d = 0; d < dim; ++d) sum[d] += widen(row[d]);
    });
  };
  sum_by_code(sorted, dim, add, [&](int64_t slot, const double* sum) {
    count_of[slot] = sorted.count(slot);
    write_row(out, float_of(dtype), slot, dim, sum);
  });
  return {sums, counts};
}

Tensor code_statistics_backward_cpu(const std::optional<Tensor>& grad_sums, const Tensor& x, const Tensor& indices,
                                    const std::optional<Tensor>& mask) {
  Tensor grad_x = empty_like_with(x, sizes_of(x), x.scalar_type());
  if (!grad_sums.has_value()) return torch::stable::fill_(grad_x, 0);
  const HeadRows sums(*grad_sums, grad_sums->dim() == 3);
  const Dense<int64_t> index(indices);
  const Mask valid(mask);
  if (grad_x.numel() > 0)
    gather(sums, index.data, valid.data(), indices.numel() / sums.heads, grad_x.mutable_data_ptr(), float_of(x.scalar_type()));
  return grad_x;
}

void update_codebook_ema_cpu(Tensor codebook, Tensor cluster_size, Tensor code_sum, const Tensor& counts, const Tensor& sums,
                             double decay, double eps, bool normalize) {
  check_contiguous(codebook, "codebook"), check_contiguous(cluster_size, "cluster_size"), check_contiguous(code_sum, "code_sum");
  const int64_t dim = codebook.size(codebook.dim() - 1), codes = codebook.size(codebook.dim() - 2);
  const int64_t slots = cluster_size.numel(), heads = codes == 0 ? 0 : slots / codes;
  std::vector<double> size = values_of(cluster_size);
  const std::vector<double> count = values_of(counts);
  for (int64_t i = 0; i < slots; ++i) size[i] = decay * size[i] + (1 - decay) * count[i];
  write_row(cluster_size.mutable_data_ptr(), float_of(cluster_size.scalar_type()), 0, slots, size.data());
  size = values_of(cluster_size);  // as they are kept: what a later step starts from
  std::vector<double> everything(heads, 0.0);
  for (int64_t i = 0; i < slots; ++i) everything[i / codes] += size[i];

  const HeadRows added(sums, sums.dim() == 3);
  const Rows kept{code_sum.const_data_ptr(), float_of(code_sum.scalar_type()), slots, dim, dim};
  void *sum_out = code_sum.mutable_data_ptr(), *code_out = codebook.mutable_data_ptr();
  parallel(slots, dim, [&](int64_t begin, int64_t end) {
    std::vector<double> total(dim), fresh(dim);
    for (int64_t i = begin; i < end; ++i) {
      read_row(kept, i, total.data());
      read_row(added.head(i / codes), i % codes, fresh.data());
      for (int64_t d = 0; d < dim; ++d) total[d] = decay * total[d] + (1 - decay) * fresh[d];
      write_row(sum_out, kept.dtype, i, dim, total.data());
      read_row(kept, i, total.data());
      const double all = everything[i / codes], smoothed = (size[i] + eps) / (all + codes * eps) * all;
      for (int64_t d = 0; d < dim; ++d) total[d] /= smoothed;
      if (normalize) to_unit_length(total.data(), dim);
      write_row(code_out, float_of(codebook.scalar_type()), i, dim, total.data());
    }
  });
}

void replace_dead_codes_cpu(Tensor codebook, Tensor cluster_size, Tensor code_sum, const Tensor& x,
                            const std::optional<Tensor>& mask, const Tensor& key, double threshold, double reset, bool normalize) {
  check_contiguous(codebook, "codebook"), check_contiguous(cluster_size, "cluster_size"), check_contiguous(code_sum, "code_sum");
  const HeadRows rows(x, codebook.dim() == 3);
  const Mask valid(mask);
  const Dense<uint64_t> seed_and_offset(key);
  const int64_t dim = rows.first.dim, codes = codebook.size(codebook.dim() - 2), count = rows.first.count;
  std::vector<double> size = values_of(cluster_size), row(dim);
  void *sum_out = code_sum.mutable_data_ptr(), *code_out = codebook.mutable_data_ptr();
  std::vector<std::pair<uint32_t, int64_t>> order;  // of the rows of a head, by their random integers
  for (int64_t h = 0; h < rows.heads; ++h) {
    std::vector<int64_t> dead;
    for (int64_t i = h * codes; i < (h + 1) * codes; ++i)
      if (size[i] < threshold) dead.push_back(i);
    if (dead.empty()) continue;
    order.clear();
    for (int64_t n = 0; n < count; ++n) {
      const int64_t element = h * count + n;
      if (valid.data() != nullptr && !valid.data()[element]) continue;
      uint64_t words[4];
      philox::block<philox::OneLane>(seed_and_offset.data[0], seed_and_offset.data[1] + element / 4, words);
      order.emplace_back(static_cast<uint32_t>(words[element % 4]), n);
    }
    const size_t taken = std::min(dead.size(), order.size());
    std::partial_sort(order.begin(), order.begin() + taken, order.end());
    for (size_t j = 0; j < taken; ++j) {
      const int64_t i = dead[j];
      read_row(rows.head(h), order[j].second, row.data());
      if (normalize) to_unit_length(row.data(), dim);
      write_row(code_out, float_of(codebook.scalar_type()), i, dim, row.data());
      read_row({code_out, float_of(codebook.scalar_type()), 0, dim, dim}, i, row.data());  // as the codebook holds it
      for (double& v : row) v *= reset;
      write_row(sum_out, float_of(code_sum.scalar_type()), i, dim, row.data());
      size[i] = reset;
    }
  }
  write_row(cluster_size.mutable_data_ptr(), float_of(cluster_size.scalar_type()), 0, static_cast<int64_t>(size.size()), size.data());
}

}  // namespace mmgen_kernels::vq
