// The delta rule in float32, one document and one head at a time, in chunks of 32 tokens.
//
// The state of a head and all matrices of a chunk stay in the second-level cache; memory is read and written once. In a
// chunk, with KK = K K^T below its diagonal and P = Q K^T with it, errors come from a triangular solve and writes from
// them:
//
//     E = V - K S - KK X,    X = diag(b) E,    O = Q S + P X,    S <- S + K^T X
//
// The backward pass goes through the chunks in reverse, with what the forward pass kept: E, and S before every chunk.
// Heads are padded to 16 floats and chunks to 4 rows, both with zeros, so products have no ragged edges.
#include "../native/common.hpp"

namespace {

constexpr int64_t CHUNK = 32, LANES = 16, ROWS = 4, WIDEST = 256;

struct Call {
  const float *q, *k, *v, *beta, *state;  // (T, heads, keys) or (T, heads, values), (T, heads), (documents, heads, ...)
  float *out, *last;
  float *errors, *states;  // (T, heads, values) and (chunks, heads, keys, values), or null where nothing is kept
  const float *d_out, *d_last;
  float *d_q, *d_k, *d_v, *d_beta, *d_state;
  const int64_t* borders;  // (documents + 1)
  int64_t documents, heads, keys, values;
  float scale;
};

// Which entries of a product are needed: all; those of a lower triangle; or all, from a left factor that is itself a
// lower or an upper triangle.
enum Reach { ALL, LOWER, FROM_LOWER, FROM_UPPER };

struct Left {
  const float* at;
  int64_t row, column;
};

inline int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

struct Bounds {
  int64_t first, last, columns;  // of the inner axis, and of the result
};

inline Bounds bounds(Reach reach, int64_t row, int64_t columns, int64_t inner) {
  const int64_t below = row + ROWS;
  return {reach == FROM_UPPER ? row : 0, reach == FROM_LOWER && below < inner ? below : inner,
          reach == LOWER && below < columns ? whole(below, LANES) : columns};
}

// One token by the recurrence itself.
FW_INLINE void one_step(const float* q, const float* k, const float* v, float beta, float scale, const float* state,
                        float* last, float* out, float* error, int64_t keys, int64_t values) {
  float missing[WIDEST], found[WIDEST];
  for (int64_t j = 0; j < values; ++j) missing[j] = v[j], found[j] = 0.0f;
  for (int64_t i = 0; i < keys; ++i)
    for (int64_t j = 0; j < values; ++j) missing[j] -= k[i] * state[i * values + j];
  if (error != nullptr) std::memcpy(error, missing, static_cast<size_t>(values) * sizeof(float));
  for (int64_t j = 0; j < values; ++j) missing[j] *= beta;
  for (int64_t i = 0; i < keys; ++i)
    for (int64_t j = 0; j < values; ++j) {
      const float now = state[i * values + j] + k[i] * missing[j];
      last[i * values + j] = now;
      found[j] += q[i] * now;
    }
  for (int64_t j = 0; j < values; ++j) out[j] = scale * found[j];
}

// The arithmetic for any processor.
struct Plain {
  // c (rows, columns) = sign * a b, or added to what is there; see Reach.
  static void product(float* c, int64_t c_row, Left a, const float* b, int64_t b_row, int64_t rows, int64_t columns,
                      int64_t inner, float sign, bool add, Reach reach) {
    for (int64_t r = 0; r < rows; ++r) {
      const Bounds to = bounds(reach, r / ROWS * ROWS, columns, inner);
      float* y = c + r * c_row;
      if (!add) std::memset(y, 0, static_cast<size_t>(to.columns) * sizeof(float));
      for (int64_t i = to.first; i < to.last; ++i) {
        const float factor = sign * a.at[r * a.row + i * a.column];
        for (int64_t j = 0; j < to.columns; ++j) y[j] += factor * b[i * b_row + j];
      }
    }
  }

  // y_r -= sum of t_ri x_i over the rows before r (after r where `up`), x_r = b_r y_r.
  static void solve(Left t, const float* b, float* y, float* x, int64_t rows, int64_t columns, bool up) {
    for (int64_t step = 0; step < rows; ++step) {
      const int64_t r = up ? rows - 1 - step : step;
      for (int64_t i = up ? r + 1 : 0; i < (up ? rows : r); ++i) {
        const float factor = t.at[r * t.row + i * t.column];
        for (int64_t j = 0; j < columns; ++j) y[r * columns + j] -= factor * x[i * columns + j];
      }
      for (int64_t j = 0; j < columns; ++j) x[r * columns + j] = b[r] * y[r * columns + j];
    }
  }

