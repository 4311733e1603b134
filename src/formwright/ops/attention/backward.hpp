// Gradients of packed attention, one document and one group of heads at a time. Part of native.cpp.
//
// With p the softmax of the scores and dp_ij = dy_i . v_j,
//
//     dv_j = sum_i p_ij dy_i,   ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij) scale,   dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i
//
// Nothing is kept of the forward pass: the scores of a few queries are made again from keys that lie transposed in the
// cache, and so are their dp from the values. Causal documents pay for what they see only.

struct Backward {
  Call forward;  // its y is not read
  const float* grad_y;
  int64_t grad_row;
  float *grad_q, *grad_k, *grad_v;  // rows side by side: (T, heads * width) and (T, groups * width)
};

// into (count, 16 C) += the transpose of p (R, count) times x (R, 16 C).
template <int R, int C>
static FW_INLINE void spread_over(const float* p, int64_t p_row, const float* x, int64_t x_row, int64_t count,
                                  float* into, int64_t into_row) {
  __m512 held[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) held[r][c] = _mm512_loadu_ps(x + r * x_row + 16 * c);
  for (int64_t j = 0; j < count; ++j) {
    __m512 acc[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[c] = _mm512_loadu_ps(into + j * into_row + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 factor = _mm512_set1_ps(p[r * p_row + j]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[c] = _mm512_fmadd_ps(factor, held[r][c], acc[c]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) _mm512_storeu_ps(into + j * into_row + 16 * c, acc[c]);
  }
}

// p of one query, still to be multiplied by `factor`, and its dp -> p, and ds in the place of dp.
static FW_INLINE void slopes(float* p, float* dp, float factor, float scale, int64_t count, int64_t padded) {
  const __m512 whole = _mm512_set1_ps(factor);
  __m512 total = _mm512_setzero_ps();
  for (int64_t j = 0; j < padded; j += 16) {
    const __m512 share = _mm512_mul_ps(_mm512_loadu_ps(p + j), whole);
    _mm512_storeu_ps(p + j, share);
    // Beyond `count` p is zero, but dp may be no number: those tokens are not seen.
    total = _mm512_mask3_fmadd_ps(share, _mm512_loadu_ps(dp + j), total, first512(count - j));
  }
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total)), by = _mm512_set1_ps(scale);
  for (int64_t j = 0; j < padded; j += 16) {
    const __m512 apart = _mm512_sub_ps(_mm512_loadu_ps(dp + j), mean);
    const __m512 share = _mm512_mul_ps(_mm512_loadu_ps(p + j), by);
    _mm512_storeu_ps(dp + j, _mm512_maskz_mul_ps(first512(count - j), share, apart));
  }
}

// Keys and values of a document, as they lie and transposed, with room for the rows of some queries.
struct Group {
  int64_t padded, kv_row, grad_row;
  const float *k, *v, *keys, *values;
  float *grad_k, *grad_v, *p, *dp;
};

// x (R, width) times a transposed (width, padded) -> R rows of `to`, every 16 of the first `columns`.
template <int R>
static FW_INLINE void against(const float* x, int64_t x_row, const float* other, const Group& own, int64_t width,
                              int64_t columns, float scale, float* to) {
  int64_t j = 0;
  for (; j + 64 <= columns; j += 64)
    scores<R, 4>(x, x_row, other + j, own.padded, width, scale, to + j, own.padded);
  for (; j < columns; j += 16) scores<R, 1>(x, x_row, other + j, own.padded, width, scale, to + j, own.padded);
}

template <int R>
static void queries_backward(const Call& call, const Group& own, const float* q, const float* dy, int64_t dy_row,
                             float* dq, int64_t dq_row, int64_t first, int64_t length) {
  const int64_t seen = call.causal ? first + R : length, padded = (seen + 15) / 16 * 16, width = call.width;
  against<R>(q, call.q_row, own.keys, own, width, padded, call.scale * LOG2E, own.p);
  against<R>(dy, dy_row, own.values, own, width, padded, 1.0f, own.dp);
  float ones[R];
  for (int r = 0; r < R; ++r) {
    const int64_t count = call.causal ? first + r + 1 : length;
    float *p = own.p + r * own.padded, *dp = own.dp + r * own.padded;
    slopes(p, dp, soften(p, count, padded), call.scale, count, padded);
    ones[r] = 1.0f;
  }
  int64_t c = 0;
  for (; c + 32 <= width; c += 32) {
    mix<R, 2>(own.dp, own.padded, own.k + c, own.kv_row, seen, ones, dq + c, dq_row);
    spread_over<R, 2>(own.dp, own.padded, q + c, call.q_row, seen, own.grad_k + c, own.grad_row);
    spread_over<R, 2>(own.p, own.padded, dy + c, dy_row, seen, own.grad_v + c, own.grad_row);
  }
  for (; c < width; c += 16) {
    mix<R, 1>(own.dp, own.padded, own.k + c, own.kv_row, seen, ones, dq + c, dq_row);
    spread_over<R, 1>(own.dp, own.padded, q + c, call.q_row, seen, own.grad_k + c, own.grad_row);
    spread_over<R, 1>(own.p, own.padded, dy + c, dy_row, seen, own.grad_v + c, own.grad_row);
  }
}

static void group_backward(const Backward& back, int64_t document, int64_t group) {
  const Call& call = back.forward;
  const int64_t start = call.offsets[document], length = call.offsets[document + 1] - start, width = call.width;
  if (length == 0) return;
  const int64_t padded = (length + 15) / 16 * 16, share = call.heads / call.groups;
  const int64_t q_grad_row = call.heads * width, kv_grad_row = call.groups * width;
  float* room = static_cast<float*>(fw::scratch(3, static_cast<size_t>((2 * width + 2 * ROWS) * padded * 4)));
  float *keys = room, *values = keys + width * padded, *p = values + width * padded;
  const int64_t at = start * call.kv_row + group * width, grad_at = start * kv_grad_row + group * width;
  const Group own = {padded,          call.kv_row, kv_grad_row, call.k + at, call.v + at,
                     keys,            values,      back.grad_k + grad_at, back.grad_v + grad_at, p,
                     p + ROWS * padded};
  for (int64_t j = 0; j < length; j += 16)
    for (int64_t d = 0; d < width; d += 16) {
      transpose16(own.k + j * own.kv_row + d, own.kv_row, length - j, keys + d * padded + j, padded);
      transpose16(own.v + j * own.kv_row + d, own.kv_row, length - j, values + d * padded + j, padded);
    }
  for (int64_t j = 0; j < length; ++j)
    for (int64_t d = 0; d < width; d += 16) {
      _mm512_storeu_ps(own.grad_k + j * kv_grad_row + d, _mm512_setzero_ps());
      _mm512_storeu_ps(own.grad_v + j * kv_grad_row + d, _mm512_setzero_ps());
    }
  for (int64_t head = group * share; head < (group + 1) * share; ++head) {
    const float* q = call.q + start * call.q_row + head * width;
    const float* dy = back.grad_y + start * back.grad_row + head * width;
    float* dq = back.grad_q + start * q_grad_row + head * width;
    int64_t i = 0;
#define FW_QUERIES(COUNT)                                                                                   \
  queries_backward<COUNT>(call, own, q + i * call.q_row, dy + i * back.grad_row, back.grad_row, \
                          dq + i * q_grad_row, q_grad_row, i, length)
    FW_EVERY(6)
    FW_EVERY(4)
    FW_EVERY(2)
    FW_EVERY(1)
#undef FW_QUERIES
  }
}
