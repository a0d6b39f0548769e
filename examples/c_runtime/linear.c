#include "linear.h"

#include <math.h>
#include <string.h>

#include "files.h"

/* Rows worth sharing between threads: below, handing out takes longer than computing. */
#define WORTH_SHARING (1u << 15)
/* Weights that are computed between two calls of `after`. */
#define PART_BYTES (UINT64_C(2) << 20)

typedef struct {
    const NlCompute *compute;
    const NlMatrix *matrix;
    const float *bias, *in;
    float *out;
    uint64_t tokens, pitch;
    const unsigned char *data; /* rows of the matrix, the first of which is number `first` */
    uint64_t first, count;
    NlEach each;
    void *context;
} Linear;

static int rounds(const NlCompute *compute, int kind) { return compute->integers && compute->integers->dots[kind]; }

void nl_prepare(const NlCompute *compute, int kind, const float *in, uint64_t columns) {
    if (rounds(compute, kind)) nl_round(in, columns, compute->codes, compute->scales);
}

void nl_multiply(const NlCompute *compute, int kind, const unsigned char *const *rows, uint64_t rows_count,
                 uint64_t columns, const float *in, float *sums) {
    if (rounds(compute, kind))
        nl_integer_dots(compute->integers, kind, rows, rows_count, columns, compute->codes, compute->scales, sums);
    else
        nl_dots(compute->kernels, kind, rows, rows_count, columns, in, sums);
}

static float biased(const Linear *job, uint64_t row, float sum) { return job->bias ? sum + job->bias[row] : sum; }

/* Rows [begin, end) with one token, as they are stored. Four are multiplied together that lie far apart: they are four
 * streams of memory then, while neighbours would be read as one, in disorder. */
static void multiply_one(const Linear *job, uint64_t begin, uint64_t end) {
    const NlTensor *at = &job->matrix->at;
    const uint64_t quarter = (end - begin) / 4;
    const unsigned char *rows[4];
    float sums[4], *out = job->out + job->first;
    for (uint64_t k = 0; k < quarter; k++) {
        for (uint64_t r = 0; r < 4; r++) rows[r] = job->data + (begin + r * quarter + k) * at->row_bytes;
        nl_multiply(job->compute, job->matrix->kind, rows, 4, at->columns, job->in, sums);
        for (uint64_t r = 0; r < 4; r++)
            out[begin + r * quarter + k] = biased(job, job->first + begin + r * quarter + k, sums[r]);
    }
    for (uint64_t k = begin + 4 * quarter; k < end; k++) {
        rows[0] = job->data + k * at->row_bytes;
        nl_multiply(job->compute, job->matrix->kind, rows, 1, at->columns, job->in, sums);
        out[k] = biased(job, job->first + k, sums[0]);
    }
}

/* With several tokens: two rows at a time are widened once for all of them. */
static void multiply_all(const Linear *job, uint64_t begin, uint64_t end, float *wide) {
    const NlTensor *at = &job->matrix->at;
    const unsigned char *rows[2] = {(const unsigned char *)wide, (const unsigned char *)(wide + at->columns)};
    for (uint64_t k = begin; k < end; k += 2) {
        const uint64_t count = end - k < 2 ? end - k : 2;
        float *out = job->out + job->first + k;
        for (uint64_t r = 0; r < count; r++)
            nl_widen(job->compute->kernels, job->matrix->kind, job->data + (k + r) * at->row_bytes, at->columns,
                     wide + r * at->columns);
        nl_products(job->compute->kernels, NL_F32, rows, count, at->columns, job->in, job->tokens, at->columns, out, 1,
                    job->pitch);
        for (uint64_t t = 0; job->bias && t < job->tokens; t++)
            for (uint64_t r = 0; r < count; r++) out[t * job->pitch + r] += job->bias[job->first + k + r];
    }
}

static void multiply(void *argument, unsigned thread, unsigned part, unsigned parts) {
    const Linear *job = argument;
    uint64_t begin, end;
    nl_share(job->count, part, parts, &begin, &end);
    if (job->tokens == 1) multiply_one(job, begin, end);
    else multiply_all(job, begin, end, job->compute->scratch + 2 * thread * job->compute->widest);
    if (job->each) job->each(job->context, job->first + begin, end - begin);
}

void nl_linear(const NlCompute *compute, const NlMatrix *matrix, const float *bias, const float *in, uint64_t tokens,
               float *out, uint64_t pitch) {
    nl_linear_parts(compute, matrix, bias, in, tokens, out, pitch, NULL, NULL, NULL);
}

int nl_linear_parts(const NlCompute *compute, const NlMatrix *matrix, const float *bias, const float *in, uint64_t tokens,
                    float *out, uint64_t pitch, NlEach each, NlAfter after, void *context) {
    const uint64_t all = matrix->at.rows, part = after ? PART_BYTES / matrix->at.row_bytes + 1 : all;
    Linear job = {compute, matrix, bias, in, out, tokens, pitch, matrix->data, 0, 0, each, context};
    if (tokens == 1) nl_prepare(compute, matrix->kind, in, matrix->at.columns);
    for (; job.first < all; job.first += job.count) {
        job.count = all - job.first < part ? all - job.first : part;
        if (matrix->streamed) {
            NlRows rows;
            NlStream *stream = matrix->streamed == NL_ON_DEMAND ? compute->routed : compute->stream;
            if (nl_stream_rows(stream, matrix, job.first, &rows, compute->failed) != 0) {
                for (uint64_t t = 0; t < tokens; t++) memset(out + t * pitch, 0, all * sizeof *out);
                return 0;
            }
            job.data = rows.data;
            job.count = rows.count;
        } else {
            job.data = matrix->data + job.first * matrix->at.row_bytes;
        }
        if (job.count * matrix->at.columns * tokens < WORTH_SHARING) multiply(&job, 0, 0, 1);
        else nl_workers_do(compute->workers, multiply, &job);
        if (after && after(context, job.first, job.count) != 0) return -1;
    }
    return 0;
}

void nl_row(const NlCompute *compute, const NlMatrix *matrix, uint64_t row, float *out) {
    const NlTensor *at = &matrix->at;
    const unsigned char *data = compute->row;
    if (!matrix->streamed)
        data = matrix->data + row * at->row_bytes;
    else if (nl_read_at(compute->file, compute->row, at->row_bytes, at->offset + row * at->row_bytes, compute->failed) != 0)
        memset(compute->row, 0, at->row_bytes);
    at->format->decode(data, at->columns, out);
}

void nl_norm(const NlNorm *norm, int centred, float epsilon, const float *in, uint64_t count, uint64_t size, float *out) {
    for (uint64_t t = 0; t < count; t++, in += size, out += size) {
        double mean = 0, square = 0;
        float scale;
        if (centred) {
            for (uint64_t j = 0; j < size; j++) mean += (double)in[j];
            mean /= (double)size;
        }
        for (uint64_t j = 0; j < size; j++) square += ((double)in[j] - mean) * ((double)in[j] - mean);
        scale = (float)(1 / sqrt(square / (double)size + (double)epsilon));
        for (uint64_t j = 0; j < size; j++) {
            out[j] = (in[j] - (float)mean) * scale * norm->norm.data[j];
            if (norm->bias.data) out[j] += norm->bias.data[j];
        }
    }
}
