#define _GNU_SOURCE
#include "workers.h"

#include <pthread.h>
#include <stdlib.h>

#define STACK_BYTES (256 << 10)
/* Looks that a thread takes for the next job before it goes to sleep: jobs of a token follow each other at once. */
#define LOOKS 2000

/* Parts of a job per thread. */
#define PARTS 8

/*
 * A job is handed out without a lock: `ticket` holds its number and its next part, and who adds 1 to it has taken that
 * part. The job stays as it is until all its parts are done, so that whoever has a part may read it. Only threads that
 * sleep need the lock, to be woken.
 */
struct NlWorkers {
    unsigned threads, started;
    pthread_t *handles;
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    NlJob job;
    void *argument;
    uint64_t ticket;             /* number of the job << 32 | next part */
    unsigned numbers, finished;  /* numbers given to threads; parts of the job that are done */
    unsigned sleeping, waiting;  /* threads that wait for work; whether the caller sleeps until all is done */
    int stopping;
};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline uint64_t look(const uint64_t *at) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
static inline unsigned look_at(const unsigned *at) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }

/* Does parts of the job that is there until none is left. */
static void do_parts(NlWorkers *workers, unsigned thread) {
    const unsigned parts = workers->threads * PARTS;
    unsigned part;
    while ((part = (unsigned)__atomic_fetch_add(&workers->ticket, 1, __ATOMIC_SEQ_CST)) < parts) {
        workers->job(workers->argument, thread, part, parts);
        if (__atomic_add_fetch(&workers->finished, 1, __ATOMIC_SEQ_CST) < parts || !look_at(&workers->waiting)) continue;
        pthread_mutex_lock(&workers->lock);
        pthread_cond_signal(&workers->done);
        pthread_mutex_unlock(&workers->lock);
    }
}

/* Waits for a job after number `seen`. Returns its number, or `seen` if there will be none. */
static unsigned next_job(NlWorkers *workers, unsigned seen) {
    for (int k = 0; k < LOOKS; k++, relax())
        if (look(&workers->ticket) >> 32 != seen) return (unsigned)(look(&workers->ticket) >> 32);
    pthread_mutex_lock(&workers->lock);
    __atomic_add_fetch(&workers->sleeping, 1, __ATOMIC_SEQ_CST);
    while (look(&workers->ticket) >> 32 == seen && !workers->stopping) pthread_cond_wait(&workers->work, &workers->lock);
    __atomic_sub_fetch(&workers->sleeping, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&workers->lock);
    return (unsigned)(look(&workers->ticket) >> 32);
}

static void *serve(void *argument) {
    NlWorkers *workers = argument;
    const unsigned thread = __atomic_add_fetch(&workers->numbers, 1, __ATOMIC_RELAXED);
    for (unsigned seen = 0, job; (job = next_job(workers, seen)) != seen; seen = job) do_parts(workers, thread);
    return NULL;
}

NlWorkers *nl_workers_open(unsigned threads, NlError *error) {
    NlWorkers *workers = calloc(1, sizeof *workers);
    pthread_attr_t attributes;
    if (!workers) {
        nl_fail(error, NL_NO_MEMORY, "out of memory");
        return NULL;
    }
    workers->threads = threads;
    pthread_mutex_init(&workers->lock, NULL);
    pthread_cond_init(&workers->work, NULL);
    pthread_cond_init(&workers->done, NULL);
    workers->handles = calloc(threads, sizeof *workers->handles);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    while (workers->handles && workers->started + 1 < threads &&
           pthread_create(&workers->handles[workers->started], &attributes, serve, workers) == 0)
        workers->started++;
    pthread_attr_destroy(&attributes);
    if (workers->handles && workers->started + 1 == threads) return workers;
    nl_fail(error, NL_NO_MEMORY, "%u threads cannot be started", threads);
    nl_workers_close(workers);
    return NULL;
}

void nl_workers_close(NlWorkers *workers) {
    if (!workers) return;
    pthread_mutex_lock(&workers->lock);
    workers->stopping = 1;
    pthread_cond_broadcast(&workers->work);
    pthread_mutex_unlock(&workers->lock);
    for (unsigned k = 0; k < workers->started; k++) pthread_join(workers->handles[k], NULL);
    pthread_cond_destroy(&workers->done);
    pthread_cond_destroy(&workers->work);
    pthread_mutex_destroy(&workers->lock);
    free(workers->handles);
    free(workers);
}

void nl_workers_do(NlWorkers *workers, NlJob job, void *argument) {
    const unsigned parts = workers->threads * PARTS;
    if (workers->threads == 1) {
        job(argument, 0, 0, 1);
        return;
    }
    workers->job = job;
    workers->argument = argument;
    workers->finished = 0;
    __atomic_store_n(&workers->ticket, ((look(&workers->ticket) >> 32) + 1) << 32, __ATOMIC_SEQ_CST);
    if (look_at(&workers->sleeping)) {
        pthread_mutex_lock(&workers->lock);
        pthread_cond_broadcast(&workers->work);
        pthread_mutex_unlock(&workers->lock);
    }
    do_parts(workers, 0);
    for (int k = 0; k < LOOKS && look_at(&workers->finished) < parts; k++) relax();
    if (look_at(&workers->finished) == parts) return;
    pthread_mutex_lock(&workers->lock);
    __atomic_store_n(&workers->waiting, 1, __ATOMIC_SEQ_CST);
    while (look_at(&workers->finished) < parts) pthread_cond_wait(&workers->done, &workers->lock);
    __atomic_store_n(&workers->waiting, 0, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&workers->lock);
}
