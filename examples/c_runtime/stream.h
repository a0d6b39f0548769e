/*
 * Weights that do not fit in memory are read anew for every token: in large reads, ahead of the computation, in the order
 * in which it uses them. A ring of buffers lies between threads that read and the thread that computes. Which matrices
 * come next is known from the start, or, where tokens are routed to experts, told layer by layer.
 */
#ifndef NL_STREAM_H
#define NL_STREAM_H

#include "weights.h"

#define NL_STREAM_BUFFERS 8u
#define NL_STREAM_THREADS 4u

typedef struct NlStream NlStream;

/* Some rows of a matrix, there until the next ones are asked for. */
typedef struct {
    const unsigned char *data;
    uint64_t count;
} NlRows;

/* Bytes of a buffer that holds at least a row of `row_bytes`, and about `usual` bytes. */
uint64_t nl_stream_buffer(uint64_t row_bytes, uint64_t usual);

/*
 * Reads the `count` matrices of a schedule round and round from a file. `memory` is NL_STREAM_BUFFERS buffers of
 * `buffer_bytes`; reads begin and end at multiples of `unit`. The schedule, the file and the memory stay the caller's.
 */
NlStream *nl_stream_open(int file, uint64_t unit, unsigned char *memory, uint64_t buffer_bytes,
                         const NlMatrix *const *schedule, uint64_t count, NlError *error);

/* The same for matrices that are told by nl_stream_ask, at most `most` at a time. */
NlStream *nl_stream_open_on_demand(int file, uint64_t unit, unsigned char *memory, uint64_t buffer_bytes, uint64_t most,
                                   NlError *error);
void nl_stream_close(NlStream *stream);

/* Has matrices read, once and in this order, each of which is then to be used whole. What was asked for before is forgotten,
 * and rows of it are there no longer. */
void nl_stream_ask(NlStream *stream, const NlMatrix *const *matrices, uint64_t count);

/* The rows of a matrix from `first` on, as many as a buffer has. Anything but the next ones of the schedule costs a
 * fresh start; of those on demand it is an error. */
int nl_stream_rows(NlStream *stream, const NlMatrix *matrix, uint64_t first, NlRows *rows, NlError *error);

/* What was read so far, and the seconds that the computation waited for it. */
void nl_stream_counters(NlStream *stream, uint64_t *reads, uint64_t *bytes, double *seconds);

#endif
