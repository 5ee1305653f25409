// Linear layers in float32 and in bytes with weights in panels, and attention over packed texts: see panels.py.
//
// A panel holds two vectors' worth of outputs: for each input, their weights side by side. A tile of y, some rows by one
// panel, stays in registers while the inputs are gone through: each weight that is loaded serves all of the rows.
// Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", section 4.

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 12;  // of 32 registers, 24 hold sums
#else
constexpr int64_t LANES = 8, ROWS = 6;  // of 16 registers, 12 hold sums
#endif
constexpr int64_t WIDTH = 2 * LANES;  // outputs in a panel
constexpr int64_t INPUTS = 384;       // at once: their part of a panel stays in the first cache
constexpr int64_t BLOCK = 16 * ROWS;  // rows at once: their inputs stay in the second cache

// Calls compute(row, row_end, panel, panel_end) in parallel, for tasks of one size, as many as threads or a multiple: rows
// are parted for the caches' sake, panels for the threads'
template <typename Compute>
void in_parallel(int64_t rows, int64_t panels, const Compute& compute) {
  const int64_t threads = at::get_num_threads(), blocks = (rows + BLOCK - 1) / BLOCK;
  const int64_t groups = std::min(panels, threads / std::gcd(blocks, threads));
  at::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t block = task / groups, group = task % groups;
      compute(rows * block / blocks, rows * (block + 1) / blocks, panels * group / groups, panels * (group + 1) / groups);
    }
  });
}

// (outputs, inputs) -> (P, inputs / D, WIDTH, D): P panels, zeros behind the last output and the last input
at::Tensor in_panels(const at::Tensor& weight, int64_t width, int64_t D) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const at::Tensor padded = at::constant_pad_nd(weight, {0, (D - inputs % D) % D, 0, (width - outputs % width) % width});
  return padded.view({-1, width, padded.size(1) / D, D}).transpose(1, 2).contiguous();
}

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }

struct Pair {
  Vector left, right;
};

// One input's weights. bfloat16 is the upper half of a float: two of them lie in the place of one, the left one below
Pair load_weights(const float* from) { return {load(from), load(from + LANES)}; }
Pair load_weights(const at::BFloat16* from) {
  const Bits both = *reinterpret_cast<const Bits*>(from);
  return {reinterpret_cast<Vector>(both << 16), reinterpret_cast<Vector>(both & 0xffff0000u)};
}

