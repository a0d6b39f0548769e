/*
 * Many reads in flight: io_uring where the kernel has it (never on Android, where even asking for it ends the app), else
 * a pool of threads that call pread. Direct reads go past the page cache; offsets, sizes and buffers are then multiples
 * of NL_PAGE.
 */
#ifndef NL_READS_H
#define NL_READS_H

#include <stdint.h>

#include "error.h"

#define NL_PAGE 4096

typedef struct NlReads NlReads;

/* One read; its memory must stay until it is done. */
typedef struct {
    void *buffer;
    uint64_t offset, bytes;
    uint64_t needed;  /* fewer than these are an error; a file may end within the last page */
    uint32_t number;  /* for the caller */
    int64_t result;   /* bytes, or a negative errno */
} NlRequest;

/* Which way to have reads in flight. */
enum { NL_READS_BEST, NL_READS_URING, NL_READS_THREADS };

/* Starts reading from a file, with at most `depth` reads in flight. `way` NL_READS_URING is an error where there is no
 * io_uring. The file stays the caller's. */
NlReads *nl_reads_open(int file, unsigned depth, int way, NlError *error);
void nl_reads_close(NlReads *reads);

/* "io_uring" or "threads". */
const char *nl_reads_name(const NlReads *reads);

/* Adds a read to those that are to be started. There must be fewer than `depth` in flight. */
void nl_reads_add(NlReads *reads, NlRequest *request);

/* Starts what was added. */
int nl_reads_start(NlReads *reads, NlError *error);

/* The next read that is done, in no order; NULL with an error. With `wait` 0 it does not wait: NULL if there is none. At
 * least one must be in flight. */
NlRequest *nl_reads_next(NlReads *reads, int wait, NlError *error);

/* Waits for all reads in flight, whatever becomes of them. */
void nl_reads_drain(NlReads *reads);

#endif
