// Softmax attention over documents laid end to end, in float32, one document and one head at a time.
//
// A head of a document is small: its keys, transposed once, and the scores of a few queries stay in the first-level
// cache, so nothing but q, k, v and the output touches memory and nothing is spent on padding. Work is handed out by
// (document, head). Scores of a row are exponentiated against their true maximum, as in the definition; they carry
// log2 e in their scale, so that the power is of two.
//
// Where a caller allows it and the processor has them, both products take bfloat16 factors, two an instruction, and add
// in float32. Then q, k, v and the exponentials are rounded to 8 bits of mantissa, and nothing else is.
#include "../native/calls.hpp"

namespace {

using Call = fw::Attention;

#ifdef FW_X86
FW_PUSH(FW_AVX512)

#include "../native/vector512.hpp"

constexpr int64_t ROWS = 8;  // room is made for so many queries at a time
constexpr float LOG2E = 1.44269504f;

// FW_QUERIES(count) for every `count` queries from i on that are left.
#define FW_EVERY(count)                     \
  for (; i + count <= length; i += count) { \
    FW_QUERIES(count);                      \
  }

// Asks for what the next head reads of R rows. Rows of a head lie apart, so that the processor does not guess them;
// past the last head the lines are of no use and do no harm.
template <int R>
static FW_INLINE void foresee(const float* x, int64_t x_row, int64_t width) {
  for (int r = 0; r < R; ++r)
    for (int64_t d = 0; d < width; d += 16)
      _mm_prefetch(reinterpret_cast<const char*>(x + r * x_row + width + d), _MM_HINT_T1);
}

// Scores of R queries with 16 C keys.
template <int R, int C>
static FW_INLINE void scores(const float* q, int64_t q_row, const float* keys, int64_t keys_row, int64_t width,
                             float scale, float* s, int64_t s_row) {
  __m512 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = _mm512_setzero_ps();
  for (int64_t d = 0; d < width; ++d) {
    __m512 key[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) key[c] = _mm512_loadu_ps(keys + d * keys_row + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 x = _mm512_set1_ps(q[r * q_row + d]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = _mm512_fmadd_ps(x, key[c], acc[r][c]);
    }
  }
  const __m512 factor = _mm512_set1_ps(scale);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) _mm512_storeu_ps(s + r * s_row + 16 * c, _mm512_mul_ps(acc[r][c], factor));
}

// The largest of `count`, in every lane.
static FW_INLINE __m512 peak512(const float* s, int64_t count) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t j = 0; j < count; j += 16)
    most = _mm512_mask_max_ps(most, first512(count - j), most, _mm512_loadu_ps(s + j));
  return _mm512_set1_ps(_mm512_reduce_max_ps(most));
}

// 2^(s - max) in place, zero beyond `count` -> 1 / sum.
static FW_INLINE float soften(float* s, int64_t count, int64_t padded) {
  const __m512 peak = peak512(s, count);
  __m512 total = _mm512_setzero_ps();
  for (int64_t j = 0; j < padded; j += 16) {
    const __mmask16 mask = first512(count - j);
    const __m512 p = _mm512_maskz_mov_ps(mask, power512<5>(_mm512_sub_ps(_mm512_loadu_ps(s + j), peak)));
    _mm512_storeu_ps(s + j, p);
    total = _mm512_add_ps(total, p);
  }
  return 1.0f / _mm512_reduce_add_ps(total);
}

