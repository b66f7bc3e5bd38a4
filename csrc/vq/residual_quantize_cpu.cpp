// residual_quantize on the CPU: per level the lookup on a scratch residual, then one pass that takes the codes away from it. T is
// the type of residuals: float, or double if any input is. Sums are in fp64 and in row order (per chunk of rows, chunks in order),
// so that nothing depends on the number of threads.
//
// All rows pass a level before the next. Taking a few rows through all levels keeps their residuals in L2, but asks for each
// level's codes again (10 K D bytes in their three forms, against 24 D a row): 4800x128 with 8 levels of 1024 codes took one
// thread 1.3x the time by 256 rows, 1.2x by 512, 1.1x by 1024 and 1.05x by 2048.
#include "vq/residual_quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>

#include "parallel.h"
#include "vq/outputs.h"
#include "vq/rows_by_code.h"

namespace mmgen_kernels::vq {
namespace {

constexpr int64_t chunk = 256;  // rows whose losses are summed before the chunks are

template <class T>
std::unique_ptr<T[]> uninitialised(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

// The codebooks of the levels: (L, K, D), read in place also where L is expanded, or (sum of sizes, D).
class Codebooks {
 public:
  Codebooks(const Tensor& codebooks, const std::vector<int64_t>& sizes)
      : stacked_(codebooks.dim() == 3),
        levels_(stacked_ ? codebooks.size(0) : static_cast<int64_t>(sizes.size())),
        tensor_(is_shared(codebooks) ? torch::stable::select(codebooks, 0, 0) : codebooks, stacked_ && !is_shared(codebooks)),
        first_(sizes.size() + 1, 0) {
    std::partial_sum(sizes.begin(), sizes.end(), first_.begin() + 1);
    if (!stacked_ && first_.back() != tensor_.first.count)
      throw std::runtime_error("residual_quantize: sizes must add up to the codes of codebooks");
  }

  int64_t levels() const { return levels_; }

  Rows level(int64_t l) const {
    if (stacked_) return tensor_.head(l);  // of a shared codebook always the same rows
    Rows rows = tensor_.first;
    rows.data = static_cast<const char*>(rows.data) +
                first_[l] * rows.row_stride * static_cast<int64_t>(tensor_.tensor.element_size());
    rows.count = first_[l + 1] - first_[l];
    return rows;
  }

  // Codes of the levels before l, in what (L, K, D) and (sum of sizes, D) have in common: levels one behind the other.
  int64_t codes_before(int64_t l) const { return stacked_ ? l * tensor_.first.count : first_[l]; }

 private:
  // A copy of a strided codebook is then made once, not for every level.
  static bool is_shared(const Tensor& codebooks) { return codebooks.dim() == 3 && codebooks.stride(0) == 0; }

  const bool stacked_;
  const int64_t levels_;
  HeadRows tensor_;
  std::vector<int64_t> first_;
};

template <class T>
void read_wide(const Rows& matrix, int64_t row, T* out) {
  with_row(matrix, row, [&](const auto* p) {
    for (int64_t d = 0; d < matrix.dim; ++d) out[d] = static_cast<T>(widen(p[d]));
  });
}

// residual -= code k, one rounding per component, and returns the squared norm of what is left; where that is not finite the
// residual becomes NaN as a whole. Eight sums, as one would wait for itself at every addition.
template <class T>
double subtract(const Rows& codes, int64_t k, T* residual) {
  with_row(codes, k, [&](const auto* code) {
    for (int64_t d = 0; d < codes.dim; ++d) residual[d] -= static_cast<T>(widen(code[d]));
  });
  double sums[8] = {};
  const auto square = [&](int64_t d) { return double(residual[d]) * double(residual[d]); };
  int64_t d = 0;
  for (; d + 8 <= codes.dim; d += 8)
    for (int64_t j = 0; j < 8; ++j) sums[j] += square(d + j);
  for (; d < codes.dim; ++d) sums[d % 8] += square(d);
  const double squared = std::accumulate(sums, sums + 8, 0.0);
  if (std::isfinite(squared)) return squared;
  std::fill_n(residual, codes.dim, std::numeric_limits<T>::quiet_NaN());
  return std::numeric_limits<double>::quiet_NaN();
}

// In how many levels each row takes part.
std::vector<int64_t> levels_taken(const Tensor& x, const std::optional<Tensor>& levels, const std::optional<Tensor>& mask,
                                  int64_t depth, int64_t count) {
  std::vector<int64_t> taken(count, depth);
  if (levels.has_value() && count > 0) {
    const Tensor dense = torch::stable::contiguous(*levels);
    const int64_t* most = static_cast<const int64_t*>(dense.const_data_ptr());
    const int64_t rows_per_sample = count / x.size(0);
    for (int64_t n = 0; n < count; ++n) taken[n] = std::clamp<int64_t>(most[n / rows_per_sample], 0, depth);
  }
  if (mask.has_value()) {
    const Tensor dense = torch::stable::contiguous(*mask);
    const bool* valid = static_cast<const bool*>(dense.const_data_ptr());
    for (int64_t n = 0; n < count; ++n)
      if (!valid[n]) taken[n] = 0;
  }
  return taken;
}

// How many rows have each code of a level, and the sum of their residuals; the level's codes are `before` and on.
template <class T>
void add_up(const T* residual, const int64_t* index, int64_t count, int64_t num_codes, int64_t dim, int64_t before, Tensor& counts,
            Tensor& sums) {
  int64_t* count_out = static_cast<int64_t*>(counts.mutable_data_ptr()) + before;
  void* sum_out = sums.mutable_data_ptr();
  const Float dtype = float_of(sums.scalar_type());
  const RowsByCode by_code(index, nullptr, 1, count, num_codes);
  const auto add = [&](int64_t n, double* sum) {
    for (int64_t d = 0; d < dim; ++d) sum[d] += double(residual[n * dim + d]);
  };
  sum_by_code(by_code, dim, add, [&](int64_t k, const double* sum) {
    write_row(sum_out, dtype, before + k, dim, sum);
    count_out[k] = by_code.count(k);
  });
}

// Takes the codes of one level away from the residuals (N, D) and adds them to total (N, D). Returns the mean square of what is
// left of the rows that have a code, 0 without any; norms (N,) become their squared norms, which the next lookup need not compute:
// 4 % of the time.
template <class T>
double advance(const Rows& codes, const int64_t* index, int64_t count, bool first, T* residual, T* total, double* norms) {
  const int64_t dim = codes.dim, chunks = (count + chunk - 1) / chunk;
  std::vector<double> squares(chunks, 0.0);
  std::vector<int64_t> active(chunks, 0);
  parallel(chunks, chunk * dim, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * chunk; n < std::min(count, end * chunk); ++n) {
      if (index[n] < 0) continue;
      T* sum = total + n * dim;
      with_row(codes, index[n], [&](const auto* code) {
        if (first)  // not 0 + code, which would lose the sign of -0
          for (int64_t d = 0; d < dim; ++d) sum[d] = static_cast<T>(widen(code[d]));
        else
          for (int64_t d = 0; d < dim; ++d) sum[d] += static_cast<T>(widen(code[d]));
      });
      const double squared = subtract(codes, index[n], residual + n * dim);
      if (std::isnan(squared)) std::fill_n(sum, dim, std::numeric_limits<T>::quiet_NaN());
      norms[n] = squared;
      squares[n / chunk] += squared;
      active[n / chunk] += 1;
    }
  });
  const int64_t rows = std::max<int64_t>(1, std::accumulate(active.begin(), active.end(), int64_t{0}));
  return std::accumulate(squares.begin(), squares.end(), 0.0) / (double(rows) * double(dim));
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& codebooks,
                                                           const std::vector<int64_t>& sizes,
                                                           const std::optional<Tensor>& levels,
                                                           const std::optional<Tensor>& mask, int64_t depth, double beta,
                                                           const std::string& metric, const std::string& precision,
                                                           std::optional<ScalarType> statistics) {
  constexpr bool is_double = std::is_same_v<T, double>;
  constexpr ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  const HeadRows rows(x, false);
  const Codebooks books(codebooks, sizes);
  const int64_t count = rows.first.count, dim = rows.first.dim, num_levels = books.levels();
  const bool exact = precision == "exact", everybody = !levels.has_value() && !mask.has_value();
  depth = std::clamp<int64_t>(depth, 0, num_levels);
  const std::vector<int64_t> taken = levels_taken(x, levels, mask, depth, count);

  const ScalarType dtype = promote(x.scalar_type(), codebooks.scalar_type());
  Tensor quantized = empty_like_with(x, {x.sizes().begin(), x.sizes().end()}, dtype);
  std::vector<int64_t> index_sizes = leading_sizes(x);
  index_sizes.push_back(num_levels);
  Tensor indices = empty_like_with(x, index_sizes, ScalarType::Long);
  Tensor loss = empty_like_with(x, {num_levels}, wide);
  const std::vector<int64_t> none{0}, shape(codebooks.sizes().begin(), codebooks.sizes().end());
  Tensor counts = empty_like_with(x, statistics ? leading_sizes(codebooks) : none, ScalarType::Long);
  Tensor sums = empty_like_with(x, statistics ? shape : none, statistics.value_or(wide));
  int64_t* index_out = static_cast<int64_t*>(indices.mutable_data_ptr());
  T* loss_out = static_cast<T*>(loss.mutable_data_ptr());

  const auto residual = uninitialised<T>(count * dim);                     // (N, D)
  const auto scratch = uninitialised<T>(dtype == wide ? 0 : count * dim);  // (N, D)
  T* total = dtype == wide ? static_cast<T*>(quantized.mutable_data_ptr()) : scratch.get();
  parallel(count, dim, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) read_wide(rows.first, n, &residual[n * dim]);
    std::fill(total + begin * dim, total + end * dim, T(0));
  });

  const Rows residuals{residual.get(), is_double ? Float::fp64 : Float::fp32, count, dim, dim};
  const auto index = uninitialised<int64_t>(count);
  const auto valid = uninitialised<bool>(count);
  const auto squared = uninitialised<double>(count);  // norms of what the level before left
  for (int64_t l = 0; l < num_levels; ++l) {
    const Rows codes = books.level(l);
    if (l < depth) {
      for (int64_t n = 0; n < count; ++n) valid[n] = taken[n] > l;
      nearest_code({residuals, codes, everybody ? nullptr : valid.get(), metric_of(metric), exact, index.get(),
                    l == 0 ? nullptr : squared.get()},
                   suited_to(residuals, codes, exact));
    } else {
      std::fill_n(index.get(), count, -1);
    }
    for (int64_t n = 0; n < count; ++n) index_out[n * num_levels + l] = index[n];
    if (statistics) add_up(residual.get(), index.get(), count, codes.count, dim, books.codes_before(l), counts, sums);
    const double mean = advance(codes, index.get(), count, l == 0, residual.get(), total, squared.get());
    loss_out[l] = static_cast<T>(mean + beta * mean);
  }

  if (dtype != wide) {
    void* out = quantized.mutable_data_ptr();
    parallel(count, dim, [&](int64_t begin, int64_t end) {
      std::vector<double> row(dim);
      for (int64_t n = begin; n < end; ++n) {
        std::copy_n(total + n * dim, dim, row.data());
        write_row(out, float_of(dtype), n, dim, row.data());
      }
    });
  }
  return {quantized, indices, loss, counts, sums};
}

