// 8-bit linear maps: quantise rows, multiply integers exactly, finish in float; one pass over memory where it can be.
//
// y = act(s_x s_w (q_x q_w^T) + bias + kept columns), with the definition's float32 arithmetic (reference.py), and
// optionally the rest of a residual sublayer: LayerNorm(residual + y). Whole sublayers are one call: all that happens
// row by row from one attention to the next (its output map, the MLPs, the query, key and value maps of what follows)
// is done for a block of rows before the next block, so that only the stream leaves the second-level cache, and a row
// is normalised and quantised while it is in the first.
//
// VNNI multiplies unsigned by signed bytes and adds four products in 32 bits. The broadcast operand is the signed one,
// so inputs stay signed and weights carry +128; 128 times the sum of a row of inputs is taken off again. AVX2 and
// portable code widen to 16 bits, where a pair of products fits 32 bits. So every path gives the same integers.
//
// Layout of a packed weight (O, K): panels of N outputs, then groups of G inputs, then N x G bytes; see Shape.
#include "../native/calls.hpp"

namespace {

using fw::Norm;
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

  static float reach(const float* x, int64_t in) {
    uint32_t most = 0;
    for (int64_t k = 0; k < in; ++k) {
      uint32_t bits;
      std::memcpy(&bits, x + k, 4);
      bits &= 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    float found;
    std::memcpy(&found, &most, 4);
    return found;
  }

  static void quantise(const float* x, int64_t in, float reach, Input* q, int64_t wide, float* step, int32_t* sum) {
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

  static float normalise(const Norm& norm, const float* x, float* y, int64_t columns) {
    double mean = 0.0, square = 0.0;
    for (int64_t c = 0; c < columns; ++c) mean += x[c];
    mean /= static_cast<double>(columns);
    for (int64_t c = 0; c < columns; ++c) square += (x[c] - mean) * (x[c] - mean);
    const float scale = static_cast<float>(1.0 / std::sqrt(square / static_cast<double>(columns) + norm.eps));
    for (int64_t c = 0; c < columns; ++c)
      y[c] = (x[c] - static_cast<float>(mean)) * scale * norm.gain[c] + (norm.shift != nullptr ? norm.shift[c] : 0.0f);
    return reach(y, columns);
  }

  static float settle(const float* residual, const float* made, const Norm& norm, float* y, int64_t columns) {
    for (int64_t c = 0; c < columns; ++c) y[c] = residual != nullptr ? made[c] + residual[c] : made[c];
    return norm.gain != nullptr ? normalise(norm, y, y, columns) : reach(y, columns);
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

// The largest magnitudes so far, as bits: NaN is above infinity.
static FW_INLINE __m512i larger512(__m512i most, __m512 v) {
  return _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
}

static FW_INLINE float largest512(__m512i most) {
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

static float reach512(const float* x, int64_t in) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < in; k += 16) most = larger512(most, _mm512_maskz_loadu_ps(first512(in - k), x + k));
  return largest512(most);
}

static void quantise512(const float* x, int64_t in, float reach, int8_t* q, int64_t wide, float* step, int32_t* sum) {
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

// x of the sum `total`, normalised into y (which may be x) -> its reach.
static FW_INLINE float normalised512(const Norm& norm, const float* x, __m512 total, float* y, int64_t columns) {
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / static_cast<float>(columns));
  __m512 square = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += 16) {
    const __mmask16 mask = first512(columns - c);
    const __m512 v = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + c), mean);
    square = _mm512_fmadd_ps(v, v, square);
  }
  const float variance = _mm512_reduce_add_ps(square) / static_cast<float>(columns);
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(variance + norm.eps));
  __m512i most = _mm512_setzero_si512();
  for (int64_t c = 0; c < columns; c += 16) {
    const __mmask16 mask = first512(columns - c);
    __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + c), mean), scale);
    const __m512 shift = norm.shift == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, norm.shift + c);
    v = _mm512_maskz_fmadd_ps(mask, v, _mm512_maskz_loadu_ps(mask, norm.gain + c), shift);
    _mm512_mask_storeu_ps(y + c, mask, v);
    most = larger512(most, v);
  }
  return largest512(most);
}

static float normalise512(const Norm& norm, const float* x, float* y, int64_t columns) {
  __m512 total = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += 16)
    total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(first512(columns - c), x + c));
  return normalised512(norm, x, total, y, columns);
}

