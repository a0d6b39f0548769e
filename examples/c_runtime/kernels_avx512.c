/* Kernels for x86-64 with AVX-512. 32 weights at a time are widened to two vectors, by a function per format; a table of
 * 16 levels is one register. What then is left of a row, of formats without blocks, is for the kernels of any machine. */
#include "kernels.h"

#ifdef NL_HAS_AVX512
#include "x86.h"

#define TARGET NL_TARGET(NL_AVX512)
#define INLINE NL_INLINE(NL_AVX512)

typedef struct {
    __m512 low, high;
} Pair;

INLINE Pair load(const float *at) { return (Pair){_mm512_loadu_ps(at), _mm512_loadu_ps(at + 16)}; }

INLINE void store(float *at, Pair of) {
    _mm512_storeu_ps(at, of.low);
    _mm512_storeu_ps(at + 16, of.high);
}

INLINE __m512 table_of(const int8_t *levels) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(nl_load_16(levels))); }

/* Of 16 bytes: what the table has for the low half of each, and for the high one. Only the last four bits of an index count. */
INLINE Pair look_up(const unsigned char *at, __m512 table) {
    const __m512i codes = _mm512_cvtepu8_epi32(nl_load_16(at));
    return (Pair){_mm512_permutexvar_ps(codes, table), _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table)};
}

INLINE __m512 wide_bf16(const unsigned char *at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(nl_load_32(at)), 16));
}

INLINE __m512 wide_bytes(const unsigned char *at) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(nl_load_16(at))); }

INLINE Pair weights_f32(const unsigned char *at, __m512 table) {
    return (void)table, load((const float *)(const void *)at);
}

INLINE Pair weights_f16(const unsigned char *at, __m512 table) {
    return (void)table, (Pair){_mm512_cvtph_ps(nl_load_32(at)), _mm512_cvtph_ps(nl_load_32(at + 32))};
}

INLINE Pair weights_bf16(const unsigned char *at, __m512 table) {
    return (void)table, (Pair){wide_bf16(at), wide_bf16(at + 32)};
}

INLINE Pair weights_q8_0(const unsigned char *at, __m512 table) {
    return (void)table, (Pair){wide_bytes(at + 2), wide_bytes(at + 18)};
}

INLINE Pair weights_q4_0(const unsigned char *at, __m512 table) { return look_up(at + 2, table); }
INLINE Pair weights_iq4_nl(const unsigned char *at, __m512 table) { return look_up(at + 2, table); }

/* These are made at once: the scale alone may be too large or too small for float32. */
INLINE Pair weights_mxfp4(const unsigned char *at, __m512 table) {
    const __m512 power = _mm512_set1_ps((float)*at - 128); /* of 2, as the table has twice the levels */
    const Pair doubles = look_up(at + 1, table);
    return (Pair){_mm512_scalef_ps(doubles.low, power), _mm512_scalef_ps(doubles.high, power)};
}

INLINE Pair add_pair(Pair to, Pair weights, Pair by) {
    return (Pair){_mm512_fmadd_ps(weights.low, by.low, to.low), _mm512_fmadd_ps(weights.high, by.high, to.high)};
}

/* Adds products of 32 weights and values; where there is a scale, their sum is scaled, and not each of them. */
INLINE Pair add_products(Pair to, Pair weights, Pair values, const unsigned char *block, int scaled) {
    if (!scaled) return add_pair(to, weights, values);
    const __m512 sum = _mm512_fmadd_ps(weights.high, values.high, _mm512_mul_ps(weights.low, values.low));
    return (Pair){_mm512_fmadd_ps(sum, _mm512_set1_ps(nl_scale_of(block)), to.low), to.high};
}

INLINE Pair add_scaled(Pair to, Pair weights, float scale, const unsigned char *block, int scaled) {
    const __m512 by = _mm512_set1_ps(scaled ? scale * nl_scale_of(block) : scale);
    return add_pair(to, weights, (Pair){by, by});
}

INLINE __m256 half_of(Pair sums) {
    const __m512 all = _mm512_add_ps(sums.low, sums.high);
    return _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
}

