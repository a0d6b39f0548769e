/* Memory is a promise: what a model takes is planned to the byte before it is taken. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "model.h"

/* What a thread touches of its stack, and the rings of io_uring. */
#define THREAD_BYTES (24u << 10)
#define READING_BYTES (256u << 10)
/* Page tables have 8 bytes for 4,096; what else the system keeps for the process was measured. */
#define PER_SYSTEM_BYTE 400
#define SYSTEM_BYTES (UINT64_C(1) << 20)
/* Room for reads of bundles: enough of them to keep a device busy, or a few of the shortest where memory is scarce. */
#define USUAL_ROOM (UINT64_C(4) << 20)
#define FEWEST_READS 4u
#define LONGEST_READ (UINT64_C(256) << 10)
#define STEPS (UINT64_C(1) << 24)
#define STREAM_BUFFER (UINT64_C(1) << 20)
/* Where weights do not fit, this part of the memory is left to batches and caches: a byte of a weight is read for every
 * token, one of a bundle only when its neuron fires. */
#define KEPT_FREE 32
/* And of each kind of buffer this part at most. */
#define SCARCE 64

/* What reading weights anew takes, if any do not fit. */
static void carve_stream(NlModel *model, NlArena *arena) {
    NlMatrix **all = model->streamed_order;
    uint64_t count = nl_weights_order(&model->weights, all), kept = 0, longest = 0, row = 0;
    const NlMatrix *rows[] = {&model->weights.embedding, &model->weights.positions};
    for (uint64_t k = 0; k < count; k++) {
        if (!all[k]->streamed) continue;
        if (all[k]->at.row_bytes > longest) longest = all[k]->at.row_bytes;
        all[kept++] = all[k];
    }
    model->streamed_count = kept;
    for (unsigned k = 0; k < 2; k++)
        if (rows[k]->streamed && rows[k]->at.row_bytes > row) row = rows[k]->at.row_bytes;
    if (row) model->compute.row = nl_carve(arena, NL_WORKING, row);
    model->stream_bytes = kept ? nl_stream_buffer(longest, model->stream_usual) : 0;
    model->stream_memory = nl_carve(arena, NL_WORKING, NL_STREAM_BUFFERS * model->stream_bytes);
    for (uint64_t k = longest = 0; k < model->weights.blocks; k++) {
        const NlMatrix *of = &model->weights.ffn[k].rows;
        if (of->streamed == NL_ON_DEMAND && of->at.row_bytes > longest) longest = of->at.row_bytes;
    }
    model->routed_bytes = longest ? nl_stream_buffer(longest, model->stream_usual) : 0;
    model->routed_memory = nl_carve(arena, NL_WORKING, NL_STREAM_BUFFERS * model->routed_bytes);
}

/* What the threads take that read weights anew. */
static uint64_t stream_threads(const NlModel *model) {
    return ((model->stream_bytes > 0) + (model->routed_bytes > 0)) * NL_STREAM_THREADS * (uint64_t)THREAD_BYTES;
}