static float settle512(const float* residual, const float* made, const Norm& norm, float* y, int64_t columns) {
  __m512i most = _mm512_setzero_si512();
  __m512 total = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += 16) {
    const __mmask16 mask = first512(columns - c);
    __m512 v = _mm512_maskz_loadu_ps(mask, made + c);
    if (residual != nullptr) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, residual + c));
    _mm512_mask_storeu_ps(y + c, mask, v);
    most = larger512(most, v);
    total = _mm512_add_ps(total, v);
  }
  return norm.gain == nullptr ? largest512(most) : normalised512(norm, y, total, y, columns);
}

FW_END

struct Vnni {
  using Input = int8_t;
  static constexpr int64_t N = 64, G = 4;
  static float reach(const float* x, int64_t in) { return reach512(x, in); }
  static void quantise(const float* x, int64_t in, float reach, Input* q, int64_t wide, float* step, int32_t* sum) {
    quantise512(x, in, reach, q, wide, step, sum);
  }
  static void panel(const Weight& w, int64_t at, const Input* q, int64_t wide, const float* step, const int32_t* sum,
                    const float* kept, int64_t rows, float* y, int64_t ld, int activation) {
    panel512(w, at, q, wide, step, sum, kept, rows, y, ld, activation);
  }
  static float normalise(const Norm& norm, const float* x, float* y, int64_t columns) {
    return normalise512(norm, x, y, columns);
  }
  static float settle(const float* residual, const float* made, const Norm& norm, float* y, int64_t columns) {
    return settle512(residual, made, norm, y, columns);
  }
};

#endif  // FW_X86

// ---------------------------------------------------------------- drivers, the same for every instruction set

// Rows of inputs are padded to whole cache lines, so groups never straddle the end and rows do not share lines.
template <typename Kernel>
int64_t width_of(int64_t in) { return up_to(in, 64 / static_cast<int64_t>(sizeof(typename Kernel::Input))); }

// Rows of inputs for a weight, quantised, without the columns that it keeps in float.
template <typename Kernel>
class Block {
 public:
  Block(int slot, int64_t rows, const Weight& weight) : w(weight), wide(width_of<Kernel>(weight.in)) {
    const size_t bytes = rows * wide * sizeof(Input) + rows * (8 + 4 * w.outliers) + w.in * 4;
    q = static_cast<Input*>(fw::scratch(slot, bytes));
    step = reinterpret_cast<float*>(q + rows * wide);
    sum = reinterpret_cast<int32_t*>(step + rows);
    kept = reinterpret_cast<float*>(sum + rows);
    row = kept + rows * w.outliers;
  }

  // Row r, from its values and their reach.
  void put(int64_t r, const float* x, float reach) {
    if (w.outliers > 0) {
      if (x != row) std::memcpy(row, x, w.in * 4);
      for (int64_t i = 0; i < w.outliers; ++i) {
        kept[r * w.outliers + i] = row[w.columns[i]];
        row[w.columns[i]] = 0.0f;
      }
      x = row, reach = Kernel::reach(row, w.in);
    }
    Kernel::quantise(x, w.in, reach, q + r * wide, wide, step + r, sum + r);
  }

  // The same of values that are normalised first, where there is a norm.
  void put(int64_t r, const float* x, const Norm& norm, float reach) {
    if (norm.gain == nullptr) return put(r, x, reach);
    reach = Kernel::normalise(norm, x, row, w.in);
    put(r, row, reach);
  }

  void fill(const float* x, int64_t rows, const Norm& norm) {
    for (int64_t r = 0; r < rows; ++r, x += w.in) put(r, x, norm, norm.gain ? 0.0f : Kernel::reach(x, w.in));
  }

  // y (rows, out) = act(w x) for some panels of a weight that reads the same columns.
  void multiply(const Weight& by, int64_t panel, int64_t rows, float* y, int activation) const {
    Kernel::panel(by, panel, q, wide, step, sum, kept, rows, y, by.out, activation);
  }

 private:
  using Input = typename Kernel::Input;
  const Weight& w;
  int64_t wide;
  Input* q;
  float *step, *kept, *row;
  int32_t* sum;
};

