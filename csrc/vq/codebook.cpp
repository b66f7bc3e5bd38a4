#include "vq/codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <unordered_map>

#include "parallel.h"

namespace mmgen_kernels::vq {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr int64_t chunk = 1024;      // codes summed at a time; fixed, so that the mean does not depend on the threads
constexpr float never = 3e38f;       // the norm term of a code that cannot win
constexpr double far_away = 0x1p44;  // norm, in scaled units, beyond which a code cannot win

}  // namespace

ErrorBound::ErrorBound(Metric metric, int64_t dim)
    : l2_(metric == Metric::l2),
      pass_(1.02 * (dim + 8) * 0x1p-24),
      value_(1.02 * (metric == Metric::cosine ? 2 * dim + 12 : dim + 4) * 0x1p-53),
      dim_(dim) {}

double ErrorBound::bound(double pass, double r, double n, double raw) const {
  const double tiny = (dim_ + 4) * (2 * flushed * (r + n) + 0x1p-100);
  if (l2_) return (pass + 2 * value_) * n * n + 2 * pass * r * n + 2 * value_ * r * r + tiny;
  return pass * r * n + value_ * r * raw + tiny;
}

double ErrorBound::operator()(double r, double n, double raw) const { return bound(pass_, r, n, raw); }

void ErrorBound::use(const CoarsePass& pass, const Units& units) {
  coarse_pass_ = 1.06 * (std::max(pass.summed_products(dim_), dim_) + 8) * 0x1p-24;
  norm_rounding_ = pass.integers ? 0.51 * units.row * units.code : 0;
}

double ErrorBound::of_coarse(double r, double n, double raw, double row, double code) const {
  const double packed = l2_ ? 2 * n : n;  // codes are packed as -2c, or -c
  return bound(coarse_pass_, r, n, raw) + 1.001 * (row * packed + (r + row) * code) + norm_rounding_;
}

Codebook::Codebook(const Rows& codes, Metric metric, const Kernels& kernels) : rows(codes), metric_(metric), kernels_(kernels) {
  measure();
  arrange();
}

double Codebook::norm(int64_t k) const { return std::sqrt(squared_norms_[k]); }

// The vector that the pass sees of code k, in fp64: c - mean, or for cosine c / |c| - mean. Returns its squared norm.
double Codebook::read(int64_t k, const double* mean, double* out) const {
  if (metric_ != Metric::cosine) return kernels_.read(rows, k, mean, out);
  const double length = std::sqrt(kernels_.read(rows, k, nullptr, out));
  if (!(length <= 0x1p500)) return infinity;  // its fp64 value comes of overflowing squares: not one for the pass
  double sum = 0;
  for (int64_t d = 0; d < rows.dim; ++d) {
    out[d] = (length == 0 ? 0 : out[d] / length) - (mean == nullptr ? 0 : mean[d]);
    sum += out[d] * out[d];
  }
  return sum;
}

// Norms, and whether subtracting the codebook's mean is worth it: distances do not change, their rounding errors do. With an
// offset of 1e4 the fp32 pass could not tell any two codes apart without it.
void Codebook::measure() {
  const int64_t count = rows.count, dim = rows.dim, chunks = (count + chunk - 1) / chunk;
  squared_norms_.resize(count);
  std::vector<double> sums(chunks * dim, 0.0);
  const auto summarise = [&] {
    double total = 0, largest = 0, smallest = infinity, smallest_positive = infinity;
    int64_t finite = 0;
    for (const double squared : squared_norms_) {
      if (!std::isfinite(squared)) continue;
      ++finite;
      total += squared;
      largest = std::max(largest, squared);
      smallest = std::min(smallest, squared);
      if (squared > 0) smallest_positive = std::min(smallest_positive, squared);
    }
    // Nothing narrower than fp64 reaches these bounds.
    extreme |= rows.dtype == Float::fp64 && (largest > 0x1p800 || smallest_positive < 0x1p-800);
    any_finite = finite > 0;
    all_finite = finite == count;
    largest_norm = std::sqrt(largest);
    smallest_norm = any_finite ? std::sqrt(smallest) : 0;
    root_mean_square = any_finite ? std::sqrt(total / finite) : 0;
    return finite;
  };
  parallel(chunks, chunk * dim, [&](int64_t begin, int64_t end) {
    if (metric_ != Metric::cosine) {
      for (int64_t i = begin; i < end; ++i)
        kernels_.summarise(rows, i * chunk, std::min(chunk, count - i * chunk), &squared_norms_[i * chunk], &sums[i * dim]);
      return;
    }
    std::vector<double> code(dim);
    for (int64_t k = begin * chunk; k < std::min(count, end * chunk); ++k) {
      squared_norms_[k] = read(k, nullptr, code.data());
      if (!std::isfinite(squared_norms_[k])) continue;
      for (int64_t d = 0; d < dim; ++d) sums[k / chunk * dim + d] += code[d];
    }
  });
  const int64_t finite = summarise();
  largest_raw_norm = largest_norm;
  mean_.assign(dim, 0.0);
  double mean_squared = 0;
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t i = 0; i < chunks; ++i) mean_[d] += sums[i * dim + d];
    mean_[d] /= std::max<int64_t>(1, finite);
    mean_squared += mean_[d] * mean_[d];
  }
  centred_ = mean_squared > 0.5 * root_mean_square * root_mean_square;
  if (!centred_) return;
  parallel(chunks, chunk * dim, [&](int64_t begin, int64_t end) {
    std::vector<double> code(dim);
    for (int64_t k = begin * chunk; k < std::min(count, end * chunk); ++k)
      if (std::isfinite(squared_norms_[k])) squared_norms_[k] = read(k, mean_.data(), code.data());
  });
  summarise();
}

