// Sixteen floats at once, for kernels that are written once and compiled for every instruction set.
//
// Included by levels.hpp inside a namespace of its own, for AVX-512 with FW_WIDE defined and between FW_PUSH(FW_AVX512) and FW_END.
// Sums, products and comparisons are the operators of the compiler's vector type.
//
// exp2: 2^x = 2^floor(x) p(x - floor(x)) with a polynomial of degree 6, exact at both ends, relative error below 2e-7.

// All of these are inlined, so the way vectors are passed to functions does not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));

constexpr int64_t WIDTH = 16;
constexpr float LOG2E = 1.44269504f;

static FW_INLINE Lanes all(float x) { return x - Lanes{}; }

static FW_INLINE Lanes load(const float* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

static FW_INLINE void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }

#ifdef FW_WIDE

static FW_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

static FW_INLINE __mmask16 mask(int64_t count) { return __mmask16((1u << count) - 1u); }

// The first `count` lanes; the others are zero and not touched.
static FW_INLINE Lanes load(const float* from, int64_t count) {
  return count >= WIDTH ? load(from) : (Lanes)_mm512_maskz_loadu_ps(mask(count), from);
}

static FW_INLINE void store(float* to, Lanes x, int64_t count) {
  if (count >= WIDTH)
    store(to, x);
  else
    _mm512_mask_storeu_ps(to, mask(count), (__m512)x);
}

static FW_INLINE Lanes floor_rest(Lanes x) { return (Lanes)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF); }
static FW_INLINE Lanes scale_by_floor(Lanes p, Lanes x) { return (Lanes)_mm512_scalef_ps((__m512)p, (__m512)x); }

static FW_INLINE float total(Lanes x) { return _mm512_reduce_add_ps((__m512)x); }

// Lane 4 k + j of the result is the sum of lanes 4 k .. 4 k + 3 of the j-th.
static FW_INLINE Lanes fold(Lanes a, Lanes b, Lanes c, Lanes d) {
  const __m512 one = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 two = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512d p = _mm512_castps_pd(one), q = _mm512_castps_pd(two);
  return (Lanes)_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
}

#else

static FW_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return a * b + c; }

static FW_INLINE Lanes load(const float* from, int64_t count) {
  Lanes x{};
  std::memcpy(&x, from, static_cast<size_t>(count < WIDTH ? count : WIDTH) * sizeof(float));
  return x;
}

static FW_INLINE void store(float* to, Lanes x, int64_t count) {
  std::memcpy(to, &x, static_cast<size_t>(count < WIDTH ? count : WIDTH) * sizeof(float));
}

static FW_INLINE Lanes whole(Lanes x) {
  const Lanes near = __builtin_convertvector(__builtin_convertvector(x, Integers), Lanes);
  return near > x ? near - 1.0f : near;
}

// Beyond these the power is 0 or infinite; of a number and NaN the comparison keeps NaN.
static FW_INLINE Lanes bounded(Lanes x) {
  x = x < -127.0f ? all(-127.0f) : x;
  return x > 128.0f ? all(128.0f) : x;
}

static FW_INLINE Lanes floor_rest(Lanes x) { return bounded(x) - whole(bounded(x)); }

static FW_INLINE Lanes scale_by_floor(Lanes p, Lanes x) {
  const Integers power = (__builtin_convertvector(whole(bounded(x)), Integers) + 127) << 23;
  Lanes factor;
  std::memcpy(&factor, &power, sizeof factor);
  return p * factor;
}

static FW_INLINE float total(Lanes x) {
  float sum[4] = {};
  for (int i = 0; i < WIDTH; ++i) sum[i & 3] += x[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static FW_INLINE Lanes fold(Lanes a, Lanes b, Lanes c, Lanes d) {
  const Lanes of[4] = {a, b, c, d};
  Lanes sum;
  for (int i = 0; i < WIDTH; ++i) {
    const int k = i & ~3;
    sum[i] = of[i & 3][k] + of[i & 3][k + 1] + of[i & 3][k + 2] + of[i & 3][k + 3];
  }
  return sum;
}

#endif

static FW_INLINE Lanes exp2(Lanes x) {
  const Lanes r = floor_rest(x);
  Lanes p = all(2.17150215e-4f);
  p = fma(p, r, all(1.2440878e-3f));
  p = fma(p, r, all(9.6780638e-3f));
  p = fma(p, r, all(5.54841525e-2f));
  p = fma(p, r, all(2.40229513e-1f));
  p = fma(p, r, all(6.93147032e-1f));
  p = fma(p, r, all(1.0f));
  return scale_by_floor(p, x);
}

static FW_INLINE Lanes sigmoid(Lanes x) {
  const Lanes u = exp2(-LOG2E * (x < 0.0f ? -x : x));
  return (x < 0.0f ? u : all(1.0f)) / (1.0f + u);
}

struct Softplus {
  Lanes value, slope;
};

// log(1 + e^x) = max(x, 0) + 2 artanh(u / (2 + u)) with u = e^-|x|: no digit is lost where the result is small.
static FW_INLINE Softplus softplus(Lanes x) {
  const Lanes u = exp2(-LOG2E * (x < 0.0f ? -x : x)), s = u / (2.0f + u), q = s * s;
  Lanes p = all(0.280276396f);
  p = fma(p, q, all(0.279981733f));
  p = fma(p, q, all(0.400217909f));
  p = fma(p, q, all(0.666664105f));
  p = fma(p, q, all(2.0f));
  return {fma(p, s, x < 0.0f ? Lanes{} : x), (x < 0.0f ? u : all(1.0f)) / (1.0f + u)};
}

// Of the 16 channels from `channel` on, how many there are.
template <typename Call>
static FW_INLINE int64_t lanes_of(const Call& call, int64_t channel) {
  return call.channels - channel < WIDTH ? call.channels - channel : WIDTH;
}
