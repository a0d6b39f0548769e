#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "reads.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "uring.h"

/* Threads of the pool; more gain nothing on the phones and disks that were measured with `neuralink probe`. */
#define MOST_THREADS 16
#define STACK_BYTES (128 << 10)

struct NlReads {
    int file;
    unsigned depth, in_flight;
    NlUring *uring;
    /* The pool: rings of `depth` requests to read and of those that are done. */
    pthread_t threads[MOST_THREADS];
    int started, stopping, has_lock;
    pthread_mutex_t lock;
    pthread_cond_t work, news;
    NlRequest **todo, **done;
    unsigned todo_first, todo_count, done_first, done_count;
};

static void *serve(void *argument) {
    NlReads *reads = argument;
    pthread_mutex_lock(&reads->lock);
    for (;;) {
        NlRequest *request;
        ssize_t count;
        while (!reads->todo_count && !reads->stopping) pthread_cond_wait(&reads->work, &reads->lock);
        if (reads->stopping) break;
        request = reads->todo[reads->todo_first];
        reads->todo_first = (reads->todo_first + 1) % reads->depth;
        reads->todo_count--;
        pthread_mutex_unlock(&reads->lock);
        do count = pread(reads->file, request->buffer, (size_t)request->bytes, (off_t)request->offset);
        while (count < 0 && errno == EINTR);
        request->result = count < 0 ? -errno : count;
        pthread_mutex_lock(&reads->lock);
        reads->done[(reads->done_first + reads->done_count++) % reads->depth] = request;
        pthread_cond_signal(&reads->news);
    }
    pthread_mutex_unlock(&reads->lock);
    return NULL;
}

static int start_pool(NlReads *reads, NlError *error) {
    unsigned wanted = reads->depth < MOST_THREADS ? reads->depth : MOST_THREADS;
    pthread_attr_t attributes;
    reads->todo = calloc(2 * (size_t)reads->depth, sizeof *reads->todo);
    if (!reads->todo) return nl_fail(error, NL_NO_MEMORY, "out of memory");
    reads->done = reads->todo + reads->depth;
    if (pthread_mutex_init(&reads->lock, NULL) != 0) return nl_fail(error, NL_NO_MEMORY, "out of memory");
    pthread_cond_init(&reads->work, NULL);
    pthread_cond_init(&reads->news, NULL);
    reads->has_lock = 1;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    while (reads->started < (int)wanted &&
           pthread_create(&reads->threads[reads->started], &attributes, serve, reads) == 0)
        reads->started++;
    pthread_attr_destroy(&attributes);
    return reads->started ? 0 : nl_fail(error, NL_NO_MEMORY, "no thread for reading can be started");
}

NlReads *nl_reads_open(int file, unsigned depth, int way, NlError *error) {
    NlReads *reads = calloc(1, sizeof *reads);
    if (!reads) {
        nl_fail(error, NL_NO_MEMORY, "out of memory");
        return NULL;
    }
    reads->file = file;
    reads->depth = depth;
    if (way != NL_READS_THREADS) reads->uring = nl_uring_open(file, depth);
    if (!reads->uring && way == NL_READS_URING)
        nl_fail(error, NL_NOT_SUPPORTED, "this system has no io_uring, or forbids it");
    else if (reads->uring || start_pool(reads, error) == 0)
        return reads;
    nl_reads_close(reads);
    return NULL;
}

void nl_reads_close(NlReads *reads) {
    if (!reads) return;
    nl_reads_drain(reads); /* no buffer may be freed that the system still writes to */
    if (reads->uring) nl_uring_close(reads->uring);
    if (reads->has_lock) {
        pthread_mutex_lock(&reads->lock);
        reads->stopping = 1;
        pthread_cond_broadcast(&reads->work);
        pthread_mutex_unlock(&reads->lock);
        for (int k = 0; k < reads->started; k++) pthread_join(reads->threads[k], NULL);
        pthread_cond_destroy(&reads->news);
        pthread_cond_destroy(&reads->work);
        pthread_mutex_destroy(&reads->lock);
    }
    free(reads->todo);
    free(reads);
}

const char *nl_reads_name(const NlReads *reads) { return reads->uring ? "io_uring" : "threads"; }

void nl_reads_add(NlReads *reads, NlRequest *request) {
    if (reads->uring) {
        nl_uring_add(reads->uring, request);
    } else {
        pthread_mutex_lock(&reads->lock);
        reads->todo[(reads->todo_first + reads->todo_count++) % reads->depth] = request;
        pthread_cond_signal(&reads->work);
        pthread_mutex_unlock(&reads->lock);
    }
    reads->in_flight++;
}

int nl_reads_start(NlReads *reads, NlError *error) {
    int code = reads->uring ? nl_uring_start(reads->uring) : 0;
    return code < 0 ? nl_fail(error, NL_IO, "reads cannot be started: %s", strerror(-code)) : 0;
}

/* Checks a result. A read that was cut short, by a signal or a device, is done again once. */
static int complete(NlReads *reads, NlRequest *request, NlError *error) {
    if (request->result >= 0 && (uint64_t)request->result < request->needed) {
        ssize_t count = pread(reads->file, request->buffer, (size_t)request->bytes, (off_t)request->offset);
        request->result = count < 0 ? -errno : count;
    }
    if (request->result < 0) return nl_fail(error, NL_IO, "reading failed: %s", strerror((int)-request->result));
    if ((uint64_t)request->result < request->needed)
        return nl_fail(error, NL_IO, "the file ended while it was being read");
    return 0;
}

NlRequest *nl_reads_next(NlReads *reads, int wait, NlError *error) {
    NlRequest *request = NULL;
    if (reads->uring) {
        int found = nl_uring_next(reads->uring, wait, &request);
        if (found < 0) nl_fail(error, NL_IO, "waiting for a read failed: %s", strerror(-found));
        if (found <= 0) return NULL;
    } else {
        pthread_mutex_lock(&reads->lock);
        while (!reads->done_count && wait) pthread_cond_wait(&reads->news, &reads->lock);
        if (reads->done_count) {
            request = reads->done[reads->done_first];
            reads->done_first = (reads->done_first + 1) % reads->depth;
            reads->done_count--;
        }
        pthread_mutex_unlock(&reads->lock);
        if (!request) return NULL;
    }
    reads->in_flight--;
    return complete(reads, request, error) == 0 ? request : NULL;
}

void nl_reads_drain(NlReads *reads) {
    while (reads->in_flight > 0) {
        NlError ignored = {NL_OK, ""};
        unsigned before = reads->in_flight;
        nl_reads_next(reads, 1, &ignored);
        if (reads->in_flight == before) return; /* the system does not even say what became of them */
    }
}