  // from (rows, columns) -> to (columns, to_row), zeros beyond the rows.
  static void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < to_row; ++i) to[j * to_row + i] = i < rows ? from[i * columns + j] : 0.0f;
  }

  static void step(const float* q, const float* k, const float* v, float beta, float scale, const float* state,
                   float* last, float* out, float* error, int64_t keys, int64_t values) {
    one_step(q, k, v, beta, scale, state, last, out, error, keys, values);
  }
};

#ifdef FW_X86
FW_PUSH(FW_AVX512)

#include "../native/vector512.hpp"

template <int V>
static FW_INLINE void tile(float* c, int64_t c_row, Left a, const float* b, int64_t b_row, int64_t first, int64_t last,
                           float sign, bool add) {
  __m512 acc[ROWS][V];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
  for (int64_t i = first; i < last; ++i) {
    __m512 right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = _mm512_loadu_ps(b + i * b_row + LANES * v);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m512 left = _mm512_set1_ps(a.at[r * a.row + i * a.column]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_fmadd_ps(left, right[v], acc[r][v]);
    }
  }
  const __m512 factor = _mm512_set1_ps(sign);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < V; ++v) {
      float* y = c + r * c_row + LANES * v;
      const __m512 base = add ? _mm512_loadu_ps(y) : _mm512_setzero_ps();
      _mm512_storeu_ps(y, _mm512_fmadd_ps(factor, acc[r][v], base));
    }
}

// Four rows of the solve, 16 V columns: the rows that are done, then the four among themselves.
template <int V, bool UP>
static FW_INLINE void solve_rows(Left t, const float* b, float* y, float* x, int64_t columns, int64_t row,
                                 int64_t rows) {
  __m512 acc[ROWS][V];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_loadu_ps(y + (row + r) * columns + LANES * v);
  for (int64_t i = UP ? row + ROWS : 0; i < (UP ? rows : row); ++i) {
    __m512 done[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) done[v] = _mm512_loadu_ps(x + i * columns + LANES * v);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m512 factor = _mm512_set1_ps(t.at[(row + r) * t.row + i * t.column]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_fnmadd_ps(factor, done[v], acc[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int step = 0; step < ROWS; ++step) {
    const int r = UP ? ROWS - 1 - step : step;
    const __m512 rate = _mm512_set1_ps(b[row + r]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512 done = _mm512_mul_ps(rate, acc[r][v]);
      _mm512_storeu_ps(y + (row + r) * columns + LANES * v, acc[r][v]);
      _mm512_storeu_ps(x + (row + r) * columns + LANES * v, done);
#pragma GCC unroll 4
      for (int other = 0; other < ROWS; ++other)
        if (UP ? other < r : other > r) {
          const __m512 factor = _mm512_set1_ps(t.at[(row + other) * t.row + (row + r) * t.column]);
          acc[other][v] = _mm512_fnmadd_ps(factor, done, acc[other][v]);
        }
    }
  }
}

template <bool UP>
static void solve_columns(Left t, const float* b, float* y, float* x, int64_t rows, int64_t columns) {
  for (int64_t step = 0; step < rows; step += ROWS) {
    const int64_t row = UP ? rows - ROWS - step : step;
    int64_t j = 0;
    for (; j + 64 <= columns; j += 64) solve_rows<4, UP>(t, b, y + j, x + j, columns, row, rows);
    for (; j < columns; j += 16) solve_rows<1, UP>(t, b, y + j, x + j, columns, row, rows);
  }
}

// The same arithmetic for AVX-512.
struct Wide {
  static void product(float* c, int64_t c_row, Left a, const float* b, int64_t b_row, int64_t rows, int64_t columns,
                      int64_t inner, float sign, bool add, Reach reach) {
    for (int64_t r = 0; r < rows; r += ROWS) {
      const Bounds to = bounds(reach, r, columns, inner);
      const Left left{a.at + r * a.row, a.row, a.column};
      float* y = c + r * c_row;
      int64_t j = 0;
      for (; j + 64 <= to.columns; j += 64)
        tile<4>(y + j, c_row, left, b + j, b_row, to.first, to.last, sign, add);
      for (; j + 32 <= to.columns; j += 32)
        tile<2>(y + j, c_row, left, b + j, b_row, to.first, to.last, sign, add);
      for (; j < to.columns; j += 16) tile<1>(y + j, c_row, left, b + j, b_row, to.first, to.last, sign, add);
    }
  }

  static void solve(Left t, const float* b, float* y, float* x, int64_t rows, int64_t columns, bool up) {
    up ? solve_columns<true>(t, b, y, x, rows, columns) : solve_columns<false>(t, b, y, x, rows, columns);
  }

  static void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    for (int64_t i = 0; i < to_row; i += LANES)
      for (int64_t j = 0; j < columns; j += LANES)
        transpose16(from + i * columns + j, columns, rows - i, to + j * to_row + i, to_row);
  }

  static void step(const float* q, const float* k, const float* v, float beta, float scale, const float* state,
                   float* last, float* out, float* error, int64_t keys, int64_t values) {
    one_step(q, k, v, beta, scale, state, last, out, error, keys, values);
  }
};

FW_END
#endif

// rows of `width` floats every `stride`, times `factor` -> contiguous rows of `wide`; `padded` rows in all.
void gather(const float* from, int64_t stride, int64_t rows, int64_t width, float factor, float* to, int64_t padded,
            int64_t wide) {
  for (int64_t i = 0; i < padded; ++i) {
    float* row = to + i * wide;
    const int64_t filled = i < rows ? width : 0;
    for (int64_t j = 0; j < filled; ++j) row[j] = factor * from[i * stride + j];
    for (int64_t j = filled; j < wide; ++j) row[j] = 0.0f;
  }
}

void scatter(const float* from, int64_t wide, int64_t rows, int64_t width, float factor, float* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) to[i * stride + j] = factor * from[i * wide + j];
}

// Clears the entries that products by blocks of four rows wrote above the diagonal, and the diagonal unless `keep`.
void clear_above(float* square, int64_t rows, bool keep) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = keep ? i + 1 : i; j < whole(i + 1, ROWS); ++j) square[i * CHUNK + j] = 0.0f;
}

