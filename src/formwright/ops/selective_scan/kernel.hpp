// The scan of one row and some groups of 16 channels, forward and backward; included once for every instruction set.
//
// A lane is a channel, so a state is one register for 16 channels and nothing is summed across lanes but the gradients
// of B and C. Time goes in chunks of CHUNK tokens: within one, a few states at a time run over all its tokens, while
// what they share (steps, inputs, outputs) stays in the first-level cache.

constexpr int64_t CHUNK = 64;

struct Steps {
  Lanes step[CHUNK], input[CHUNK];  // Delta and Delta x
};

// (E, N) -> a register per state, for the channels from `channel` on.
static FW_INLINE void gather(const Call& call, const float* from, int64_t channel, float factor, Lanes* to) {
  const int64_t count = lanes_of(call, channel);
  for (int64_t n = 0; n < call.states; ++n) {
    Lanes x{};
    for (int64_t i = 0; i < count; ++i) x[i] = from == nullptr ? 0.0f : factor * from[(channel + i) * call.states + n];
    to[n] = x;
  }
}

static FW_INLINE void scatter(const Call& call, const Lanes* from, int64_t channel, float* to) {
  const int64_t count = lanes_of(call, channel);
  for (int64_t n = 0; n < call.states; ++n)
    for (int64_t i = 0; i < count; ++i) to[(channel + i) * call.states + n] = from[n][i];
}

static FW_INLINE void prepare(const Call& call, int64_t token, int64_t tokens, int64_t channel, Steps& steps) {
  const int64_t count = lanes_of(call, channel);
  for (int64_t t = 0; t < tokens; ++t) {
    const Lanes raw = load(call.delta.at(token + t) + channel, count);
    const Lanes step = call.softplus ? softplus(raw).value : raw;
    steps.step[t] = step;
    steps.input[t] = step * load(call.x.at(token + t) + channel, count);
  }
}

// NB states from n on over the tokens of a chunk: h moves on, y gets C h.
template <int NB>
static FW_INLINE void advance(const Call& call, int64_t token, int64_t tokens, int64_t n, const Lanes* decay,
                              const Steps& steps, Lanes* state, Lanes* y) {
  Lanes h[NB];
  for (int j = 0; j < NB; ++j) h[j] = state[n + j];
  for (int64_t t = 0; t < tokens; ++t) {
    const float *B = call.B.at(token + t) + n, *C = call.C.at(token + t) + n;
    const Lanes step = steps.step[t], input = steps.input[t];
    Lanes sum = y[t];
#pragma GCC unroll 8
    for (int j = 0; j < NB; ++j) {
      h[j] = fma(exp2(step * decay[n + j]), h[j], input * B[j]);
      sum = fma(h[j], all(C[j]), sum);
    }
    y[t] = sum;
  }
  for (int j = 0; j < NB; ++j) state[n + j] = h[j];
}

static void forward_row(const Call& call, int64_t row, int64_t first, int64_t last) {
  const int64_t groups = last - first, states = call.states;
  Lanes* decay = static_cast<Lanes*>(fw::scratch(0, static_cast<size_t>(2 * groups * states) * sizeof(Lanes)));
  Lanes* h = decay + groups * states;
  for (int64_t g = 0; g < groups; ++g) {
    gather(call, call.A, (first + g) * WIDTH, LOG2E, decay + g * states);
    gather(call, call.initial_of(row), (first + g) * WIDTH, 1.0f, h + g * states);
  }
  Steps steps;
  Lanes y[CHUNK];
  int64_t chunk = call.chunks == nullptr ? 0 : call.chunks[row];
  for (int64_t done = 0; done < call.lengths[row]; done += CHUNK, ++chunk) {
    const int64_t token = call.starts[row] + done, left = call.lengths[row] - done;
    const int64_t tokens = left < CHUNK ? left : CHUNK;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t channel = (first + g) * WIDTH, count = lanes_of(call, channel);
      Lanes *own = h + g * states, *rate = decay + g * states;
      if (call.kept != nullptr)
        for (int64_t n = 0; n < states; ++n) store(call.kept_at(chunk, n) + channel, own[n]);
      prepare(call, token, tokens, channel, steps);
      for (int64_t t = 0; t < tokens; ++t) y[t] = Lanes{};
      int64_t n = 0;
      for (; n + 8 <= states; n += 8) advance<8>(call, token, tokens, n, rate, steps, own, y);
      for (; n + 4 <= states; n += 4) advance<4>(call, token, tokens, n, rate, steps, own, y);
      for (; n < states; ++n) advance<1>(call, token, tokens, n, rate, steps, own, y);
      const Lanes skip = call.D == nullptr ? Lanes{} : load(call.D + channel, count);
      for (int64_t t = 0; t < tokens; ++t) {
        Lanes out = fma(skip, load(call.x.at(token + t) + channel, count), y[t]);
        if (call.z.data != nullptr) {
          const Lanes z = load(call.z.at(token + t) + channel, count);
          out = out * z * sigmoid(z);
        }
        store(call.y + (token + t) * call.channels + channel, out, count);
      }
    }
  }
  for (int64_t g = 0; g < groups; ++g) scatter(call, h + g * states, (first + g) * WIDTH, call.final_of(row));
}

