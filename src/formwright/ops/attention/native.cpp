// Softmax attention over documents laid end to end, in float32, one document and one head at a time.
//
// A head of a document is small: its keys, transposed once, and the scores of six queries stay in the first-level
// cache, so nothing but q, k, v and the output touches memory and nothing is spent on padding. Work is handed out by
// (document, head). Scores of a row are exponentiated against their true maximum, as in the definition.
#include "../native/calls.hpp"

namespace {

using Call = fw::Attention;

#ifdef FW_X86
FW_PUSH(FW_AVX512)

#include "../native/vector512.hpp"

constexpr int64_t ROWS = 6;

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

// exp(s - max) in place, zero beyond `count` -> 1 / sum.
static FW_INLINE float soften(float* s, int64_t count, int64_t padded) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t j = 0; j < count; j += 16)
    most = _mm512_mask_max_ps(most, first512(count - j), most, _mm512_loadu_ps(s + j));
  const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m512 total = _mm512_setzero_ps();
  for (int64_t j = 0; j < padded; j += 16) {
    const __mmask16 mask = first512(count - j);
    const __m512 p = _mm512_maskz_mov_ps(mask, exp512(_mm512_sub_ps(_mm512_loadu_ps(s + j), peak)));
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
  int64_t j = 0;
  for (; j + 64 <= padded; j += 64)
    scores<R, 4>(q, call.q_row, keys + j, keys_row, call.width, call.scale, s + j, keys_row);
  if (j + 32 <= padded) {
    scores<R, 2>(q, call.q_row, keys + j, keys_row, call.width, call.scale, s + j, keys_row);
    j += 32;
  }
  if (j < padded) scores<R, 1>(q, call.q_row, keys + j, keys_row, call.width, call.scale, s + j, keys_row);
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
  for (; i + ROWS <= length; i += ROWS)
    queries<ROWS>(call, q + i * call.q_row, keys, padded, v, y + i * call.y_row, i, length, s);
#define FW_REST(COUNT)                                                                                      \
  case COUNT:                                                                                               \
    queries<COUNT>(call, q + i * call.q_row, keys, padded, v, y + i * call.y_row, i, length, s);            \
    break
  switch (length - i) {
    FW_REST(1);
    FW_REST(2);
    FW_REST(3);
    FW_REST(4);
    FW_REST(5);
  }
#undef FW_REST
}

FW_END
#endif

}  // namespace

// Whether fw_attention_packed runs on this processor.
FW_API int fw_attention_ready() { return fw::level() == fw::VNNI; }

// q (T, heads, width), k and v (T, groups, width) with the strides of `call` -> y. width is a multiple of 16.
FW_API void fw_attention_packed(const Call* call, int threads) {
#ifdef FW_X86
  fw::parallel(call->documents * call->heads, 4, threads, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) head512(*call, at / call->heads, at % call->heads);
  });
#else
  (void)call, (void)threads;
#endif
}
