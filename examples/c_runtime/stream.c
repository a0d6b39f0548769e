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

/* A matrix of the schedule, and how many pieces come before it. */
typedef struct {
    const NlMatrix *matrix;
    uint64_t before;
} Entry;

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
    int on_demand;
    Entry *entries;
    uint64_t count, pieces; /* of entries, and of their pieces, which are read round and round */
    uint64_t base, end;     /* numbers of the first piece of the first entry, and of the first that is not to be read */
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

static uint64_t most_rows(const NlStream *stream, const NlMatrix *matrix) {
    return (stream->buffer_bytes - 2 * NL_PAGE) / matrix->at.row_bytes;
}

/* The piece with a number. */
static Piece piece_of(const NlStream *stream, uint64_t number) {
    const uint64_t place = (number - stream->base) % stream->pieces;
    uint64_t low = 0, high = stream->count - 1, most, first;
    const NlMatrix *matrix;
    while (low < high) { /* the last entry that does not begin behind it */
        uint64_t middle = (low + high + 1) / 2;
        if (stream->entries[middle].before <= place) low = middle;
        else high = middle - 1;
    }
    matrix = stream->entries[low].matrix;
    most = most_rows(stream, matrix);
    first = (place - stream->entries[low].before) * most;
    return (Piece){matrix, first, matrix->at.rows - first < most ? matrix->at.rows - first : most};
}

static void *serve(void *argument) {
    NlStream *stream = argument;
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        Slot *slot = &stream->slots[stream->next % NL_STREAM_BUFFERS];
        uint64_t number = stream->next;
        Piece piece;
        int failure;
        if (stream->stopping) break;
        if (!stream->begun || number >= stream->wanted + NL_STREAM_BUFFERS || number >= stream->end || slot->state == READING) {
            pthread_cond_wait(&stream->room, &stream->lock);
            continue;
        }
        piece = piece_of(stream, number);
        stream->next++;
        slot->number = number;
        slot->state = READING;
        pthread_mutex_unlock(&stream->lock);
        failure = read_piece(stream, &piece, stream->memory + number % NL_STREAM_BUFFERS * stream->buffer_bytes);
        pthread_mutex_lock(&stream->lock);
        slot->state = READY;
        slot->failure = failure;
        stream->reads++;
        stream->bytes += piece.rows * piece.matrix->at.row_bytes;
        pthread_cond_broadcast(&stream->news);
        pthread_cond_broadcast(&stream->room);
    }
    pthread_mutex_unlock(&stream->lock);
    return NULL;
}

/* Enters the matrices that are read next. */
static void enter(NlStream *stream, const NlMatrix *const *schedule, uint64_t count) {
    stream->count = count;
    stream->pieces = 0;
    for (uint64_t k = 0; k < count; k++) {
        const uint64_t most = most_rows(stream, schedule[k]);
        stream->entries[k] = (Entry){schedule[k], stream->pieces};
        stream->pieces += (schedule[k]->at.rows + most - 1) / most;
    }
}

/* A stream whose threads wait for something to do. */
static NlStream *open_stream(int file, uint64_t unit, unsigned char *memory, uint64_t buffer_bytes, uint64_t most,
                             NlError *error) {
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
    stream->end = UINT64_MAX;
    pthread_mutex_init(&stream->lock, NULL);
    pthread_cond_init(&stream->room, NULL);
    pthread_cond_init(&stream->news, NULL);
    stream->entries = calloc((size_t)most, sizeof *stream->entries);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    while (stream->entries && stream->started < NL_STREAM_THREADS &&
           pthread_create(&stream->threads[stream->started], &attributes, serve, stream) == 0)
        stream->started++;
    pthread_attr_destroy(&attributes);
    if (stream->started == NL_STREAM_THREADS) return stream;
    nl_fail(error, NL_NO_MEMORY, "%u threads that read cannot be started", NL_STREAM_THREADS);
    nl_stream_close(stream);
    return NULL;
}

NlStream *nl_stream_open(int file, uint64_t unit, unsigned char *memory, uint64_t buffer_bytes,
                         const NlMatrix *const *schedule, uint64_t count, NlError *error) {
    NlStream *stream = open_stream(file, unit, memory, buffer_bytes, count, error);
    if (stream) enter(stream, schedule, count); /* nothing is read before the first rows are asked for */
    return stream;
}

NlStream *nl_stream_open_on_demand(int file, uint64_t unit, unsigned char *memory, uint64_t buffer_bytes, uint64_t most,
                                   NlError *error) {
    NlStream *stream = open_stream(file, unit, memory, buffer_bytes, most, error);
    if (stream) stream->on_demand = 1;
    return stream;
}

void nl_stream_ask(NlStream *stream, const NlMatrix *const *matrices, uint64_t count) {
    pthread_mutex_lock(&stream->lock);
    enter(stream, matrices, count);
    stream->base = stream->next;
    stream->end = stream->next + stream->pieces;
    stream->wanted = stream->next - 1; /* so that the first piece is the next one; 0 - 1 wraps round, and back */
    stream->begun = 1;
    pthread_cond_broadcast(&stream->room);
    pthread_mutex_unlock(&stream->lock);
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
    free(stream->entries);
    free(stream);
}

/* Goes on at a piece that is not the next one: with numbers that no read in flight has. */
static int seek(NlStream *stream, const NlMatrix *matrix, uint64_t first) {
    uint64_t k = 0, place;
    while (k < stream->count && stream->entries[k].matrix != matrix) k++;
    if (k == stream->count || stream->on_demand || first % most_rows(stream, matrix)) return -1;
    place = stream->entries[k].before + first / most_rows(stream, matrix);
    stream->next += (place + stream->pieces - stream->next % stream->pieces) % stream->pieces;
    stream->wanted = stream->next;
    return 0;
}

int nl_stream_rows(NlStream *stream, const NlMatrix *matrix, uint64_t first, NlRows *rows, NlError *error) {
    Piece piece = {NULL, 0, 0};
    Slot *slot;
    int failure;
    pthread_mutex_lock(&stream->lock);
    if (stream->begun && stream->wanted + 1 < stream->end) piece = piece_of(stream, stream->wanted + 1);
    if (piece.matrix == matrix && piece.first == first) {
        stream->wanted++;
    } else if (seek(stream, matrix, first) != 0) {
        pthread_mutex_unlock(&stream->lock);
        return nl_fail(error, NL_BAD_OPTION, "a matrix that is not in the schedule");
    }
    stream->begun = 1;
    piece = piece_of(stream, stream->wanted);
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
    rows->count = piece.rows;
    return 0;
}

void nl_stream_counters(NlStream *stream, uint64_t *reads, uint64_t *bytes, double *seconds) {
    pthread_mutex_lock(&stream->lock);
    *reads = stream->reads;
    *bytes = stream->bytes;
    *seconds = stream->seconds;
    pthread_mutex_unlock(&stream->lock);
}
