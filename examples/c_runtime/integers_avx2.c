/* Integer sums with AVX2. Products of 8 bits are added in pairs to 16 bits: of magnitudes of weights, unsigned, with
 * activations that have taken their signs. 2 * 128 * 127 is the most, which fits. */
#include "integers.h"

#ifdef NL_HAS_AVX2
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET static inline __attribute__((always_inline))

INLINE __m256i codes_q8_0(const unsigned char *block) {
    return _mm256_loadu_si256((const __m256i *)(const void *)(block + 2));
}

/* 32 codes of four bits, weights 16 apart in a byte, as what a table has for them. */
INLINE __m256i look_up(const unsigned char *at, const int8_t *table) {
    const __m128i packed = _mm_loadu_si128((const __m128i *)(const void *)at);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1);
    const __m256i levels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)table));
    return _mm256_shuffle_epi8(levels, _mm256_and_si256(both, _mm256_set1_epi8(15)));
}

INLINE __m256i codes_q4_0(const unsigned char *block) { return look_up(block + 2, NL_Q4_0_LEVELS); }
INLINE __m256i codes_iq4_nl(const unsigned char *block) { return look_up(block + 2, NL_IQ4_NL_LEVELS); }

INLINE __m256 products(__m256i weights, __m256i codes) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(codes, weights));
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* The scales of a block of each of four rows. */
INLINE __m128 scales_of(const unsigned char *const rows[4], uint64_t at) {
    uint16_t halves[4];
    for (int k = 0; k < 4; k++) memcpy(&halves[k], rows[k] + at, 2);
    return _mm_cvtph_ps(_mm_setr_epi16((short)halves[0], (short)halves[1], (short)halves[2], (short)halves[3], 0, 0, 0, 0));
}

INLINE __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

#define ALL(scales, k) _mm256_broadcastss_ps(_mm_shuffle_ps(scales, scales, (k) * 0x55))

#define INTEGERS(name, bytes)                                                                                        \
    TARGET static void dots_##name(const unsigned char *const rows[4], uint64_t count, const int8_t *codes,          \
                                   const float *scales, float *sums) {                                               \
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;                                                         \
        for (uint64_t j = 0, at = 0; j < count; j += 32, at += (bytes)) {                                            \
            const __m256i of = _mm256_loadu_si256((const __m256i *)(const void *)(codes + j));                       \
            const __m128 by = _mm_mul_ps(scales_of(rows, at), _mm_set1_ps(scales[j / 32]));                          \
            a = _mm256_fmadd_ps(products(codes_##name(rows[0] + at), of), ALL(by, 0), a);                            \
            b = _mm256_fmadd_ps(products(codes_##name(rows[1] + at), of), ALL(by, 1), b);                            \
            c = _mm256_fmadd_ps(products(codes_##name(rows[2] + at), of), ALL(by, 2), c);                            \
            d = _mm256_fmadd_ps(products(codes_##name(rows[3] + at), of), ALL(by, 3), d);                            \
        }                                                                                                            \
        _mm_storeu_ps(sums, sums_of(a, b, c, d));                                                                    \
    }

INTEGERS(q8_0, 34)
INTEGERS(q4_0, 18)
INTEGERS(iq4_nl, 18)

const NlIntegers NL_AVX2_INTEGERS = {
    "avx2", {[NL_Q8_0] = dots_q8_0, [NL_Q4_0] = dots_q4_0, [NL_IQ4_NL] = dots_iq4_nl}};

#else
typedef int nl_no_avx2_integers; /* a file of C must declare something */
#endif