// Where one head of one document lies, and memory for its chunks.
struct Head {
  const Call& call;
  int64_t head, start, length, chunks, first;  // `first`: place of its first chunk among the kept states
  int64_t dk, dv;                              // widths padded to whole vectors
  float* free;

  Head(const Call& given, int64_t document, int64_t which)
      : call(given),
        head(which),
        start(given.borders[document]),
        length(given.borders[document + 1] - start),
        chunks((length + CHUNK - 1) / CHUNK),
        first(start / CHUNK + document),
        dk(whole(given.keys, LANES)),
        dv(whole(given.values, LANES)) {
    const int64_t floats = 4 * dk * dv + CHUNK * (5 * dk + 6 * dv + 4 * CHUNK + 1);
    free = static_cast<float*>(fw::scratch(3, static_cast<size_t>(floats) * sizeof(float)));
  }

  float* take(int64_t floats) {
    float* taken = free;
    free += floats;
    return taken;
  }
  int64_t token(int64_t chunk) const { return (start + chunk * CHUNK) * call.heads + head; }
  int64_t rows(int64_t chunk) const { return chunk + 1 < chunks ? CHUNK : length - chunk * CHUNK; }
  int64_t kept(int64_t chunk) const { return ((first + chunk) * call.heads + head) * call.keys * call.values; }
  int64_t key_stride() const { return call.heads * call.keys; }
  int64_t value_stride() const { return call.heads * call.values; }
  void load(const float* from, float* state) const { gather(from, call.values, call.keys, call.values, 1, state, dk, dv); }
  void store(const float* state, float* to) const { scatter(state, dv, call.keys, call.values, 1, to, call.values); }
};

// Matrices of a chunk that both passes need.
template <typename Math>
struct Chunk {
  int64_t rows = 0, padded = 0, token = 0;
  float *q, *k, *keys, *kk, *p, *b;  // keys: k transposed

  explicit Chunk(Head& at)
      : q(at.take(CHUNK * at.dk)),
        k(at.take(CHUNK * at.dk)),
        keys(at.take(CHUNK * at.dk)),
        kk(at.take(CHUNK * CHUNK)),
        p(at.take(CHUNK * CHUNK)),
        b(at.take(CHUNK)) {}

