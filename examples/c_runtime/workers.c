#define _GNU_SOURCE
#include "workers.h"

#include <pthread.h>
#include <stdlib.h>

#define STACK_BYTES (256 << 10)
/* Looks that a thread takes for the next job before it goes to sleep: jobs of a token follow each other at once. */
#define LOOKS 2000

/* Parts of a job per thread. */
#define PARTS 4

struct NlWorkers {
    unsigned threads, started;
    pthread_t *handles;
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    NlJob job;
    void *argument;
    unsigned turn, numbers;   /* number of the job; numbers given to threads */
    unsigned part, busy;      /* the next part to do; threads within the job */
    int open, stopping;       /* whether threads may still join the job */
};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void do_parts(NlWorkers *workers, unsigned thread) {
    const unsigned parts = workers->threads * PARTS;
    unsigned part;
    while ((part = __atomic_fetch_add(&workers->part, 1, __ATOMIC_RELAXED)) < parts)
        workers->job(workers->argument, thread, part, parts);
}

static void *serve(void *argument) {
    NlWorkers *workers = argument;
    unsigned seen = 0, thread = __atomic_add_fetch(&workers->numbers, 1, __ATOMIC_RELAXED);
    for (;;) {
        for (int look = 0; look < LOOKS && __atomic_load_n(&workers->turn, __ATOMIC_ACQUIRE) == seen; look++) relax();
        pthread_mutex_lock(&workers->lock);
        while ((workers->turn == seen || !workers->open) && !workers->stopping)
            pthread_cond_wait(&workers->work, &workers->lock);
        seen = workers->turn;
        if (workers->stopping) break;
        __atomic_add_fetch(&workers->busy, 1, __ATOMIC_RELAXED);
        pthread_mutex_unlock(&workers->lock);
        do_parts(workers, thread);
        if (__atomic_sub_fetch(&workers->busy, 1, __ATOMIC_ACQ_REL) == 0) {
            pthread_mutex_lock(&workers->lock);
            pthread_cond_signal(&workers->done);
            pthread_mutex_unlock(&workers->lock);
        }
    }
    pthread_mutex_unlock(&workers->lock);
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
    __atomic_add_fetch(&workers->turn, 1, __ATOMIC_RELEASE);
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
    if (workers->threads == 1) {
        job(argument, 0, 0, 1);
        return;
    }
    pthread_mutex_lock(&workers->lock);
    workers->job = job;
    workers->argument = argument;
    workers->part = 0;
    workers->open = 1;
    __atomic_add_fetch(&workers->turn, 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&workers->work);
    pthread_mutex_unlock(&workers->lock);
    do_parts(workers, 0);
    /* No part is left, but some may still be done. Who has not come yet need not come any more. */
    for (int look = 0; look < LOOKS && __atomic_load_n(&workers->busy, __ATOMIC_ACQUIRE); look++) relax();
    pthread_mutex_lock(&workers->lock);
    workers->open = 0;
    while (__atomic_load_n(&workers->busy, __ATOMIC_ACQUIRE)) pthread_cond_wait(&workers->done, &workers->lock);
    pthread_mutex_unlock(&workers->lock);
}
