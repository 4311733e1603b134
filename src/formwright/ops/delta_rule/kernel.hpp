// The delta rule of one head and document, forward and backward; included once for every instruction set.

#include "../native/products.hpp"

// One token by the recurrence itself.
static void one_step(const float* q, const float* k, const float* v, float beta, float scale, const float* state,
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

// Four rows of the solve, 16 V columns: the rows that are done, then the four among themselves.
template <int V, bool UP>
static FW_INLINE void solve_rows(Left t, const float* b, float* y, float* x, int64_t columns, int64_t row,
                                 int64_t rows) {
  Lanes acc[ROWS][V];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = load(y + (row + r) * columns + WIDTH * v);
  for (int64_t i = UP ? row + ROWS : 0; i < (UP ? rows : row); ++i) {
    Lanes done[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) done[v] = load(x + i * columns + WIDTH * v);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Lanes factor = all(-t.at[(row + r) * t.row + i * t.column]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = fma(factor, done[v], acc[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int step = 0; step < ROWS; ++step) {
    const int r = UP ? ROWS - 1 - step : step;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Lanes done = b[row + r] * acc[r][v];
      store(y + (row + r) * columns + WIDTH * v, acc[r][v]);
      store(x + (row + r) * columns + WIDTH * v, done);
#pragma GCC unroll 4
      for (int other = 0; other < ROWS; ++other)
        if (UP ? other < r : other > r) {
          const Lanes factor = all(-t.at[(row + other) * t.row + (row + r) * t.column]);
          acc[other][v] = fma(factor, done, acc[other][v]);
        }
    }
  }
}

// y_r -= sum of t_ri x_i over the rows before r (after r where UP), x_r = b_r y_r.
template <bool UP>
static void solve(Left t, const float* b, float* y, float* x, int64_t rows, int64_t columns) {
  for (int64_t step = 0; step < rows; step += ROWS) {
    const int64_t row = UP ? rows - ROWS - step : step;
    int64_t j = 0;
    for (; j + WIDTH * ACROSS <= columns; j += WIDTH * ACROSS)
      solve_rows<ACROSS, UP>(t, b, y + j, x + j, columns, row, rows);
    for (; j < columns; j += WIDTH) solve_rows<1, UP>(t, b, y + j, x + j, columns, row, rows);
  }
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
        dk(whole(given.keys, WIDTH)),
        dv(whole(given.values, WIDTH)) {
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
    transpose(k, padded, at.dk, keys, CHUNK);
    product(kk, CHUNK, {k, at.dk, 1}, keys, CHUNK, padded, CHUNK, at.dk, 1, false, LOWER);
    product(p, CHUNK, {q, at.dk, 1}, keys, CHUNK, padded, CHUNK, at.dk, 1, false, LOWER);
    clear_above(kk, CHUNK, padded, false);
    clear_above(p, CHUNK, padded, true);
  }
};

static void forward(const Call& call, int64_t document, int64_t head) {
  Head at(call, document, head);
  const int64_t dk = at.dk, dv = at.dv, own = (document * call.heads + head) * call.keys * call.values;
  if (at.length == 1) {
    const int64_t token = at.token(0);
    float* error = call.errors == nullptr ? nullptr : call.errors + token * call.values;
    if (call.states != nullptr)
      std::memcpy(call.states + at.kept(0), call.state + own,
                  static_cast<size_t>(call.keys * call.values) * sizeof(float));
    one_step(call.q + token * call.keys, call.k + token * call.keys, call.v + token * call.values, call.beta[token],
               call.scale, call.state + own, call.last + own, call.out + token * call.values, error, call.keys,
               call.values);
    return;
  }
  float* state = at.take(dk * dv);
  Chunk now(at);
  float *e = at.take(CHUNK * dv), *x = at.take(CHUNK * dv), *o = at.take(CHUNK * dv);
  at.load(call.state + own, state);
  for (int64_t chunk = 0; chunk < at.chunks; ++chunk) {
    now.read(at, chunk);
    const int64_t rows = now.rows, padded = now.padded, value = now.token * call.values;
    gather(call.v + value, at.value_stride(), rows, call.values, 1, e, padded, dv);
    if (call.states != nullptr) at.store(state, call.states + at.kept(chunk));
    product(e, dv, {now.k, dk, 1}, state, dv, padded, dv, dk, -1, true, ALL);
    solve<false>({now.kk, CHUNK, 1}, now.b, e, x, padded, dv);
    product(o, dv, {now.q, dk, 1}, state, dv, padded, dv, dk, 1, false, ALL);
    product(o, dv, {now.p, CHUNK, 1}, x, dv, padded, dv, padded, 1, true, FROM_LOWER);
    product(state, dv, {now.k, 1, dk}, x, dv, dk, dv, padded, 1, true, ALL);
    scatter(o, dv, rows, call.values, 1, call.out + value, at.value_stride());
    if (call.errors != nullptr) scatter(e, dv, rows, call.values, 1, call.errors + value, at.value_stride());
  }
  at.store(state, call.last + own);
}

static void backward(const Call& call, int64_t document, int64_t head) {
  Head at(call, document, head);
  const int64_t dk = at.dk, dv = at.dv, own = (document * call.heads + head) * call.keys * call.values;
  float *state = at.take(dk * dv), *state_t = at.take(dk * dv);
  float *d_state = at.take(dk * dv), *d_state_t = at.take(dk * dv);
  Chunk now(at);
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
    transpose(state, dk, dv, state_t, dk);
    transpose(d_state, dk, dv, d_state_t, dk);
    transpose(x, padded, dv, x_t, CHUNK);

    // Gradients of the writes, and through the solve those of what it was given.
    product(y, dv, {now.p, 1, CHUNK}, d_o, dv, padded, dv, padded, 1, false, FROM_UPPER);
    product(y, dv, {now.k, dk, 1}, d_state, dv, padded, dv, dk, 1, true, ALL);
    solve<true>({now.kk, 1, CHUNK}, now.b, y, d_r, padded, dv);
    product(d_p, CHUNK, {d_o, dv, 1}, x_t, CHUNK, padded, CHUNK, dv, 1, false, LOWER);
    product(pairs, CHUNK, {d_r, dv, 1}, x_t, CHUNK, padded, CHUNK, dv, 1, false, LOWER);
    clear_above(d_p, CHUNK, padded, true);
    clear_above(pairs, CHUNK, padded, false);

    product(d_q, dk, {d_o, dv, 1}, state_t, dk, padded, dk, dv, 1, false, ALL);
    product(d_q, dk, {d_p, CHUNK, 1}, now.k, dk, padded, dk, padded, 1, true, FROM_LOWER);
    product(d_k, dk, {x, dv, 1}, d_state_t, dk, padded, dk, dv, 1, false, ALL);
    product(d_k, dk, {d_r, dv, 1}, state_t, dk, padded, dk, dv, -1, true, ALL);
    product(d_k, dk, {d_p, 1, CHUNK}, now.q, dk, padded, dk, padded, 1, true, FROM_UPPER);
    product(d_k, dk, {pairs, CHUNK, 1}, now.k, dk, padded, dk, padded, -1, true, FROM_LOWER);
    product(d_k, dk, {pairs, 1, CHUNK}, now.k, dk, padded, dk, padded, -1, true, FROM_UPPER);
    product(d_state, dv, {now.q, 1, dk}, d_o, dv, dk, dv, padded, 1, true, ALL);
    product(d_state, dv, {now.k, 1, dk}, d_r, dv, dk, dv, padded, -1, true, ALL);

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