void nl_model_carve(NlModel *model, NlArena *arena, uint64_t batch, uint64_t pages) {
    const NlShape *shape = &model->shape;
    uint64_t most = 0, wide = shape->heads * shape->head_size, threads = model->compute.threads;
    uint64_t size = batch * shape->hidden * sizeof(float);
    for (uint64_t k = 0; k < model->weights.blocks; k++)
        if (model->weights.ffn[k].block.neurons > most) most = model->weights.ffn[k].block.neurons;
    nl_weights_carve(&model->weights, arena);
    nl_sequence_carve(&model->sequence, arena, shape, batch, model->compute.threads);
    nl_fetch_carve(&model->fetch, arena, most, pages);
    model->compute.widest = wide > shape->hidden ? wide : shape->hidden;
    if (shape->embedded > model->compute.widest) model->compute.widest = shape->embedded;
    model->compute.scratch = nl_carve(arena, NL_WORKING, 2 * threads * model->compute.widest * sizeof(float));
    if (model->compute.integers) {
        model->compute.codes = nl_carve(arena, NL_WORKING, model->compute.widest);
        model->compute.scales = nl_carve(arena, NL_WORKING, (model->compute.widest / 32 + 1) * sizeof(float));
    }
    model->room.values = nl_carve(arena, NL_WORKING, batch * most * sizeof(float));
    model->room.sums = nl_carve(arena, NL_WORKING, threads * size);
    model->room.slots = nl_carve(arena, NL_WORKING, most * sizeof(int32_t));
    model->states = nl_carve(arena, NL_WORKING, size);
    model->normed = nl_carve(arena, NL_WORKING, shape->embedded > shape->hidden ? batch * shape->embedded * sizeof(float) : size);
    model->changes = nl_carve(arena, NL_WORKING, size);
    carve_stream(model, arena);
    model->logits = nl_carve(arena, NL_WORKING, (model->vocabulary > batch ? model->vocabulary : batch) * sizeof(float));
    model->surprises = nl_carve(arena, NL_WORKING, batch * sizeof(NlSurprise));
    if (shape->experts) {
        model->mixture.scores = nl_carve(arena, NL_WORKING, batch * shape->experts * sizeof(float));
        model->mixture.shares = nl_carve(arena, NL_WORKING, batch * shape->used_experts * sizeof(float));
        model->mixture.chosen = nl_carve(arena, NL_WORKING, batch * shape->used_experts * sizeof(uint32_t));
        model->mixture.tokens = nl_carve(arena, NL_WORKING, batch * sizeof(uint32_t));
        model->mixture.wanted = nl_carve(arena, NL_WORKING, shape->experts * sizeof *model->mixture.wanted);
        model->mixture.in = nl_carve(arena, NL_WORKING, size);
        model->mixture.out = nl_carve(arena, NL_WORKING, size);
    }
    model->candidates = nl_carve(arena, NL_WORKING, model->vocabulary * sizeof(NlCandidate));
}

/* What everything but the caches takes with a batch and so many pages for reads. */
static NlArena count(NlModel *model, uint64_t batch, uint64_t pages) {
    NlArena arena;
    memset(&arena, 0, sizeof arena);
    nl_model_carve(model, &arena, batch, pages);
    return arena;
}

/* Bundles of a block that a share of all, in STEPS, lets its cache hold: never fewer than the pinned ones and one. */
static uint64_t capacity_of(const NlBlock *block, uint64_t share) {
    uint64_t least = block->pinned < block->neurons ? block->pinned + 1 : block->neurons;
    uint64_t found = (uint64_t)((double)block->neurons * (double)share / (double)STEPS);
    if (share == STEPS || found > block->neurons) found = block->neurons;
    return found > least ? found : least;
}

/* Fills in the capacities for a share, and what the caches then take. */
static void set_capacities(NlModel *model, uint64_t share) {
    NlMemory *memory = &model->memory;
    memory->tables = memory->cache = memory->cached = 0;
    for (uint64_t k = 0; k < model->weights.blocks; k++) {
        const NlBlock *block = &model->weights.ffn[k].block;
        int none = model->options.dram == 0 && model->options.cache_share <= 0;
        uint64_t rows = none ? 0 : capacity_of(block, share);
        model->capacities[k] = rows;
        memory->cached += rows;
        memory->cache += rows * block->stride;
        memory->tables += nl_cache_bytes(block->neurons, rows, none ? 0 : block->pinned) + 2 * sizeof(int64_t);
    }
}

static uint64_t total_of(NlMemory *memory) {
    const uint64_t held = memory->programs + memory->dense + memory->resident + memory->sequence + memory->working +
                          memory->tables + memory->cache;
    memory->system = held / PER_SYSTEM_BYTE + SYSTEM_BYTES;
    memory->total = held + memory->system;
    return memory->total;
}

static void enter(NlMemory *memory, const NlArena *arena) {
    memory->dense = arena->uses[NL_DENSE];
    memory->resident = arena->uses[NL_RESIDENT];
    memory->sequence = arena->uses[NL_SEQUENCE];
    memory->working = arena->uses[NL_WORKING];
}

