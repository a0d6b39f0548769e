/*
 * Activations rounded to whole numbers of 8 bits: blocks of 32 share a scale, as rows of q8_0 do. Products with rows of
 * block formats are then sums of integers, exact but for the rounding of the activations.
 */
#ifndef NL_INTEGERS_H
#define NL_INTEGERS_H

#include "kernels.h"

/* Four rows with a rounded vector of `count` values: sums[k] = sum over blocks of both scales * (codes of row k with `codes`). */
typedef void (*NlIntegerDots)(const unsigned char *const rows[4], uint64_t count, const int8_t *codes,
                              const float *scales, float *sums);

typedef struct {
    const char *name;
    NlIntegerDots dots[NL_KINDS]; /* NULL for formats whose activations stay float32 */
} NlIntegers;

/* Rounds a vector, a multiple of 32 values: codes from -127 to 127, a scale for every 32. If a value of a block is not
 * finite, its scale is not a number. */
void nl_round(const float *values, uint64_t count, int8_t *codes, float *scales);

/* Any number of rows. */
void nl_integer_dots(const NlIntegers *integers, int kind, const unsigned char *const *rows, uint64_t rows_count,
                     uint64_t count, const int8_t *codes, const float *scales, float *sums);

/* Those of a name of kernels, or for NULL the best that this processor has; NULL if there are none of this name here. */
const NlIntegers *nl_integers(const char *name);

extern const NlIntegers NL_SCALAR_INTEGERS;
#ifdef NL_HAS_AVX2
extern const NlIntegers NL_AVX2_INTEGERS;
#ifdef NL_HAS_AVX512
extern const NlIntegers NL_AVX512_INTEGERS;
#endif
/* The same instruction, for processors without AVX-512. */
#ifdef __has_include
#if __has_include(<avxvnniintrin.h>)
#define NL_HAS_AVXVNNI
extern const NlIntegers NL_AVXVNNI_INTEGERS;
#endif
#endif
#endif
#ifdef NL_HAS_NEON
extern const NlIntegers NL_NEON_INTEGERS;
/* ARM's instructions for such sums, if the compiler knows them. */
#if defined(__ARM_FEATURE_DOTPROD) || (defined(__GNUC__) && !defined(__clang__))
#define NL_HAS_DOTPROD
extern const NlIntegers NL_DOTPROD_INTEGERS;
#endif
#endif

#endif
