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

/* Formats that can be computed with. */
enum { NL_F32, NL_F16, NL_BF16, NL_Q8_0, NL_Q4_0, NL_IQ4_NL, NL_KINDS };

typedef struct {
    const char *name; /* "scalar", "avx2" or "neon" */
    NlDot dot[NL_KINDS];
    NlAdd add[NL_KINDS];
} NlKernels;

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
#endif
#if defined(__aarch64__)
#define NL_HAS_NEON
extern const NlKernels NL_NEON_KERNELS;
#endif

#endif