/* The largest caches that fit. */
static int settle(NlModel *model, NlError *error) {
    NlMemory *memory = &model->memory;
    uint64_t low = 0, high = STEPS, dram = model->options.dram;
    if (dram == 0) {
        double share = model->options.cache_share;
        set_capacities(model, share >= 1 ? STEPS : (uint64_t)ceil(share * (double)STEPS));
        total_of(memory);
        return 0;
    }
    set_capacities(model, 0);
    if (total_of(memory) > dram)
        return nl_fail(error, NL_NO_MEMORY,
                       "%" PRIu64 " bytes of memory are too few: this model takes at least %" PRIu64 " (%" PRIu64
                       " of dense weights, %" PRIu64 " of resident rows, %" PRIu64 " for %" PRIu64
                       " tokens of context, %" PRIu64 " of other things)",
                       dram, memory->least, memory->dense, memory->resident, memory->sequence, memory->context,
                       memory->least - memory->dense - memory->resident - memory->sequence);
    while (low < high) {
        uint64_t middle = (low + high + 1) / 2;
        set_capacities(model, middle);
        if (total_of(memory) <= dram) low = middle;
        else high = middle - 1;
    }
    set_capacities(model, low);
    total_of(memory);
    return 0;
}

/* Decides which weights are read anew for every token, so that the others and something of caches fit: none, if they all
 * do. Fills in the least that would do. */
static void stream(NlModel *model, uint64_t flash, uint64_t pages) {
    NlMemory *memory = &model->memory;
    const uint64_t dram = model->options.dram, held = memory->least, programs = memory->programs;
    const uint64_t kinds = model->shape.experts ? 2 : 1; /* of buffers */
    const uint64_t kept = dram / KEPT_FREE < flash ? dram / KEPT_FREE : flash;
    uint64_t read, spare;
    NlArena arena;
    model->stream_usual = NL_PAGE;
    nl_weights_stream(&model->weights, UINT64_MAX, &read);
    arena = count(model, 1, pages);
    enter(memory, &arena);
    memory->programs = programs + stream_threads(model);
    set_capacities(model, 0);
    if (total_of(memory) < memory->least) memory->least = memory->total;
    if (held + kept <= dram) {
        nl_weights_stream(&model->weights, 0, &read);
        memory->programs = programs;
        return;
    }
    spare = dram > memory->total ? dram - memory->total : 0;
    for (; model->stream_usual < STREAM_BUFFER; model->stream_usual *= 2)
        if (2 * model->stream_usual * NL_STREAM_BUFFERS * kinds > (spare < dram / SCARCE ? spare : dram / SCARCE)) break;
    /* What is marked saves less than its bytes: there are buffers to fill then. */
    for (uint64_t wanted = held + kept - dram;; wanted += memory->total + kept - dram) {
        uint64_t saved = nl_weights_stream(&model->weights, wanted, &memory->streamed);
        arena = count(model, 1, pages);
        enter(memory, &arena);
        memory->programs = programs + stream_threads(model);
        set_capacities(model, 0);
        if (total_of(memory) + kept <= dram || saved < wanted) break;
    }
}

/* Pages for reads of bundles, of blocks of at most `largest` bytes: no more than one block takes, and of little memory a
 * small part. */
static uint64_t room_pages(const NlModel *model, uint64_t largest, uint64_t fewest) {
    const uint64_t dram = model->options.dram, most = model->memory.streamed ? dram / SCARCE : dram / 16, whole = largest / NL_PAGE + 4 * (uint64_t)model->fetch.depth;
    uint64_t pages = USUAL_ROOM / NL_PAGE < whole ? USUAL_ROOM / NL_PAGE : whole;
    while (dram && pages > fewest && pages * NL_PAGE > most) pages /= 2;
    return pages > fewest && (!dram || model->memory.total + pages * NL_PAGE <= dram) ? pages : fewest;
}

