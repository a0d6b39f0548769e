#define _GNU_SOURCE
#include "fetch.h"

#include <string.h>
#include <time.h>

/* Cached bundles that are used between two looks at the reads: some ten microseconds of work. */
#define CHUNK 64

double nl_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

uint64_t nl_fetch_least(uint64_t stride) { return (stride + NL_PAGE - 1) / NL_PAGE * NL_PAGE + 2 * NL_PAGE; }

void nl_fetch_carve(NlFetch *fetch, NlArena *arena, uint64_t neurons, uint64_t pages) {
    const uint64_t requests = 2 * (uint64_t)fetch->depth;
    nl_room_carve(&fetch->room, arena, pages);
    fetch->requests = nl_carve(arena, NL_WORKING, requests * sizeof *fetch->requests);
    fetch->idle = nl_carve(arena, NL_WORKING, requests * sizeof *fetch->idle);
    fetch->ready = nl_carve(arena, NL_WORKING, requests * sizeof *fetch->ready);
    fetch->items = nl_carve(arena, NL_WORKING, neurons * sizeof *fetch->items);
    fetch->planned = nl_carve(arena, NL_WORKING, neurons * sizeof *fetch->planned);
    fetch->rows = nl_carve(arena, NL_WORKING, neurons * sizeof *fetch->rows);
    fetch->missing = nl_carve(arena, NL_WORKING, neurons * sizeof *fetch->missing);
    fetch->read_slots = nl_carve(arena, NL_WORKING, neurons * sizeof *fetch->read_slots);
    fetch->read_rows = nl_carve(arena, NL_WORKING, neurons * sizeof *fetch->read_rows);
    fetch->begins = nl_carve(arena, NL_WORKING, neurons * sizeof *fetch->begins);
    fetch->wanted = nl_carve(arena, NL_WORKING, neurons);
}

void nl_fetch_reset(NlFetch *fetch) {
    fetch->idle_count = 2 * fetch->depth;
    for (unsigned k = 0; k < fetch->idle_count; k++) fetch->idle[k] = &fetch->requests[k];
    memset(fetch->room.taken, 0, fetch->room.pages);
}

/* Starts reads as long as there is room for them. */
static int start(NlFetch *fetch) {
    NlCall *call = &fetch->call;
    const NlBlock *block = call->store->block;
    int any = 0;
    while (call->started < call->final && call->in_flight < fetch->depth && fetch->idle_count > 0) {
        NlRequest *request = fetch->idle[fetch->idle_count - 1];
        const NlRead *read = &fetch->planned[call->started];
        uint64_t offset = block->bundles_offset + (uint64_t)read->first * block->stride;
        uint64_t lead = offset % fetch->unit;
        request->offset = offset - lead;
        request->needed = lead + (uint64_t)read->count * block->stride;
        request->bytes = (request->needed + fetch->unit - 1) / fetch->unit * fetch->unit;
        if (!(request->buffer = nl_room_take(&fetch->room, request->bytes))) break;
        request->number = (uint32_t)call->started;
        nl_reads_add(fetch->reads, request);
        fetch->counters.reads++;
        fetch->counters.bytes_read += request->bytes;
        fetch->idle_count--;
        call->started++;
        call->in_flight++;
        any = 1;
    }
    return any ? nl_reads_start(fetch->reads, call->error) : 0;
}

/* Takes what is done, after waiting for the first if there is to be one; then starts more. */
static int collect(NlFetch *fetch, int wait) {
    NlCall *call = &fetch->call;
    NlRequest *request = NULL;
    while (call->in_flight > 0) {
        if (wait) {
            double began = nl_now();
            request = nl_reads_next(fetch->reads, 1, call->error);
            fetch->counters.io_seconds += nl_now() - began;
        } else {
            request = nl_reads_next(fetch->reads, 0, call->error);
        }
        if (!request) break;
        fetch->ready[call->ready++] = request;
        call->in_flight--;
        wait = 0;
    }
    return call->error->code != NL_OK ? -1 : start(fetch);
}