// y (R, WIDTH) = before (R, WIDTH) + x (R, inputs) times some inputs of a panel, (inputs, WIDTH). Strides are from row to
// row, 0 for the same row again. With each input, memory is asked for `step` numbers more of `next`, into the second
// cache: the weights that come next, in as many parts as tiles go through the same panel. Four inputs a turn: what counts
// and points costs less, which is felt where another thread shares the core.
template <typename Weight, int64_t R>
void tile(const float* x, int64_t x_stride, const Weight* panel, int64_t inputs, const float* before,
          int64_t before_stride, float* y, int64_t y_stride, const Weight* next, int64_t step) {
  Vector sum[R][2];
#pragma GCC unroll 12
  for (int64_t r = 0; r < R; r++) {
    sum[r][0] = sum[r][1] = Vector{};
    __builtin_prefetch(y + r * y_stride, 1);  // rows of y lie far apart: without it, each tile waits for them at its end
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < inputs; i++) {
    const auto [left, right] = load_weights(panel + i * WIDTH);
    __builtin_prefetch(next + i * step, 0, 2);
#pragma GCC unroll 12
    for (int64_t r = 0; r < R; r++) {
      sum[r][0] += left * x[r * x_stride + i];
      sum[r][1] += right * x[r * x_stride + i];
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < R; r++) {
    store(y + r * y_stride, sum[r][0] + load(before + r * before_stride));
    store(y + r * y_stride + LANES, sum[r][1] + load(before + r * before_stride + LANES));
  }
}

template <typename Weight, int64_t... R>
constexpr auto tiles(std::integer_sequence<int64_t, R...>) {
  return std::array{tile<Weight, R + 1>...};
}
template <typename Weight>
constexpr auto TILES = tiles<Weight>(std::make_integer_sequence<int64_t, ROWS>());

Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// e^x for x <= 0, and e^-80 below: 2^n e^r with n = round(x / log 2), which the exponent's bits say, and e^r for
// |r| <= log(2) / 2 by its series. n is read off the last bits of a sum so large that they count ones.
Vector exp_of_negative(Vector x) {
  constexpr float LARGE = 0x1.8p23f, LOG2E = 1.44269504f, LOG2 = 0x1.62ep-1f, REST = 0x1.0bfbe8p-15f;
  x = x < -80.0f ? Vector{} - 80.0f : x;
  const Vector sum = x * LOG2E + LARGE, n = sum - LARGE, r = (x - n * LOG2) - n * REST;
  Vector series = r * (1.0f / 5040) + 1.0f / 720;
  for (const float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * r + term;
  return series * reinterpret_cast<Vector>((reinterpret_cast<Bits>(sum) + 127) << 23);
}

// x Phi(x) = max(x, 0) - |x| (1 - Phi(|x|)). Abramowitz and Stegun 1964, "Handbook of Mathematical Functions", 7.1.26:
// within 1.5e-7, as in torch's own.
Vector gelu(Vector x) {
  const Vector size = larger(x, -x), t = 1.0f / (0.3275911f * 0.707106781f * size + 1.0f);
  Vector tail = Vector{} + 1.061405429f;
  for (const float a : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) tail = tail * t + a;
  return larger(x, Vector{}) - 0.5f * size * tail * t * exp_of_negative(-0.5f * x * x);
}

// In place, of rows of 16 or more numbers
template <int64_t width>
void gelu(float* y, int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t w = 0; w < width; w += LANES) store(y + r * stride + w, gelu(load(y + r * stride + w)));
}

template <typename Weight>
struct Product {
  const float* x;
  const Weight* panels;
  const float* bias;
  float* y;
  int64_t inputs, outputs;
  bool then_gelu;

  // y = x W^T + b for the rows and panels from .. to, or its GELU
  void compute(int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) const {
    const int64_t rows = row_end - row, blocks = (rows + ROWS - 1) / ROWS, pieces = (inputs + INPUTS - 1) / INPUTS;
    for (int64_t piece = 0; piece < pieces; piece++) {
      const int64_t start = inputs * piece / pieces, end = inputs * (piece + 1) / pieces;
      for (int64_t p = panel; p < panel_end; p++) {
        const Weight* weights = panels + (p * inputs + start) * WIDTH;
        for (int64_t block = 0; block < blocks; block++) {
          const int64_t from = row + rows * block / blocks, count = row + rows * (block + 1) / blocks - from;
          const int64_t step = WIDTH / blocks;
          const Weight* next = weights + inputs * WIDTH + block * (end - start) * step;
          compute_tile(from, count, p, start, end, next, step);
        }
      }
    }
  }

  // What the inputs from .. to add to one tile, or at the first of them, to its bias; after the last, its GELU
  void compute_tile(int64_t row, int64_t rows, int64_t panel, int64_t start, int64_t end, const Weight* next,
                    int64_t step) const {
    const float *from = x + row * inputs + start, *biases = bias + panel * WIDTH;
    const Weight* weights = panels + (panel * inputs + start) * WIDTH;
    float* to = y + row * outputs + panel * WIDTH;
    const int64_t width = std::min(WIDTH, outputs - panel * WIDTH);
    const bool fits = width == WIDTH;
    float whole[ROWS * WIDTH];  // the last panel may be wider than what is left of y
    float* place = fits ? to : whole;
    const int64_t stride = fits ? outputs : WIDTH;
    if (!fits) std::fill_n(whole, rows * WIDTH, 0.0f);
    for (int64_t r = 0; !fits && start && r < rows; r++) std::copy_n(to + r * outputs, width, whole + r * WIDTH);
    TILES<Weight>[rows - 1](from, inputs, weights, end - start, start ? place : biases, start ? stride : 0, place,
                            stride, next, step);
    if (then_gelu && end == inputs) gelu<WIDTH>(place, rows, stride);
    for (int64_t r = 0; !fits && r < rows; r++) std::copy_n(whole + r * WIDTH, width, to + r * outputs);
  }
};

// (N, inputs), panels of `lay_out`, in float32 or bfloat16, their biases -> (N, outputs), or GELUs of it
at::Tensor linear(const at::Tensor& x, const at::Tensor& panels, const at::Tensor& bias, int64_t outputs, bool gelu) {
  const at::Tensor input = x.contiguous();
  const int64_t rows = input.size(0), inputs = input.size(1), count = panels.size(0);
  TORCH_CHECK(panels.size(1) == inputs && bias.size(0) == count * WIDTH && outputs <= count * WIDTH,
              "x and panels do not fit");
  at::Tensor y = at::empty({rows, outputs}, input.options());
  const auto multiply = [&](const auto* weights) {
    const Product product{input.const_data_ptr<float>(), weights, bias.const_data_ptr<float>(),
                          y.mutable_data_ptr<float>(), inputs, outputs, gelu};
    in_parallel(rows, count, [&](auto... part) { product.compute(part...); });
  };
  if (panels.scalar_type() == at::kBFloat16)
    multiply(panels.const_data_ptr<at::BFloat16>());
  else
    multiply(panels.const_data_ptr<float>());
  return y;
}

// (outputs, inputs) -> (P, inputs, WIDTH); of bfloat16, one of the left half of a panel and one of the right in turn
at::Tensor lay_out(const at::Tensor& weight) {
  const at::Tensor panels = in_panels(weight, WIDTH, 1).squeeze(-1);
  if (weight.scalar_type() != at::kBFloat16) return panels;
  return panels.unflatten(-1, {2, LANES}).transpose(-1, -2).contiguous().view(panels.sizes());
}

// Rows of a matrix: `stride` numbers from one to the next
struct Rows {
  const float* first;
  int64_t stride;

  const float* operator[](int64_t row) const { return first + row * stride; }
};

// (LANES,) -> their sum, or whatever `join` makes of two
template <typename Join>
float reduced(Vector x, const Join& join) {
  float result = x[0];
  for (int64_t lane = 1; lane < LANES; lane++) result = join(result, x[lane]);
  return result;
}

// L scores, filled up to `wide` -> e^(score - the largest), in place. Returns their sum.
float exponentials(float* scores, int64_t L, int64_t wide) {
  std::fill(scores + L, scores + wide, -std::numeric_limits<float>::infinity());
  Vector most = load(scores), sum{};
  for (int64_t w = LANES; w < wide; w += LANES) most = larger(most, load(scores + w));
  const float largest = reduced(most, [](float a, float b) { return a > b ? a : b; });
  for (int64_t w = 0; w < wide; w += LANES) {
    const Vector y = exp_of_negative(load(scores + w) - largest);
    store(scores + w, y);
    sum += y;
  }
  return reduced(sum, [](float a, float b) { return a + b; });
}

// One head on one text: query (M, K), key and value (L, K) -> y (M, K), whose rows are y_stride apart. A few rows of
// scores at a time, by keys in panels and values in panels.
void attend(Rows query, int64_t M, Rows key, Rows value, int64_t L, int64_t K, float* y, int64_t y_stride) {
  static constexpr float ZEROS[WIDTH] = {};
  const int64_t columns = (L + WIDTH - 1) / WIDTH, wide = columns * WIDTH, parts = (K + WIDTH - 1) / WIDTH;
  thread_local std::vector<float> memory;
  memory.resize(wide * K + parts * L * WIDTH + ROWS * (wide + WIDTH));
  float *keys = memory.data(), *values = keys + wide * K, *scores = values + parts * L * WIDTH;
  float* context = scores + ROWS * wide;
  for (int64_t p = 0; p < columns; p++)  // (columns, K, WIDTH), behind the last key that key again
    for (int64_t w = 0; w < WIDTH; w++) {
      const float* from = key[std::min(p * WIDTH + w, L - 1)];
      for (int64_t k = 0; k < K; k++) keys[(p * K + k) * WIDTH + w] = from[k];
    }
  for (int64_t p = 0; p < parts; p++)  // (parts, L, WIDTH), what is behind the last value is not looked at
    for (int64_t l = 0; l < L; l++)
      std::copy_n(value[l] + p * WIDTH, std::min(WIDTH, K - p * WIDTH), values + (p * L + l) * WIDTH);
  for (int64_t row = 0; row < M; row += ROWS) {
    const int64_t rows = std::min(ROWS, M - row);
    const auto tile = TILES<float>[rows - 1];
    for (int64_t p = 0; p < columns; p++)
      tile(query[row], query.stride, keys + p * K * WIDTH, K, ZEROS, 0, scores + p * WIDTH, wide, keys, 0);
    float sums[ROWS];
    for (int64_t r = 0; r < rows; r++) sums[r] = exponentials(scores + r * wide, L, wide);
    for (int64_t p = 0; p < parts; p++) {
      tile(scores, wide, values + p * L * WIDTH, L, ZEROS, 0, context, WIDTH, values, 0);
      for (int64_t r = 0; r < rows; r++)  // softmax's division, of what is less
        for (int64_t k = 0; k < std::min(WIDTH, K - p * WIDTH); k++)
          y[(row + r) * y_stride + p * WIDTH + k] = context[r * WIDTH + k] / sums[r];
    }
  }
}

Rows rows_of(const at::Tensor& x) {
  TORCH_CHECK(x.stride(1) == 1, "rows are not in one piece");
  return {x.const_data_ptr<float>(), x.stride(0)};
}

// Queries of M of the N tokens, at `places` (ascending; none: of all), keys and values of all of them, (N, D); starts:
// (B + 1,), where each of B texts begins and the last one ends -> (M, D), zeros behind the last text
at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& starts,
                     const std::optional<at::Tensor>& places, int64_t heads) {
  const int64_t M = query.size(0), N = key.size(0), D = query.size(1), K = D / heads, texts = starts.size(0) - 1;
  const Rows queries = rows_of(query), keys = rows_of(key), values = rows_of(value);
  const int64_t *start = starts.const_data_ptr<int64_t>(), *place = places ? places->const_data_ptr<int64_t>() : nullptr;
  TORCH_CHECK(key.size(1) == D && value.sizes() == key.sizes() && K * heads == D, "query, key and value do not fit");
  TORCH_CHECK(starts.is_contiguous() && texts > 0 && start[0] == 0 && std::is_sorted(start, start + texts + 1) &&
                  start[texts] <= N,
              "starts do not fit");
  TORCH_CHECK(places ? places->is_contiguous() && places->size(0) == M && std::is_sorted(place, place + M) : M == N,
              "places do not fit");
  TORCH_CHECK(!place || M == 0 || (place[0] >= 0 && place[M - 1] < N), "places do not fit");
  const auto first = [=](int64_t text) {  // of a text's queries
    return place ? std::lower_bound(place, place + M, start[text]) - place : start[text];
  };
  at::Tensor y = at::empty({M, D}, query.options());
  float* to = y.mutable_data_ptr<float>();
  std::fill(to + first(texts) * D, to + M * D, 0.0f);
  const int64_t threads = at::get_num_threads(), parts = std::max<int64_t>(1, 2 * threads / (texts * heads));
  std::atomic<int64_t> next = 0;  // texts differ in length: whoever is done takes another
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next++) < texts * heads * parts;) {
      const int64_t text = task / (heads * parts), head = task / parts % heads, part = task % parts;
      const int64_t begin = first(text), count = first(text + 1) - begin, from = begin + count * part / parts;
      const int64_t many = begin + count * (part + 1) / parts - from, at = start[text], L = start[text + 1] - at;
      attend({queries[from] + head * K, queries.stride}, many, {keys[at] + head * K, keys.stride},
             {values[at] + head * K, values.stride}, L, K, to + from * D + head * K, D);
    }
  });
  return y;
}