// y[i] (rows, out), from row `from` on, = act(w[i] x), panel by panel over threads.
template <typename Kernel>
void multiply(const Weight* w, int64_t count, const Block<Kernel>& x, int64_t from, int64_t rows, float* const* y,
              int activation, int threads) {
  int64_t panels = 0;
  for (int64_t i = 0; i < count; ++i) panels += (w[i].out + Kernel::N - 1) / Kernel::N;
  fw::parallel(panels, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = 0, start = 0; i < count; ++i) {
      const int64_t stop = start + (w[i].out + Kernel::N - 1) / Kernel::N;
      for (int64_t at = first > start ? first : start; at < (last < stop ? last : stop); ++at)
        x.multiply(w[i], at - start, rows, y[i] + from * w[i].out, activation);
      start = stop;
    }
  });
}

// work(first, rows, threads) for every block of rows; few rows are one block, and threads share its outputs.
template <typename Work>
void by_rows(int64_t rows, int threads, const Work& work) {
  if (rows < BLOCK * threads) return work(int64_t{0}, rows, threads);
  fw::parallel((rows + BLOCK - 1) / BLOCK, 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t first = from * BLOCK; first < to * BLOCK && first < rows; first += BLOCK)
      work(first, rows - first < BLOCK ? rows - first : BLOCK, 1);
  });
}

constexpr Norm PLAIN = {nullptr, nullptr, 0.0f};

// Weights that read the same input and leave out the same columns.
template <typename Kernel>
void linear(const Weight* w, int64_t count, const float* x, int64_t rows, float* const* y, const Tail& tail,
            int threads) {
  by_rows(rows, threads, [&](int64_t first, int64_t held, int inside) {
    Block<Kernel> block(0, held, *w);
    block.fill(x + first * w->in, held, PLAIN);
    multiply(w, count, block, first, held, y, NONE, inside);
    if (tail.residual == nullptr && tail.norm.gain == nullptr) return;
    for (int64_t r = first; r < first + held; ++r) {
      const float* residual = tail.residual == nullptr ? nullptr : tail.residual + r * w->out;
      Kernel::settle(residual, y[0] + r * w->out, tail.norm, y[0] + r * w->out, w->out);
    }
  });
}

// A sublayer: attention of packed documents by q, k, v, o, or up and down with an activation between. `joins`: the
// residual is added. The norm comes before all that, or after it.
struct Step {
  Weight weights[4];
  Norm norm;
  int64_t heads, groups, width;  // no heads: up and down
  float scale;
  int causal, rounded, activation, joins, before;

  const Norm& enters() const { return before ? norm : PLAIN; }
  const Norm& leaves() const { return before ? PLAIN : norm; }
};

// What runs row by row: the output map of an attention (`opens`, over what it mixed), MLPs, and the query, key and
// value maps of the next attention (`closes`); either may be missing. The stream enters as `x`, and is `y` from the end
// of the first sublayer on.
struct Stretch {
  const Step *opens, *steps, *closes;
  int64_t count;
  const float *x, *mixed;
  float *y, *q, *k, *v;
};

template <typename Kernel>
class Rows {
 public:
  Rows(const Stretch& stretch, int64_t first, int64_t held, int threads)
      : s(stretch), first(first), held(held), threads(threads), stream(stretch.x) {}

  void run() {
    if (s.opens != nullptr) {
      const Weight& o = s.opens->weights[3];
      Block<Kernel> mixed(0, held, o);
      mixed.fill(s.mixed + first * o.in, held, PLAIN);
      end(*s.opens, o, mixed, s.count > 0 ? s.steps : s.closes);
    } else {
      const Step& begins = s.count > 0 ? *s.steps : *s.closes;
      Block<Kernel>(0, held, begins.weights[0]).fill(s.x + first * begins.weights[0].in, held, begins.enters());
    }
    for (int64_t i = 0; i < s.count; ++i) perceptron(s.steps[i], i + 1 < s.count ? s.steps + i + 1 : s.closes);
    if (s.closes == nullptr) return;
    float* const to[] = {s.q, s.k, s.v};
    multiply(s.closes->weights, 3, Block<Kernel>(0, held, *s.closes->weights), first, held, to, NONE, threads);
  }

 private:
  // What a sublayer reads lies in slot 0, quantised; so does what the next one reads, afterwards.
  void perceptron(const Step& step, const Step* next) {
    const Weight &up = step.weights[0], &down = step.weights[1];
    float* hidden = static_cast<float*>(fw::scratch(1, held * up.out * 4));
    multiply(&up, 1, Block<Kernel>(0, held, up), 0, held, &hidden, step.activation, threads);
    Block<Kernel> inner(2, held, down);
    inner.fill(hidden, held, PLAIN);
    end(step, down, inner, next);
  }

