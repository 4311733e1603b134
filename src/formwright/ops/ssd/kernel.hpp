// The state-space dual of one head, or of one chunk of a group; included once for every instruction set.

#include "../native/products.hpp"

// Decays of a chunk of one head. Products run from token to token: no difference of sums, which would cancel.
struct Decays {
  float step[CHUNK], decay[CHUNK];  // dt and exp(dt A); 0 and 1 behind the last token
  float into[CHUNK], out[CHUNK];    // from the chunk's start to a token, from it to the end
  float through;

  void read(const Call& call, int64_t head, int64_t chunk) {
    const int64_t token = call.borders[chunk], tokens = call.tokens(chunk);
    for (int64_t i = 0; i < CHUNK; ++i) {
      step[i] = i < tokens ? call.dt.at(token + i)[head] : 0.0f;
      decay[i] = i < tokens ? decay_of(call, token + i, head) : 1.0f;
      into[i] = i == 0 ? decay[i] : into[i - 1] * decay[i];
    }
    for (int64_t i = CHUNK - 1; i >= 0; --i) out[i] = i + 1 < CHUNK ? out[i + 1] * decay[i + 1] : 1.0f;
    through = into[CHUNK - 1];
  }

  static float decay_of(const Call& call, int64_t token, int64_t head) {
    return call.resets_at(token) ? 0.0f : std::exp(call.dt.at(token)[head] * call.A[head]);
  }

  // M (64, 64): the product of the decays after j up to i, 0 above the diagonal.
  void mask(float* m, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      float* row = m + i * CHUNK;
      for (int64_t j = 0; j < i; ++j) row[j] = decay[i] * row[j - CHUNK];
      row[i] = 1.0f;
      for (int64_t j = i + 1; j < CHUNK; ++j) row[j] = 0.0f;
    }
  }
};

// One head: its part of tensors, and memory for its chunks.
struct Head {
  const Call& call;
  int64_t row, head, group, wide, deep;  // wide and deep: width and size padded to whole vectors
  float* free;

  Head(const Call& given, int64_t of, int64_t which)
      : call(given), row(of), head(which), group(which / (given.heads / given.groups)), wide(given.wide()),
        deep(given.deep()) {
    const int64_t floats = 4 * wide * deep + CHUNK * (4 * wide + deep + 3 * CHUNK);
    free = static_cast<float*>(fw::scratch(3, static_cast<size_t>(floats) * sizeof(float)));
  }

  float* take(int64_t floats) {
    float* taken = free;
    free += floats;
    return taken;
  }
  int64_t stride() const { return call.heads * call.width; }
  // Of (tokens, heads, width) contiguous: the chunk's first entry of this head.
  float* rows_of(float* tokens, int64_t chunk) const { return tokens + call.borders[chunk] * stride() + head * call.width; }
  // A state (width, size), or zeros where there is none -> (wide, deep).
  void load_state(const float* states, float* to) const {
    const bool given = states != nullptr;
    gather(given ? states + (row * call.heads + head) * call.width * call.size : to, call.size, given ? call.width : 0,
           call.size, 1, to, wide, deep);
  }
  void store_state(const float* from, float* states) const {
    float* to = states + (row * call.heads + head) * call.width * call.size;
    scatter(from, deep, call.width, call.size, 1, to, call.size);
  }
  void read(const fw::Tokens& from, int64_t chunk, float* to) const {
    const int64_t tokens = call.tokens(chunk), padded = whole(tokens, ROWS);
    gather(from.at(call.borders[chunk]) + head * call.width, from.stride, tokens, call.width, 1, to, padded, wide);
  }
};

static void scale(float* x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

static void scale_rows(float* x, int64_t width, const float* factors, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) scale(x + i * width, width, factors[i]);
}

// to = a * b, where `add` to += a * b; counts are multiples of WIDTH.
static void multiply(const float* a, const float* b, int64_t count, float* to, bool add) {
  for (int64_t i = 0; i < count; i += WIDTH) store(to + i, fma(load(a + i), load(b + i), add ? load(to + i) : Lanes{}));
}

