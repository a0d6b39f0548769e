/* Threads that compute together: a job is cut into as many parts as there are threads, the caller's included. */
#ifndef NL_WORKERS_H
#define NL_WORKERS_H

#include <stdint.h>

#include "error.h"

typedef struct NlWorkers NlWorkers;

/* Does part `part` of `parts` of a job. */
typedef void (*NlJob)(void *argument, unsigned part, unsigned parts);

NlWorkers *nl_workers_open(unsigned threads, NlError *error);
void nl_workers_close(NlWorkers *workers);

/* Does a job and returns when all its parts are done. */
void nl_workers_do(NlWorkers *workers, NlJob job, void *argument);

/* The share of `count` things that a part does: [*begin, *end). */
static inline void nl_share(uint64_t count, unsigned part, unsigned parts, uint64_t *begin, uint64_t *end) {
    *begin = count * part / parts;
    *end = count * (part + 1) / parts;
}

#endif