  // The last map of a sublayer, the residual, the norm, and the input of the next one.
  void end(const Step& step, const Weight& w, const Block<Kernel>& from, const Step* next) {
    float* y = s.y + first * w.out;
    const float* adds = step.joins ? stream + first * w.out : nullptr;
    // Where the stream itself is added, the product needs a place of its own.
    float* made = adds == y ? static_cast<float*>(fw::scratch(3, held * w.out * 4)) : y;
    multiply(&w, 1, from, 0, held, &made, NONE, threads);
    Block<Kernel> block(0, held, next == nullptr ? w : next->weights[0]);
    for (int64_t r = 0, at = 0; r < held; ++r, at += w.out) {
      const float* add = adds == nullptr ? nullptr : adds + at;
      const float reach = Kernel::settle(add, made + at, step.leaves(), y + at, w.out);
      if (next != nullptr) block.put(r, y + at, next->enters(), reach);
    }
    stream = s.y;
  }

  const Stretch& s;
  const int64_t first, held;
  const int threads;
  const float* stream;
};

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

namespace {

// work(kernel) with the kernel of the instruction set in use.
template <typename Work>
void chosen(const Work& work) {
#ifdef FW_X86
  if (fw::level() == fw::VNNI) return work(Vnni());
  if (fw::level() == fw::TWO) return work(Avx2());
#endif
  work(Portable());
}

}  // namespace

FW_API void fw_layer_norm(const Norm* norm, float* x, int64_t rows, int64_t width) {
  if (norm->gain == nullptr) return;
  chosen([&](auto kernel) {
    for (int64_t r = 0; r < rows; ++r) kernel.normalise(*norm, x + r * width, x + r * width, width);
  });
}

// x (rows, in) -> y[i] (rows, out of weights[i]). `tail` belongs to a single weight.
FW_API void fw_int8_linear(const Weight* weights, int64_t count, const float* x, int64_t rows, float* const* y,
                           const Tail* tail, int threads) {
  chosen([&](auto kernel) { linear<decltype(kernel)>(weights, count, x, rows, y, *tail, threads); });
}

namespace {

// Fewer rows than this stay on the calling thread: waking another costs more than it brings.
constexpr int64_t ALONE = 4;

// What the attention of `step` mixes of the documents, from the stretch that closed with it.
void attend(const Step& step, fw::Attention call, const Stretch& s, float* mixed, int threads) {
  call.heads = step.heads, call.groups = step.groups, call.width = step.width;
  call.scale = step.scale, call.causal = step.causal, call.rounded = step.rounded;
  call.q_row = call.y_row = call.heads * call.width;
  call.kv_row = call.groups * call.width;
  call.q = s.q, call.k = s.k, call.v = s.v, call.y = mixed;
  fw_attention_packed(&call, threads);
}

}  // namespace

// Sublayers one after another: x (rows, in) -> y (rows, out). `room` holds, of the attentions, the most that one mixes
// (rows * heads * width) and the most that one reads.
FW_API void fw_int8_steps(const Step* steps, int64_t count, const fw::Attention* documents, const float* x,
                          int64_t rows, float* room, float* y, int threads) {
  if (rows < ALONE) threads = 1;
  const Step* const end = steps + count;
  int64_t widest = 0;
  for (const Step* step = steps; step != end; ++step)
    widest = step->heads * step->width > widest ? step->heads * step->width : widest;
  float* const mixed = room;
  Stretch s = {nullptr, steps, nullptr, 0, x, mixed, y, room + rows * widest, nullptr, nullptr};
  fw::together(threads, [&] {
    for (;;) {
      const Step* next = s.steps;
      while (next != end && next->heads == 0) ++next;
      s.count = next - s.steps, s.closes = next == end ? nullptr : next;
      if (s.closes != nullptr) s.k = s.q + rows * next->weights[0].out, s.v = s.k + rows * next->weights[1].out;
      by_rows(rows, threads, [&](int64_t first, int64_t held, int inside) {
        chosen([&](auto kernel) { Rows<decltype(kernel)>(s, first, held, inside).run(); });
      });
      if (s.closes == nullptr) return;
      attend(*next, *documents, s, mixed, threads);
      if (s.opens != nullptr || s.count > 0) s.x = y;
      s.opens = next, s.steps = next + 1;
    }
  });
}
