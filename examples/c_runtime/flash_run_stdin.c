/* Ends the program when nobody can send requests any more, as when the process that asks was killed. */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include "flash_run.h"

#define STACK_BYTES (64 << 10)
#define ENDED (POLLHUP | POLLERR | POLLNVAL)

/* Waits for the end of stdin. What was sent before may lie there unread. */
static void *watch(void *argument) {
    const struct timespec pause = {0, 10000000};
    struct pollfd requests = {.fd = 0, .events = POLLHUP}; /* some systems report it only if asked */
    while (!(requests.revents & ENDED))
        if (poll(&requests, 1, -1) <= 0) nanosleep(&pause, NULL);
    (void)argument;
    _exit(1);
}

int end_with_stdin(void) {
    pthread_attr_t attributes;
    pthread_t thread;
    int result;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    result = pthread_create(&thread, &attributes, watch, NULL);
    pthread_attr_destroy(&attributes);
    return result == 0 ? 0 : -1;
}
