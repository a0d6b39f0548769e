/* io_uring through raw system calls: a queue of reads and one of their results, both shared with the kernel. */
#ifndef NL_URING_H
#define NL_URING_H

#include "reads.h"

typedef struct NlUring NlUring;

/* NULL where there is no io_uring, or where it is forbidden. */
NlUring *nl_uring_open(int file, unsigned depth);
void nl_uring_close(NlUring *uring);
void nl_uring_add(NlUring *uring, NlRequest *request);            /* to what the next call of nl_uring_start starts */
int nl_uring_start(NlUring *uring);                               /* 0, or a negative errno */
int nl_uring_next(NlUring *uring, int wait, NlRequest **request); /* 1, 0 if there is none, or a negative errno */

#endif