/* Uses the bundles that have arrived, keeps those that the cache takes, and gives their memory back. */
static void use_ready(NlFetch *fetch, NlUse use, void *context) {
    NlCall *call = &fetch->call;
    const uint64_t stride = call->store->block->stride;
    size_t count = 0;
    for (unsigned k = 0; k < call->ready; k++) {
        const NlRequest *request = fetch->ready[k];
        const NlRead *read = &fetch->planned[request->number];
        const unsigned char *from = (unsigned char *)request->buffer + request->needed - (uint64_t)read->count * stride;
        for (int32_t j = 0; j < read->count; j++, from += stride)
            if (fetch->wanted[fetch->begins[request->number] + j]) fetch->items[count++] = (NlItem){read->first + j, from};
    }
    use(context, fetch->items, count);
    for (unsigned k = 0; k < call->ready; k++) {
        NlRequest *request = fetch->ready[k];
        const NlRead *read = &fetch->planned[request->number];
        const int32_t *rows = fetch->read_rows + fetch->begins[request->number];
        const unsigned char *from = (unsigned char *)request->buffer + request->needed - (uint64_t)read->count * stride;
        for (int32_t j = 0; j < read->count; j++, from += stride)
            if (rows[j] >= 0) memcpy(call->store->pool + (uint64_t)rows[j] * stride, from, (size_t)stride);
        nl_room_give(&fetch->room, request->buffer, request->bytes);
        fetch->idle[fetch->idle_count++] = request;
        call->done++;
    }
    call->ready = 0;
}

/* Enters what the first `final` reads bring, now that they become no longer. */
static void settle(NlFetch *fetch, size_t final) {
    NlCall *call = &fetch->call;
    for (; call->final < final; call->final++) {
        const NlRead *read = &fetch->planned[call->final];
        fetch->begins[call->final] = (int32_t)call->covered;
        for (int32_t slot = read->first; slot < read->first + read->count; slot++, call->covered++) {
            fetch->read_slots[call->covered] = slot;
            fetch->wanted[call->covered] = call->wanted < call->missing && fetch->missing[call->wanted] == slot;
            call->wanted += fetch->wanted[call->covered];
        }
    }
}

void nl_fetch_begin(NlFetch *fetch, NlStore *store, const int32_t *slots, NlError *error) {
    fetch->call = (NlCall){.store = store, .error = error, .slots = slots};
    nl_cache_next(&store->cache);
}

int nl_fetch_more(NlFetch *fetch, size_t count) {
    NlCall *call = &fetch->call;
    const NlBlock *block = call->store->block;
    const size_t before = call->count, missed = call->missing;
    nl_cache_look_up(&call->store->cache, call->slots + before, count - before, fetch->rows + before);
    for (size_t k = before; k < count; k++)
        if (fetch->rows[k] < 0) fetch->missing[call->missing++] = call->slots[k];
    call->count = count;
    fetch->counters.looked_up += count - before;
    fetch->counters.hits += count - before - (call->missing - missed);
    fetch->counters.bytes_useful += (call->missing - missed) * block->stride;
    call->planned = nl_plan_reads(fetch->missing + missed, call->missing - missed, block->gap,
                                  (int32_t)((fetch->longest - 2 * NL_PAGE) / block->stride), fetch->planned, call->planned);
    if (call->planned) settle(fetch, call->planned - 1); /* the last may become longer */
    return collect(fetch, 0);
}

static int finish(NlFetch *fetch, NlUse use, void *context) {
    NlCall *call = &fetch->call;
    NlStore *store = call->store;
    size_t items = 0;
    settle(fetch, call->planned);
    if (start(fetch) != 0) return -1;
    for (size_t k = 0; k < call->count; k++) {
        if (fetch->rows[k] >= 0)
            fetch->items[items++] = (NlItem){call->slots[k], store->pool + (uint64_t)fetch->rows[k] * store->block->stride};
        if ((items < CHUNK || call->done == call->planned) && k + 1 < call->count) continue;
        use(context, fetch->items, items);
        items = 0;
        if (collect(fetch, 0) != 0) return -1;
    }
    /* From here on rows of the pool may be given to others: what was cached has been used. */
    nl_cache_admit(&store->cache, fetch->read_slots, fetch->wanted, call->covered, fetch->read_rows);
    while (call->done < call->planned) {
        if (collect(fetch, call->ready == 0) != 0) return -1;
        use_ready(fetch, use, context);
        if (start(fetch) != 0) return -1;
    }
    return 0;
}

int nl_fetch_finish(NlFetch *fetch, NlUse use, void *context) {
    if (finish(fetch, use, context) == 0) return 0;
    nl_fetch_give_up(fetch);
    return -1;
}

void nl_fetch_give_up(NlFetch *fetch) {
    nl_reads_drain(fetch->reads); /* nobody may use their memory before */
    nl_fetch_reset(fetch);
}
