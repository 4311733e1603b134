// Arithmetic of 16 floats at once. Include between FW_PUSH(FW_TARGET_AVX512) and FW_END.
//
// exp: Cody-Waite reduction to |r| <= ln(2)/2 and a polynomial of degree 6, relative error below 2e-7.
// erf: Abramowitz and Stegun 7.1.26, absolute error below 2e-7.

static FW_INLINE __m512 exp512(__m512 x) {
  // Of a number and NaN the second operand is given, so NaN passes.
  x = _mm512_min_ps(_mm512_set1_ps(88.3f), _mm512_max_ps(_mm512_set1_ps(-87.3f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.3888889e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3333333e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1666668e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666667e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// 2^x for x <= 0 by a polynomial of degree D: relative error below 8e-8 at degree 5, below 8e-5 at degree 3.
template <int D>
static FW_INLINE __m512 power512(__m512 x) {
  static_assert(D == 3 || D == 5, "coefficients are here for these degrees");
  static constexpr float C3[] = {0.99992806f, 0.69326097f, 0.24261113f, 0.05517167f};
  static constexpr float C5[] = {1.0000001f, 0.69314694f, 0.24022122f, 0.05550713f, 0.009675541f, 0.0013276471f};
  const float* c = D == 3 ? C3 : C5;
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // NaN passes, as in exp512
  const __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(c[D]);
#pragma GCC unroll 5
  for (int i = D - 1; i >= 0; --i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c[i]));
  return _mm512_scalef_ps(p, n);
}

static FW_INLINE __m512 erf512(__m512 x) {
  const __m512 size = _mm512_abs_ps(x);
  const __m512 t = _mm512_div_ps(_mm512_set1_ps(1.0f),
                                 _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f)));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  p = _mm512_mul_ps(p, t);
  const __m512 tail = _mm512_mul_ps(p, exp512(_mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), size), size)));
  const __m512 y = _mm512_sub_ps(_mm512_set1_ps(1.0f), tail);
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(y), sign));
}

static FW_INLINE __mmask16 first512(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1u);
}

// 16 rows of 16 floats (missing rows are zero) -> its transpose, 16 floats every `to_row`.
static FW_INLINE void transpose16(const float* from, int64_t from_row, int64_t rows, float* to, int64_t to_row) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = i < rows ? _mm512_loadu_ps(from + i * from_row) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d one = _mm512_castps_pd(b[i + j]), two = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(one, two));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(one, two));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // column 4 c + j of rows 4 g .. 4 g + 3 is lane c of a[4 g + j]
    const __m512 low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(to + (0 + j) * to_row, _mm512_shuffle_f32x4(low, low2, 0x88));
    _mm512_storeu_ps(to + (4 + j) * to_row, _mm512_shuffle_f32x4(high, high2, 0x88));
    _mm512_storeu_ps(to + (8 + j) * to_row, _mm512_shuffle_f32x4(low, low2, 0xdd));
    _mm512_storeu_ps(to + (12 + j) * to_row, _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}
