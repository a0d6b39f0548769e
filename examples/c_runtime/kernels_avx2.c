/* Kernels for x86-64 with AVX2, FMA and F16C, whatever the compiler's options are. Eight weights are widened at a time
 * by a `load` per format. */
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

/* The 32 codes of a block as numbers, in the order of the weights. */
typedef struct {
    __m256 part[4];
} Levels;

INLINE __m256 signed_bytes(const unsigned char *at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)at)));
}

INLINE Levels levels_q8_0(const unsigned char *at) {
    return (Levels){{signed_bytes(at), signed_bytes(at + 8), signed_bytes(at + 16), signed_bytes(at + 24)}};
}

/* Eight bytes, each with the code of a weight in its low half and that of the weight 16 further in its high half. */
INLINE Levels levels_q4_0(const unsigned char *at) {
    __m256i first = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)at));
    __m256i second = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(at + 8)));
    __m256i mask = _mm256_set1_epi32(15), eight = _mm256_set1_epi32(8);
    return (Levels){{_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(first, mask), eight)),
                     _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(second, mask), eight)),
                     _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(first, 4), eight)),
                     _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(second, 4), eight))}};
}

INLINE __m256 widen(__m128i codes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)); }

INLINE Levels levels_iq4_nl(const unsigned char *at) {
    __m128i packed = _mm_loadu_si128((const __m128i *)(const void *)at), mask = _mm_set1_epi8(15);
    __m128i levels = _mm_loadu_si128((const __m128i *)(const void *)IQ4_NL);
    __m128i low = _mm_shuffle_epi8(levels, _mm_and_si128(packed, mask));
    __m128i high = _mm_shuffle_epi8(levels, _mm_and_si128(_mm_srli_epi16(packed, 4), mask));
    return (Levels){{widen(low), widen(_mm_srli_si128(low, 8)), widen(high), widen(_mm_srli_si128(high, 8))}};
}

INLINE float scale_of(const unsigned char *block) {
    uint16_t half;
    memcpy(&half, block, sizeof half);
    return _cvtsh_ss(half);
}

INLINE __m256 times(Levels levels, const float *values) {
    __m256 a = _mm256_mul_ps(levels.part[0], _mm256_loadu_ps(values));
    __m256 b = _mm256_mul_ps(levels.part[1], _mm256_loadu_ps(values + 8));
    a = _mm256_fmadd_ps(levels.part[2], _mm256_loadu_ps(values + 16), a);
    b = _mm256_fmadd_ps(levels.part[3], _mm256_loadu_ps(values + 24), b);
    return _mm256_add_ps(a, b);
}

/* Scale times code is exact in float32, so that it does not matter that a block's sum is scaled at its end. There are two
 * sums, as a block would else wait for the one before. */
#define BLOCKS(name, bytes)                                                                                         \
    TARGET static float dot_##name(const unsigned char *row, uint64_t count, const float *values) {                 \
        __m256 even = _mm256_setzero_ps(), odd = even;                                                              \
        uint64_t j = 0;                                                                                             \
        for (; j + 64 <= count; j += 64, row += 2 * (bytes)) {                                                      \
            __m256 a = times(levels_##name(row + 2), values + j);                                                   \
            __m256 b = times(levels_##name(row + (bytes) + 2), values + j + 32);                                    \
            even = _mm256_fmadd_ps(a, _mm256_set1_ps(scale_of(row)), even);                                         \
            odd = _mm256_fmadd_ps(b, _mm256_set1_ps(scale_of(row + (bytes))), odd);                                 \
        }                                                                                                           \
        if (j < count)                                                                                              \
            even = _mm256_fmadd_ps(times(levels_##name(row + 2), values + j), _mm256_set1_ps(scale_of(row)), even); \
        return sum_of(_mm256_add_ps(even, odd));                                                                    \
    }                                                                                                               \
    TARGET static void add_##name(const unsigned char *row, uint64_t count, float scale, float *values) {           \
        for (uint64_t j = 0; j < count; j += 32, row += (bytes)) {                                                  \
            Levels levels = levels_##name(row + 2);                                                                 \
            __m256 by = _mm256_set1_ps(scale * scale_of(row));                                                      \
            for (int k = 0; k < 4; k++) {                                                                           \
                float *to = values + j + 8 * k;                                                                     \
                _mm256_storeu_ps(to, _mm256_fmadd_ps(levels.part[k], by, _mm256_loadu_ps(to)));                     \
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
