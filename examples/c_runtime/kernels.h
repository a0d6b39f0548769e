/*
 * What a row of weights does to activations, exactly: weights are widened to float32, products and sums are float32.
 * There is a set for every kind of machine; all give the same up to the order of their sums.
 */
#ifndef NL_KERNELS_H
#define NL_KERNELS_H

#include <stdint.h>

#include "weight_formats.h"

/* Sum of row[j] * values[j]. `count` is the row's number of weights. */
typedef float (*NlDot)(const unsigned char *row, uint64_t count, const float *values);
/* values[j] += scale * row[j]. */
typedef void (*NlAdd)(const unsigned char *row, uint64_t count, float scale, float *values);

/* The same with four rows, of a multiple of 8 weights: sums[k] = row k with `values`; all of scales[k] * row k are added. */
typedef void (*NlDots)(const unsigned char *const rows[4], uint64_t count, const float *values, float *sums);
typedef void (*NlAdds)(const unsigned char *const rows[4], uint64_t count, const float *scales, float *values);
/* Two rows of a multiple of 8 weights with four vectors, `pitch` values apart: sums[4 * row + vector]. */
typedef void (*NlTile)(const unsigned char *const rows[2], uint64_t count, const float *vectors, uint64_t pitch,
                       float *sums);

/* Values as float16, little-endian: the nearest, and of those beyond the largest the largest. */
typedef void (*NlNarrow)(const float *values, uint64_t count, unsigned char *out);

/* Formats that can be computed with; the first are those without blocks. */
enum { NL_F32, NL_F16, NL_BF16, NL_Q8_0, NL_Q4_0, NL_IQ4_NL, NL_MXFP4, NL_KINDS, NL_PLAIN_KINDS = NL_Q8_0 };

typedef struct {
    const char *name; /* "scalar", "avx2", "avx512" or "neon" */
    NlDot dot[NL_KINDS];
    NlAdd add[NL_KINDS];
    NlDots dots[NL_KINDS]; /* these three are NULL where several rows at once gain nothing */
    NlAdds adds[NL_KINDS];
    NlTile tile[NL_PLAIN_KINDS];
    NlNarrow narrow;
} NlKernels;

/* dot and add of any number of rows, four at a time where that is possible: sums[k] = row k with `values`. */
void nl_dots(const NlKernels *kernels, int kind, const unsigned char *const *rows, uint64_t rows_count, uint64_t count,
             const float *values, float *sums);
void nl_adds(const NlKernels *kernels, int kind, const unsigned char *const *rows, uint64_t rows_count, uint64_t count,
             const float *scales, float *values);

/* Rows with vectors, `pitch` values apart: out[row * row_step + vector * vector_step]. */
void nl_products(const NlKernels *kernels, int kind, const unsigned char *const *rows, uint64_t rows_count,
                 uint64_t count, const float *vectors, uint64_t vectors_count, uint64_t pitch, float *out,
                 uint64_t row_step, uint64_t vector_step);

/* Widens a row: what adding it to zeros gives, which is exact, and faster than NlFormat's decode. */
void nl_widen(const NlKernels *kernels, int kind, const unsigned char *row, uint64_t count, float *values);

/* Which of the kinds a format is; -1 if it cannot be computed with. */
int nl_kind(const NlFormat *format);

/* The kernels of a name, or for NULL the best that this processor has; NULL if there are none of this name here. */
const NlKernels *nl_kernels(const char *name);

extern const NlKernels NL_SCALAR_KERNELS;
#if defined(__x86_64__) && defined(__GNUC__)
#define NL_HAS_AVX2
extern const NlKernels NL_AVX2_KERNELS;
#ifdef __has_include
#if __has_include(<avx512vnniintrin.h>) /* the compiler knows it with VNNI */
#define NL_HAS_AVX512
extern const NlKernels NL_AVX512_KERNELS;
#endif
#endif
#endif
#if defined(__aarch64__)
#define NL_HAS_NEON
extern const NlKernels NL_NEON_KERNELS;
#endif

#endif