// What the backward pass of a chunk and group holds for each token.
struct Sums {
  Lanes y[CHUNK], grad[CHUNK];         // output before skip and gate; gradient that reaches it
  Lanes from_B[CHUNK], from_A[CHUNK];  // sums over states of lambda B and of lambda A (h without its input)
};

// NB states from n on: forward again from the chunk's first state, then backward. `folded` gets four sums of lanes for
// each token and state, C's and then B's.
template <int NB>
static FW_INLINE void retrace(const Call& call, int64_t token, int64_t tokens, int64_t n, const Lanes* decay,
                              const Lanes* start, const Steps& steps, Sums& sums, Lanes* lambda, Lanes* grad_A,
                              Lanes* folded) {
  Lanes kept[CHUNK][NB], rate[CHUNK][NB], h[NB];
  for (int j = 0; j < NB; ++j) h[j] = start[n + j];
  for (int64_t t = 0; t < tokens; ++t) {
    const float *B = call.B.at(token + t) + n, *C = call.C.at(token + t) + n;
    const Lanes step = steps.step[t], input = steps.input[t];
    Lanes sum = sums.y[t];
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
      rate[t][j] = exp2(step * decay[n + j]);
      kept[t][j] = rate[t][j] * h[j];
      h[j] = fma(input, all(B[j]), kept[t][j]);
      sum = fma(h[j], all(C[j]), sum);
    }
    sums.y[t] = sum;
  }
  Lanes back[NB], total[NB];
  for (int j = 0; j < NB; ++j) back[j] = lambda[n + j], total[j] = grad_A[n + j];
  const int64_t quads = (call.states + 3) / 4;
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const float *B = call.B.at(token + t) + n, *C = call.C.at(token + t) + n;
    const Lanes step = steps.step[t], input = steps.input[t], grad = sums.grad[t];
    Lanes by_B[4] = {}, by_C[4] = {}, from_B = sums.from_B[t], from_A = sums.from_A[t];
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) {
      by_C[j] = grad * fma(input, all(B[j]), kept[t][j]);
      const Lanes both = fma(grad, all(C[j]), back[j]), weighed = both * kept[t][j];
      by_B[j] = both * input;
      from_B = fma(both, all(B[j]), from_B);
      from_A = fma(weighed, decay[n + j], from_A);
      total[j] = fma(step, weighed, total[j]);
      back[j] = rate[t][j] * both;
    }
    sums.from_B[t] = from_B, sums.from_A[t] = from_A;
    Lanes* to = folded + (t * quads + n / 4) * 2;
    to[0] += fold(by_C[0], by_C[1], by_C[2], by_C[3]);
    to[1] += fold(by_B[0], by_B[1], by_B[2], by_B[3]);
  }
  for (int j = 0; j < NB; ++j) lambda[n + j] = back[j], grad_A[n + j] = total[j];
}

// The gradient that reaches y before its gate.
static FW_INLINE void ungate(const Call& call, int64_t token, int64_t tokens, int64_t channel, Sums& sums) {
  const int64_t count = lanes_of(call, channel);
  for (int64_t t = 0; t < tokens; ++t) {
    Lanes grad = load(call.grad_y.at(token + t) + channel, count);
    if (call.z.data != nullptr) {
      const Lanes z = load(call.z.at(token + t) + channel, count);
      grad = grad * z * sigmoid(z);
    }
    sums.grad[t] = grad;
    sums.y[t] = sums.from_B[t] = sums.from_A[t] = Lanes{};
  }
}

