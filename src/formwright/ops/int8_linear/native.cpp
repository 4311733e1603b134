// 8-bit linear maps: quantise rows, multiply integers exactly, finish in float; one pass over memory where it can be.
//
// y = act(s_x s_w (q_x q_w^T) + bias + kept columns), with the definition's float32 arithmetic (reference.py), and
// optionally the rest of a residual sublayer: LayerNorm(residual + y). A whole MLP (up, activation, down) is one call:
// the hidden values of a block of rows never leave the second-level cache. So is a whole attention sublayer: what its
// four steps would cost beside the work (calls, checks, views) is what a short text mostly waits for.
//
// VNNI multiplies unsigned by signed bytes and adds four products in 32 bits. The broadcast operand is the signed one,
// so inputs stay signed and weights carry +128; 128 times the sum of a row of inputs is taken off again. AVX2 and
// portable code widen to 16 bits, where a pair of products fits 32 bits. So every path gives the same integers.
//
// Layout of a packed weight (O, K): panels of N outputs, then groups of G inputs, then N x G bytes; see Shape.
#include "../native/calls.hpp"

namespace {

using fw::Tail;
using fw::Weight;

enum Activation { NONE = 0, GELU = 1, GELU_TANH = 2, RELU = 3, SILU = 4 };

constexpr float TINY = 1e-30f;
constexpr int64_t BLOCK = 48;  // rows handled together: their hidden values stay in the second-level cache

int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// 127 / the largest magnitude; NaN where the row holds NaN or infinity.
inline float per_unit(float reach) {
  if (!(reach < INFINITY)) return NAN;
  return 127.0f / (reach > TINY ? reach : TINY);
}

// ---------------------------------------------------------------- portable and AVX2: 16-bit inputs, pairs of columns

struct Narrow {
  using Input = int16_t;
  static constexpr int64_t N = 16, G = 2, R = 4;

  static void quantise(const float* x, int64_t in, Input* q, int64_t wide, float* step, int32_t* sum) {
    uint32_t most = 0;
    for (int64_t k = 0; k < in; ++k) {
      uint32_t bits;
      std::memcpy(&bits, x + k, 4);
      bits &= 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    float reach;
    std::memcpy(&reach, &most, 4);
    const float unit = per_unit(reach);
    const bool defined = unit == unit;
    int32_t total = 0;
    for (int64_t k = 0; k < in; ++k) {
      q[k] = defined ? static_cast<Input>(std::nearbyintf(x[k] * unit)) : Input(0);
      total += q[k];
    }
    for (int64_t k = in; k < wide; ++k) q[k] = 0;
    *step = 1.0f / unit;
    *sum = total;
  }

  static void finish(const Weight& w, int64_t column, int64_t rows, const int32_t* acc, const float* step,
                     const float* kept, float* y, int64_t ld) {
    const int64_t columns = w.out - column < N ? w.out - column : N;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        float value = static_cast<float>(acc[r * N + c]) * w.scale[column + c] * step[r];
        if (w.bias != nullptr) value += w.bias[column + c];
        for (int64_t i = 0; i < w.outliers; ++i) value += kept[r * w.outliers + i] * w.kept[i * w.out + column + c];
        y[r * ld + column + c] = value;
      }
  }

  static void activate(float* y, int64_t rows, int64_t columns, int64_t ld, int activation) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        float& v = y[r * ld + c];
        if (activation == GELU) v = 0.5f * v * (1.0f + std::erf(v * 0.70710678f));
        else if (activation == GELU_TANH) v = 0.5f * v * (1.0f + std::tanh(0.79788456f * (v + 0.044715f * v * v * v)));
        else if (activation == RELU) v = v > 0.0f || v != v ? v : 0.0f;
        else if (activation == SILU) v = v / (1.0f + std::exp(-v));
      }
  }

  static void tail(const Tail& t, const float* residual, float* y, int64_t columns) {
    if (residual != nullptr)
      for (int64_t c = 0; c < columns; ++c) y[c] += residual[c];
    if (t.gain == nullptr) return;
    double mean = 0.0, square = 0.0;
    for (int64_t c = 0; c < columns; ++c) mean += y[c];
    mean /= static_cast<double>(columns);
    for (int64_t c = 0; c < columns; ++c) square += (y[c] - mean) * (y[c] - mean);
    const float scale = static_cast<float>(1.0 / std::sqrt(square / static_cast<double>(columns) + t.eps));
    for (int64_t c = 0; c < columns; ++c)
      y[c] = (y[c] - static_cast<float>(mean)) * scale * t.gain[c] + (t.shift != nullptr ? t.shift[c] : 0.0f);
  }
};

