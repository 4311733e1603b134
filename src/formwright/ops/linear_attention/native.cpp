// The causal product in float32: out_t = a_t S + sum_{s <= t} (a_t . b_s) c_s, with S grown by b_s c_s^T.
//
// One document and head at a time, 64 tokens after another: their keys are transposed once, the scores of six tokens
// stay in registers and the first-level cache, and both sums of an output run into the same accumulators. The state is
// worked on where it is given back. Without AVX-512 the recurrence runs token by token.
#include "../native/common.hpp"

namespace {

struct Call {
  const float *a, *b, *c;
  float *out, *state;      // out (tokens, heads, outer), state (documents, heads, inner, outer)
  const int64_t* offsets;  // (documents + 1)
  int64_t a_token, a_head, b_token, b_head, c_token, c_head;
  int64_t documents, heads, inner, outer;
  int reverse;
};

// One head of one document.
struct Head {
  const float *a, *b, *c;
  float *out, *state;
  int64_t length, out_token;
};

Head head_of(const Call& call, int64_t document, int64_t head) {
  const int64_t first = call.offsets[document], out_token = call.heads * call.outer;
  return {call.a + first * call.a_token + head * call.a_head,
          call.b + first * call.b_token + head * call.b_head,
          call.c + first * call.c_token + head * call.c_head,
          call.out + first * out_token + head * call.outer,
          call.state + (document * call.heads + head) * call.inner * call.outer,
          call.offsets[document + 1] - first,
          out_token};
}

void head_plain(const Call& call, const Head& h) {
  for (int64_t step = 0; step < h.length; ++step) {
    const int64_t t = call.reverse ? h.length - 1 - step : step;
    const float *a = h.a + t * call.a_token, *b = h.b + t * call.b_token, *c = h.c + t * call.c_token;
    float* out = h.out + t * h.out_token;
    for (int64_t e = 0; e < call.outer; ++e) out[e] = 0.0f;
    for (int64_t d = 0; d < call.inner; ++d) {
      float* state = h.state + d * call.outer;
      for (int64_t e = 0; e < call.outer; ++e) {
        state[e] += b[d] * c[e];
        out[e] += a[d] * state[e];
      }
    }
  }
}

#ifdef FW_X86
FW_PUSH(FW_AVX512)

#include "../native/vector512.hpp"

constexpr int64_t CHUNK = 64, ROWS = 6;

// A product to add: element (r, i) of x at x + r x_row + i x_step, row i of y at y + i y_row.
struct Term {
  const float* x;
  int64_t x_row, x_step;
  const float* y;
  int64_t y_row, count;
};

// R rows and 16 C columns of a sum of products; the last vector of columns is cut by `tail`.
template <int R, int C>
static FW_INLINE void tile(const Term* terms, int number, float* to, int64_t to_row, bool add, __mmask16 tail) {
  __m512 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      acc[r][c] = add ? _mm512_maskz_loadu_ps(c + 1 < C ? 0xffff : tail, to + r * to_row + 16 * c) : _mm512_setzero_ps();
  for (int n = 0; n < number; ++n) {
    const Term& term = terms[n];
    for (int64_t i = 0; i < term.count; ++i) {
      __m512 y[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        y[c] = _mm512_maskz_loadu_ps(c + 1 < C ? 0xffff : tail, term.y + i * term.y_row + 16 * c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512 x = _mm512_set1_ps(term.x[r * term.x_row + i * term.x_step]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = _mm512_fmadd_ps(x, y[c], acc[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      _mm512_mask_storeu_ps(to + r * to_row + 16 * c, c + 1 < C ? 0xffff : tail, acc[r][c]);
}

template <int R>
static void strip(const Term* given, int number, float* to, int64_t to_row, int64_t columns, bool add) {
  Term terms[2] = {given[0], given[number - 1]};
  for (int64_t j = 0; j < columns; j += 64) {
    const int64_t left = columns - j;
    const __mmask16 tail = first512(left >= 64 ? 16 : (left - 1) % 16 + 1);
    if (left > 48)
      tile<R, 4>(terms, number, to + j, to_row, add, tail);
    else if (left > 32)
      tile<R, 3>(terms, number, to + j, to_row, add, tail);
    else if (left > 16)
      tile<R, 2>(terms, number, to + j, to_row, add, tail);
    else
      tile<R, 1>(terms, number, to + j, to_row, add, tail);
    for (Term& term : terms) term.y += 64;
  }
}

// `rows` (at most ROWS) rows of the sum of one or two products.
static void rows_of(int64_t rows, const Term* terms, int number, float* to, int64_t to_row, int64_t columns, bool add) {
  switch (rows) {
    case 6: return strip<6>(terms, number, to, to_row, columns, add);
    case 5: return strip<5>(terms, number, to, to_row, columns, add);
    case 4: return strip<4>(terms, number, to, to_row, columns, add);
    case 3: return strip<3>(terms, number, to, to_row, columns, add);
    case 2: return strip<2>(terms, number, to, to_row, columns, add);
    default: return strip<1>(terms, number, to, to_row, columns, add);
  }
}

// Tokens `first` .. `first` + `rows` of a chunk of `count`: scores with the tokens that they may see, then both sums.
static void tokens512(const Call& call, const Head& h, const float* a, const float* c, float* out, const float* keys,
                      float* scores, int64_t first, int64_t rows, int64_t count) {
  const int64_t from = call.reverse ? first : 0, to = call.reverse ? count : first + rows;
  const Term score{a, call.a_token, 1, keys + from, CHUNK, call.inner};
  rows_of(rows, &score, 1, scores, CHUNK, to - from, false);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t own = first + r - from;
    const int64_t hidden = call.reverse ? 0 : own + 1, end = call.reverse ? own : to - from;
    for (int64_t s = hidden; s < end; ++s) scores[r * CHUNK + s] = 0.0f;
  }
  const Term sums[2] = {{scores, CHUNK, 1, c + from * call.c_token, call.c_token, to - from},
                        {a, call.a_token, 1, h.state, call.outer, call.inner}};
  rows_of(rows, sums, 2, out, h.out_token, call.outer, false);
}

static void head512(const Call& call, const Head& h) {
  float* keys = static_cast<float*>(fw::scratch(3, static_cast<size_t>((call.inner + ROWS) * CHUNK * 4)));
  float* scores = keys + call.inner * CHUNK;
  const int64_t chunks = (h.length + CHUNK - 1) / CHUNK;
  for (int64_t step = 0; step < chunks; ++step) {
    const int64_t start = (call.reverse ? chunks - 1 - step : step) * CHUNK;
    const int64_t count = h.length - start < CHUNK ? h.length - start : CHUNK;
    const float *a = h.a + start * call.a_token, *b = h.b + start * call.b_token, *c = h.c + start * call.c_token;
    for (int64_t s = 0; s < count; ++s)
      for (int64_t d = 0; d < call.inner; ++d) keys[d * CHUNK + s] = b[s * call.b_token + d];
    for (int64_t i = 0; i < count; i += ROWS)
      tokens512(call, h, a + i * call.a_token, c, h.out + (start + i) * h.out_token, keys, scores, i,
                count - i < ROWS ? count - i : ROWS, count);
    for (int64_t d = 0; d < call.inner; d += ROWS) {
      const Term grown{b + d, 1, call.b_token, c, call.c_token, count};
      rows_of(call.inner - d < ROWS ? call.inner - d : ROWS, &grown, 1, h.state + d * call.outer, call.outer,
              call.outer, true);
    }
  }
}

FW_END
#endif

}  // namespace

// `state` holds what each document starts from, and then what it ends with.
FW_API void fw_causal_product(const Call* call, int threads) {
  const auto run = FW_PICK(head_plain, head512);
  fw::parallel(call->documents * call->heads, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) run(*call, head_of(*call, at / call->heads, at % call->heads));
  });
}