// Gradients of x, delta, z and D from the sums over states.
static FW_INLINE void deliver(const Call& call, int64_t token, int64_t tokens, int64_t channel, const Steps& steps,
                              const Sums& sums, Lanes* grad_D) {
  const int64_t count = lanes_of(call, channel);
  const Lanes skip = call.D == nullptr ? Lanes{} : load(call.D + channel, count);
  Lanes total = *grad_D;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = (token + t) * call.channels + channel;
    const Lanes x = load(call.x.at(token + t) + channel, count), grad = sums.grad[t];
    Lanes by_step = fma(x, sums.from_B[t], sums.from_A[t] * (1.0f / LOG2E));
    if (call.softplus) by_step *= softplus(load(call.delta.at(token + t) + channel, count)).slope;
    store(call.grad_x + at, fma(steps.step[t], sums.from_B[t], skip * grad), count);
    store(call.grad_delta + at, by_step, count);
    total = fma(grad, x, total);
    if (call.z.data != nullptr) {
      const Lanes z = load(call.z.at(token + t) + channel, count), s = sigmoid(z);
      const Lanes slope = s * fma(z, 1.0f - s, all(1.0f)), y = fma(skip, x, sums.y[t]);
      store(call.grad_z + at, load(call.grad_y.at(token + t) + channel, count) * y * slope, count);
    }
  }
  *grad_D = total;
}

// Sums of four lanes of every state -> gradients of B and C for the tokens of a chunk.
static FW_INLINE void settle(const Call& call, int64_t slice, int64_t token, int64_t tokens, const Lanes* folded) {
  const int64_t quads = (call.states + 3) / 4;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = 0; n < call.states; ++n) {
      const Lanes* from = folded + (t * quads + n / 4) * 2;
      const int64_t at = (slice * call.tokens + token + t) * call.states + n, j = n % 4;
      call.grad_C[at] = from[0][j] + from[0][4 + j] + from[0][8 + j] + from[0][12 + j];
      call.grad_B[at] = from[1][j] + from[1][4 + j] + from[1][8 + j] + from[1][12 + j];
    }
}

static void backward_row(const Call& call, int64_t row, int64_t slice, int64_t first, int64_t last) {
  const int64_t groups = last - first, states = call.states, quads = (states + 3) / 4, length = call.lengths[row];
  const int64_t each = groups * states, folds = CHUNK * quads * 2;
  Lanes* decay = static_cast<Lanes*>(
      fw::scratch(0, static_cast<size_t>(3 * each + groups + folds + states) * sizeof(Lanes)));
  Lanes *lambda = decay + each, *grad_A = lambda + each, *grad_D = grad_A + each, *folded = grad_D + groups;
  Lanes* start = folded + folds;
  for (int64_t g = 0; g < groups; ++g) {
    gather(call, call.A, (first + g) * WIDTH, LOG2E, decay + g * states);
    gather(call, call.grad_final_of(row), (first + g) * WIDTH, 1.0f, lambda + g * states);
    grad_D[g] = Lanes{};
  }
  for (int64_t i = 0; i < each; ++i) grad_A[i] = Lanes{};
  Steps steps;
  Sums sums;
  for (int64_t chunk = (length + CHUNK - 1) / CHUNK - 1; chunk >= 0; --chunk) {
    const int64_t done = chunk * CHUNK, token = call.starts[row] + done;
    const int64_t tokens = length - done < CHUNK ? length - done : CHUNK;
    for (int64_t i = 0; i < folds; ++i) folded[i] = Lanes{};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t channel = (first + g) * WIDTH, at = g * states;
      for (int64_t n = 0; n < states; ++n) start[n] = load(call.kept_at(call.chunks[row] + chunk, n) + channel);
      prepare(call, token, tokens, channel, steps);
      ungate(call, token, tokens, channel, sums);
      int64_t n = 0;
#define FW_STATES(COUNT)                                                                                          \
  retrace<COUNT>(call, token, tokens, n, decay + at, start, steps, sums, lambda + at, grad_A + at, folded)
      for (; n + 4 <= states; n += 4) FW_STATES(4);
      if (states - n == 3) FW_STATES(3);
      if (states - n == 2) FW_STATES(2);
      if (states - n == 1) FW_STATES(1);
#undef FW_STATES
      deliver(call, token, tokens, channel, steps, sums, grad_D + g);
    }
    settle(call, slice, token, tokens, folded);
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t channel = (first + g) * WIDTH;
    scatter(call, lambda + g * states, channel, call.grad_initial + row * call.channels * states);
    scatter(call, grad_A + g * states, channel, call.grad_A + row * call.channels * states);
    store(call.grad_D + row * call.channels + channel, grad_D[g], lanes_of(call, channel));
  }
}