/* The plan for options.dram, where the process has taken `programs` before. */
static int plan(NlModel *model, uint64_t programs, NlError *error) {
    NlMemory *memory = &model->memory;
    const uint64_t cycle = memory->cycle;
    const NlOptions *options = &model->options;
    uint64_t stride = 0, largest = 0, batch = options->batch ? options->batch : 64, dram = options->dram, fewest, pages, most;
    NlArena arena;
    memset(memory, 0, sizeof *memory);
    memory->cycle = cycle;
    nl_weights_stream(&model->weights, 0, &memory->streamed);
    for (uint64_t k = 0; k < model->weights.blocks; k++) {
        const NlBlock *block = &model->weights.ffn[k].block;
        if (block->stride > stride) stride = block->stride;
        if (block->stride * block->neurons > largest) largest = block->stride * block->neurons;
        memory->flash += block->stride * block->neurons;
        memory->bundles += block->neurons;
    }
    model->fetch.depth = options->queue_depth;
    model->fetch.longest = nl_fetch_least(stride);
    fewest = FEWEST_READS * model->fetch.longest / NL_PAGE;
    memory->context = model->sequence.context;
    memory->programs = programs + model->compute.threads * THREAD_BYTES + READING_BYTES;
    if (model->options.reads == NL_READS_THREADS) memory->programs += 16 * THREAD_BYTES;
    arena = count(model, 1, fewest);
    enter(memory, &arena);
    set_capacities(model, 0);
    memory->least = total_of(memory);
    if (dram && model->weights.held) {
        stream(model, memory->flash, fewest);
        arena = count(model, 1, fewest);
        enter(memory, &arena);
        set_capacities(model, 0);
    }
    if (batch > model->sequence.context) batch = model->sequence.context;
    /* Where memory is scarce, most of it is to be cache: an eighth for a batch at most. */
    total_of(memory);
    pages = room_pages(model, largest, fewest);
    if (pages / FEWEST_READS * NL_PAGE > model->fetch.longest) model->fetch.longest = pages / FEWEST_READS * NL_PAGE;
    if (model->fetch.longest > LONGEST_READ && LONGEST_READ > nl_fetch_least(stride)) model->fetch.longest = LONGEST_READ;
    most = pages * NL_PAGE + (memory->streamed ? NL_STREAM_BUFFERS * (model->stream_bytes + model->routed_bytes) + dram / SCARCE : dram / 8);
    for (;; batch = (batch + 1) / 2) {
        arena = count(model, batch, pages);
        if (!dram || batch == 1 || options->batch) break;
        enter(memory, &arena);
        set_capacities(model, 0);
        if (memory->working <= most && total_of(memory) <= dram) break;
    }
    memory->batch = batch;
    enter(memory, &arena);
    return settle(model, error);
}

/* Whether a cache takes a token's bundles with so much memory. */
static int holds_cycle(NlModel *model, uint64_t programs, uint64_t dram) {
    NlError ignored = {NL_OK, ""};
    model->options.dram = dram;
    return plan(model, programs, &ignored) == 0 && model->memory.cache >= model->memory.cycle;
}

/* The least memory with which the cache takes a token's bundles, to a hundredth; more than there is now. */
static uint64_t cycle_dram(NlModel *model, uint64_t programs) {
    const uint64_t dram = model->options.dram;
    uint64_t low = dram, high = dram;
    do high *= 2;
    while (high < UINT64_MAX / 4 && !holds_cycle(model, programs, high));
    while (high - low > high / 100) {
        uint64_t middle = low + (high - low) / 2;
        if (holds_cycle(model, programs, middle)) high = middle;
        else low = middle;
    }
    model->options.dram = dram;
    return high;
}

int nl_plan_memory(NlModel *model, NlError *error) {
    const uint64_t programs = nl_resident_bytes();
    double cycle = 0, firing;
    uint64_t enough;
    for (uint64_t k = 0; k < model->weights.blocks; k++) {
        const NlBlock *block = &model->weights.ffn[k].block;
        if (nl_index_firing(&model->index, block, &firing, error) != 0) return -1;
        cycle += firing * (double)block->stride;
    }
    model->memory.cycle = (uint64_t)cycle;
    if (plan(model, programs, error) != 0) return -1;
    if (!model->options.dram || model->memory.cache >= model->memory.cycle) return 0;
    enough = cycle_dram(model, programs);
    if (plan(model, programs, error) != 0) return -1;
    model->memory.cycle_dram = enough;
    return 0;
}

int nl_shrink(NlModel *model, uint64_t dram, NlError *error) {
    const uint64_t before = model->options.dram, fixed = model->memory.total - model->memory.cache - model->memory.tables;
    NlMemory *memory = &model->memory;
    uint64_t least;
    if (dram >= memory->total) return 0;
    set_capacities(model, 0);
    least = fixed + memory->cache + memory->tables;
    if (least > dram) {
        settle(model, error); /* as it was */
        return nl_fail(error, NL_NO_MEMORY, "the model takes at least %" PRIu64 " bytes as it was opened", least);
    }
    model->options.dram = dram;
    if (settle(model, error) != 0) {
        model->options.dram = before;
        return -1;
    }
    nl_unmap(model->caches, model->cache_bytes);
    model->caches = NULL;
    if (nl_start_caches(model, error) == 0) return 0;
    model->error = *error; /* there is no cache any more */
    return -1;
}