// to = from, where `add` to += from.
static void gain(const float* from, int64_t count, float* to, bool add) {
  for (int64_t i = 0; i < count; i += WIDTH) store(to + i, add ? load(to + i) + load(from + i) : load(from + i));
}

static float dot(const float* a, const float* b, int64_t count) {
  Lanes sum{};
  for (int64_t i = 0; i < count; i += WIDTH) sum = fma(load(a + i), load(b + i), sum);
  return total(sum);
}

// A chunk of a group: B, C and their scores.
static void cut(const Call& call, int64_t chunk, int64_t group) {
  const int64_t token = call.borders[chunk], tokens = call.tokens(chunk), rows = whole(tokens, ROWS);
  const int64_t deep = call.deep();
  const Block block(call, call.blocks, chunk, group);
  float* keys = static_cast<float*>(fw::scratch(3, static_cast<size_t>(deep * CHUNK) * sizeof(float)));
  gather(call.B.at(token) + group * call.size, call.B.stride, tokens, call.size, 1, block.b, rows, deep);
  gather(call.C.at(token) + group * call.size, call.C.stride, tokens, call.size, 1, block.c, rows, deep);
  transpose(block.b, rows, deep, keys, CHUNK);
  product(block.scores, CHUNK, {block.c, deep, 1}, keys, CHUNK, rows, CHUNK, deep, 1, false, LOWER);
  clear_above(block.scores, CHUNK, rows, true);
}

// One token of one head, by the recurrence itself.
static void step(const Call& call, int64_t row, int64_t head) {
  const int64_t group = head / (call.heads / call.groups), size = call.size;
  const int64_t own = (row * call.heads + head) * call.width * size;
  const float *B = call.B.at(row) + group * size, *C = call.C.at(row) + group * size;
  const float* x = call.x.at(row) + head * call.width;
  const float step = call.dt.at(row)[head], decay = Decays::decay_of(call, row, head);
  const float* start = call.resets_at(row) ? nullptr : call.start;
  for (int64_t p = 0; p < call.width; ++p) {
    const int64_t at = own + p * size;
    const float value = step * x[p];
    Lanes sum{};
    for (int64_t n = 0; n < size; n += WIDTH) {
      const int64_t count = size - n;
      const Lanes before = start == nullptr ? Lanes{} : decay * load(start + at + n, count);
      const Lanes now = fma(all(value), load(B + n, count), before);
      store(call.final + at + n, now, count);
      sum = fma(now, load(C + n, count), sum);
    }
    call.y[own / size + p] = total(sum) + (call.D == nullptr ? 0.0f : call.D[head] * x[p]);
  }
}

static void forward(const Call& call, int64_t row, int64_t which) {
  Head at(call, row, which);
  const int64_t wide = at.wide, deep = at.deep, all_of = wide * deep;
  float *state = at.take(all_of), *turned = at.take(all_of);  // (deep, wide); as tensors have it
  float *x = at.take(CHUNK * wide), *y = at.take(CHUNK * wide), *weights = at.take(CHUNK * CHUNK);
  Decays decays;
  at.load_state(call.start, turned);
  transpose(turned, wide, deep, state, wide);
  for (int64_t chunk = call.firsts[row]; chunk < call.firsts[row + 1]; ++chunk) {
    const Block block(call, call.blocks, chunk, at.group);
    const int64_t first = call.borders[chunk], tokens = call.tokens(chunk), rows = whole(tokens, ROWS);
    if (call.resets_at(first)) std::fill_n(state, all_of, 0.0f);
    if (call.states != nullptr)
      std::memcpy(call.state_at(chunk, which), state, static_cast<size_t>(all_of) * sizeof(float));
    decays.read(call, which, chunk);
    at.read(call.x, chunk, x);
    scale_rows(x, wide, decays.step, rows);
    decays.mask(weights, rows);
    multiply(weights, block.scores, rows * CHUNK, weights, false);
    product(y, wide, {block.c, deep, 1}, state, wide, rows, wide, deep, 1, false, ALL);
    scale_rows(y, wide, decays.into, rows);
    product(y, wide, {weights, CHUNK, 1}, x, wide, rows, wide, rows, 1, true, FROM_LOWER);
    for (int64_t i = 0; i < tokens && call.D != nullptr; ++i) {
      const float* given = call.x.at(first + i) + which * call.width;
      for (int64_t p = 0; p < call.width; ++p) y[i * wide + p] += call.D[which] * given[p];
    }
    scatter(y, wide, tokens, call.width, 1, at.rows_of(call.y, chunk), at.stride());
    scale_rows(x, wide, decays.out, rows);
    scale(state, all_of, decays.through);
    product(state, wide, {block.b, 1, deep}, x, wide, deep, wide, rows, 1, true, ALL);
  }
  transpose(state, deep, wide, turned, deep);
  at.store_state(turned, call.final);
}