// A panel of outputs, R rows at a time; Multiply::tile gives the sums of up to R rows by N outputs.
template <typename Multiply>
struct Pairs : Narrow {
  static void panel(const Weight& w, int64_t at, const Input* q, int64_t wide, const float* step, const int32_t*,
                    const float* kept, int64_t rows, float* y, int64_t ld, int activation) {
    const int8_t* packed = static_cast<const int8_t*>(w.packed) + at * N * wide;
    for (int64_t first = 0; first < rows; first += R) {
      const int64_t count = rows - first < R ? rows - first : R;
      int32_t acc[R * N];
      Multiply::tile(count, q + first * wide, wide, packed, acc);
      finish(w, at * N, count, acc, step + first, kept + first * w.outliers, y + first * ld, ld);
    }
    const int64_t columns = w.out - at * N < N ? w.out - at * N : N;
    if (activation != NONE) activate(y + at * N, rows, columns, ld, activation);
  }
};

struct PlainTile {
  static void tile(int64_t count, const int16_t* q, int64_t wide, const int8_t* packed, int32_t* acc) {
    constexpr int64_t N = Narrow::N;
    std::memset(acc, 0, count * N * sizeof(int32_t));
    for (int64_t k = 0; k < wide; k += Narrow::G)
      for (int64_t r = 0; r < count; ++r) {
        const int32_t one = q[r * wide + k], two = q[r * wide + k + 1];
        for (int64_t c = 0; c < N; ++c)
          acc[r * N + c] += one * packed[k * N + 2 * c] + two * packed[k * N + 2 * c + 1];
      }
  }
};

using Portable = Pairs<PlainTile>;

#ifdef FW_X86

FW_PUSH(FW_AVX2)

template <int COUNT>
static FW_INLINE void pairs(const int16_t* q, int64_t wide, const int8_t* packed, int32_t* acc) {
  __m256i low[COUNT], high[COUNT];
  for (int r = 0; r < COUNT; ++r) low[r] = high[r] = _mm256_setzero_si256();
  for (int64_t k = 0; k < wide; k += 2, packed += 32) {
    const __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    const __m256i second = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + 16)));
    for (int r = 0; r < COUNT; ++r) {
      int32_t both;
      std::memcpy(&both, q + r * wide + k, 4);
      const __m256i x = _mm256_set1_epi32(both);
      low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(first, x));
      high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(second, x));
    }
  }
  for (int r = 0; r < COUNT; ++r) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * 16), low[r]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * 16 + 8), high[r]);
  }
}

struct Avx2Tile {
  static void tile(int64_t count, const int16_t* q, int64_t wide, const int8_t* packed, int32_t* acc) {
    switch (count) {
      case 1: pairs<1>(q, wide, packed, acc); break;
      case 2: pairs<2>(q, wide, packed, acc); break;
      case 3: pairs<3>(q, wide, packed, acc); break;
      default: pairs<4>(q, wide, packed, acc); break;
    }
  }
};

FW_END

using Avx2 = Pairs<Avx2Tile>;

// ---------------------------------------------------------------- AVX-512 VNNI: bytes, groups of four columns

FW_PUSH(FW_AVX512)

#include "../native/vector512.hpp"

static FW_INLINE __m512 activated(__m512 v, int activation) {
  const __m512 one = _mm512_set1_ps(1.0f);
  switch (activation) {
    case GELU: {
      const __m512 e = erf512(_mm512_mul_ps(v, _mm512_set1_ps(0.70710678f)));
      return _mm512_mul_ps(_mm512_mul_ps(v, _mm512_set1_ps(0.5f)), _mm512_add_ps(one, e));
    }
    case GELU_TANH: {  // 0.5 v (1 + tanh(u)) = v / (1 + exp(-2 u))
      const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(v, v), v);
      const __m512 u = _mm512_mul_ps(_mm512_set1_ps(-1.59576912f),
                                     _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), v));
      return _mm512_div_ps(v, _mm512_add_ps(one, exp512(u)));
    }
    case RELU:
      return _mm512_max_ps(_mm512_setzero_ps(), v);  // the second operand is given where one is NaN
    case SILU:
      return _mm512_div_ps(v, _mm512_add_ps(one, exp512(_mm512_sub_ps(_mm512_setzero_ps(), v))));
    default:
      return v;
  }
}