// What one call of the backward knows; the residuals are computed again, rounded as in the forward.
template <class T>
struct Backward {
  const Rows rows;
  const Codebooks& books;
  const int64_t* index;              // (N, L)
  const std::vector<double> slopes;  // (L,), of each level: 2 grad_loss / (M_l D)

  int64_t index_at(int64_t n, int64_t l, const Rows& codes) const {
    return std::min(index[n * books.levels() + l], codes.count - 1);
  }

  void to_x(const std::optional<HeadRows>& upstream, bool rotate, double beta, Float dtype, void* out) const {
    const int64_t dim = rows.dim, num_levels = books.levels();
    std::vector<Rows> codebooks;
    for (int64_t l = 0; l < num_levels; ++l) codebooks.push_back(books.level(l));
    parallel(rows.count, dim * (1 + num_levels), [&](int64_t begin, int64_t end) {
      std::vector<T> residual(dim), total(dim);
      std::vector<double> pull(dim), g(dim), row(dim), sum(dim);
      for (int64_t n = begin; n < end; ++n) {
        read_wide(rows, n, residual.data());
        std::fill(total.begin(), total.end(), T(0));
        std::fill(pull.begin(), pull.end(), 0.0);
        bool active = false;
        for (int64_t l = 0; l < num_levels; ++l) {
          const int64_t k = index_at(n, l, codebooks[l]);
          if (k < 0) continue;
          active = true;
          subtract(codebooks[l], k, residual.data());
          const double slope = beta * slopes[l];
          for (int64_t d = 0; d < dim; ++d) pull[d] += slope * double(residual[d]);
          if (rotate)
            with_row(codebooks[l], k, [&](const auto* code) {
              for (int64_t d = 0; d < dim; ++d) total[d] += static_cast<T>(widen(code[d]));
            });
        }
        if (active && upstream) {
          read_row(upstream->first, n, g.data());
          if (rotate) {
            read_row(rows, n, row.data());
            std::copy(total.begin(), total.end(), sum.begin());
            rotate_back(row.data(), sum.data(), g.data(), dim);
          }
          for (int64_t d = 0; d < dim; ++d) pull[d] += g[d];
        }
        write_row(out, dtype, n, dim, pull.data());
      }
    });
  }