// At k the sum over i >= k > j: all pairs of tokens whose product holds decay k.
static void crossing(const float* pairs, int64_t rows, float* found) {
  float sums[CHUNK] = {};
  for (int64_t k = rows - 1; k >= 0; --k) {
    Lanes sum{};
    for (int64_t j = 0; j < k; j += WIDTH) {
      store(sums + j, load(sums + j) + load(pairs + k * CHUNK + j, k - j));
      sum += load(sums + j, k - j);
    }
    found[k] = total(sum);
  }
}

// One head, last chunk first; `dblocks` gets what belongs to its group, added to what is there where `add`.
static void backward_head(const Call& call, int64_t row, int64_t which, float* dblocks, bool add) {
  Head at(call, row, which);
  const int64_t wide = at.wide, deep = at.deep, all_of = wide * deep;
  float *state = at.take(all_of), *dstate = at.take(all_of), *dturned = at.take(all_of);  // (wide, deep), once turned
  float *x = at.take(CHUNK * wide), *xs = at.take(CHUNK * wide), *dy = at.take(CHUNK * wide);
  float *v = at.take(CHUNK * wide), *read = at.take(CHUNK * deep);
  float *mask = at.take(CHUNK * CHUNK), *weights = at.take(CHUNK * CHUNK), *pairs = at.take(CHUNK * CHUNK);
  float toward[CHUNK], early[CHUNK], late[CHUNK], dlogs[CHUNK];
  const float D = call.D == nullptr ? 0.0f : call.D[which];
  double dA = 0.0, dD = 0.0;
  Decays decays;
  at.load_state(call.dfinal, dstate);
  for (int64_t chunk = call.firsts[row + 1] - 1; chunk >= call.firsts[row]; --chunk) {
    const Block block(call, call.blocks, chunk, at.group), grads(call, dblocks, chunk, at.group);
    const int64_t tokens = call.tokens(chunk), rows = whole(tokens, ROWS), first = call.borders[chunk];
    const bool begins = call.resets_at(first);
    decays.read(call, which, chunk);
    at.read(call.x, chunk, x);
    at.read(call.dy, chunk, dy);
    transpose(call.state_at(chunk, which), deep, wide, state, deep);
    transpose(dstate, wide, deep, dturned, wide);
    decays.mask(mask, rows);
    multiply(mask, block.scores, rows * CHUNK, weights, false);

    // Gradients of X: through the state at the chunk's end, then through this chunk's outputs.
    product(v, wide, {block.b, deep, 1}, dturned, wide, rows, wide, deep, 1, false, ALL);
    scale_rows(v, wide, decays.out, rows);
    for (int64_t i = 0; i < tokens; ++i) early[i] = decays.step[i] * dot(x + i * wide, v + i * wide, wide);
    product(v, wide, {weights, 1, CHUNK}, dy, wide, rows, wide, rows, 1, true, FROM_UPPER);
    float* dx = at.rows_of(call.dx, chunk);
    for (int64_t i = 0; i < tokens; ++i) {
      const float *grad = v + i * wide, *out = dy + i * wide;
      toward[i] = dot(x + i * wide, grad, wide);
      dD += dot(x + i * wide, out, wide);
      for (int64_t p = 0; p < call.width; ++p) dx[i * at.stride() + p] = decays.step[i] * grad[p] + D * out[p];
    }

    // Of the scores and of the decays between tokens.
    scale_rows(x, wide, decays.step, rows);
    transpose(x, rows, wide, xs, CHUNK);
    product(pairs, CHUNK, {dy, wide, 1}, xs, CHUNK, rows, CHUNK, wide, 1, false, LOWER);
    clear_above(pairs, CHUNK, rows, true);
    multiply(pairs, mask, rows * CHUNK, grads.scores, add);
    multiply(pairs, weights, rows * CHUNK, pairs, false);
    crossing(pairs, rows, dlogs);

    // Of C through the state before the chunk, of B through the one behind it, and of the former.
    scale_rows(dy, wide, decays.into, rows);
    product(read, deep, {dy, wide, 1}, state, deep, rows, deep, wide, 1, false, ALL);
    for (int64_t i = 0; i < tokens; ++i) late[i] = dot(read + i * deep, block.c + i * deep, deep);
    gain(read, rows * deep, grads.c, add);
    scale_rows(x, wide, decays.out, rows);
    product(grads.b, deep, {x, wide, 1}, dstate, deep, rows, deep, wide, 1, add, ALL);
    const float across = decays.through * dot(state, dstate, all_of);
    scale(dstate, all_of, decays.through);
    product(dstate, deep, {dy, 1, wide}, block.c, deep, wide, deep, rows, 1, true, ALL);
    if (begins) std::fill_n(dstate, all_of, 0.0f);

    // Decay k passes what is written before it and read from it on.
    float behind = across, before = 0.0f;
    for (int64_t k = tokens - 1; k >= 0; --k) dlogs[k] += behind += late[k];
    for (int64_t k = 0; k < tokens; ++k) {
      const float dlog = k == 0 && begins ? 0.0f : dlogs[k] + before;
      before += early[k];
      call.ddt[(first + k) * call.heads + which] = toward[k] + call.A[which] * dlog;
      dA += decays.step[k] * dlog;
    }
  }
  at.store_state(dstate, call.dstart);
  call.dA[row * call.heads + which] = static_cast<float>(dA);
  call.dD[row * call.heads + which] = static_cast<float>(dD);
}