static void quantise512(const float* x, int64_t in, int8_t* q, int64_t wide, float* step, int32_t* sum) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < in; k += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(first512(in - k), x + k);
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(v), magnitude));  // NaN is above infinity
  }
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float reach;
  std::memcpy(&reach, &bits, 4);
  const float unit = per_unit(reach);
  const __mmask16 defined = unit == unit ? 0xffff : 0;
  const __m512 factor = _mm512_set1_ps(unit);
  __m512i total = _mm512_setzero_si512();
  for (int64_t k = 0; k < wide; k += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(first512(in - k), x + k);
    const __m512i whole = _mm512_maskz_cvtps_epi32(defined, _mm512_mul_ps(v, factor));
    total = _mm512_add_epi32(total, whole);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), _mm512_cvtepi32_epi8(whole));
  }
  *step = 1.0f / unit;
  *sum = _mm512_reduce_add_epi32(total);
}

// COUNT rows by 64 outputs: 24 accumulators, 4 loads of weights and 6 of inputs for 24 multiplications.
template <int COUNT>
static FW_INLINE void tile512(const Weight& w, int64_t column, const int8_t* q, int64_t wide, const uint8_t* packed,
                              const float* step, const int32_t* sum, const float* kept, float* y, int64_t ld,
                              int activation) {
  __m512i acc[COUNT][4];
#pragma GCC unroll 8
  for (int r = 0; r < COUNT; ++r)
    for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_setzero_si512();
  for (int64_t k = 0; k < wide; k += 4, packed += 256) {
    const __m512i b0 = _mm512_loadu_si512(packed), b1 = _mm512_loadu_si512(packed + 64);
    const __m512i b2 = _mm512_loadu_si512(packed + 128), b3 = _mm512_loadu_si512(packed + 192);
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r) {
      int32_t four;
      std::memcpy(&four, q + r * wide + k, 4);
      const __m512i x = _mm512_set1_epi32(four);
      acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], b0, x);
      acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], b1, x);
      acc[r][2] = _mm512_dpbusd_epi32(acc[r][2], b2, x);
      acc[r][3] = _mm512_dpbusd_epi32(acc[r][3], b3, x);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const int64_t at = column + 16 * c;
    const __mmask16 mask = first512(w.out - at);
    if (mask == 0) break;
    const __m512 scale = _mm512_maskz_loadu_ps(mask, w.scale + at);
    const __m512 bias = w.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, w.bias + at);
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r) {
      const __m512i centred = _mm512_sub_epi32(acc[r][c], _mm512_set1_epi32(128 * sum[r]));
      __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(centred), scale);
      v = _mm512_fmadd_ps(v, _mm512_set1_ps(step[r]), bias);
      for (int64_t i = 0; i < w.outliers; ++i)
        v = _mm512_fmadd_ps(_mm512_set1_ps(kept[r * w.outliers + i]),
                            _mm512_maskz_loadu_ps(mask, w.kept + i * w.out + at), v);
      _mm512_mask_storeu_ps(y + r * ld + at, mask, activated(v, activation));
    }
  }
}

static void panel512(const Weight& w, int64_t at, const int8_t* q, int64_t wide, const float* step,
                     const int32_t* sum, const float* kept, int64_t rows, float* y, int64_t ld, int activation) {
  const uint8_t* packed = static_cast<const uint8_t*>(w.packed) + at * 64 * wide;
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6)
    tile512<6>(w, at * 64, q + r * wide, wide, packed, step + r, sum + r, kept + r * w.outliers, y + r * ld, ld,
               activation);
#define FW_REST(COUNT)                                                                                             \
  case COUNT:                                                                                                      \
    tile512<COUNT>(w, at * 64, q + r * wide, wide, packed, step + r, sum + r, kept + r * w.outliers, y + r * ld,   \
                   ld, activation);                                                                                \
    break
  switch (rows - r) {
    FW_REST(1);
    FW_REST(2);
    FW_REST(3);
    FW_REST(4);
    FW_REST(5);
  }
#undef FW_REST
}