  void read(const Head& at, int64_t chunk) {
    const Call& call = at.call;
    rows = at.rows(chunk), padded = whole(rows, ROWS), token = at.token(chunk);
    gather(call.q + token * call.keys, at.key_stride(), rows, call.keys, call.scale, q, padded, at.dk);
    gather(call.k + token * call.keys, at.key_stride(), rows, call.keys, 1, k, padded, at.dk);
    for (int64_t i = 0; i < padded; ++i) b[i] = i < rows ? call.beta[token + i * call.heads] : 0.0f;
    Math::transpose(k, padded, at.dk, keys, CHUNK);
    Math::product(kk, CHUNK, {k, at.dk, 1}, keys, CHUNK, padded, CHUNK, at.dk, 1, false, LOWER);
    Math::product(p, CHUNK, {q, at.dk, 1}, keys, CHUNK, padded, CHUNK, at.dk, 1, false, LOWER);
    clear_above(kk, padded, false);
    clear_above(p, padded, true);
  }
};

template <typename Math>
void forward(const Call& call, int64_t document, int64_t head) {
  Head at(call, document, head);
  const int64_t dk = at.dk, dv = at.dv, own = (document * call.heads + head) * call.keys * call.values;
  if (at.length == 1) {
    const int64_t token = at.token(0);
    float* error = call.errors == nullptr ? nullptr : call.errors + token * call.values;
    if (call.states != nullptr)
      std::memcpy(call.states + at.kept(0), call.state + own,
                  static_cast<size_t>(call.keys * call.values) * sizeof(float));
    Math::step(call.q + token * call.keys, call.k + token * call.keys, call.v + token * call.values, call.beta[token],
               call.scale, call.state + own, call.last + own, call.out + token * call.values, error, call.keys,
               call.values);
    return;
  }
  float* state = at.take(dk * dv);
  Chunk<Math> now(at);
  float *e = at.take(CHUNK * dv), *x = at.take(CHUNK * dv), *o = at.take(CHUNK * dv);
  at.load(call.state + own, state);
  for (int64_t chunk = 0; chunk < at.chunks; ++chunk) {
    now.read(at, chunk);
    const int64_t rows = now.rows, padded = now.padded, value = now.token * call.values;
    gather(call.v + value, at.value_stride(), rows, call.values, 1, e, padded, dv);
    if (call.states != nullptr) at.store(state, call.states + at.kept(chunk));
    Math::product(e, dv, {now.k, dk, 1}, state, dv, padded, dv, dk, -1, true, ALL);
    Math::solve({now.kk, CHUNK, 1}, now.b, e, x, padded, dv, false);
    Math::product(o, dv, {now.q, dk, 1}, state, dv, padded, dv, dk, 1, false, ALL);
    Math::product(o, dv, {now.p, CHUNK, 1}, x, dv, padded, dv, padded, 1, true, FROM_LOWER);
    Math::product(state, dv, {now.k, 1, dk}, x, dv, dk, dv, padded, 1, true, ALL);
    scatter(o, dv, rows, call.values, 1, call.out + value, at.value_stride());
    if (call.errors != nullptr) scatter(e, dv, rows, call.values, 1, call.errors + value, at.value_stride());
  }
  at.store(state, call.last + own);
}

