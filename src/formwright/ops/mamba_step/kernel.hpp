// One token of a Mamba layer, a range of outputs at a time; see native.cpp. Included once for every instruction set.

typedef float Quad __attribute__((vector_size(16)));

// The sums of four vectors.
static FW_INLINE Quad sums(Lanes a, Lanes b, Lanes c, Lanes d) {
  const Lanes folded = fold(a, b, c, d);
  Quad part[4];
  std::memcpy(part, &folded, sizeof part);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// The sums of sixteen vectors.
static FW_INLINE Lanes sums(const Lanes* of) {
  Quad part[4];
  for (int k = 0; k < 4; ++k) part[k] = sums(of[4 * k], of[4 * k + 1], of[4 * k + 2], of[4 * k + 3]);
  return load(reinterpret_cast<const float*>(part));
}

// Asks for what a later pass reads, the share of one piece of this pass: memory would rest while threads wait for each
// other and while a pass computes.
static FW_INLINE void ask(const float* from, int64_t count, int64_t first, int64_t last, int64_t outputs) {
  constexpr int64_t LINE = 16, MOST = 1 << 17;  // half a MiB
  if (count > MOST) count = MOST;
  for (int64_t i = count * first / outputs; i < count * last / outputs; i += LINE) __builtin_prefetch(from + i, 0, 2);
}

// made[r] is what sums up to weight . from[r] of R rows. A row of weights is read from one end to the other, so memory
// is read in one stream, which is what a step costs; the order of the sums is the same for any R.
template <int R>
static FW_INLINE void dots(const float* weight, const float* from, int64_t in, Lanes* made) {
  Lanes even[R] = {}, odd[R] = {};
  int64_t i = 0;
  for (; i + 2 * WIDTH <= in; i += 2 * WIDTH) {
    const Lanes a = load(weight + i), b = load(weight + i + WIDTH);
    for (int r = 0; r < R; ++r) {
      even[r] = fma(a, load(from + r * in + i), even[r]);
      odd[r] = fma(b, load(from + r * in + i + WIDTH), odd[r]);
    }
  }
  for (; i < in; i += WIDTH)
    for (int r = 0; r < R; ++r) even[r] = fma(load(weight + i, in - i), load(from + r * in + i, in - i), even[r]);
  for (int r = 0; r < R; ++r) made[r] = even[r] + odd[r];
}

// to[row * to_row + o] = weight[o] . from[row] + bias[o] for `first` <= o < `last`, added to what is there where it
// `joins`. A row of weights comes from memory once for all rows of inputs.
static void products(const float* weight, const float* bias, const float* from, int64_t rows, int64_t in, float* to,
                     int64_t to_row, int64_t first, int64_t last, bool joins = false) {
  constexpr int64_t FOUR = 4, BOTH = 2;
  for (int64_t o = first; o < last; o += FOUR) {
    const int64_t some = last - o < FOUR ? last - o : FOUR;
    for (int64_t row = 0; row < rows; row += BOTH) {
      const int64_t here = rows - row < BOTH ? 1 : BOTH;
      Lanes of[FOUR][BOTH] = {};
      for (int64_t j = 0; j < some; ++j) {
        const float *a = weight + (o + j) * in, *x = from + row * in;
        if (here == BOTH)
          dots<BOTH>(a, x, in, of[j]);
        else
          dots<1>(a, x, in, of[j]);
      }
      for (int64_t r = 0; r < here; ++r) {
        const Quad found = sums(of[0][r], of[1][r], of[2][r], of[3][r]);
        float* made = to + (row + r) * to_row + o;
        for (int64_t j = 0; j < some; ++j)
          made[j] = (joins ? made[j] : 0.0f) + found[j] + (bias == nullptr ? 0.0f : bias[o + j]);
      }
    }
  }
}

static void normalise(const Layer& layer, const float* from, int64_t rows, float* to) {
  const int64_t width = layer.width;
  for (const float* end = from + rows * width; from != end; from += width, to += width) {
    Lanes square{};
    for (int64_t i = 0; i < width; i += WIDTH) {
      const Lanes x = load(from + i, width - i);
      square = fma(x, x, square);
    }
    const float scale = 1.0f / std::sqrt(total(square) / static_cast<float>(width) + layer.eps);
    for (int64_t i = 0; i < width; i += WIDTH)
      store(to + i, load(layer.norm + i, width - i) * (scale * load(from + i, width - i)), width - i);
  }
}

// Projected values and gates, those of the values through the convolution.
static void enter(const Call& call, int64_t first, int64_t last) {
  const Layer& layer = call.layer;
  const int64_t inner = layer.inner, kept = layer.taps - 1;
  products(layer.in_weight, layer.in_bias, call.read, call.rows, layer.width, call.mixed, 2 * inner, first, last);
  ask(layer.x_weight, layer.chosen() * inner, first, last, 2 * inner);
  ask(layer.dt_weight, inner * layer.rank, first, last, 2 * inner);
  ask(layer.A_log, inner * layer.states, first, last, 2 * inner);
  ask(call.state.h, call.rows * inner * layer.states, first, last, 2 * inner);
  for (int64_t row = 0; row < call.rows; ++row) {
    const float *window = call.state.window + row * kept * inner, *values = call.mixed + row * 2 * inner;
    float* next = call.state.next_window + row * kept * inner;
    for (int64_t c = first; c < (last < inner ? last : inner); c += WIDTH) {
      const int64_t some = inner - c;
      Lanes mixed = layer.conv_bias == nullptr ? Lanes{} : load(layer.conv_bias + c, some);
      for (int64_t j = 0; j <= kept; ++j) {
        Lanes tap{};
        for (int64_t i = 0; i < WIDTH && i < some; ++i) tap[i] = layer.taps_of[(c + i) * layer.taps + j];
        const Lanes value = load(j < kept ? window + j * inner + c : values + c, some);
        mixed = fma(tap, value, mixed);
        if (j > 0) store(next + (j - 1) * inner + c, value, some);
      }
      store(call.values + row * inner + c, mixed * sigmoid(mixed), some);
    }
  }
}

static void select(const Call& call, int64_t first, int64_t last) {
  const Layer& layer = call.layer;
  products(layer.x_weight, nullptr, call.values, call.rows, layer.inner, call.chosen, layer.chosen(), first, last);
  ask(layer.out_weight, layer.width * layer.inner / 8, first, last, layer.chosen());
}

// The recurrence of some channels, read out and gated in place of the values.
static void scan(const Call& call, int64_t first, int64_t last) {
  const Layer& layer = call.layer;
  const int64_t inner = layer.inner, states = layer.states, rank = layer.rank;
  ask(layer.out_weight, layer.width * inner / 4, first, last, inner);
  for (int64_t row = 0; row < call.rows; ++row) {
    const float *chosen = call.chosen + row * layer.chosen(), *B = chosen + rank, *C = B + states;
    for (int64_t c = first; c < last; c += WIDTH) {
      const int64_t some = last - c < WIDTH ? last - c : WIDTH;
      Lanes found[WIDTH] = {};
      for (int64_t j = 0; j < some; ++j)
        for (int64_t i = 0; i < rank; i += WIDTH)
          found[j] = fma(load(layer.dt_weight + (c + j) * rank + i, rank - i), load(chosen + i, rank - i), found[j]);
      float* values = call.values + row * inner + c;
      const Lanes x = load(values, some), z = load(call.mixed + row * 2 * inner + inner + c, some);
      const Lanes step = softplus(sums(found) + load(layer.dt_bias + c, some)).value, fed = step * x;
      for (int64_t j = 0; j < some; ++j) {
        const float *h = call.state.h + (row * inner + c + j) * states, *rate = layer.A_log + (c + j) * states;
        float* next = call.state.next_h + (row * inner + c + j) * states;
        Lanes read{};
        for (int64_t n = 0; n < states; n += WIDTH) {
          const Lanes decay = exp2(-LOG2E * step[j] * exp2(LOG2E * load(rate + n, states - n)));
          const Lanes now = fma(decay, load(h + n, states - n), fed[j] * load(B + n, states - n));
          store(next + n, now, states - n);
          read = fma(now, load(C + n, states - n), read);
        }
        found[j] = read;
      }
      store(values, fma(load(layer.D + c, some), x, sums(found)) * (z * sigmoid(z)), some);
    }
  }
}

static void leave(const Call& call, int64_t first, int64_t last) {
  const Layer& layer = call.layer;
  products(layer.out_weight, layer.out_bias, call.values, call.rows, layer.inner, call.stream, layer.width, first, last,
           layer.joins);
  if (call.next != nullptr) ask(call.next->in_weight, 1 << 14, first, last, layer.width);
}