#ifdef __AVX2__

constexpr int64_t BYTE_ROWS = 6, BYTE_WIDTH = 16, FOUR = 4;  // four products of bytes are added at once

__m256i four_products(__m256i sum, __m256i x, __m256i weights) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  sum = _mm256_dpbusd_epi32(sum, x, weights);
#else  // two of them in 16 bits, which holds them if weights are no larger than 64
  const __m256i pairs = _mm256_maddubs_epi16(x, weights);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
  asm volatile("" : "+x"(sum));  // one after another: what is begun for all tiles at once finds no registers
  return sum;
}

// y (R, BYTE_WIDTH) = (x (R, groups, FOUR) times a panel (groups, BYTE_WIDTH, FOUR), less offsets) times the panel's
// scales and the row's `steps`, and a bias
template <int64_t R>
void byte_tile(const uint8_t* x, int64_t x_stride, const int8_t* panel, int64_t groups, const int32_t* offsets,
               const float* scales, const float* steps, const float* bias, float* y, int64_t y_stride,
               const int8_t* next, int64_t step) {
  __m256i sum[R][2];
#pragma GCC unroll 12
  for (int64_t r = 0; r < R; r++) {
    sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    __builtin_prefetch(y + r * y_stride, 1);
  }
  for (int64_t g = 0; g < groups; g++) {
    const auto* weights = reinterpret_cast<const __m256i*>(panel + g * BYTE_WIDTH * FOUR);
    const __m256i left = _mm256_loadu_si256(weights), right = _mm256_loadu_si256(weights + 1);
    __builtin_prefetch(next + g * step, 0, 2);
#pragma GCC unroll 12
    for (int64_t r = 0; r < R; r++) {
      int32_t four;
      std::memcpy(&four, x + r * x_stride + g * FOUR, FOUR);
      const __m256i values = _mm256_set1_epi32(four);
      sum[r][0] = four_products(sum[r][0], values, left);
      sum[r][1] = four_products(sum[r][1], values, right);
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; half++) {
      const auto* off = reinterpret_cast<const __m256i*>(offsets) + half;
      const __m256 product = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[r][half], _mm256_loadu_si256(off)));
      const __m256 scaled = _mm256_mul_ps(product, _mm256_loadu_ps(scales + half * 8));
      const __m256 result = _mm256_fmadd_ps(scaled, _mm256_set1_ps(steps[r]), _mm256_loadu_ps(bias + half * 8));
      _mm256_storeu_ps(y + r * y_stride + half * 8, result);
    }
  }
}