// One segment in the order given; or, where norms differ widely, codes grouped by the exponent of their norms. Without it the
// error bound of the largest codes would make every tile of small ones uncertain.
void Codebook::arrange() {
  const int64_t count = rows.count, width = kernels_.codes;
  segments.clear();
  order_.clear();
  const bool wide_spread = largest_norm > 2 * root_mean_square && largest_norm > 16 * smallest_norm;
  if (canonical_.empty() && !wide_spread) {
    segments.push_back({0, (count + width - 1) / width, largest_norm});
    return;
  }
  constexpr int coarse = 2;  // exponents per segment
  constexpr size_t buckets = 2048;
  const auto bucket = [&](int64_t k) {
    const double n = norm(k);
    if (!std::isfinite(n)) return int(buckets) - 1;
    return n > 0 ? (std::ilogb(n) + 2048) / coarse : 0;
  };
  std::vector<int64_t> sizes(buckets, 0);
  const auto kept = [&](int64_t k) { return canonical_.empty() || canonical_[k] == k; };
  for (int64_t k = 0; k < count; ++k)
    if (kept(k)) ++sizes[bucket(k)];
  std::vector<int64_t> next(sizes.size());
  int64_t tile = 0;
  for (size_t b = 0; b < sizes.size(); ++b) {
    next[b] = tile * width;
    if (sizes[b] == 0) continue;
    const int64_t tiles = (sizes[b] + width - 1) / width;
    segments.push_back({tile, tiles, 0.0});
    tile += tiles;
  }
  order_.assign(tile * width, -1);
  for (int64_t k = 0; k < count; ++k)
    if (kept(k)) order_[next[bucket(k)]++] = k;
  for (Segment& s : segments)
    for (int64_t p = s.first_tile * width; p < (s.first_tile + s.tiles) * width; ++p)
      if (order_[p] >= 0 && std::isfinite(squared_norms_[order_[p]])) s.largest_norm = std::max(s.largest_norm, norm(order_[p]));
}

void Codebook::drop_duplicates() {
  canonical_.resize(rows.count);
  std::unordered_multimap<uint64_t, int64_t> seen;
  std::vector<double> a(rows.dim), b(rows.dim);
  for (int64_t k = 0; k < rows.count; ++k) {
    read_row(rows, k, a.data());
    uint64_t hash = 1469598103934665603ull;
    for (double& v : a) {
      v += 0.0;  // -0 equals 0
      uint64_t bits;
      std::memcpy(&bits, &v, 8);
      hash = (hash ^ bits ^ (bits >> 29)) * 1099511628211ull;
    }
    canonical_[k] = k;
    const auto [begin, end] = seen.equal_range(hash);
    for (auto it = begin; it != end && canonical_[k] == k; ++it) {
      read_row(rows, it->second, b.data());
      if (std::equal(a.begin(), a.end(), b.begin())) canonical_[k] = it->second;
    }
    if (canonical_[k] == k) seen.emplace(hash, k);
  }
  arrange();
}

void Codebook::pack(int64_t first, int64_t last, double scale, float* out, float* norms, const Units& units,
                    std::byte* coarse_tiles, float* left_out) const {
  const int64_t width = kernels_.codes, dim = rows.dim;
  const bool l2 = metric_ == Metric::l2;
  const double factor = l2 ? -2 * scale : -scale, reach = far_away / scale;
  std::vector<double> code(dim);
  std::vector<float> flat(width * dim), residuals(width);
  for (int64_t t = first; t < last; ++t) {
    for (int64_t j = 0; j < width; ++j) {
      const int64_t k = code_at(t * width + j);
      const bool possible = k >= 0 && norm(k) <= reach;  // false for NaN
      if (!possible) {
        std::fill_n(&flat[j * dim], dim, 0.0f);
      } else if (metric_ == Metric::cosine) {
        read(k, mean_of_codes(), code.data());
        kernels_.narrow(code.data(), factor, dim, &flat[j * dim]);
      } else {
        kernels_.load(rows, k, mean_of_codes(), factor, &flat[j * dim]);
      }
      const double norm_term = l2 && possible ? squared_norms_[k] * scale * scale : 0.0;
      norms[(t - first) * width + j] = possible ? static_cast<float>(norm_term < flushed * flushed ? 0 : norm_term) : never;
    }
    kernels_.interleave_codes(flat.data(), dim, out + (t - first) * width * dim);
    if (kernels_.coarse == nullptr) continue;
    kernels_.coarse->pack_tile(flat.data(), norms + (t - first) * width, dim, units,
                               coarse_tiles + (t - first) * kernels_.coarse->tile_bytes(dim), residuals.data());
    left_out[t - first] = *std::max_element(residuals.begin(), residuals.end());
  }
}

}  // namespace mmgen_kernels::vq
