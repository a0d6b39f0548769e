#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "direct.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "arena.h"

#define COMPARED_BYTES (UINT64_C(64) << 10)

/* Whether direct reads give what reads through the page cache give. */
static int compare_ways(const NlIndex *index, int direct, uint64_t offset, uint64_t bytes, int *same, NlError *error) {
    uint64_t lead = offset % NL_PAGE, window;
    unsigned char *memory;
    ssize_t count;
    int result = -1;
    if (bytes > COMPARED_BYTES) bytes = COMPARED_BYTES;
    window = (lead + bytes + NL_PAGE - 1) / NL_PAGE * NL_PAGE;
    *same = 0;
    if (!(memory = nl_map(2 * window))) return nl_fail(error, NL_NO_MEMORY, "out of memory");
    count = pread(direct, memory, (size_t)window, (off_t)(offset - lead));
    if (count < 0 || (uint64_t)count < lead + bytes) {
        result = 0; /* no direct reads, or no whole ones */
    } else if (nl_read_at(index->file, memory + window, lead + bytes, offset - lead, error) == 0) {
        *same = memcmp(memory, memory + window, (size_t)(lead + bytes)) == 0;
        result = 0;
    }
    nl_unmap(memory, 2 * window);
    return result;
}

int nl_source_open(NlSource *source, const NlIndex *index, const char *directory, int wish, uint64_t offset,
                   uint64_t bytes, NlError *error) {
    int same = 0, file = -1;
    uint64_t size;
    NlError ignored = {NL_OK, ""};
    *source = (NlSource){index->file, 0, 1, ""};
    if (wish == 2) return 0;
#ifdef O_DIRECT
    file = nl_open_file(directory, index->name, O_DIRECT, &size, &ignored);
    if (file >= 0 && compare_ways(index, file, offset, bytes, &same, error) != 0) {
        close(file);
        return -1;
    }
#else
    (void)directory, (void)offset, (void)bytes, (void)size, (void)ignored;
#endif
    if (same) {
        source->file = file;
        source->direct = 1;
        source->unit = NL_PAGE;
        return 0;
    }
    if (file >= 0) close(file);
    if (wish == 1)
        return nl_fail(error, NL_NOT_SUPPORTED, "this file system has no direct reads that give what the page cache gives");
    snprintf(source->note, sizeof source->note, "the file system has no direct reads: they go through the page cache");
    return 0;
}

void nl_source_close(NlSource *source, const NlIndex *index) {
    if (source->file >= 0 && source->file != index->file) close(source->file);
    source->file = -1;
}
