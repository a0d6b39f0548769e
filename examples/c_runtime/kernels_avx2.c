/* Kernels for x86-64 with AVX2, FMA and F16C, whatever the compiler's options are. Eight weights are widened at a time
 * by a `load` per format. */
#include "kernels.h"

#ifdef NL_HAS_AVX2
#include <string.h>

#include "x86.h"

#define TARGET NL_TARGET(NL_AVX2)
#define INLINE NL_INLINE(NL_AVX2)

INLINE float sum_of(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

INLINE __m256 load_f32(const unsigned char *at) { return _mm256_loadu_ps((const float *)(const void *)at); }

INLINE __m256 load_f16(const unsigned char *at) {
    return _mm256_cvtph_ps(nl_load_16(at));
}

INLINE __m256 load_bf16(const unsigned char *at) {
    __m256i wide = _mm256_cvtepu16_epi32(nl_load_16(at));
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

/* Four rows at once are four streams of memory, and share what they are multiplied with. A tile is two rows with four
 * vectors: a weight is then widened once for four products. */
#define PLAIN_ROWS(name, bytes)                                                                                     \
    TARGET static void dots_##name(const unsigned char *const rows[4], uint64_t count, const float *values,         \
                                   float *sums) {                                                                   \
        const unsigned char *p = rows[0], *q = rows[1], *r = rows[2], *s = rows[3];                                 \
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;                                                        \
        for (uint64_t j = 0; j < count; j += 8) {                                                                   \
            __m256 of = _mm256_loadu_ps(values + j);                                                                \
            a = _mm256_fmadd_ps(load_##name(p + j * (bytes)), of, a);                                               \
            b = _mm256_fmadd_ps(load_##name(q + j * (bytes)), of, b);                                               \
            c = _mm256_fmadd_ps(load_##name(r + j * (bytes)), of, c);                                               \
            d = _mm256_fmadd_ps(load_##name(s + j * (bytes)), of, d);                                               \
        }                                                                                                           \
        _mm_storeu_ps(sums, nl_sums_of(a, b, c, d));                                                                \
    }                                                                                                               \
    TARGET static void tile_##name(const unsigned char *const rows[2], uint64_t count, const float *vectors,        \
                                   uint64_t pitch, float *sums) {                                                   \
        const float *second = vectors + pitch, *third = second + pitch, *fourth = third + pitch;                    \
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a, e = a, f = a, g = a, h = a;                            \
        for (uint64_t j = 0; j < count; j += 8) {                                                                   \
            __m256 p = load_##name(rows[0] + j * (bytes)), q = load_##name(rows[1] + j * (bytes)), of;              \
            of = _mm256_loadu_ps(vectors + j);                                                                      \
            a = _mm256_fmadd_ps(p, of, a);                                                                          \
            e = _mm256_fmadd_ps(q, of, e);                                                                          \
            of = _mm256_loadu_ps(second + j);                                                                       \
            b = _mm256_fmadd_ps(p, of, b);                                                                          \
            f = _mm256_fmadd_ps(q, of, f);                                                                          \
            of = _mm256_loadu_ps(third + j);                                                                        \
            c = _mm256_fmadd_ps(p, of, c);                                                                          \
            g = _mm256_fmadd_ps(q, of, g);                                                                          \
            of = _mm256_loadu_ps(fourth + j);                                                                       \
            d = _mm256_fmadd_ps(p, of, d);                                                                          \
            h = _mm256_fmadd_ps(q, of, h);                                                                          \
        }                                                                                                           \
        _mm_storeu_ps(sums, nl_sums_of(a, b, c, d));                                                                \
        _mm_storeu_ps(sums + 4, nl_sums_of(e, f, g, h));                                                            \
    }                                                                                                               \
    TARGET static void adds_##name(const unsigned char *const rows[4], uint64_t count, const float *scales,         \
                                   float *values) {                                                                 \
        const unsigned char *p = rows[0], *q = rows[1], *r = rows[2], *s = rows[3];                                 \
        const __m256 a = _mm256_set1_ps(scales[0]), b = _mm256_set1_ps(scales[1]);                                  \
        const __m256 c = _mm256_set1_ps(scales[2]), d = _mm256_set1_ps(scales[3]);                                  \
        for (uint64_t j = 0; j < count; j += 8) {                                                                   \
            __m256 sum = _mm256_fmadd_ps(load_##name(p + j * (bytes)), a, _mm256_loadu_ps(values + j));             \
            sum = _mm256_fmadd_ps(load_##name(q + j * (bytes)), b, sum);                                            \
            sum = _mm256_fmadd_ps(load_##name(r + j * (bytes)), c, sum);                                            \
            _mm256_storeu_ps(values + j, _mm256_fmadd_ps(load_##name(s + j * (bytes)), d, sum));                    \
        }                                                                                                           \
    }

PLAIN(f32, 4)
PLAIN(f16, 2)
PLAIN(bf16, 2)
PLAIN_ROWS(f32, 4)
PLAIN_ROWS(f16, 2)
PLAIN_ROWS(bf16, 2)

/* The 32 codes of a block as numbers, in the order of the weights. */
typedef struct {
    __m256 part[4];
} Levels;

INLINE __m256 signed_bytes(const unsigned char *at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)at)));
}

INLINE Levels levels_q8_0(const unsigned char *block) {
    const unsigned char *at = block + 2;
    return (Levels){{signed_bytes(at), signed_bytes(at + 8), signed_bytes(at + 16), signed_bytes(at + 24)}};
}

/* Eight of 16 bytes, which are in both halves of `bytes`, as numbers: each becomes the highest byte of a 32-bit integer. */
INLINE __m256 spread(__m256i bytes, __m256i eight) { return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, eight)); }

/* Of 16 bytes, each with the code of a weight in its low half and that of the weight 16 further in its high half: what a
 * table has for them, times 2^24. */
INLINE Levels look_up(const unsigned char *at, const int8_t *table) {
    const __m256i packed = _mm256_broadcastsi128_si256(nl_load_16(at));
    const __m256i levels = _mm256_broadcastsi128_si256(nl_load_16(table));
    const __m256i mask = _mm256_set1_epi8(15), step = _mm256_set1_epi32(0x08000000);
    const __m256i first = _mm256_setr_epi32(0x00808080, 0x01808080, 0x02808080, 0x03808080, 0x04808080, 0x05808080,
                                            0x06808080, 0x07808080);
    const __m256i second = _mm256_add_epi32(first, step);
    const __m256i low = _mm256_shuffle_epi8(levels, _mm256_and_si256(packed, mask));
    const __m256i high = _mm256_shuffle_epi8(levels, _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask));
    return (Levels){{spread(low, first), spread(low, second), spread(high, first), spread(high, second)}};
}

INLINE Levels levels_q4_0(const unsigned char *block) { return look_up(block + 2, NL_Q4_0_LEVELS); }
INLINE Levels levels_iq4_nl(const unsigned char *block) { return look_up(block + 2, NL_IQ4_NL_LEVELS); }

/* Of mxfp4 a weight is made at once: its scale alone may be too large or too small for float32. */
INLINE __m256 scaled(__m128i codes, __m256 half) {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), half);
}

