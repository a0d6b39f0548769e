/* Measures the storage that a layout lies on: random reads of its flash file, the way that a model is read. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "direct.h"
#include "fetch.h"

#define USUAL_DEPTH 32u
#define TURNS 5
#define BATCHES 15
#define FILLED 2u /* how often a batch fills the queue */

/* What a turn of reads works with: `depth` requests with a buffer each. */
typedef struct {
    NlReads *reads;
    NlRequest *requests;
    unsigned depth;
    uint64_t pages; /* of the file */
    uint64_t random;
} Bench;

/* A number below `below`: SplitMix64. */
static uint64_t draw(Bench *bench, uint64_t below) {
    uint64_t mixed = bench->random += UINT64_C(0x9E3779B97F4A7C15);
    mixed = (mixed ^ mixed >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    mixed = (mixed ^ mixed >> 27) * UINT64_C(0x94D049BB133111EB);
    return (mixed ^ mixed >> 31) % below;
}

static void add(Bench *bench, NlRequest *request, uint64_t bytes) {
    request->offset = draw(bench, bench->pages - bytes / NL_PAGE + 1) * NL_PAGE;
    request->bytes = request->needed = bytes;
    nl_reads_add(bench->reads, request);
}

/* Reads for `seconds` with `depth` reads in flight, and at least `rounds` for each of them; their number and what they
 * took. */
static int turn(Bench *bench, uint64_t bytes, unsigned depth, unsigned rounds, double seconds, NlProbePoint *point,
                NlError *error) {
    const double began = nl_now();
    uint64_t least = (uint64_t)rounds * depth, started = depth, done = 0;
    for (unsigned k = 0; k < depth; k++) add(bench, &bench->requests[k], bytes);
    if (nl_reads_start(bench->reads, error) != 0) return -1;
    while (done < started) {
        NlRequest *request = nl_reads_next(bench->reads, 1, error);
        if (!request) return -1;
        done++;
        if (started >= least && nl_now() - began >= seconds) continue;
        add(bench, request, bytes);
        if (nl_reads_start(bench->reads, error) != 0) return -1;
        started++;
    }
    *point = (NlProbePoint){bytes, done, nl_now() - began, 0};
    return 0;
}

static int compare(const void *a, const void *b) {
    const NlProbePoint *x = a, *y = b;
    double left = x->seconds / (double)x->reads, right = y->seconds / (double)y->reads;
    return (left > right) - (left < right);
}

/* Sizes take turns, since storage may be slower for some time: then it is for all of them. The median of the turns counts,
 * as other work on the machine may disturb some. */
static int probe_file(Bench *bench, double seconds, NlProbe *probe, NlError *error) {
    static const uint64_t sizes[NL_PROBED] = {4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20};
    NlProbePoint turns[NL_PROBED + 1][TURNS]; /* the last are of one read at a time */
    NlProbePoint batches[NL_PROBED][BATCHES];
    while (probe->count < NL_PROBED && 2 * sizes[probe->count] <= bench->pages * NL_PAGE) probe->count++;
    if (probe->count < 2)
        return nl_fail(error, NL_BAD_OPTION, "a flash file of %" PRIu64 " pages is too small to measure", bench->pages);
    for (int k = 0; k < TURNS; k++) {
        for (unsigned size = 0; size < probe->count; size++) {
            if (turn(bench, sizes[size], bench->depth, 4, seconds / TURNS, &turns[size][k], error) != 0) return -1;
            for (int batch = k; batch < BATCHES; batch += TURNS)
                if (turn(bench, sizes[size], bench->depth, FILLED, 0, &batches[size][batch], error) != 0) return -1;
        }
        if (turn(bench, sizes[0], 1, 4, seconds / TURNS / 4, &turns[NL_PROBED][k], error) != 0) return -1;
    }
    for (unsigned size = 0; size < probe->count; size++) {
        NlProbePoint *point = &probe->points[size];
        qsort(turns[size], TURNS, sizeof **turns, compare);
        qsort(batches[size], BATCHES, sizeof **batches, compare);
        *point = turns[size][TURNS / 2];
        point->batch_seconds = batches[size][BATCHES / 2].seconds;
        /* No read takes less time than a smaller one: if it seems so, that is noise. */
        if (size && compare(point, point - 1) < 0)
            point->seconds = point[-1].seconds / (double)point[-1].reads * (double)point->reads;
    }
    qsort(turns[NL_PROBED], TURNS, sizeof **turns, compare);
    probe->single_seconds = turns[NL_PROBED][TURNS / 2].seconds / (double)turns[NL_PROBED][TURNS / 2].reads;
    return 0;
}

static int probe_index(const NlIndex *index, const char *directory, const NlOptions *options, double seconds,
                       NlProbe *probe, NlError *error) {
    const uint64_t largest = UINT64_C(1) << 20;
    NlSource source;
    Bench bench = {0};
    unsigned char *memory;
    int result = -1;
    bench.depth = options->queue_depth ? options->queue_depth : USUAL_DEPTH;
    bench.pages = index->file_bytes / NL_PAGE;
    bench.random = 1;
    if (bench.depth > 1024) return nl_fail(error, NL_BAD_OPTION, "at most 1,024 reads in flight");
    if (nl_source_open(&source, index, directory, options->direct, 0, index->file_bytes, error) != 0) return -1;
    memory = nl_map(bench.depth * largest);
    bench.requests = calloc(bench.depth, sizeof *bench.requests);
    if (!memory || !bench.requests) nl_fail(error, NL_NO_MEMORY, "out of memory");
    else bench.reads = nl_reads_open(source.file, bench.depth, options->reads, error);
    if (bench.reads) {
        for (unsigned k = 0; k < bench.depth; k++) bench.requests[k].buffer = memory + k * largest;
        probe->depth = bench.depth;
        probe->direct = source.direct;
        probe->reads = nl_reads_name(bench.reads);
        probe->file_bytes = index->file_bytes;
        result = probe_file(&bench, seconds, probe, error);
        nl_reads_close(bench.reads);
    }
    free(bench.requests);
    nl_unmap(memory, bench.depth * largest);
    nl_source_close(&source, index);
    return result;
}

int nl_probe(const char *directory, const NlOptions *options, double seconds, NlProbe *probe, NlError *error) {
    NlIndex index;
    int result = -1;
    memset(probe, 0, sizeof *probe);
    if (nl_index_open(&index, directory, error) == 0)
        result = probe_index(&index, directory, options, seconds, probe, error);
    nl_index_close(&index);
    return result;
}

int nl_probe_name(const char *name, NlError *error) {
    if (!*name || strpbrk(name, "\"\\") || strlen(name) > 200)
        return nl_fail(error, NL_BAD_OPTION, "a device's name has 1 to 200 characters, and no quotes or backslashes");
    for (const char *at = name; *at; at++)
        if ((unsigned char)*at < 0x20 || *at == 0x7f)
            return nl_fail(error, NL_BAD_OPTION, "a device's name has no control characters");
    return 0;
}

int nl_probe_profile(const NlProbe *probe, const char *name, char *text, size_t size, NlError *error) {
    const NlProbePoint *first = probe->points;
    double latency = probe->single_seconds - first->seconds / (double)first->reads;
    size_t used;
    if (nl_probe_name(name, error) != 0) return -1;
    if (latency < 0) latency = 0;
    used = (size_t)snprintf(text, size,
        "{\n  \"format\": \"neuralink-device\",\n  \"version\": 1,\n  \"name\": \"%s\",\n"
        "  \"description\": \"Random reads measured by `flash_run --probe` with %s%s.\",\n"
        "  \"source\": \"Random reads of a file of %" PRIu64 " bytes.\",\n  \"queue_depth\": %u,\n"
        "  \"latency_seconds\": %.9f,\n  \"page_bytes\": %d,\n  \"reads\": [",
        name, probe->reads, probe->direct ? "" : " through the page cache (not the storage's own)", probe->file_bytes,
        probe->depth, latency, probe->direct ? NL_PAGE : 1);
    for (unsigned k = 0; k < probe->count && used < size; k++) {
        const NlProbePoint *point = &probe->points[k];
        const double read_seconds = point->seconds / (double)point->reads;
        const double fill = point->batch_seconds - latency - FILLED * probe->depth * read_seconds;
        used += (size_t)snprintf(text + used, size - used, "%s\n    {\"bytes\": %" PRIu64 ", \"bytes_per_second\": %.17g",
                                 k ? "," : "", point->bytes, (double)point->bytes / read_seconds);
        if (fill > 0 && used < size)
            used += (size_t)snprintf(text + used, size - used, ", \"fill_seconds\": %.9f", fill);
        if (used < size) used += (size_t)snprintf(text + used, size - used, "}");
    }
    if (used < size) used += (size_t)snprintf(text + used, size - used, "\n  ]\n}\n");
    return used < size ? 0 : nl_fail(error, NL_BAD_OPTION, "a profile has more characters than there is room for");
}
