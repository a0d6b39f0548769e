/* Threads that compute together, the caller's included. A job is cut into more parts than there are threads, and each
 * takes the next part that is left: one that the system has put aside delays the others by a part at most. */
#ifndef NL_WORKERS_H
#define NL_WORKERS_H

#include <stdint.h>

#include "error.h"

typedef struct NlWorkers NlWorkers;

/* Does part `part` of `parts` of a job, in thread `thread` of all. */
typedef void (*NlJob)(void *argument, unsigned thread, unsigned part, unsigned parts);

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