INLINE Levels levels_mxfp4(const unsigned char *block) {
    const __m128i packed = nl_load_16(block + 1), mask = _mm_set1_epi8(15);
    const __m128i table = nl_load_16(NL_MXFP4_DOUBLES);
    const __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(packed, mask));
    const __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(packed, 4), mask));
    const __m256 half = _mm256_set1_ps(nl_half_scale(*block));
    return (Levels){{scaled(low, half), scaled(_mm_srli_si128(low, 8), half), scaled(high, half),
                     scaled(_mm_srli_si128(high, 8), half)}};
}

INLINE float scale_q8_0(const unsigned char *block) { return nl_scale_of(block); }
INLINE float scale_q4_0(const unsigned char *block) { return 0x1p-24f * nl_scale_of(block); }
INLINE float scale_iq4_nl(const unsigned char *block) { return 0x1p-24f * nl_scale_of(block); }
INLINE float scale_mxfp4(const unsigned char *block) { return (void)block, 1; }

INLINE __m256 times(Levels levels, const float *values) {
    __m256 a = _mm256_mul_ps(levels.part[0], _mm256_loadu_ps(values));
    __m256 b = _mm256_mul_ps(levels.part[1], _mm256_loadu_ps(values + 8));
    a = _mm256_fmadd_ps(levels.part[2], _mm256_loadu_ps(values + 16), a);
    b = _mm256_fmadd_ps(levels.part[3], _mm256_loadu_ps(values + 24), b);
    return _mm256_add_ps(a, b);
}

/* Scale times code is exact in float32, so that it does not matter that a block's sum is scaled at its end. There are two
 * sums, as a block would else wait for the one before.  */