  // Every row has one code per level, so that the sum over a code's rows takes the code away from them too.
  void to_codebooks(Float dtype, void* out) const {
    const int64_t dim = rows.dim, num_levels = books.levels();
    const auto residual = uninitialised<T>(rows.count * dim);  // (N, D)
    parallel(rows.count, dim, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) read_wide(rows, n, &residual[n * dim]);
    });
    for (int64_t l = 0; l < num_levels; ++l) {
      const Rows codes = books.level(l);
      const RowsByCode by_code(index + l, nullptr, 1, rows.count, codes.count, num_levels);
      const double slope = slopes[l];
      const auto add = [&](int64_t n, double* sum) {
        T* row = &residual[n * dim];
        subtract(codes, std::min(index[n * num_levels + l], codes.count - 1), row);
        for (int64_t d = 0; d < dim; ++d) sum[d] -= slope * double(row[d]);
      };
      const int64_t first = books.codes_before(l);
      sum_by_code(by_code, dim, add, [&](int64_t k, const double* sum) { write_row(out, dtype, first + k, dim, sum); });
    }
  }
};

template <class T>
std::tuple<Tensor, Tensor> backward(const std::optional<Tensor>& grad_quantized, const std::optional<Tensor>& grad_loss,
                                    const Tensor& x, const Tensor& codebooks, const Tensor& indices,
                                    const std::vector<int64_t>& sizes, double beta, bool rotate, bool need_grad_x,
                                    bool need_grad_codebooks) {
  const HeadRows rows(x, false);
  const Codebooks books(codebooks, sizes);
  const Tensor dense_indices = torch::stable::contiguous(indices);
  const int64_t* index = static_cast<const int64_t*>(dense_indices.const_data_ptr());
  const int64_t num_levels = books.levels();
  std::vector<double> slopes(num_levels, 0.0);
  if (grad_loss.has_value()) {
    const Tensor dense = torch::stable::contiguous(*grad_loss);
    read_row({dense.const_data_ptr(), float_of(dense.scalar_type()), 1, num_levels, num_levels}, 0, slopes.data());
    std::vector<int64_t> active(num_levels, 0);
    for (int64_t n = 0; n < rows.first.count; ++n)
      for (int64_t l = 0; l < num_levels; ++l) active[l] += index[n * num_levels + l] >= 0;
    for (int64_t l = 0; l < num_levels; ++l)
      slopes[l] *= 2.0 / (double(std::max<int64_t>(1, active[l])) * static_cast<double>(rows.first.dim));
  }
  const Backward<T> pass{rows.first, books, index, slopes};
  Tensor grad_x = empty_like_with(x, {0}, x.scalar_type());
  if (need_grad_x) {
    grad_x = empty_like_with(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type());
    std::optional<HeadRows> upstream;
    if (grad_quantized.has_value()) upstream.emplace(*grad_quantized, false);
    pass.to_x(upstream, rotate, beta, float_of(x.scalar_type()), grad_x.mutable_data_ptr());
  }
  Tensor grad_codebooks = empty_like_with(codebooks, {0}, codebooks.scalar_type());
  if (need_grad_codebooks) {
    grad_codebooks = empty_like_with(codebooks, {codebooks.sizes().begin(), codebooks.sizes().end()}, codebooks.scalar_type());
    pass.to_codebooks(float_of(codebooks.scalar_type()), grad_codebooks.mutable_data_ptr());
  }
  return {grad_x, grad_codebooks};
}

