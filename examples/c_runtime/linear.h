/* Dense layers and norms on a batch of tokens, by all threads. Activations are float32, a row for each token. */
#ifndef NL_LINEAR_H
#define NL_LINEAR_H

#include "integers.h"
#include "stream.h"
#include "weights.h"
#include "workers.h"

/* What computes: kernels, threads, and for each thread room for two widened rows of `widest` weights. */
typedef struct {
    const NlKernels *kernels;
    NlWorkers *workers;
    unsigned threads;
    uint64_t widest;
    float *scratch;
    const NlIntegers *integers; /* NULL: activations stay float32 */
    int8_t *codes;              /* a rounded vector of `widest` values, */
    float *scales;              /* and its scales */
    NlStream *stream; /* of matrices that are not in memory; NULL if all are */
    NlStream *routed; /* of those that only some tokens need */
    NlError *failed;  /* where it enters that a matrix could not be read */
    int file;         /* what single rows of such matrices are read from */
    unsigned char *row;
} NlCompute;

/* A vector that rows of a kind are to be multiplied with, rounded if that is so; batches of tokens stay as they are. */
void nl_prepare(const NlCompute *compute, int kind, const float *in, uint64_t columns);

/* Rows with one vector, that was prepared: sums[k] = row k with `in`. */
void nl_multiply(const NlCompute *compute, int kind, const unsigned char *const *rows, uint64_t rows_count,
                 uint64_t columns, const float *in, float *sums);

/* If a matrix is streamed and cannot be read, compute->failed says so and the result is 0. */

/* out[t * pitch + r] = row r of the matrix times in[t * columns], plus bias[r] if there is a bias. */
void nl_linear(const NlCompute *compute, const NlMatrix *matrix, const float *bias, const float *in, uint64_t tokens,
               float *out, uint64_t pitch);

/* The same, part by part. Threads call `each` with rows `first` to `first` + `count` - 1 that they have done; `after` is
 * called by one of them when all rows of a part are done, and ends it by -1. */
typedef void (*NlEach)(void *context, uint64_t first, uint64_t count);
typedef int (*NlAfter)(void *context, uint64_t first, uint64_t count);
int nl_linear_parts(const NlCompute *compute, const NlMatrix *matrix, const float *bias, const float *in, uint64_t tokens,
                    float *out, uint64_t pitch, NlEach each, NlAfter after, void *context);

/* Row `row` of a matrix, widened. */
void nl_row(const NlCompute *compute, const NlMatrix *matrix, uint64_t row, float *out);

/* Layer norm, or without centring RMS norm, of `count` rows of `size` values; `out` may be `in`. */
void nl_norm(const NlNorm *norm, int centred, float epsilon, const float *in, uint64_t count, uint64_t size, float *out);

#endif
