#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "stream.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "reads.h"

#define STACK_BYTES (64 << 10)

/* Rows of a matrix that fit in a buffer. */
typedef struct {
    const NlMatrix *matrix;
    uint64_t first, rows;
} Piece;

/* What a buffer holds: the piece with a number, of all that were ever read, modulo the pieces of the schedule. */
typedef struct {
    uint64_t number;
    enum { EMPTY, READING, READY } state;
    int failure; /* errno, or -1 for a file that ended */
} Slot;

struct NlStream {
    int file;
    uint64_t unit, buffer_bytes;
    unsigned char *memory;
    Piece *pieces;
    uint64_t count;
    pthread_t threads[NL_STREAM_THREADS];
    unsigned started;
    int stopping, begun;
    pthread_mutex_t lock;
    pthread_cond_t room, news;
    Slot slots[NL_STREAM_BUFFERS];
    uint64_t next, wanted; /* numbers of the piece to read next, and of the one in use: those before it are free */
    uint64_t reads, bytes;
    double seconds;
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

uint64_t nl_stream_buffer(uint64_t row_bytes, uint64_t usual) {
    uint64_t least = row_bytes + 2 * NL_PAGE, bytes = usual > least ? usual : least;
    return (bytes + NL_PAGE - 1) / NL_PAGE * NL_PAGE;
}

/* Reads a piece into its buffer; 0, or what failed. */
static int read_piece(NlStream *stream, const Piece *piece, unsigned char *buffer) {
    const NlTensor *at = &piece->matrix->at;
    uint64_t begin = at->offset + piece->first * at->row_bytes, lead = begin % stream->unit;
    uint64_t needed = lead + piece->rows * at->row_bytes, got = 0;
    uint64_t whole = (needed + stream->unit - 1) / stream->unit * stream->unit;
    while (got < needed) {
        ssize_t count = pread(stream->file, buffer + got, (size_t)(whole - got), (off_t)(begin - lead + got));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return errno;
        got += (uint64_t)count;
        /* A direct read goes on at multiples of the unit only: one that ends elsewhere has met the end of the file. */
        if (count == 0 || (got < needed && got % stream->unit)) return -1;
    }
    return 0;
}

static void *serve(void *argument) {
    NlStream *stream = argument;
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        Slot *slot = &stream->slots[stream->next % NL_STREAM_BUFFERS];
        uint64_t number = stream->next;
        const Piece *piece = &stream->pieces[number % stream->count];
        int failure;
        if (stream->stopping) break;
        if (!stream->begun || number >= stream->wanted + NL_STREAM_BUFFERS || slot->state == READING) {
            pthread_cond_wait(&stream->room, &stream->lock);
            continue;
        }
        stream->next++;
        slot->number = number;
        slot->state = READING;
        pthread_mutex_unlock(&stream->lock);
        failure = read_piece(stream, piece, stream->memory + number % NL_STREAM_BUFFERS * stream->buffer_bytes);
        pthread_mutex_lock(&stream->lock);
        slot->state = READY;
        slot->failure = failure;
        stream->reads++;
        stream->bytes += piece->rows * piece->matrix->at.row_bytes;
        pthread_cond_broadcast(&stream->news);
        pthread_cond_broadcast(&stream->room);
    }
    pthread_mutex_unlock(&stream->lock);
    return NULL;
}

/* Cuts the matrices of a schedule into pieces; with `pieces` NULL it only counts them. */
static uint64_t cut(const NlStream *stream, const NlMatrix *const *schedule, uint64_t count, Piece *pieces) {
    uint64_t found = 0;
    for (uint64_t k = 0; k < count; k++) {
        const NlTensor *at = &schedule[k]->at;
        uint64_t most = (stream->buffer_bytes - 2 * NL_PAGE) / at->row_bytes;
        for (uint64_t first = 0; first < at->rows; first += most, found++)
            if (pieces) pieces[found] = (Piece){schedule[k], first, at->rows - first < most ? at->rows - first : most};
    }
    return found;
}