bool is_wide(const Tensor& x, const Tensor& codebooks) {
  return promote(x.scalar_type(), codebooks.scalar_type()) == ScalarType::Double;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_quantize_cpu(
    const Tensor& x, const Tensor& codebooks, std::vector<int64_t> sizes, const std::optional<Tensor>& levels,
    const std::optional<Tensor>& mask, int64_t depth, double beta, std::string gradient, std::string metric,
    std::string precision, std::optional<ScalarType> statistics) {
  const auto call = is_wide(x, codebooks) ? forward<double> : forward<float>;
  return call(x, codebooks, sizes, levels, mask, depth, beta, metric, precision, statistics);
}

std::tuple<Tensor, Tensor> residual_quantize_backward_cpu(const std::optional<Tensor>& grad_quantized,
                                                          const std::optional<Tensor>& grad_loss, const Tensor& x,
                                                          const Tensor& codebooks, const Tensor& indices,
                                                          std::vector<int64_t> sizes, double beta, std::string gradient,
                                                          bool need_grad_x, bool need_grad_codebooks) {
  const auto call = is_wide(x, codebooks) ? backward<double> : backward<float>;
  return call(grad_quantized, grad_loss, x, codebooks, indices, sizes, beta, gradient == "rotation", need_grad_x,
              need_grad_codebooks);
}

}  // namespace mmgen_kernels::vq