static void tail512(const Tail& t, const float* residual, float* y, int64_t columns) {
  __m512 total = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += 16) {
    const __mmask16 mask = first512(columns - c);
    __m512 v = _mm512_maskz_loadu_ps(mask, y + c);
    if (residual != nullptr) {
      v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, residual + c));
      _mm512_mask_storeu_ps(y + c, mask, v);
    }
    total = _mm512_add_ps(total, v);
  }
  if (t.gain == nullptr) return;
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / static_cast<float>(columns));
  __m512 square = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += 16) {
    const __mmask16 mask = first512(columns - c);
    const __m512 v = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, y + c), mean);
    square = _mm512_fmadd_ps(v, v, square);
  }
  const float variance = _mm512_reduce_add_ps(square) / static_cast<float>(columns);
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(variance + t.eps));
  for (int64_t c = 0; c < columns; c += 16) {
    const __mmask16 mask = first512(columns - c);
    __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, y + c), mean), scale);
    const __m512 shift = t.shift == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, t.shift + c);
    v = _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(mask, t.gain + c), shift);
    _mm512_mask_storeu_ps(y + c, mask, v);
  }
}

FW_END

struct Vnni {
  using Input = int8_t;
  static constexpr int64_t N = 64, G = 4;
  static void quantise(const float* x, int64_t in, Input* q, int64_t wide, float* step, int32_t* sum) {
    quantise512(x, in, q, wide, step, sum);
  }
  static void panel(const Weight& w, int64_t at, const Input* q, int64_t wide, const float* step, const int32_t* sum,
                    const float* kept, int64_t rows, float* y, int64_t ld, int activation) {
    panel512(w, at, q, wide, step, sum, kept, rows, y, ld, activation);
  }
  static void tail(const Tail& t, const float* residual, float* y, int64_t columns) {
    tail512(t, residual, y, columns);
  }
};

#endif  // FW_X86

// ---------------------------------------------------------------- drivers, the same for every instruction set

// Rows of inputs are padded to whole cache lines, so groups never straddle the end and rows do not share lines.
template <typename Kernel>
int64_t width_of(int64_t in) { return up_to(in, 64 / static_cast<int64_t>(sizeof(typename Kernel::Input))); }

// A block of inputs, quantised, without the columns that are kept in float.
template <typename Kernel>
struct Block {
  typename Kernel::Input* q;
  float *step, *kept;
  int32_t* sum;
  int64_t wide;

  static size_t bytes(int64_t rows, int64_t in, int64_t outliers) {
    return rows * width_of<Kernel>(in) * sizeof(typename Kernel::Input) + rows * (8 + 4 * outliers) + in * 4 + 256;
  }

  Block(void* memory, int64_t rows, int64_t in, int64_t outliers) : wide(width_of<Kernel>(in)) {
    q = static_cast<typename Kernel::Input*>(memory);
    step = reinterpret_cast<float*>(q + rows * wide);
    sum = reinterpret_cast<int32_t*>(step + rows);
    kept = reinterpret_cast<float*>(sum + rows);
    row = kept + rows * outliers;
  }

  void fill(const Weight& w, const float* x, int64_t ld, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* source = x + r * ld;
      if (w.outliers > 0) {
        std::memcpy(row, source, w.in * 4);
        for (int64_t i = 0; i < w.outliers; ++i) {
          kept[r * w.outliers + i] = row[w.columns[i]];
          row[w.columns[i]] = 0.0f;
        }
        source = row;
      }
      Kernel::quantise(source, w.in, q + r * wide, wide, step + r, sum + r);
    }
  }

 private:
  float* row;
};

template <typename Kernel>
void multiply(const Weight& w, const Block<Kernel>& x, int64_t first, int64_t last, int64_t rows, float* y, int64_t ld,
              int activation) {
  for (int64_t at = first; at < last; ++at)
    Kernel::panel(w, at, x.q, x.wide, x.step, x.sum, x.kept, rows, y, ld, activation);
}

template <typename Kernel>
int64_t panels(const Weight& w) { return (w.out + Kernel::N - 1) / Kernel::N; }

template <typename Kernel>
void finish_rows(const Tail& tail, int64_t first, int64_t rows, float* y, int64_t columns) {
  if (tail.residual == nullptr && tail.gain == nullptr) return;
  for (int64_t r = 0; r < rows; ++r)
    Kernel::tail(tail, tail.residual == nullptr ? nullptr : tail.residual + (first + r) * columns, y + r * columns,
                 columns);
}