/* `bytes` are those of 32 weights. */
#define KERNELS(name, kind, bytes, scaled, levels)                                                                  \
    TARGET static void dots_##name(const unsigned char *const rows[4], uint64_t count, const float *values,         \
                                   float *sums) {                                                                   \
        const Pair zero = {_mm512_setzero_ps(), _mm512_setzero_ps()};                                               \
        const __m512 table = table_of(levels);                                                                      \
        Pair a = zero, b = zero, c = zero, d = zero;                                                                \
        uint64_t j = 0, at = 0;                                                                                     \
        for (; j + 32 <= count; j += 32, at += (bytes)) {                                                           \
            const Pair of = load(values + j);                                                                       \
            a = add_products(a, weights_##name(rows[0] + at, table), of, rows[0] + at, scaled);                     \
            b = add_products(b, weights_##name(rows[1] + at, table), of, rows[1] + at, scaled);                     \
            c = add_products(c, weights_##name(rows[2] + at, table), of, rows[2] + at, scaled);                     \
            d = add_products(d, weights_##name(rows[3] + at, table), of, rows[3] + at, scaled);                     \
        }                                                                                                           \
        _mm_storeu_ps(sums, nl_sums_of(half_of(a), half_of(b), half_of(c), half_of(d)));                            \
        for (int k = 0; j < count && k < 4; k++)                                                                    \
            sums[k] += NL_SCALAR_KERNELS.dot[kind](rows[k] + at, count - j, values + j);                            \
    }                                                                                                               \
    TARGET static float dot_##name(const unsigned char *row, uint64_t count, const float *values) {                 \
        const Pair zero = {_mm512_setzero_ps(), _mm512_setzero_ps()};                                               \
        const __m512 table = table_of(levels);                                                                      \
        const __m256 none = _mm256_setzero_ps();                                                                    \
        Pair even = zero, odd = zero;                                                                               \
        uint64_t j = 0;                                                                                             \
        for (; j + 64 <= count; j += 64, row += 2 * (bytes)) {                                                      \
            const unsigned char *next = row + (bytes);                                                              \
            even = add_products(even, weights_##name(row, table), load(values + j), row, scaled);                   \
            odd = add_products(odd, weights_##name(next, table), load(values + j + 32), next, scaled);              \
        }                                                                                                           \
        if (j + 32 <= count) {                                                                                      \
            even = add_products(even, weights_##name(row, table), load(values + j), row, scaled);                   \
            j += 32, row += (bytes);                                                                                \
        }                                                                                                           \
        const float sum = _mm_cvtss_f32(nl_sums_of(_mm256_add_ps(half_of(even), half_of(odd)), none, none, none));  \
        return j < count ? sum + NL_SCALAR_KERNELS.dot[kind](row, count - j, values + j) : sum;                     \
    }                                                                                                               \
    TARGET static void add_##name(const unsigned char *row, uint64_t count, float scale, float *values) {           \
        const __m512 table = table_of(levels);                                                                      \
        uint64_t j = 0;                                                                                             \
        for (; j + 32 <= count; j += 32, row += (bytes))                                                            \
            store(values + j, add_scaled(load(values + j), weights_##name(row, table), scale, row, scaled));        \
        if (j < count) NL_SCALAR_KERNELS.add[kind](row, count - j, scale, values + j);                              \
    }                                                                                                               \
    TARGET static void adds_##name(const unsigned char *const rows[4], uint64_t count, const float *scales,         \
                                   float *values) {                                                                 \
        const __m512 table = table_of(levels);                                                                      \
        uint64_t j = 0, at = 0;                                                                                     \
        for (; j + 32 <= count; j += 32, at += (bytes)) {                                                           \
            Pair to = load(values + j);                                                                             \
            for (int k = 0; k < 4; k++)                                                                             \
                to = add_scaled(to, weights_##name(rows[k] + at, table), scales[k], rows[k] + at, scaled);          \
            store(values + j, to);                                                                                  \
        }                                                                                                           \
        for (int k = 0; j < count && k < 4; k++)                                                                    \
            NL_SCALAR_KERNELS.add[kind](rows[k] + at, count - j, scales[k], values + j);                            \
    }

KERNELS(f32, NL_F32, 128, 0, NL_Q4_0_LEVELS) /* the first three need no table */
KERNELS(f16, NL_F16, 64, 0, NL_Q4_0_LEVELS)
KERNELS(bf16, NL_BF16, 64, 0, NL_Q4_0_LEVELS)
KERNELS(q8_0, NL_Q8_0, 34, 1, NL_Q4_0_LEVELS)
KERNELS(q4_0, NL_Q4_0, 18, 1, NL_Q4_0_LEVELS)
KERNELS(iq4_nl, NL_IQ4_NL, 18, 1, NL_IQ4_NL_LEVELS)
KERNELS(mxfp4, NL_MXFP4, 17, 0, NL_MXFP4_DOUBLES)

/* Two rows with four vectors: a weight is widened once for four products. */
#define TILE(name, kind, bytes)                                                                                     \
    TARGET static void tile_##name(const unsigned char *const rows[2], uint64_t count, const float *vectors,        \
                                   uint64_t pitch, float *sums) {                                                   \
        const __m512 none = _mm512_setzero_ps();                                                                    \
        const Pair zero = {none, none};                                                                             \
        const float *second = vectors + pitch, *third = second + pitch, *fourth = third + pitch;                    \
        Pair a = zero, b = zero, c = zero, d = zero, e = zero, f = zero, g = zero, h = zero;                        \
        uint64_t j = 0, at = 0;                                                                                     \
        for (; j + 32 <= count; j += 32, at += (bytes)) {                                                           \
            const Pair p = weights_##name(rows[0] + at, none), q = weights_##name(rows[1] + at, none);              \
            Pair of = load(vectors + j);                                                                            \
            a = add_pair(a, p, of);                                                                                 \
            e = add_pair(e, q, of);                                                                                 \
            of = load(second + j);                                                                                  \
            b = add_pair(b, p, of);                                                                                 \
            f = add_pair(f, q, of);                                                                                 \
            of = load(third + j);                                                                                   \
            c = add_pair(c, p, of);                                                                                 \
            g = add_pair(g, q, of);                                                                                 \
            of = load(fourth + j);                                                                                  \
            d = add_pair(d, p, of);                                                                                 \
            h = add_pair(h, q, of);                                                                                 \
        }                                                                                                           \
        _mm_storeu_ps(sums, nl_sums_of(half_of(a), half_of(b), half_of(c), half_of(d)));                            \
        _mm_storeu_ps(sums + 4, nl_sums_of(half_of(e), half_of(f), half_of(g), half_of(h)));                        \
        for (int k = 0; j < count && k < 8; k++)                                                                    \
            sums[k] += NL_SCALAR_KERNELS.dot[kind](rows[k / 4] + at, count - j, vectors + k % 4 * pitch + j);       \
    }

TILE(f32, NL_F32, 128)
TILE(f16, NL_F16, 64)
TILE(bf16, NL_BF16, 64)

TARGET static void narrow(const float *values, uint64_t count, unsigned char *out) {
    const __m512 most = _mm512_set1_ps(65504), least = _mm512_set1_ps(-65504);
    uint64_t j = 0;
    for (; j + 16 <= count; j += 16) {
        /* What is not a number is the second operand, and stays. */
        const __m512 v = _mm512_max_ps(least, _mm512_min_ps(most, _mm512_loadu_ps(values + j)));
        _mm256_storeu_si256((__m256i *)(void *)(out + 2 * j), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    nl_narrow_row(values + j, count - j, out + 2 * j);
}

const NlKernels NL_AVX512_KERNELS = {
    "avx512",
    {dot_f32, dot_f16, dot_bf16, dot_q8_0, dot_q4_0, dot_iq4_nl, dot_mxfp4},
    {add_f32, add_f16, add_bf16, add_q8_0, add_q4_0, add_iq4_nl, add_mxfp4},
    {dots_f32, dots_f16, dots_bf16, dots_q8_0, dots_q4_0, dots_iq4_nl, dots_mxfp4},
    {adds_f32, adds_f16, adds_bf16, adds_q8_0, adds_q4_0, adds_iq4_nl, adds_mxfp4},
    {tile_f32, tile_f16, tile_bf16},
    narrow,
};

#else
typedef int nl_no_avx512; /* a file of C must declare something */
#endif
