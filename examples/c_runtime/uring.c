#define _GNU_SOURCE
#include "uring.h"

#if defined(__linux__) && !defined(__ANDROID__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#define HAS_URING
#endif
#endif

#ifdef HAS_URING
#include <errno.h>
#include <linux/io_uring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Of every architecture since Linux 5.1, also where the C library is older. */
#ifndef __NR_io_uring_setup
#define __NR_io_uring_setup 425
#define __NR_io_uring_enter 426
#endif

struct NlUring {
    int ring, file;
    unsigned depth, place, added; /* `place` of the next iovec; reads that were added but not started */
    void *submissions, *completions;
    size_t submission_bytes, completion_bytes, entry_bytes;
    unsigned *tail, *array, *done_head, *done_tail, mask, done_mask;
    struct io_uring_sqe *entries;
    struct io_uring_cqe *done;
    struct iovec *vectors;
};

static void *map(int ring, size_t bytes, off_t offset) {
    void *found = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring, offset);
    return found == MAP_FAILED ? NULL : found;
}

NlUring *nl_uring_open(int file, unsigned depth) {
    struct io_uring_params parameters;
    NlUring *uring = calloc(1, sizeof *uring);
    char *queue, *results;
    if (!uring) return NULL;
    memset(&parameters, 0, sizeof parameters);
    uring->file = file;
    uring->depth = depth;
    uring->ring = (int)syscall(__NR_io_uring_setup, depth, &parameters);
    if (uring->ring < 0) {
        free(uring);
        return NULL;
    }
    uring->submission_bytes = parameters.sq_off.array + parameters.sq_entries * sizeof(unsigned);
    uring->completion_bytes = parameters.cq_off.cqes + parameters.cq_entries * sizeof(struct io_uring_cqe);
    uring->entry_bytes = parameters.sq_entries * sizeof(struct io_uring_sqe);
    uring->submissions = map(uring->ring, uring->submission_bytes, IORING_OFF_SQ_RING);
    uring->completions = map(uring->ring, uring->completion_bytes, IORING_OFF_CQ_RING);
    uring->entries = map(uring->ring, uring->entry_bytes, IORING_OFF_SQES);
    uring->vectors = calloc(depth, sizeof *uring->vectors);
    if (!uring->submissions || !uring->completions || !uring->entries || !uring->vectors) {
        nl_uring_close(uring);
        return NULL;
    }
    queue = uring->submissions;
    results = uring->completions;
    uring->tail = (unsigned *)(void *)(queue + parameters.sq_off.tail);
    uring->array = (unsigned *)(void *)(queue + parameters.sq_off.array);
    uring->mask = *(unsigned *)(void *)(queue + parameters.sq_off.ring_mask);
    uring->done_head = (unsigned *)(void *)(results + parameters.cq_off.head);
    uring->done_tail = (unsigned *)(void *)(results + parameters.cq_off.tail);
    uring->done_mask = *(unsigned *)(void *)(results + parameters.cq_off.ring_mask);
    uring->done = (struct io_uring_cqe *)(void *)(results + parameters.cq_off.cqes);
    return uring;
}

void nl_uring_close(NlUring *uring) {
    if (uring->entries) munmap(uring->entries, uring->entry_bytes);
    if (uring->completions) munmap(uring->completions, uring->completion_bytes);
    if (uring->submissions) munmap(uring->submissions, uring->submission_bytes);
    close(uring->ring);
    free(uring->vectors);
    free(uring);
}

void nl_uring_add(NlUring *uring, NlRequest *request) {
    unsigned tail = *uring->tail, slot = tail & uring->mask;
    struct io_uring_sqe *entry = &uring->entries[slot];
    /* The kernel has copied the vector once nl_uring_start is back. */
    struct iovec *vector = &uring->vectors[uring->place++ % uring->depth];
    vector->iov_base = request->buffer;
    vector->iov_len = (size_t)request->bytes;
    memset(entry, 0, sizeof *entry);
    entry->opcode = IORING_OP_READV; /* in kernels from 5.1 on; IORING_OP_READ is younger */
    entry->fd = uring->file;
    entry->off = request->offset;
    entry->addr = (uint64_t)(uintptr_t)vector;
    entry->len = 1;
    entry->user_data = (uint64_t)(uintptr_t)request;
    uring->array[slot] = slot;
    __atomic_store_n(uring->tail, tail + 1, __ATOMIC_RELEASE);
    uring->added++;
}

int nl_uring_start(NlUring *uring) {
    while (uring->added > 0) {
        long taken = syscall(__NR_io_uring_enter, uring->ring, uring->added, 0, 0, NULL, 0);
        if (taken >= 0) uring->added -= (unsigned)taken;
        else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) return -errno;
    }
    return 0;
}

int nl_uring_next(NlUring *uring, int wait, NlRequest **request) {
    for (;;) {
        unsigned head = *uring->done_head;
        if (head != __atomic_load_n(uring->done_tail, __ATOMIC_ACQUIRE)) {
            const struct io_uring_cqe *done = &uring->done[head & uring->done_mask];
            *request = (NlRequest *)(uintptr_t)done->user_data;
            (*request)->result = done->res;
            __atomic_store_n(uring->done_head, head + 1, __ATOMIC_RELEASE);
            return 1;
        }
        if (!wait) return 0;
        if (syscall(__NR_io_uring_enter, uring->ring, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0 && errno != EINTR)
            return -errno;
    }
}

#else

NlUring *nl_uring_open(int file, unsigned depth) {
    (void)file, (void)depth;
    return 0;
}
void nl_uring_close(NlUring *uring) { (void)uring; }
void nl_uring_add(NlUring *uring, NlRequest *request) { (void)uring, (void)request; }
int nl_uring_start(NlUring *uring) {
    (void)uring;
    return -1;
}
int nl_uring_next(NlUring *uring, int wait, NlRequest **request) {
    (void)uring, (void)wait, (void)request;
    return -1;
}
#endif
