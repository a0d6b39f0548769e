/* Integer sums on x86-64: with AVX2, and with VNNI, an instruction that adds four products of 8 bits to 32. AVX-512 has it,
 * and processors without AVX-512 may have it alone. All take 256 bits at a time and give the same, to the last bit.
 *
 * The first factors of such products have no sign. So a bias makes weights positive, and sums begin with what that adds too
 * much. AVX2 adds pairs of products to 16 bits first, where only those of the small codes of q4_0 fit; for the others it
 * takes magnitudes of weights with activations that have taken their signs: 2 * 128 * 127 is the most, which fits. */
#include "integers.h"

#ifdef NL_HAS_AVX2
#include "x86.h"

#define INLINE NL_INLINE(NL_AVX2)

/* 32 codes of four bits, weights 16 apart in a byte. */
INLINE __m256i unpacked(const unsigned char *at) {
    const __m256i both = _mm256_broadcastsi128_si256(nl_load_16(at));
    return _mm256_and_si256(_mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15));
}

INLINE __m256i biased(__m256i codes) { return _mm256_xor_si256(codes, _mm256_set1_epi8(-128)); }
INLINE __m256i iq4_nl_levels(void) { return _mm256_broadcastsi128_si256(nl_load_16(NL_IQ4_NL_LEVELS)); }

/* Codes of a block as they are, and with a bias of 8 in q4_0 and of 128 in the others. */
INLINE __m256i codes_q8_0(const unsigned char *block) { return nl_load_32(block + 2); }
INLINE __m256i codes_iq4_nl(const unsigned char *block) { return _mm256_shuffle_epi8(iq4_nl_levels(), unpacked(block + 2)); }
INLINE __m256i biased_q8_0(const unsigned char *block) { return biased(codes_q8_0(block)); }
INLINE __m256i biased_q4_0(const unsigned char *block) { return unpacked(block + 2); }
INLINE __m256i biased_iq4_nl(const unsigned char *block) {
    return _mm256_shuffle_epi8(biased(iq4_nl_levels()), unpacked(block + 2));
}

/* Adds to eight sums four products each. */
INLINE __m256i add_small(__m256i sums, __m256i weights, __m256i codes) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(weights, codes), _mm256_set1_epi16(1)));
}

INLINE __m256i add_signed(__m256i sums, __m256i weights, __m256i codes) {
    return add_small(sums, _mm256_abs_epi8(weights), _mm256_sign_epi8(codes, weights));
}

#define INTEGERS(set, target, add, name, bytes, weights, bias)                                                      \
    NL_TARGET(target) static void set##_##name(const unsigned char *const rows[4], uint64_t count,                  \
                                               const int8_t *codes, const float *scales, float *sums) {             \
        const __m256i zero = _mm256_setzero_si256(), biases = _mm256_set1_epi8((char)(bias));                       \
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;                                                        \
        for (uint64_t j = 0, at = 0; j < count; j += 32, at += (bytes)) {                                           \
            const __m256i of = nl_load_32(codes + j);                                                               \
            const __m256i begin = (bias) ? _mm256_sub_epi32(zero, add(zero, biases, of)) : zero;                    \
            const __m256 by = _mm256_mul_ps(nl_scales_of(rows, at), _mm256_set1_ps(scales[j / 32]));                \
            const __m256i p = add(begin, weights(rows[0] + at), of), q = add(begin, weights(rows[1] + at), of);     \
            const __m256i r = add(begin, weights(rows[2] + at), of), s = add(begin, weights(rows[3] + at), of);     \
            a = _mm256_fmadd_ps(_mm256_cvtepi32_ps(p), _mm256_permute_ps(by, 0x00), a);                             \
            b = _mm256_fmadd_ps(_mm256_cvtepi32_ps(q), _mm256_permute_ps(by, 0x55), b);                             \
            c = _mm256_fmadd_ps(_mm256_cvtepi32_ps(r), _mm256_permute_ps(by, 0xaa), c);                             \
            d = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), _mm256_permute_ps(by, 0xff), d);                             \
        }                                                                                                           \
        _mm_storeu_ps(sums, nl_sums_of(a, b, c, d));                                                                \
    }

INTEGERS(avx2, NL_AVX2, add_signed, q8_0, 34, codes_q8_0, 0)
INTEGERS(avx2, NL_AVX2, add_small, q4_0, 18, biased_q4_0, 8)
INTEGERS(avx2, NL_AVX2, add_signed, iq4_nl, 18, codes_iq4_nl, 0)

const NlIntegers NL_AVX2_INTEGERS = {"avx2", {[NL_Q8_0] = avx2_q8_0, [NL_Q4_0] = avx2_q4_0, [NL_IQ4_NL] = avx2_iq4_nl}};

#ifdef NL_HAS_AVX512
INTEGERS(avx512, NL_AVX512, _mm256_dpbusd_epi32, q8_0, 34, biased_q8_0, 128)
INTEGERS(avx512, NL_AVX512, _mm256_dpbusd_epi32, q4_0, 18, biased_q4_0, 8)
INTEGERS(avx512, NL_AVX512, _mm256_dpbusd_epi32, iq4_nl, 18, biased_iq4_nl, 128)

const NlIntegers NL_AVX512_INTEGERS = {
    "avx512", {[NL_Q8_0] = avx512_q8_0, [NL_Q4_0] = avx512_q4_0, [NL_IQ4_NL] = avx512_iq4_nl}};
#endif

#ifdef NL_HAS_AVXVNNI
#define AVXVNNI NL_AVX2 ",avxvnni"
INTEGERS(avxvnni, AVXVNNI, _mm256_dpbusd_avx_epi32, q8_0, 34, biased_q8_0, 128)
INTEGERS(avxvnni, AVXVNNI, _mm256_dpbusd_avx_epi32, q4_0, 18, biased_q4_0, 8)
INTEGERS(avxvnni, AVXVNNI, _mm256_dpbusd_avx_epi32, iq4_nl, 18, biased_iq4_nl, 128)

const NlIntegers NL_AVXVNNI_INTEGERS = {
    "avxvnni", {[NL_Q8_0] = avxvnni_q8_0, [NL_Q4_0] = avxvnni_q4_0, [NL_IQ4_NL] = avxvnni_iq4_nl}};
#endif

#else
typedef int nl_no_x86_integers; /* a file of C must declare something */
#endif
