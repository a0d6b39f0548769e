/* Reading past the page cache, where that can be trusted. */
#ifndef NL_DIRECT_H
#define NL_DIRECT_H

#include "index.h"
#include "reads.h"

/* What a layout's weights are read from: the flash file once more, past the page cache, or as it is open already. */
typedef struct {
    int file;
    int direct;
    uint64_t unit; /* offsets and sizes of reads are multiples of this */
    char note[200]; /* a line if direct reads were wished for and are not there, or "" */
} NlSource;

/* `wish` as NlOptions.direct. Some file systems fall back silently, or wrongly: `bytes` bytes at `offset` are read both
 * ways and compared. */
int nl_source_open(NlSource *source, const NlIndex *index, const char *directory, int wish, uint64_t offset,
                   uint64_t bytes, NlError *error);
void nl_source_close(NlSource *source, const NlIndex *index);

#endif