template <int64_t... R>
constexpr auto byte_tiles(std::integer_sequence<int64_t, R...>) {
  return std::array{byte_tile<R + 1>...};
}
constexpr auto BYTE_TILES = byte_tiles(std::make_integer_sequence<int64_t, BYTE_ROWS>());

struct ByteProduct {
  const uint8_t* x;
  const int8_t* panels;
  const int32_t* offsets;
  const float *scales, *steps, *bias;
  float* y;
  int64_t groups, outputs;
  bool then_gelu;

  void compute(int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) const {
    const int64_t tiles = (row_end - row + BYTE_ROWS - 1) / BYTE_ROWS, step = BYTE_WIDTH * FOUR / tiles;
    for (int64_t p = panel; p < panel_end; p++)
      for (int64_t tile = 0; tile < tiles; tile++)
        compute_tile(row + (row_end - row) * tile / tiles, row + (row_end - row) * (tile + 1) / tiles, p,
                     tile * groups * step, step);
  }

  void compute_tile(int64_t row, int64_t row_end, int64_t panel, int64_t ahead, int64_t step) const {
    const int64_t rows = row_end - row, inputs = groups * FOUR, at = panel * BYTE_WIDTH;
    const int64_t width = std::min(BYTE_WIDTH, outputs - at);
    const bool fits = width == BYTE_WIDTH;
    float whole[BYTE_ROWS * BYTE_WIDTH];  // the last panel may be wider than what is left of y
    float *to = y + row * outputs + at, *place = fits ? to : whole;
    const int64_t stride = fits ? outputs : BYTE_WIDTH;
    BYTE_TILES[rows - 1](x + row * inputs, inputs, panels + at * inputs, groups, offsets + at, scales + at, steps + row,
                         bias + at, place, stride, panels + (at + BYTE_WIDTH) * inputs + ahead, step);
    if (then_gelu) gelu<BYTE_WIDTH>(place, rows, stride);
    for (int64_t r = 0; !fits && r < rows; r++) std::copy_n(whole + r * BYTE_WIDTH, width, to + r * outputs);
  }
};

