// One token of a Mamba layer, a range of outputs at a time; see native.cpp. Included once for every instruction set.

static FW_INLINE float sum(Lanes x) {
#ifdef FW_WIDE
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0.0f;
  for (int i = 0; i < WIDTH; ++i) total += x[i];
  return total;
#endif
}

static FW_INLINE float silu(float x) { return x / (1.0f + std::exp(-x)); }

// to[row * to_row + o] = weight[o] . from[row] + bias[o] for `first` <= o < `last`. Four rows of weights are read once
// for all rows of inputs, so they come from memory once; reading them is what a step costs.
static void products(const float* weight, const float* bias, const float* from, int64_t rows, int64_t in, float* to,
                     int64_t to_row, int64_t first, int64_t last) {
  constexpr int64_t FOUR = 4, AHEAD = 1024;
  const int64_t even = in / WIDTH * WIDTH;
  for (int64_t o = first; o < last; o += FOUR) {
    const int64_t some = last - o < FOUR ? last - o : FOUR;
    const float *a = weight + o * in, *b = some > 1 ? a + in : a, *c = some > 2 ? b + in : a, *d = some > 3 ? c + in : a;
    for (int64_t row = 0; row < rows; ++row) {
      const float* x = from + row * in;
      Lanes of_a{}, of_b{}, of_c{}, of_d{};
      const auto add = [&](int64_t i, int64_t count) {
        const Lanes value = load(x + i, count);
        of_a = fma(load(a + i, count), value, of_a);
        of_b = fma(load(b + i, count), value, of_b);
        of_c = fma(load(c + i, count), value, of_c);
        of_d = fma(load(d + i, count), value, of_d);
      };
      for (int64_t i = 0; i < even; i += WIDTH) {
        __builtin_prefetch(a + i + AHEAD);
        __builtin_prefetch(b + i + AHEAD);
        __builtin_prefetch(c + i + AHEAD);
        __builtin_prefetch(d + i + AHEAD);
        add(i, WIDTH);
      }
      if (even < in) add(even, in - even);
      const float totals[FOUR] = {sum(of_a), sum(of_b), sum(of_c), sum(of_d)};
      for (int64_t j = 0; j < some; ++j) to[row * to_row + o + j] = totals[j] + (bias == nullptr ? 0.0f : bias[o + j]);
    }
  }
}

// Projected values and gates, those of the values through the convolution.
static void enter(const Call& call, int64_t first, int64_t last) {
  const int64_t inner = call.inner, kept = call.taps - 1;
  products(call.in_weight, call.in_bias, call.x, call.rows, call.width, call.mixed, 2 * inner, first, last);
  for (int64_t row = 0; row < call.rows; ++row) {
    const float* window = call.window + row * kept * inner;
    float *next = call.next_window + row * kept * inner, *values = call.mixed + row * 2 * inner;
    for (int64_t c = first; c < (last < inner ? last : inner); ++c) {
      const float* taps = call.taps_of + c * call.taps;
      float total = (call.conv_bias == nullptr ? 0.0f : call.conv_bias[c]) + taps[kept] * values[c];
      for (int64_t j = 0; j < kept; ++j) {
        total += taps[j] * window[j * inner + c];
        next[j * inner + c] = j + 1 < kept ? window[(j + 1) * inner + c] : values[c];
      }
      call.values[row * inner + c] = silu(total);
    }
  }
}

static void select(const Call& call, int64_t first, int64_t last) {
  const int64_t chosen = call.rank + 2 * call.states;
  products(call.x_weight, nullptr, call.values, call.rows, call.inner, call.chosen, chosen, first, last);
}

// The recurrence of some channels, read out and gated in place of the values.
static void scan(const Call& call, int64_t first, int64_t last) {
  const int64_t inner = call.inner, states = call.states;
  for (int64_t row = 0; row < call.rows; ++row) {
    const float* chosen = call.chosen + row * (call.rank + 2 * states);
    const float *B = chosen + call.rank, *C = B + states;
    for (int64_t c = first; c < last; ++c) {
      Lanes total{};
      for (int64_t i = 0; i < call.rank; i += WIDTH)
        total = fma(load(call.dt_weight + c * call.rank + i, call.rank - i), load(chosen + i, call.rank - i), total);
      const float step = softplus(all(sum(total) + call.dt_bias[c])).value[0], x = call.values[row * inner + c];
      const float *h = call.h + (row * inner + c) * states, *rate = call.A_log + c * states;
      float* next = call.next_h + (row * inner + c) * states;
      Lanes read{};
      for (int64_t n = 0; n < states; n += WIDTH) {
        const int64_t some = states - n;
        const Lanes decay = exp2(-LOG2E * step * exp2(LOG2E * load(rate + n, some)));
        const Lanes now = fma(decay, load(h + n, some), step * x * load(B + n, some));
        store(next + n, now, some);
        read = fma(now, load(C + n, some), read);
      }
      const float z = call.mixed[row * 2 * inner + inner + c];
      call.values[row * inner + c] = (sum(read) + call.D[c] * x) * silu(z);
    }
  }
}

static void leave(const Call& call, int64_t first, int64_t last) {
  products(call.out_weight, call.out_bias, call.values, call.rows, call.inner, call.y, call.width, first, last);
}
