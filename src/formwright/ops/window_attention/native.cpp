// Softmax attention over runs of keys, in float32, forwards and backwards, without ever holding a row of scores.
//
// A tile of queries whose runs move along together walks over the union of its runs, 64 keys at a time: keys are
// transposed once a tile, six queries (a strip) at a time take only the 16-key columns they can need, and the softmax
// is rescaled as larger scores appear. The backward pass makes the probabilities again from the rows' log sums. All
// products are one micro-kernel; the portable path is the same walk with plain loops.
#include <algorithm>

#include "../native/common.hpp"

namespace {

constexpr int64_t STRIP = 6, TILE = 48, KEYS = 64;

struct Call {
  const float *q, *k, *v, *hidden;  // (B, L, H, D), (B, S, G, D) twice, (B, S) of 0 or -inf, or null
  float *y, *logs;                  // (B, L, H, D), (B, L, H)
  const float *dy, *delta;          // as y; (B, L, H): sum of y dy less the gradient of the log sum
  float *dq, *dk, *dv;
  const int64_t *low, *high, *tiles;  // (patterns, L, runs) twice, (count + 1)
  int64_t batch, length, total, heads, groups, width, runs, patterns, count;
  float scale;
};

// y (rows, cols) = keep * y + a b; a is read with two strides, `keep` has a factor for every row, null forgets y.
using Product = void (*)(int64_t rows, int64_t cols, int64_t count, const float* a, int64_t a_row, int64_t a_step,
                         const float* b, int64_t b_row, float* y, int64_t y_row, const float* keep);
// One row of scores becomes exp(scale s + hidden - peak), zero outside low .. high; returns the factor of what was
// summed before and moves the running peak and sum on.
using Soften = float (*)(float* s, int64_t count, int64_t low, int64_t high, float scale, const float* hidden,
                         float* peak, float* sum);
// Scores and products of dy and v become probabilities and gradients of scores.
using Unsoften = void (*)(float* s, float* d, int64_t count, int64_t low, int64_t high, float scale,
                          const float* hidden, float log, float delta);
// (rows, width) -> (width, KEYS)
using Transpose = void (*)(const float* from, int64_t from_row, int64_t rows, int64_t width, float* to);

struct Arithmetic {
  Product product;
  Soften soften;
  Unsoften unsoften;
  Transpose transpose;
};

void product_plain(int64_t rows, int64_t cols, int64_t count, const float* a, int64_t a_row, int64_t a_step,
                   const float* b, int64_t b_row, float* y, int64_t y_row, const float* keep) {
  for (int64_t r = 0; r < rows; ++r) {
    float* out = y + r * y_row;
    for (int64_t c = 0; c < cols; ++c) out[c] = keep ? keep[r] * out[c] : 0.0f;
    for (int64_t j = 0; j < count; ++j) {
      const float x = a[r * a_row + j * a_step];
      const float* row = b + j * b_row;
      for (int64_t c = 0; c < cols; ++c) out[c] += x * row[c];
    }
  }
}

bool shown(const float* hidden, int64_t at) { return hidden == nullptr || hidden[at] == 0.0f; }

float soften_plain(float* s, int64_t count, int64_t low, int64_t high, float scale, const float* hidden, float* peak,
                   float* sum) {
  float most = *peak;
  for (int64_t j = 0; j < count; ++j) {
    const bool seen = j >= low && j < high && shown(hidden, j);
    s[j] = seen ? s[j] * scale : -INFINITY;
    if (!(s[j] <= most)) most = s[j];  // NaN passes
  }
  const float base = most == -INFINITY ? 0.0f : most, factor = std::exp(*peak - base);
  float total = 0.0f;
  for (int64_t j = 0; j < count; ++j) total += s[j] = s[j] == -INFINITY ? 0.0f : std::exp(s[j] - base);
  *sum = *sum * factor + total;
  *peak = most;
  return factor;
}

void unsoften_plain(float* s, float* d, int64_t count, int64_t low, int64_t high, float scale, const float* hidden,
                    float log, float delta) {
  for (int64_t j = 0; j < count; ++j) {
    const bool seen = j >= low && j < high && shown(hidden, j);
    s[j] = seen ? std::exp(s[j] * scale - log) : 0.0f;
    d[j] = seen ? s[j] * (d[j] - delta) * scale : 0.0f;
  }
}

void transpose_plain(const float* from, int64_t from_row, int64_t rows, int64_t width, float* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < width; ++d) to[d * KEYS + r] = from[r * from_row + d];
  for (int64_t d = 0; d < width; ++d)
    for (int64_t r = rows; r < KEYS; ++r) to[d * KEYS + r] = 0.0f;
}

#ifdef FW_X86
FW_PUSH(FW_AVX512)

