/* Kernels for x86-64 with AVX2, FMA and F16C, whatever the compiler's options are. Eight weights are widened at a time
 * by a `load` per format; dot product and scaled addition are the same around it. */
#include "kernels.h"

#ifdef NL_HAS_AVX2
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET static inline __attribute__((always_inline))

static const int8_t IQ4_NL[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

INLINE float sum_of(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

INLINE __m256 load_f32(const unsigned char *at) { return _mm256_loadu_ps((const float *)(const void *)at); }

INLINE __m256 load_f16(const unsigned char *at) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)at));
}

INLINE __m256 load_bf16(const unsigned char *at) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

/* The remainder of a row of fewer than eight weights is copied into a row of eight that ends in zeros. */
#define PLAIN(name, bytes)                                                                                          \
    TARGET static float dot_##name(const unsigned char *row, uint64_t count, const float *values) {                 \
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;                                                        \
        uint64_t j = 0;                                                                                             \
        for (; j + 32 <= count; j += 32) {                                                                          \
            a = _mm256_fmadd_ps(load_##name(row + j * (bytes)), _mm256_loadu_ps(values + j), a);                    \
            b = _mm256_fmadd_ps(load_##name(row + (j + 8) * (bytes)), _mm256_loadu_ps(values + j + 8), b);          \
            c = _mm256_fmadd_ps(load_##name(row + (j + 16) * (bytes)), _mm256_loadu_ps(values + j + 16), c);        \
            d = _mm256_fmadd_ps(load_##name(row + (j + 24) * (bytes)), _mm256_loadu_ps(values + j + 24), d);        \
        }                                                                                                           \
        for (; j + 8 <= count; j += 8)                                                                              \
            a = _mm256_fmadd_ps(load_##name(row + j * (bytes)), _mm256_loadu_ps(values + j), a);                    \
        if (j < count) {                                                                                            \
            unsigned char rest[8 * (bytes)] = {0};                                                                  \
            float of[8] = {0};                                                                                      \
            memcpy(rest, row + j * (bytes), (count - j) * (bytes));                                                 \
            memcpy(of, values + j, (count - j) * sizeof *of);                                                       \
            b = _mm256_fmadd_ps(load_##name(rest), _mm256_loadu_ps(of), b);                                         \
        }                                                                                                           \
        return sum_of(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));                                     \
    }                                                                                                               \
    TARGET static void add_##name(const unsigned char *row, uint64_t count, float scale, float *values) {           \
        __m256 by = _mm256_set1_ps(scale);                                                                          \
        uint64_t j = 0;                                                                                             \
        for (; j + 8 <= count; j += 8)                                                                              \
            _mm256_storeu_ps(values + j, _mm256_fmadd_ps(load_##name(row + j * (bytes)), by,                        \
                                                         _mm256_loadu_ps(values + j)));                             \
        if (j < count) {                                                                                            \
            unsigned char rest[8 * (bytes)] = {0};                                                                  \
            float sums[8] = {0};                                                                                    \
            memcpy(rest, row + j * (bytes), (count - j) * (bytes));                                                 \
            memcpy(sums, values + j, (count - j) * sizeof *sums);                                                   \
            _mm256_storeu_ps(sums, _mm256_fmadd_ps(load_##name(rest), by, _mm256_loadu_ps(sums)));                  \
            memcpy(values + j, sums, (count - j) * sizeof *sums);                                                   \
        }                                                                                                           \
    }

PLAIN(f32, 4)
PLAIN(f16, 2)
PLAIN(bf16, 2)

/* The 32 codes of a block as signed bytes, in the order of the weights. */

INLINE __m256i codes_q8_0(const unsigned char *at) { return _mm256_loadu_si256((const __m256i *)(const void *)at); }

INLINE __m256i nibbles(const unsigned char *at) {
    __m128i packed = _mm_loadu_si128((const __m128i *)(const void *)at);
    __m256i both = _mm256_set_m128i(_mm_srli_epi16(packed, 4), packed);
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

INLINE __m256i codes_q4_0(const unsigned char *at) { return _mm256_sub_epi8(nibbles(at), _mm256_set1_epi8(8)); }

INLINE __m256i codes_iq4_nl(const unsigned char *at) {
    __m256i levels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)IQ4_NL));
    return _mm256_shuffle_epi8(levels, nibbles(at));
}

INLINE __m256 eight(__m128i codes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)); }

INLINE float scale_of(const unsigned char *block) {
    uint16_t half;
    memcpy(&half, block, sizeof half);
    return _cvtsh_ss(half);
}

/* Scale times code is exact in float32, so that it does not matter that a block's sum is scaled at its end. */
#define BLOCKS(name, bytes)                                                                                         \
    TARGET static float dot_##name(const unsigned char *row, uint64_t count, const float *values) {                 \
        __m256 even = _mm256_setzero_ps(), odd = even;                                                              \
        for (uint64_t j = 0; j < count; j += 32, row += (bytes)) {                                                  \
            __m256i codes = codes_##name(row + 2);                                                                  \
            __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);                 \
            __m256 by = _mm256_set1_ps(scale_of(row)), a, b;                                                        \
            a = _mm256_mul_ps(eight(low), _mm256_loadu_ps(values + j));                                             \
            b = _mm256_mul_ps(eight(_mm_srli_si128(low, 8)), _mm256_loadu_ps(values + j + 8));                      \
            a = _mm256_fmadd_ps(eight(high), _mm256_loadu_ps(values + j + 16), a);                                  \
            b = _mm256_fmadd_ps(eight(_mm_srli_si128(high, 8)), _mm256_loadu_ps(values + j + 24), b);               \
            even = _mm256_fmadd_ps(a, by, even);                                                                    \
            odd = _mm256_fmadd_ps(b, by, odd);                                                                      \
        }                                                                                                           \
        return sum_of(_mm256_add_ps(even, odd));                                                                    \
    }                                                                                                               \
    TARGET static void add_##name(const unsigned char *row, uint64_t count, float scale, float *values) {           \
        for (uint64_t j = 0; j < count; j += 32, row += (bytes)) {                                                  \
            __m256i codes = codes_##name(row + 2);                                                                  \
            __m128i parts[2] = {_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1)};                 \
            __m256 by = _mm256_set1_ps(scale * scale_of(row));                                                      \
            for (int k = 0; k < 2; k++) {                                                                           \
                float *to = values + j + 16 * k;                                                                    \
                _mm256_storeu_ps(to, _mm256_fmadd_ps(eight(parts[k]), by, _mm256_loadu_ps(to)));                    \
                to += 8;                                                                                            \
                _mm256_storeu_ps(to, _mm256_fmadd_ps(eight(_mm_srli_si128(parts[k], 8)), by, _mm256_loadu_ps(to))); \
            }                                                                                                       \
        }                                                                                                           \
    }

BLOCKS(q8_0, 34)
BLOCKS(q4_0, 18)
BLOCKS(iq4_nl, 18)

const NlKernels NL_AVX2_KERNELS = {
    "avx2",
    {dot_f32, dot_f16, dot_bf16, dot_q8_0, dot_q4_0, dot_iq4_nl},
    {add_f32, add_f16, add_bf16, add_q8_0, add_q4_0, add_iq4_nl},
};

#else
typedef int nl_no_avx2; /* a file of C must declare something */
#endif