static void backward(const Call& call, int64_t row, int64_t part) {
  const int64_t group = part / call.slices, slice = part % call.slices;
  const int64_t shared = call.heads / call.groups, first = group * shared + slice * shared / call.slices;
  const int64_t last = group * shared + (slice + 1) * shared / call.slices;
  float* dblocks = call.dblocks + slice * call.chunks() * call.groups * call.block_floats();
  for (int64_t head = first; head < last; ++head) backward_head(call, row, head, dblocks, head > first);
}

// The slices of a group's chunk added up, and from them dB and dC.
static void join(const Call& call, int64_t chunk, int64_t group) {
  const int64_t token = call.borders[chunk], tokens = call.tokens(chunk), rows = whole(tokens, ROWS);
  const int64_t deep = call.deep(), stride = call.groups * call.size, place = token * stride + group * call.size;
  const Block block(call, call.blocks, chunk, group), sum(call, call.dblocks, chunk, group);
  for (int64_t slice = 1; slice < call.slices; ++slice) {
    float* dblocks = call.dblocks + slice * call.chunks() * call.groups * call.block_floats();
    const Block more(call, dblocks, chunk, group);
    gain(more.b, rows * deep, sum.b, true);
    gain(more.c, rows * deep, sum.c, true);
    gain(more.scores, rows * CHUNK, sum.scores, true);
  }
  product(sum.c, deep, {sum.scores, CHUNK, 1}, block.b, deep, rows, deep, rows, 1, true, FROM_LOWER);
  product(sum.b, deep, {sum.scores, 1, CHUNK}, block.c, deep, rows, deep, rows, 1, true, FROM_UPPER);
  scatter(sum.b, deep, tokens, call.size, 1, call.dB + place, stride);
  scatter(sum.c, deep, tokens, call.size, 1, call.dC + place, stride);
}