// R rows of p (count) times v (count, 16 C).
template <int R, int C>
static FW_INLINE void mix(const float* p, int64_t p_row, const float* v, int64_t v_row, int64_t count,
                          const float* factor, float* y, int64_t y_row) {
  __m512 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = _mm512_setzero_ps();
  for (int64_t j = 0; j < count; ++j) {
    __m512 value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = _mm512_loadu_ps(v + j * v_row + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 x = _mm512_set1_ps(p[r * p_row + j]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = _mm512_fmadd_ps(x, value[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      _mm512_storeu_ps(y + r * y_row + 16 * c, _mm512_mul_ps(acc[r][c], _mm512_set1_ps(factor[r])));
}

template <int R>
static void queries(const Call& call, const float* q, const float* keys, int64_t keys_row, const float* v, float* y,
                    int64_t first, int64_t length, float* s) {
  const int64_t seen = call.causal ? first + R : length, padded = (seen + 15) / 16 * 16;
  const float scale = call.scale * LOG2E;
  int64_t j = 0;
  for (; j + 64 <= padded; j += 64)
    scores<R, 4>(q, call.q_row, keys + j, keys_row, call.width, scale, s + j, keys_row);
  if (j + 32 <= padded) {
    scores<R, 2>(q, call.q_row, keys + j, keys_row, call.width, scale, s + j, keys_row);
    j += 32;
  }
  if (j < padded) scores<R, 1>(q, call.q_row, keys + j, keys_row, call.width, scale, s + j, keys_row);
  float factor[R];
  for (int r = 0; r < R; ++r)
    factor[r] = soften(s + r * keys_row, call.causal ? first + r + 1 : length, padded);
  int64_t c = 0;
  for (; c + 64 <= call.width; c += 64)
    mix<R, 4>(s, keys_row, v + c, call.kv_row, seen, factor, y + c, call.y_row);
  for (; c + 32 <= call.width; c += 32)
    mix<R, 2>(s, keys_row, v + c, call.kv_row, seen, factor, y + c, call.y_row);
  for (; c < call.width; c += 16) mix<R, 1>(s, keys_row, v + c, call.kv_row, seen, factor, y + c, call.y_row);
}

static void head512(const Call& call, int64_t document, int64_t head) {
  const int64_t start = call.offsets[document], length = call.offsets[document + 1] - start;
  if (length == 0) return;
  const int64_t padded = (length + 15) / 16 * 16, group = head / (call.heads / call.groups);
  const float* q = call.q + start * call.q_row + head * call.width;
  const float* k = call.k + start * call.kv_row + group * call.width;
  const float* v = call.v + start * call.kv_row + group * call.width;
  float* y = call.y + start * call.y_row + head * call.width;
  float* keys = static_cast<float*>(fw::scratch(3, static_cast<size_t>((call.width + ROWS) * padded * 4)));
  float* s = keys + call.width * padded;
  for (int64_t j = 0; j < length; j += 16)
    for (int64_t d = 0; d < call.width; d += 16)
      transpose16(k + j * call.kv_row + d, call.kv_row, length - j, keys + d * padded + j, padded);
  int64_t i = 0;
#define FW_QUERIES(COUNT)                                                               \
  foresee<COUNT>(q + i * call.q_row, call.q_row, call.width);                           \
  foresee<COUNT>(k + i * call.kv_row, call.kv_row, call.width);                         \
  foresee<COUNT>(v + i * call.kv_row, call.kv_row, call.width);                         \
  queries<COUNT>(call, q + i * call.q_row, keys, padded, v, y + i * call.y_row, i, length, s)
  FW_EVERY(6)
  FW_EVERY(4)
  FW_EVERY(2)
  FW_EVERY(1)
#undef FW_QUERIES
}

#include "backward.hpp"

FW_END

#ifdef FW_AVX512_BF16
FW_PUSH(FW_AVX512_BF16)

// Two neighbouring terms are one 32-bit lane, a pair: of queries and exponentials as they lie, of keys transposed as
// such, of values two rows woven together. R rows of `count` pairs times rows of 16 C pairs, each row times its factor.
template <int R, int C>
static FW_INLINE void pairs(const int32_t* x, int64_t x_row, const int32_t* w, int64_t w_row, int64_t count,
                            const float* factor, float* y, int64_t y_row) {
  __m512 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = _mm512_setzero_ps();
  for (int64_t d = 0; d < count; ++d) {
    __m512bh held[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) held[c] = (__m512bh)_mm512_loadu_si512(w + d * w_row + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512bh one = (__m512bh)_mm512_set1_epi32(x[r * x_row + d]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], one, held[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      _mm512_storeu_ps(y + r * y_row + 16 * c, _mm512_mul_ps(acc[r][c], _mm512_set1_ps(factor[r])));
}

// The same for `columns` of them, a multiple of 32.
template <int R>
static FW_INLINE void pairs_across(const int32_t* x, int64_t x_row, const int32_t* w, int64_t w_row, int64_t count,
                                   const float* factor, float* y, int64_t y_row, int64_t columns) {
  int64_t c = 0;
  if constexpr (R < 8)  // of 32 registers
    for (; c + 64 <= columns; c += 64) pairs<R, 4>(x, x_row, w + c, w_row, count, factor, y + c, y_row);
  for (; c < columns; c += 32) pairs<R, 2>(x, x_row, w + c, w_row, count, factor, y + c, y_row);
}

// `count` floats, a multiple of 32 -> half as many pairs.
static FW_INLINE void narrow(const float* from, int64_t count, int32_t* to) {
  for (int64_t d = 0; d < count; d += 32) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + d + 16), _mm512_loadu_ps(from + d));
    _mm512_storeu_si512(to + d / 2, (__m512i)both);
  }
}

// 16 floats of one row and, unless it is null, of the next -> 16 pairs.
static FW_INLINE void weave(const float* low, const float* high, int32_t* to) {
  static constexpr int16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512 next = high != nullptr ? _mm512_loadu_ps(high) : _mm512_setzero_ps();
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(next, _mm512_loadu_ps(low));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER), both));
}

// 2^(s - max) as pairs, zero beyond `count` -> 1 / sum. Degree 3 is right to 13 bits, of which rounding keeps 8.
static FW_INLINE float soften_pairs(const float* s, int64_t count, int64_t padded, int32_t* to) {
  const __m512 peak = peak512(s, count);
  __m512 total = _mm512_setzero_ps();
  for (int64_t j = 0; j < padded; j += 32) {
    __m512 low = power512<3>(_mm512_sub_ps(_mm512_loadu_ps(s + j), peak));
    __m512 high = power512<3>(_mm512_sub_ps(_mm512_loadu_ps(s + j + 16), peak));
    if (j + 32 > count) {
      low = _mm512_maskz_mov_ps(first512(count - j), low);
      high = _mm512_maskz_mov_ps(first512(count - j - 16), high);
    }
    _mm512_storeu_si512(to + j / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    total = _mm512_add_ps(total, _mm512_add_ps(low, high));
  }
  return 1.0f / _mm512_reduce_add_ps(total);
}

// A head of a document as pairs, keys (width / 2, padded) and values (padded / 2, width), and room for ROWS queries.
struct Narrowed {
  int64_t padded;
  int32_t *keys, *values, *q, *p;
  float* s;
};

template <int R>
static void queries_bf16(const Call& call, const Narrowed& head, const float* q, float* y, int64_t first,
                         int64_t length) {
  const int64_t seen = call.causal ? first + R : length, padded = (seen + 31) / 32 * 32, half = call.width / 2;
  float factor[R];
  for (int r = 0; r < R; ++r) {
    narrow(q + r * call.q_row, call.width, head.q + r * half);
    factor[r] = call.scale * LOG2E;
  }
  pairs_across<R>(head.q, half, head.keys, head.padded, half, factor, head.s, head.padded, padded);
  for (int r = 0; r < R; ++r) {
    const int64_t count = call.causal ? first + r + 1 : length;
    factor[r] = soften_pairs(head.s + r * head.padded, count, padded, head.p + r * head.padded / 2);
  }
  pairs_across<R>(head.p, head.padded / 2, head.values, call.width, (seen + 1) / 2, factor, y, call.y_row, call.width);
}

static void head_bf16(const Call& call, int64_t document, int64_t head) {
  const int64_t start = call.offsets[document], length = call.offsets[document + 1] - start;
  if (length == 0) return;
  const int64_t padded = (length + 31) / 32 * 32, group = head / (call.heads / call.groups), half = call.width / 2;
  const float* q = call.q + start * call.q_row + head * call.width;
  const float* k = call.k + start * call.kv_row + group * call.width;
  const float* v = call.v + start * call.kv_row + group * call.width;
  float* y = call.y + start * call.y_row + head * call.width;
  const int64_t each = half * padded;
  const int64_t lanes = 3 * each + ROWS * (half + padded / 2 + padded);
  int32_t* keys = static_cast<int32_t*>(fw::scratch(3, static_cast<size_t>(lanes) * 4));
  int32_t *values = keys + each, *rows = values + each, *own = rows + each, *p = own + ROWS * half;
  const Narrowed held = {padded, keys, values, own, p, reinterpret_cast<float*>(p + ROWS * padded / 2)};
  for (int64_t j = 0; j < length; ++j) narrow(k + j * call.kv_row, call.width, rows + j * half);
  for (int64_t j = 0; j < padded; j += 16)
    for (int64_t d = 0; d < half; d += 16)
      transpose16(reinterpret_cast<const float*>(rows + j * half + d), half, length - j,
                  reinterpret_cast<float*>(keys + d * padded + j), padded);
  for (int64_t j = 0; j < length; j += 2)
    for (int64_t c = 0; c < call.width; c += 16) {
      const float* low = v + j * call.kv_row + c;
      weave(low, j + 1 < length ? low + call.kv_row : nullptr, values + j / 2 * call.width + c);
    }
  int64_t i = 0;
#define FW_QUERIES(COUNT)                                                               \
  foresee<COUNT>(q + i * call.q_row, call.q_row, call.width);                           \
  foresee<COUNT>(k + i * call.kv_row, call.kv_row, call.width);                         \
  foresee<COUNT>(v + i * call.kv_row, call.kv_row, call.width);                         \
  queries_bf16<COUNT>(call, held, q + i * call.q_row, y + i * call.y_row, i, length)
  FW_EVERY(8)
  FW_EVERY(4)
  FW_EVERY(2)
  FW_EVERY(1)
#undef FW_QUERIES
}

FW_END
#endif
#endif

}  // namespace

// Whether fw_attention_packed runs on this processor.
FW_API int fw_attention_ready() { return fw::level() == fw::VNNI; }

// q (T, heads, width), k and v (T, groups, width) with the strides of `call` -> y. width is a multiple of 16.
FW_API void fw_attention_packed(const Call* call, int threads) {
#ifdef FW_X86
#ifdef FW_AVX512_BF16
  if (call->rounded && call->width % 32 == 0 && fw::bfloat16())
    return fw::parallel(call->documents * call->heads, 4, threads, [&](int64_t first, int64_t last) {
      for (int64_t at = first; at < last; ++at) head_bf16(*call, at / call->heads, at % call->heads);
    });
#endif
  fw::parallel(call->documents * call->heads, 4, threads, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) head512(*call, at / call->heads, at % call->heads);
  });
#else
  (void)call, (void)threads;
#endif
}

// The gradients of q, k and v, from that of y; in float32 whatever `rounded` says.
FW_API void fw_attention_packed_backward(const void* given, int threads) {
#ifdef FW_X86
  const Backward& back = *static_cast<const Backward*>(given);
  const Call& call = back.forward;
  fw::parallel(call.documents * call.groups, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) group_backward(back, at / call.groups, at % call.groups);
  });
#else
  (void)given, (void)threads;
#endif
}