#define BLOCKS(name, bytes)                                                                                         \
    INLINE __m256 block_##name(const unsigned char *block, const float *values, __m256 sum) {                       \
        return _mm256_fmadd_ps(times(levels_##name(block), values), _mm256_set1_ps(scale_##name(block)), sum);      \
    }                                                                                                               \
    TARGET static float dot_##name(const unsigned char *row, uint64_t count, const float *values) {                 \
        __m256 even = _mm256_setzero_ps(), odd = even;                                                              \
        uint64_t j = 0;                                                                                             \
        for (; j + 64 <= count; j += 64, row += 2 * (bytes)) {                                                      \
            even = block_##name(row, values + j, even);                                                             \
            odd = block_##name(row + (bytes), values + j + 32, odd);                                                \
        }                                                                                                           \
        if (j < count) even = block_##name(row, values + j, even);                                                  \
        return sum_of(_mm256_add_ps(even, odd));                                                                    \
    }                                                                                                               \
    TARGET static void dots_##name(const unsigned char *const rows[4], uint64_t count, const float *values,         \
                                   float *sums) {                                                                   \
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;                                                        \
        for (uint64_t j = 0, at = 0; j < count; j += 32, at += (bytes)) {                                           \
            a = block_##name(rows[0] + at, values + j, a);                                                          \
            b = block_##name(rows[1] + at, values + j, b);                                                          \
            c = block_##name(rows[2] + at, values + j, c);                                                          \
            d = block_##name(rows[3] + at, values + j, d);                                                          \
        }                                                                                                           \
        _mm_storeu_ps(sums, nl_sums_of(a, b, c, d));                                                                \
    }                                                                                                               \
    TARGET static void add_##name(const unsigned char *row, uint64_t count, float scale, float *values) {           \
        for (uint64_t j = 0; j < count; j += 32, row += (bytes)) {                                                  \
            Levels levels = levels_##name(row);                                                                     \
            __m256 by = _mm256_set1_ps(scale * scale_##name(row));                                                  \
            for (int k = 0; k < 4; k++) {                                                                           \
                float *to = values + j + 8 * k;                                                                     \
                _mm256_storeu_ps(to, _mm256_fmadd_ps(levels.part[k], by, _mm256_loadu_ps(to)));                     \
            }                                                                                                       \
        }                                                                                                           \
    }                                                                                                               \
    TARGET static void adds_##name(const unsigned char *const rows[4], uint64_t count, const float *scales,         \
                                   float *values) {                                                                 \
        for (uint64_t j = 0, at = 0; j < count; j += 32, at += (bytes)) {                                           \
            float *to = values + j;                                                                                 \
            __m256 a = _mm256_loadu_ps(to), b = _mm256_loadu_ps(to + 8);                                            \
            __m256 c = _mm256_loadu_ps(to + 16), d = _mm256_loadu_ps(to + 24);                                      \
            for (int k = 0; k < 4; k++) {                                                                           \
                Levels levels = levels_##name(rows[k] + at);                                                        \
                __m256 by = _mm256_set1_ps(scales[k] * scale_##name(rows[k] + at));                                 \
                a = _mm256_fmadd_ps(levels.part[0], by, a);                                                         \
                b = _mm256_fmadd_ps(levels.part[1], by, b);                                                         \
                c = _mm256_fmadd_ps(levels.part[2], by, c);                                                         \
                d = _mm256_fmadd_ps(levels.part[3], by, d);                                                         \
            }                                                                                                       \
            _mm256_storeu_ps(to, a);                                                                                \
            _mm256_storeu_ps(to + 8, b);                                                                            \
            _mm256_storeu_ps(to + 16, c);                                                                           \
            _mm256_storeu_ps(to + 24, d);                                                                           \
        }                                                                                                           \
    }

BLOCKS(q8_0, 34)
BLOCKS(q4_0, 18)
BLOCKS(iq4_nl, 18)
BLOCKS(mxfp4, 17)

TARGET static void narrow(const float *values, uint64_t count, unsigned char *out) {
    const __m256 most = _mm256_set1_ps(65504), least = _mm256_set1_ps(-65504);
    uint64_t j = 0;
    for (; j + 8 <= count; j += 8) {
        /* What is not a number is the second operand, and stays. */
        __m256 v = _mm256_max_ps(least, _mm256_min_ps(most, _mm256_loadu_ps(values + j)));
        _mm_storeu_si128((__m128i *)(void *)(out + 2 * j), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    nl_narrow_row(values + j, count - j, out + 2 * j);
}

const NlKernels NL_AVX2_KERNELS = {
    "avx2",
    {dot_f32, dot_f16, dot_bf16, dot_q8_0, dot_q4_0, dot_iq4_nl, dot_mxfp4},
    {add_f32, add_f16, add_bf16, add_q8_0, add_q4_0, add_iq4_nl, add_mxfp4},
    {dots_f32, dots_f16, dots_bf16, dots_q8_0, dots_q4_0, dots_iq4_nl, dots_mxfp4},
    {adds_f32, adds_f16, adds_bf16, adds_q8_0, adds_q4_0, adds_iq4_nl, adds_mxfp4},
    {tile_f32, tile_f16, tile_bf16},
    narrow,
};

#else
typedef int nl_no_avx2; /* a file of C must declare something */
#endif