#include "../native/vector512.hpp"

// R rows of 16 C columns, or of fewer where C is 1.
template <int R, int C>
static FW_INLINE void block512(int64_t cols, int64_t count, const float* a, int64_t a_row, int64_t a_step,
                               const float* b, int64_t b_row, float* y, int64_t y_row, const float* keep) {
  const __mmask16 mask = C == 1 ? first512(cols) : __mmask16(0xffff);
  __m512 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      acc[r][c] = keep ? _mm512_mul_ps(_mm512_set1_ps(keep[r]), _mm512_maskz_loadu_ps(mask, y + r * y_row + 16 * c))
                       : _mm512_setzero_ps();
  for (int64_t j = 0; j < count; ++j) {
    __m512 value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = _mm512_maskz_loadu_ps(mask, b + j * b_row + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 x = _mm512_set1_ps(a[r * a_row + j * a_step]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = _mm512_fmadd_ps(x, value[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) _mm512_mask_storeu_ps(y + r * y_row + 16 * c, mask, acc[r][c]);
}

template <int R>
static void rows512(int64_t cols, int64_t count, const float* a, int64_t a_row, int64_t a_step, const float* b,
                    int64_t b_row, float* y, int64_t y_row, const float* keep) {
  int64_t c = 0;
  for (; c + 64 <= cols; c += 64) block512<R, 4>(64, count, a, a_row, a_step, b + c, b_row, y + c, y_row, keep);
  for (; c + 32 <= cols; c += 32) block512<R, 2>(32, count, a, a_row, a_step, b + c, b_row, y + c, y_row, keep);
  for (; c < cols; c += 16) block512<R, 1>(cols - c, count, a, a_row, a_step, b + c, b_row, y + c, y_row, keep);
}

static void product512(int64_t rows, int64_t cols, int64_t count, const float* a, int64_t a_row, int64_t a_step,
                       const float* b, int64_t b_row, float* y, int64_t y_row, const float* keep) {
  int64_t r = 0;
  for (; r + STRIP <= rows; r += STRIP)
    rows512<STRIP>(cols, count, a + r * a_row, a_row, a_step, b, b_row, y + r * y_row, y_row, keep ? keep + r : keep);
#define FW_REST(COUNT)                                                                                           \
  case COUNT:                                                                                                    \
    rows512<COUNT>(cols, count, a + r * a_row, a_row, a_step, b, b_row, y + r * y_row, y_row, keep ? keep + r : keep); \
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

// Which of 16 keys from `at` on are between low and high and not hidden.
static FW_INLINE __mmask16 seen512(int64_t at, int64_t count, int64_t low, int64_t high, const float* hidden) {
  const int64_t last = high < count ? high : count;
  __mmask16 mask = static_cast<__mmask16>(first512(last - at) & ~first512(low - at));
  if (hidden)
    mask = _mm512_mask_cmp_ps_mask(mask, _mm512_maskz_loadu_ps(mask, hidden + at), _mm512_setzero_ps(), _CMP_EQ_OQ);
  return mask;
}

static float soften512(float* s, int64_t count, int64_t low, int64_t high, float scale, const float* hidden,
                       float* peak, float* sum) {
  __m512 most = _mm512_set1_ps(*peak);
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t j = 0; j < count; j += 16) {
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(s + j), by);
    _mm512_storeu_ps(s + j, x);
    most = _mm512_mask_max_ps(most, seen512(j, count, low, high, hidden), most, x);
  }
  const float top = _mm512_reduce_max_ps(most), base = top == -INFINITY ? 0.0f : top;
  const __m512 shift = _mm512_set1_ps(base);
  __m512 total = _mm512_setzero_ps();
  for (int64_t j = 0; j < count; j += 16) {
    const __mmask16 mask = seen512(j, count, low, high, hidden);
    const __m512 p = _mm512_maskz_mov_ps(mask, exp512(_mm512_sub_ps(_mm512_loadu_ps(s + j), shift)));
    _mm512_storeu_ps(s + j, p);
    total = _mm512_add_ps(total, p);
  }
  const float factor = *peak == top ? 1.0f : std::exp(*peak - base);
  *sum = *sum * factor + _mm512_reduce_add_ps(total);
  *peak = top;
  return factor;
}

static void unsoften512(float* s, float* d, int64_t count, int64_t low, int64_t high, float scale, const float* hidden,
                        float log, float delta) {
  const __m512 by = _mm512_set1_ps(scale), shift = _mm512_set1_ps(log), less = _mm512_set1_ps(delta);
  for (int64_t j = 0; j < count; j += 16) {
    const __mmask16 mask = seen512(j, count, low, high, hidden);
    const __m512 p = _mm512_maskz_mov_ps(mask, exp512(_mm512_fmsub_ps(_mm512_loadu_ps(s + j), by, shift)));
    const __m512 gap = _mm512_sub_ps(_mm512_loadu_ps(d + j), less);
    _mm512_storeu_ps(s + j, p);
    _mm512_storeu_ps(d + j, _mm512_maskz_mul_ps(mask, _mm512_mul_ps(p, by), gap));
  }
}

static void transpose512(const float* from, int64_t from_row, int64_t rows, int64_t width, float* to) {
  if (width % 16) return transpose_plain(from, from_row, rows, width, to);
  for (int64_t r = 0; r < KEYS; r += 16)
    for (int64_t d = 0; d < width; d += 16)
      transpose16(from + r * from_row + d, from_row, rows - r, to + d * KEYS + r, KEYS);
}

FW_END
#endif

constexpr Arithmetic PLAIN{product_plain, soften_plain, unsoften_plain, transpose_plain};
#ifdef FW_X86
constexpr Arithmetic WIDE{product512, soften512, unsoften512, transpose512};
#endif

// The smallest range that holds run m of the queries first .. last; empty where none has one.
struct Range {
  int64_t low, high;
};

Range reach(const Call& call, const int64_t* low, const int64_t* high, int64_t first, int64_t last, int64_t m) {
  Range found{call.total, 0};
  for (int64_t i = first; i < last; ++i) {
    const int64_t a = low[i * call.runs + m], b = high[i * call.runs + m];
    if (a < b) found = {std::min(found.low, a), std::max(found.high, b)};
  }
  return found;
}

// The walk of one tile: strip(i, rows, start, count) for every strip and the keys start .. start + count it needs of
// the `KEYS` keys from `at` on; open(at, n) before them, close(at, n) behind them.
template <typename Open, typename Strip, typename Close>
void walk(const Call& call, int64_t pattern, int64_t first, int64_t last, const Open& open, const Strip& strip,
          const Close& close) {
  const int64_t* low = call.low + pattern * call.length * call.runs;
  const int64_t* high = call.high + pattern * call.length * call.runs;
  for (int64_t m = 0; m < call.runs; ++m) {
    const Range whole = reach(call, low, high, first, last, m);
    Range own[TILE / STRIP];
    for (int64_t i = first, s = 0; i < last; i += STRIP, ++s)
      own[s] = reach(call, low, high, i, std::min(i + STRIP, last), m);
    for (int64_t at = whole.low; at < whole.high; at += KEYS) {
      const int64_t n = std::min(KEYS, whole.high - at);
      open(at, n);
      for (int64_t i = first, s = 0; i < last; i += STRIP, ++s) {
        const int64_t start = std::max<int64_t>(0, own[s].low - at) / 16 * 16, stop = std::min(n, own[s].high - at);
        if (start < stop) strip(i, std::min(STRIP, last - i), m, at, start, stop - start);
      }
      close(at, n);
    }
  }
}

void forward(const Call& call, const Arithmetic& use, int64_t b, int64_t h, int64_t first, int64_t last) {
  const int64_t width = call.width, q_row = call.heads * width, k_row = call.groups * width;
  const int64_t group = h / (call.heads / call.groups), pattern = call.patterns > 1 ? h : 0;
  const float* q = call.q + b * call.length * q_row + h * width;
  const float* k = call.k + b * call.total * k_row + group * width;
  const float* v = call.v + b * call.total * k_row + group * width;
  const float* hidden = call.hidden ? call.hidden + b * call.total : nullptr;
  const int64_t *low = call.low + pattern * call.length * call.runs, *high = call.high + pattern * call.length * call.runs;
  float* keys = static_cast<float*>(fw::scratch(3, (width * KEYS + TILE * width + STRIP * KEYS) * sizeof(float)));
  float *sums = keys + width * KEYS, *s = sums + TILE * width;
  float peak[TILE], total[TILE];
  std::fill(peak, peak + TILE, -INFINITY);
  std::fill(total, total + TILE, 0.0f);
  std::fill(sums, sums + TILE * width, 0.0f);
  walk(
      call, pattern, first, last,
      [&](int64_t at, int64_t n) { use.transpose(k + at * k_row, k_row, n, width, keys); },
      [&](int64_t i, int64_t rows, int64_t m, int64_t at, int64_t start, int64_t count) {
        float factor[STRIP];
        const int64_t from = at + start, row = i - first;
        use.product(rows, (count + 15) / 16 * 16, width, q + i * q_row, q_row, 1, keys + start, KEYS, s, KEYS, nullptr);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t place = (i + r) * call.runs + m;
          factor[r] = use.soften(s + r * KEYS, count, low[place] - from, high[place] - from, call.scale,
                                 hidden ? hidden + from : nullptr, peak + row + r, total + row + r);
        }
        use.product(rows, width, count, s, KEYS, 1, v + from * k_row, k_row, sums + row * width, width, factor);
      },
      [](int64_t, int64_t) {});
  for (int64_t i = first; i < last; ++i) {
    const int64_t row = i - first;
    const float by = total[row] == 0.0f ? 0.0f : 1.0f / total[row];
    float* y = call.y + (b * call.length + i) * q_row + h * width;
    for (int64_t d = 0; d < width; ++d) y[d] = sums[row * width + d] * by;
    call.logs[(b * call.length + i) * call.heads + h] = total[row] == 0.0f ? -INFINITY : peak[row] + std::log(total[row]);
  }
}

void backward(const Call& call, const Arithmetic& use, int64_t b, int64_t h, int64_t first, int64_t last) {
  const int64_t width = call.width, q_row = call.heads * width, k_row = call.groups * width;
  const int64_t group = h / (call.heads / call.groups), pattern = call.patterns > 1 ? h : 0;
  const int64_t q_at = b * call.length * q_row + h * width, k_at = b * call.total * k_row + group * width;
  const float *q = call.q + q_at, *dy = call.dy + q_at, *k = call.k + k_at, *v = call.v + k_at;
  float *dq = call.dq + q_at, *dk = call.dk + k_at, *dv = call.dv + k_at;
  const float* hidden = call.hidden ? call.hidden + b * call.total : nullptr;
  const int64_t *low = call.low + pattern * call.length * call.runs, *high = call.high + pattern * call.length * call.runs;
  float* keys = static_cast<float*>(fw::scratch(3, (2 * width * KEYS + 2 * TILE * KEYS) * sizeof(float)));
  float *values = keys + width * KEYS, *p = values + width * KEYS, *ds = p + TILE * KEYS;
  float ones[KEYS];
  std::fill(ones, ones + KEYS, 1.0f);
  walk(
      call, pattern, first, last,
      [&](int64_t at, int64_t n) {
        use.transpose(k + at * k_row, k_row, n, width, keys);
        use.transpose(v + at * k_row, k_row, n, width, values);
        std::fill(p, p + 2 * TILE * KEYS, 0.0f);
      },
      [&](int64_t i, int64_t rows, int64_t m, int64_t at, int64_t start, int64_t count) {
        const int64_t from = at + start, row = i - first, wide = (count + 15) / 16 * 16;
        float *s = p + row * KEYS + start, *d = ds + row * KEYS + start;
        use.product(rows, wide, width, q + i * q_row, q_row, 1, keys + start, KEYS, s, KEYS, nullptr);
        use.product(rows, wide, width, dy + i * q_row, q_row, 1, values + start, KEYS, d, KEYS, nullptr);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t place = (i + r) * call.runs + m, at_row = (b * call.length + i + r) * call.heads + h;
          use.unsoften(s + r * KEYS, d + r * KEYS, wide, low[place] - from, high[place] - from, call.scale,
                       hidden ? hidden + from : nullptr, call.logs[at_row], call.delta[at_row]);
        }
        use.product(rows, width, count, d, KEYS, 1, k + from * k_row, k_row, dq + i * q_row, q_row, ones);
      },
      [&](int64_t at, int64_t n) {
        use.product(n, width, last - first, p, 1, KEYS, dy + first * q_row, q_row, dv + at * k_row, k_row, ones);
        use.product(n, width, last - first, ds, 1, KEYS, q + first * q_row, q_row, dk + at * k_row, k_row, ones);
      });
}

}  // namespace

// y and logs of q, k and v.
FW_API void fw_window_attention(const Call* call, int threads) {
  const Arithmetic use = FW_PICK(PLAIN, WIDE);
  fw::parallel(call->batch * call->heads * call->count, 4, threads, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const int64_t tile = at % call->count, rest = at / call->count;
      forward(*call, use, rest / call->heads, rest % call->heads, call->tiles[tile], call->tiles[tile + 1]);
    }
  });
}

// dq, dk and dv, which start at zero. Heads that share keys are one piece of work, so that no sum is shared.
FW_API void fw_window_attention_backward(const Call* call, int threads) {
  const Arithmetic use = FW_PICK(PLAIN, WIDE);
  fw::parallel(call->batch * call->groups, 1, threads, [&](int64_t first, int64_t last) {
    const int64_t each = call->heads / call->groups;
    for (int64_t at = first; at < last; ++at)
      for (int64_t h = at % call->groups * each; h < (at % call->groups + 1) * each; ++h)
        for (int64_t tile = 0; tile < call->count; ++tile)
          backward(*call, use, at / call->groups, h, call->tiles[tile], call->tiles[tile + 1]);
  });
}