// Weights that read the same input and leave out the same columns. Few rows are split by outputs, many by rows.
template <typename Kernel>
void linear(const Weight* w, int64_t count, const float* x, int64_t rows, float* const* y, const Tail& tail,
            int activation, int threads) {
  const Weight& one = w[0];
  if (rows < BLOCK * threads) {
    Block<Kernel> block(fw::scratch(0, Block<Kernel>::bytes(rows, one.in, one.outliers)), rows, one.in, one.outliers);
    block.fill(one, x, one.in, rows);
    for (int64_t i = 0; i < count; ++i)
      fw::parallel(panels<Kernel>(w[i]), 2, threads, [&](int64_t first, int64_t last) {
        multiply<Kernel>(w[i], block, first, last, rows, y[i], w[i].out, activation);
      });
    finish_rows<Kernel>(tail, 0, rows, y[0], one.out);
    return;
  }
  fw::parallel((rows + BLOCK - 1) / BLOCK, 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      const int64_t first = b * BLOCK, held = rows - first < BLOCK ? rows - first : BLOCK;
      Block<Kernel> block(fw::scratch(0, Block<Kernel>::bytes(BLOCK, one.in, one.outliers)), BLOCK, one.in,
                          one.outliers);
      block.fill(one, x + first * one.in, one.in, held);
      for (int64_t i = 0; i < count; ++i)
        multiply<Kernel>(w[i], block, 0, panels<Kernel>(w[i]), held, y[i] + first * w[i].out, w[i].out, activation);
      finish_rows<Kernel>(tail, first, held, y[0] + first * one.out, one.out);
    }
  });
}

template <typename Kernel>
void mlp(const Weight& up, const Weight& down, const float* x, int64_t rows, float* y, const Tail& tail,
         int activation, int threads) {
  const int64_t hidden = up.out;
  if (rows < BLOCK * threads) {
    float* values = static_cast<float*>(fw::scratch(1, rows * hidden * 4));
    float* to[1] = {values};
    linear<Kernel>(&up, 1, x, rows, to, Tail{nullptr, nullptr, nullptr, 0.0f}, activation, threads);
    float* out[1] = {y};
    linear<Kernel>(&down, 1, values, rows, out, tail, NONE, threads);
    return;
  }
  fw::parallel((rows + BLOCK - 1) / BLOCK, 1, threads, [&](int64_t from, int64_t to) {
    float* values = static_cast<float*>(fw::scratch(1, BLOCK * hidden * 4));
    for (int64_t b = from; b < to; ++b) {
      const int64_t first = b * BLOCK, held = rows - first < BLOCK ? rows - first : BLOCK;
      Block<Kernel> block(fw::scratch(0, Block<Kernel>::bytes(BLOCK, up.in, up.outliers)), BLOCK, up.in, up.outliers);
      block.fill(up, x + first * up.in, up.in, held);
      multiply<Kernel>(up, block, 0, panels<Kernel>(up), held, values, hidden, activation);
      Block<Kernel> inner(fw::scratch(2, Block<Kernel>::bytes(BLOCK, hidden, down.outliers)), BLOCK, hidden,
                          down.outliers);
      inner.fill(down, values, hidden, held);
      multiply<Kernel>(down, inner, 0, panels<Kernel>(down), held, y + first * down.out, down.out, NONE);
      finish_rows<Kernel>(tail, first, held, y + first * down.out, down.out);
    }
  });
}

template <int64_t N, int64_t G>
void lay_out(const int8_t* w, int64_t out, int64_t in, int64_t wide, int8_t offset, int8_t* packed) {
  for (int64_t at = 0; at * N < out; ++at)
    for (int64_t k = 0; k < wide; ++k)
      for (int64_t c = 0; c < N; ++c) {
        const int64_t o = at * N + c;
        const int8_t value = o < out && k < in ? w[o * in + k] : int8_t(0);
        packed[at * N * wide + (k / G) * N * G + c * G + k % G] = static_cast<int8_t>(value ^ offset);
      }
}

}  // namespace

// Bytes that a weight (out, in) takes packed for the instruction set in use.
FW_API int64_t fw_int8_packed_bytes(int64_t out, int64_t in) {
#ifdef FW_X86
  if (fw::level() == fw::VNNI) return up_to(out, Vnni::N) * width_of<Vnni>(in);
#endif
  return up_to(out, Narrow::N) * width_of<Narrow>(in);
}