template <typename Math>
void backward(const Call& call, int64_t document, int64_t head) {
  Head at(call, document, head);
  const int64_t dk = at.dk, dv = at.dv, own = (document * call.heads + head) * call.keys * call.values;
  float *state = at.take(dk * dv), *state_t = at.take(dk * dv);
  float *d_state = at.take(dk * dv), *d_state_t = at.take(dk * dv);
  Chunk<Math> now(at);
  float *e = at.take(CHUNK * dv), *x = at.take(CHUNK * dv), *x_t = at.take(CHUNK * dv), *d_o = at.take(CHUNK * dv);
  float *y = at.take(CHUNK * dv), *d_r = at.take(CHUNK * dv);
  float *d_p = at.take(CHUNK * CHUNK), *pairs = at.take(CHUNK * CHUNK);
  float *d_q = at.take(CHUNK * dk), *d_k = at.take(CHUNK * dk);
  at.load(call.d_last + own, d_state);
  for (int64_t chunk = at.chunks - 1; chunk >= 0; --chunk) {
    now.read(at, chunk);
    const int64_t rows = now.rows, padded = now.padded, value = now.token * call.values, key = now.token * call.keys;
    gather(call.errors + value, at.value_stride(), rows, call.values, 1, e, padded, dv);
    gather(call.d_out + value, at.value_stride(), rows, call.values, 1, d_o, padded, dv);
    for (int64_t i = 0; i < padded; ++i)
      for (int64_t j = 0; j < dv; ++j) x[i * dv + j] = now.b[i] * e[i * dv + j];
    at.load(call.states + at.kept(chunk), state);
    Math::transpose(state, dk, dv, state_t, dk);
    Math::transpose(d_state, dk, dv, d_state_t, dk);
    Math::transpose(x, padded, dv, x_t, CHUNK);

    // Gradients of the writes, and through the solve those of what it was given.
    Math::product(y, dv, {now.p, 1, CHUNK}, d_o, dv, padded, dv, padded, 1, false, FROM_UPPER);
    Math::product(y, dv, {now.k, dk, 1}, d_state, dv, padded, dv, dk, 1, true, ALL);
    Math::solve({now.kk, 1, CHUNK}, now.b, y, d_r, padded, dv, true);
    Math::product(d_p, CHUNK, {d_o, dv, 1}, x_t, CHUNK, padded, CHUNK, dv, 1, false, LOWER);
    Math::product(pairs, CHUNK, {d_r, dv, 1}, x_t, CHUNK, padded, CHUNK, dv, 1, false, LOWER);
    clear_above(d_p, padded, true);
    clear_above(pairs, padded, false);

    Math::product(d_q, dk, {d_o, dv, 1}, state_t, dk, padded, dk, dv, 1, false, ALL);
    Math::product(d_q, dk, {d_p, CHUNK, 1}, now.k, dk, padded, dk, padded, 1, true, FROM_LOWER);
    Math::product(d_k, dk, {x, dv, 1}, d_state_t, dk, padded, dk, dv, 1, false, ALL);
    Math::product(d_k, dk, {d_r, dv, 1}, state_t, dk, padded, dk, dv, -1, true, ALL);
    Math::product(d_k, dk, {d_p, 1, CHUNK}, now.q, dk, padded, dk, padded, 1, true, FROM_UPPER);
    Math::product(d_k, dk, {pairs, CHUNK, 1}, now.k, dk, padded, dk, padded, -1, true, FROM_LOWER);
    Math::product(d_k, dk, {pairs, 1, CHUNK}, now.k, dk, padded, dk, padded, -1, true, FROM_UPPER);
    Math::product(d_state, dv, {now.q, 1, dk}, d_o, dv, dk, dv, padded, 1, true, ALL);
    Math::product(d_state, dv, {now.k, 1, dk}, d_r, dv, dk, dv, padded, -1, true, ALL);

    scatter(d_q, dk, rows, call.keys, call.scale, call.d_q + key, at.key_stride());
    scatter(d_k, dk, rows, call.keys, 1, call.d_k + key, at.key_stride());
    scatter(d_r, dv, rows, call.values, 1, call.d_v + value, at.value_stride());
    for (int64_t i = 0; i < rows; ++i) {
      float sum = 0.0f;
      for (int64_t j = 0; j < dv; ++j) sum += y[i * dv + j] * e[i * dv + j];
      call.d_beta[now.token + i * call.heads] = sum;
    }
  }
  at.store(d_state, call.d_state + own);
}

using Pass = void (*)(const Call&, int64_t, int64_t);

void run(const Call& call, int threads, Pass pass) {
  fw::parallel(call.documents * call.heads, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) pass(call, at / call.heads, at % call.heads);
  });
}

}  // namespace

// q, k, v, beta and state -> out and last, and where they are wanted errors and states.
FW_API void fw_delta_rule(const Call* call, int threads) {
  run(*call, threads, FW_PICK(forward<Plain>, forward<Wide>));
}

// The same inputs with errors and states, d_out and d_last -> the gradients of the inputs.
FW_API void fw_delta_rule_backward(const Call* call, int threads) {
  run(*call, threads, FW_PICK(backward<Plain>, backward<Wide>));
}
