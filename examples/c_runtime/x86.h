/* What the kernels for x86-64 share. Every function names the extensions that it is compiled for, so that they need no
 * options of the compiler. */
#ifndef NL_X86_H
#define NL_X86_H

#ifdef NL_EMULATION /* a header with these intrinsics for machines that lack them, as tests have one, and NL_TARGET */
#include NL_EMULATION
#else
#include <immintrin.h>
#define NL_TARGET(extensions) __attribute__((target(extensions)))
#endif
#include <string.h>

#include "weight_formats.h"

#define NL_AVX2 "avx2,fma,f16c"
#define NL_AVX512 NL_AVX2 ",avx512f,avx512vl,avx512vnni"
#define NL_INLINE(extensions) NL_TARGET(extensions) static inline __attribute__((always_inline))

NL_INLINE(NL_AVX2) __m128i nl_load_16(const void *at) { return _mm_loadu_si128((const __m128i *)at); }
NL_INLINE(NL_AVX2) __m256i nl_load_32(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }

/* The sums of four vectors. */
NL_INLINE(NL_AVX2) __m128 nl_sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

NL_INLINE(NL_AVX2) short nl_half_at(const unsigned char *at) {
    short half;
    memcpy(&half, at, sizeof half);
    return half;
}

/* The float16 that a block begins with. */
NL_INLINE(NL_AVX2) float nl_scale_of(const unsigned char *block) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(nl_half_at(block))));
}

/* Those of a block of each of four rows, twice. */
NL_INLINE(NL_AVX2) __m256 nl_scales_of(const unsigned char *const rows[4], uint64_t at) {
    const __m128i halves = _mm_setr_epi16(nl_half_at(rows[0] + at), nl_half_at(rows[1] + at), nl_half_at(rows[2] + at),
                                          nl_half_at(rows[3] + at), 0, 0, 0, 0);
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(halves, halves));
}

#endif