FW_API void fw_int8_pack(const int8_t* weight, int64_t out, int64_t in, void* packed) {
#ifdef FW_X86
  if (fw::level() == fw::VNNI)  // + 128 on bytes is the flip of their highest bit
    return lay_out<Vnni::N, Vnni::G>(weight, out, in, width_of<Vnni>(in), INT8_MIN, static_cast<int8_t*>(packed));
#endif
  lay_out<Narrow::N, Narrow::G>(weight, out, in, width_of<Narrow>(in), 0, static_cast<int8_t*>(packed));
}

// x (rows, in) -> y[i] (rows, out of weights[i]). `tail` belongs to a single weight.
FW_API void fw_int8_linear(const Weight* weights, int64_t count, const float* x, int64_t rows, float* const* y,
                           const Tail* tail, int activation, int threads) {
#ifdef FW_X86
  if (fw::level() == fw::VNNI) return linear<Vnni>(weights, count, x, rows, y, *tail, activation, threads);
  if (fw::level() == fw::TWO) return linear<Avx2>(weights, count, x, rows, y, *tail, activation, threads);
#endif
  linear<Portable>(weights, count, x, rows, y, *tail, activation, threads);
}

namespace {

// Fewer rows than this stay on the calling thread: the time goes into reading weights, which more threads hardly speed
// up, and a thread that must be woken, or is kept busy by others, costs more than it brings.
constexpr int64_t ALONE = 12;

// A sublayer: attention of packed documents by q, k, v, o, or up and down with an activation between; then its tail.
struct Step {
  Weight weights[4];
  Tail tail;  // its residual is what the call gives
  int64_t heads, groups, width;  // no heads: up and down
  float scale;
  int causal, rounded, activation, joins;
};

// y = tail(down(activation(up(x)))): x (rows, in) -> y (rows, out of down).
void perceptron(const Step& step, const float* x, int64_t rows, float* y, const Tail& tail, int threads) {
  const Weight &up = step.weights[0], &down = step.weights[1];
#ifdef FW_X86
  if (fw::level() == fw::VNNI) return mlp<Vnni>(up, down, x, rows, y, tail, step.activation, threads);
  if (fw::level() == fw::TWO) return mlp<Avx2>(up, down, x, rows, y, tail, step.activation, threads);
#endif
  mlp<Portable>(up, down, x, rows, y, tail, step.activation, threads);
}

// y = tail(o(attention(q, k, v of x))): x (rows, in) -> y (rows, out of o), with the documents of `call`.
void attention(const Step& step, fw::Attention call, const float* x, int64_t rows, float* room, float* y,
               const Tail& tail, int threads) {
  call.heads = step.heads, call.groups = step.groups, call.width = step.width;
  call.scale = step.scale, call.causal = step.causal, call.rounded = step.rounded;
  call.q_row = call.y_row = call.heads * call.width;
  call.kv_row = call.groups * call.width;
  float* q = room;
  float* k = q + rows * call.q_row;
  float* v = k + rows * call.kv_row;
  float* const parts[] = {q, k, v};
  const Tail none = {nullptr, nullptr, nullptr, 0.0f};
  fw_int8_linear(step.weights, 3, x, rows, parts, &none, NONE, threads);
  call.q = q, call.k = k, call.v = v, call.y = v + rows * call.kv_row;
  fw_attention_packed(&call, threads);
  fw_int8_linear(step.weights + 3, 1, call.y, rows, &y, &tail, NONE, threads);
}

}  // namespace

// Sublayers one after another: x (rows, in) -> y[0], y[1], y[0], ... in turn. The first adds `residual`, the others
// their own input. `room` holds rows * (2 heads + 2 groups) * width floats of the widest attention.
FW_API void fw_int8_steps(const Step* steps, int64_t count, const fw::Attention* documents, const float* x,
                          const float* residual, int64_t rows, float* room, float* const* y, int threads) {
  if (rows < ALONE) threads = 1;
  for (int64_t i = 0; i < count; ++i) {
    float* to = y[i % 2];
    Tail tail = steps[i].tail;
    tail.residual = steps[i].joins ? residual : nullptr;
    if (steps[i].heads) attention(steps[i], *documents, x, rows, room, to, tail, threads);
    else perceptron(steps[i], x, rows, to, tail, threads);
    x = residual = to;
  }
}