// (N, inputs) of uint8 in steps (N, 1), panels of `lay_out_bytes`, their offsets, scales and biases -> (N, outputs) of
// float32
at::Tensor linear_of_bytes(const at::Tensor& x, const at::Tensor& steps, const at::Tensor& panels,
                           const at::Tensor& offsets, const at::Tensor& scales, const at::Tensor& bias,
                           int64_t outputs, bool gelu) {
  const int64_t rows = x.size(0), count = panels.size(0), groups = panels.size(1), inputs = groups * FOUR;
  const auto fit = [=](const at::Tensor& of_outputs) { return of_outputs.size(0) == count * BYTE_WIDTH; };
  TORCH_CHECK((x.size(1) + FOUR - 1) / FOUR == groups && steps.numel() == rows && fit(offsets) && fit(scales) &&
                  fit(bias) && outputs <= count * BYTE_WIDTH,
              "x and panels do not fit");
  const at::Tensor input = (x.size(1) == inputs ? x : at::constant_pad_nd(x, {0, inputs - x.size(1)})).contiguous();
  const at::Tensor of_rows = steps.contiguous();
  at::Tensor y = at::empty({rows, outputs}, scales.options());
  const ByteProduct product{input.const_data_ptr<uint8_t>(), panels.const_data_ptr<int8_t>(),
                            offsets.const_data_ptr<int32_t>(), scales.const_data_ptr<float>(),
                            of_rows.const_data_ptr<float>(), bias.const_data_ptr<float>(), y.mutable_data_ptr<float>(),
                            groups, outputs, gelu};
  in_parallel(rows, count, [&](auto... part) { product.compute(part...); });
  return y;
}

at::Tensor lay_out_bytes(const at::Tensor& weight) { return in_panels(weight, BYTE_WIDTH, FOUR); }

#endif

}  // namespace

TORCH_LIBRARY(minibert_panels, library) {
  library.def("linear(Tensor x, Tensor panels, Tensor bias, int outputs, bool gelu) -> Tensor");
  library.def("lay_out(Tensor weight) -> Tensor");
  library.def("attention(Tensor query, Tensor key, Tensor value, Tensor starts, Tensor? places, int heads) -> Tensor");
  library.def(
      "linear_of_bytes(Tensor x, Tensor steps, Tensor panels, Tensor offsets, Tensor scales, Tensor bias, int outputs, "
      "bool gelu) -> Tensor");
  library.def("lay_out_bytes(Tensor weight) -> Tensor");
}

TORCH_LIBRARY_IMPL(minibert_panels, CPU, library) {
  library.impl("linear", linear);
  library.impl("lay_out", lay_out);
  library.impl("attention", attention);
#ifdef __AVX2__
  library.impl("linear_of_bytes", linear_of_bytes);
  library.impl("lay_out_bytes", lay_out_bytes);
#endif
}
