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
} Linear;

static void multiply(void *argument, unsigned thread, unsigned part, unsigned parts) {
    const Linear *job = argument;
    const NlTensor *at = &job->matrix->at;
    const NlDot dot = job->compute->kernels->dot[job->matrix->kind], plain = job->compute->kernels->dot[NL_F32];
    float *wide = job->compute->scratch + 2 * thread * job->compute->widest;
    uint64_t begin, end;
    nl_share(job->count, part, parts, &begin, &end);
    for (uint64_t k = begin; k < end; k++) {
        const unsigned char *row = job->data + k * at->row_bytes;
        const uint64_t r = job->first + k;
        float bias = job->bias ? job->bias[r] : 0;
        if (job->tokens == 1) {
            job->out[r] = dot(row, at->columns, job->in) + bias;
            continue;
        }
        nl_widen(job->compute->kernels, job->matrix->kind, row, at->columns, wide);
        for (uint64_t t = 0; t < job->tokens; t++)
            job->out[t * job->pitch + r] =
                plain((const unsigned char *)wide, at->columns, job->in + t * at->columns) + bias;
    }
}

void nl_linear(const NlCompute *compute, const NlMatrix *matrix, const float *bias, const float *in, uint64_t tokens,
               float *out, uint64_t pitch) {
    nl_linear_parts(compute, matrix, bias, in, tokens, out, pitch, NULL, NULL);
}

int nl_linear_parts(const NlCompute *compute, const NlMatrix *matrix, const float *bias, const float *in, uint64_t tokens,
                    float *out, uint64_t pitch, NlAfter after, void *context) {
    const uint64_t all = matrix->at.rows, part = after ? PART_BYTES / matrix->at.row_bytes + 1 : all;
    Linear job = {compute, matrix, bias, in, out, tokens, pitch, matrix->data, 0, 0};
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
