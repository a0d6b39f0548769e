/* The intrinsics of AVX-512 on a machine that has AVX2, FMA and F16C only: those of SIMDe, in C for any machine, and made of
 * two halves those that SIMDe lacks. */
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#define NL_TARGET(extensions)

static inline simde__m512i two_halves(__m256i low, __m256i high) {
    return simde_mm512_inserti64x4(simde_mm512_castsi256_si512(low), high, 1);
}

#define HALF(v, k) simde_mm512_extracti64x4_epi64(v, k)
#define FLOATS(low, high) simde_mm512_castsi512_ps(two_halves(_mm256_castps_si256(low), _mm256_castps_si256(high)))

static inline simde__m512i cvtepi8_epi32(__m128i v) {
    return two_halves(_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)));
}

static inline simde__m512i cvtepu8_epi32(__m128i v) {
    return two_halves(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}

static inline simde__m512i cvtepu16_epi32(__m256i v) {
    return two_halves(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)),
                      _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}

static inline simde__m512 cvtepi32_ps(simde__m512i v) {
    return FLOATS(_mm256_cvtepi32_ps(HALF(v, 0)), _mm256_cvtepi32_ps(HALF(v, 1)));
}

static inline simde__m512 cvtph_ps(__m256i v) {
    return FLOATS(_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}

static inline __m256i cvtps_ph(simde__m512 v) {
    const simde__m512i whole = simde_mm512_castps_si512(v);
    return _mm256_set_m128i(_mm256_cvtps_ph(_mm256_castsi256_ps(HALF(whole, 1)), _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(_mm256_castsi256_ps(HALF(whole, 0)), _MM_FROUND_TO_NEAREST_INT));
}

#define _mm512_cvtepi8_epi32(v) cvtepi8_epi32(v)
#define _mm512_cvtepu8_epi32(v) cvtepu8_epi32(v)
#define _mm512_cvtepu16_epi32(v) cvtepu16_epi32(v)
#define _mm512_cvtepi32_ps(v) cvtepi32_ps(v)
#define _mm512_cvtph_ps(v) cvtph_ps(v)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(v, rounding) cvtps_ph(v)
#define _mm256_dpbusd_avx_epi32(sum, a, b) simde_mm256_dpbusd_epi32(sum, a, b)