NlStream *nl_stream_open(int file, uint64_t unit, unsigned char *memory, uint64_t buffer_bytes,
                         const NlMatrix *const *schedule, uint64_t count, NlError *error) {
    NlStream *stream = calloc(1, sizeof *stream);
    pthread_attr_t attributes;
    if (!stream) {
        nl_fail(error, NL_NO_MEMORY, "out of memory");
        return NULL;
    }
    stream->file = file;
    stream->unit = unit;
    stream->memory = memory;
    stream->buffer_bytes = buffer_bytes;
    stream->count = cut(stream, schedule, count, NULL);
    pthread_mutex_init(&stream->lock, NULL);
    pthread_cond_init(&stream->room, NULL);
    pthread_cond_init(&stream->news, NULL);
    stream->pieces = calloc((size_t)stream->count, sizeof *stream->pieces);
    if (stream->pieces) cut(stream, schedule, count, stream->pieces);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    while (stream->pieces && stream->started < NL_STREAM_THREADS &&
           pthread_create(&stream->threads[stream->started], &attributes, serve, stream) == 0)
        stream->started++;
    pthread_attr_destroy(&attributes);
    if (stream->started == NL_STREAM_THREADS) return stream;
    nl_fail(error, NL_NO_MEMORY, "%u threads that read cannot be started", NL_STREAM_THREADS);
    nl_stream_close(stream);
    return NULL;
}

void nl_stream_close(NlStream *stream) {
    if (!stream) return;
    pthread_mutex_lock(&stream->lock);
    stream->stopping = 1;
    pthread_cond_broadcast(&stream->room);
    pthread_mutex_unlock(&stream->lock);
    for (unsigned k = 0; k < stream->started; k++) pthread_join(stream->threads[k], NULL);
    pthread_cond_destroy(&stream->news);
    pthread_cond_destroy(&stream->room);
    pthread_mutex_destroy(&stream->lock);
    free(stream->pieces);
    free(stream);
}

/* Goes on at a piece that is not the next one: with numbers that no read in flight has. */
static int seek(NlStream *stream, const NlMatrix *matrix, uint64_t first) {
    uint64_t place = 0;
    while (place < stream->count && (stream->pieces[place].matrix != matrix || stream->pieces[place].first != first))
        place++;
    if (place == stream->count) return -1;
    stream->next += (place + stream->count - stream->next % stream->count) % stream->count;
    stream->wanted = stream->next;
    return 0;
}

int nl_stream_rows(NlStream *stream, const NlMatrix *matrix, uint64_t first, NlRows *rows, NlError *error) {
    const Piece *piece;
    Slot *slot;
    int failure;
    pthread_mutex_lock(&stream->lock);
    piece = &stream->pieces[(stream->wanted + 1) % stream->count];
    if (stream->begun && piece->matrix == matrix && piece->first == first) {
        stream->wanted++;
    } else if (seek(stream, matrix, first) != 0) {
        pthread_mutex_unlock(&stream->lock);
        return nl_fail(error, NL_BAD_OPTION, "a matrix that is not in the schedule");
    }
    stream->begun = 1;
    piece = &stream->pieces[stream->wanted % stream->count];
    slot = &stream->slots[stream->wanted % NL_STREAM_BUFFERS];
    pthread_cond_broadcast(&stream->room);
    if (slot->number != stream->wanted || slot->state != READY) {
        double began = now();
        while (slot->number != stream->wanted || slot->state != READY) pthread_cond_wait(&stream->news, &stream->lock);
        stream->seconds += now() - began;
    }
    failure = slot->failure;
    pthread_mutex_unlock(&stream->lock);
    if (failure)
        return nl_fail(error, NL_IO, "weights cannot be read: %s", failure < 0 ? "the file has ended" : strerror(failure));
    rows->data = stream->memory + stream->wanted % NL_STREAM_BUFFERS * stream->buffer_bytes +
                 (matrix->at.offset + first * matrix->at.row_bytes) % stream->unit;
    rows->count = piece->rows;
    return 0;
}

void nl_stream_counters(NlStream *stream, uint64_t *reads, uint64_t *bytes, double *seconds) {
    pthread_mutex_lock(&stream->lock);
    *reads = stream->reads;
    *bytes = stream->bytes;
    *seconds = stream->seconds;
    pthread_mutex_unlock(&stream->lock);
}
