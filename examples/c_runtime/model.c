/* Opening and closing a model, and a batch of tokens through it. */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "device.h"
#include "model.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define USUAL_CONTEXT 1024u
#define USUAL_DEPTH 32u
#define MOST_THREADS 256u
/* Neurons of runs of two or more are admitted with this probability, see neuralink_cli/storage/cache.py. */
#define LINKED_RUN 2
#define LINKED_ADMISSION 0.1

static int settle_options(NlModel *model, const NlOptions *options, NlError *error) {
    NlOptions *own = &model->options;
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    *own = *options;
    if (!own->threads) own->threads = processors > 0 ? (uint32_t)processors : 1;
    if (!own->queue_depth) own->queue_depth = USUAL_DEPTH;
    if (own->threads > MOST_THREADS || own->queue_depth > 1024 || own->batch > 65536)
        return nl_fail(error, NL_BAD_OPTION, "at most %u threads, 1,024 reads in flight and batches of 65,536", MOST_THREADS);
    if (!(own->cache_share >= 0 && own->cache_share <= 1))
        return nl_fail(error, NL_BAD_OPTION, "a share of the bundles is from 0 to 1");
    if (!(model->compute.kernels = nl_kernels(own->kernels)))
        return nl_fail(error, NL_BAD_OPTION, "this machine has no kernels %.20s", own->kernels);
    if (own->round_activations) model->compute.integers = nl_integers(own->kernels);
    own->kernels = NULL; /* the caller's */
    model->compute.threads = own->threads;
    if (own->context > model->shape.positions)
        return nl_fail(error, NL_BAD_OPTION, "a context of %u tokens is more than the %" PRIu64 " positions of the model",
                       own->context, model->shape.positions);
    model->sequence.kind = own->half_sequence ? NL_F16 : NL_F32;
    model->sequence.context = own->context ? own->context : USUAL_CONTEXT;
    if (model->sequence.context > model->shape.positions) model->sequence.context = model->shape.positions;
    return 0;
}

/* With a device profile its gaps take the place of those of the index. */
static int settle_gaps(NlModel *model, NlError *error) {
    NlDevice device;
    if (!model->options.device) return 0;
    if (nl_device_read(&device, model->options.device, error) != 0) return -1;
    for (uint64_t k = 0; k < model->weights.blocks; k++) {
        NlBlock *block = &model->weights.ffn[k].block;
        block->gap = nl_device_gap(&device, block->stride);
        if (block->gap > block->neurons) block->gap = block->neurons;
    }
    model->options.device = NULL; /* the caller's */
    return 0;
}

/* Index, config and header are read, all tensors found, and memory planned. Nothing large is in memory yet. */
static int find_all(NlModel *model, const char *directory, const NlOptions *options, NlError *error) {
    NlTensors tensors;
    int result = -1;
    memset(&tensors, 0, sizeof tensors);
    if (nl_index_open(&model->index, directory, error) == 0 &&
        nl_shape_read(directory, model->index.model_type, &model->shape, error) == 0 &&
        nl_tensors_open(&tensors, &model->index, error) == 0 &&
        nl_weights_find(&model->weights, &model->index, &tensors, &model->shape, error) == 0 &&
        settle_options(model, options, error) == 0 && settle_gaps(model, error) == 0) {
        model->weights.held = !options->map_dense;
        model->vocabulary = model->weights.embedding.at.rows;
        model->capacities = calloc((size_t)model->weights.blocks, sizeof *model->capacities);
        model->ffn = calloc((size_t)model->weights.blocks, sizeof *model->ffn);
        model->streamed_order = calloc((size_t)nl_weights_most(&model->weights), sizeof *model->streamed_order);
        result = model->capacities && model->ffn && model->streamed_order ? 0 : nl_fail(error, NL_NO_MEMORY, "out of memory");
    }
    nl_tensors_close(&tensors);
    free((char *)model->index.json.text);
    model->index.json.text = NULL;
    return result == 0 ? nl_plan_memory(model, error) : -1;
}

int nl_start_caches(NlModel *model, NlError *error) {
    unsigned char *at;
    uint64_t bytes = model->memory.cache + model->memory.tables;
    if (!(at = nl_map(bytes))) return nl_fail(error, NL_NO_MEMORY, "the system has no %" PRIu64 " bytes for the cache", bytes);
    model->caches = at;
    model->cache_bytes = bytes;
    for (uint64_t k = 0; k < model->weights.blocks; k++) {
        NlStore *store = &model->ffn[k].store;
        const NlBlock *block = &model->weights.ffn[k].block;
        uint64_t rows = model->capacities[k], pinned = rows ? block->pinned : 0;
        uint64_t tables = nl_cache_bytes(block->neurons, rows, pinned);
        store->block = block;
        nl_cache_start(&store->cache, at, block->neurons, rows, pinned, model->options.plain_cache ? 0 : LINKED_RUN,
                       model->options.plain_cache ? 1 : LINKED_ADMISSION);
        at += (tables + sizeof(int64_t) - 1) / sizeof(int64_t) * sizeof(int64_t);
        store->pool = at;
        at += (rows * block->stride + sizeof(int64_t) - 1) / sizeof(int64_t) * sizeof(int64_t);
        if (nl_read_at(model->index.file, store->pool, pinned * block->stride, block->bundles_offset, error) != 0) return -1;
    }
    return 0;
}

static int start(NlModel *model, const char *directory, NlError *error) {
    const NlBlock *first = &model->weights.ffn[0].block;
    NlArena counted;
    memset(&counted, 0, sizeof counted);
    nl_model_carve(model, &counted, model->memory.batch, model->fetch.room.pages);
    model->arena.bytes = counted.used; /* without dense weights that are mapped: large pages would fill their place */
    if (!(model->arena.memory = nl_map(model->arena.bytes)))
        return nl_fail(error, NL_NO_MEMORY, "the system has no %" PRIu64 " bytes of memory", model->arena.bytes);
    if (!model->weights.held) {
        void *mapping = mmap(NULL, (size_t)model->index.file_bytes, PROT_READ, MAP_SHARED, model->index.file, 0);
        if (mapping == MAP_FAILED) return nl_fail(error, NL_NO_MEMORY, "the flash file cannot be mapped");
        model->weights.mapping = mapping;
        model->weights.mapped = model->index.file_bytes;
    }
    nl_model_carve(model, &model->arena, model->memory.batch, model->fetch.room.pages);
    if (!model->candidates) return nl_fail(error, NL_NO_MEMORY, "the memory was planned wrongly");
    if (nl_source_open(&model->source, &model->index, directory, model->options.direct, first->bundles_offset,
                       first->stride * first->neurons, error) != 0)
        return -1;
    model->fetch.unit = model->source.unit;
    if (nl_weights_read(&model->weights, &model->index, error) != 0) return -1;
    nl_fetch_reset(&model->fetch);
    for (uint64_t k = 0; k < model->weights.blocks; k++) {
        NlFfn *ffn = &model->ffn[k];
        ffn->weights = &model->weights.ffn[k];
        ffn->up_activated = model->shape.up_activated;
        if (nl_activation(ffn->weights->block.activation, (double)model->shape.cut, &ffn->activation, error) != 0) return -1;
    }
    nl_sequence_start(&model->sequence, &model->shape);
#ifdef POSIX_FADV_DONTNEED
    posix_fadvise(model->index.file, 0, 0, POSIX_FADV_DONTNEED); /* what was read is in our memory now */
#endif
    if (nl_start_caches(model, error) != 0) return -1;
    if (!(model->compute.workers = nl_workers_open(model->compute.threads, error))) return -1;
    if (model->streamed_count) {
        model->compute.stream =
            nl_stream_open(model->source.file, model->source.unit, model->stream_memory, model->stream_bytes,
                           (const NlMatrix *const *)model->streamed_order, model->streamed_count, error);
        if (!model->compute.stream) return -1;
    }
    if (model->routed_bytes) {
        model->compute.routed = nl_stream_open_on_demand(model->source.file, model->source.unit, model->routed_memory,
                                                         model->routed_bytes, model->shape.experts, error);
        if (!model->compute.routed) return -1;
    }
    model->compute.failed = &model->error;
    model->compute.file = model->index.file;
    model->fetch.reads = nl_reads_open(model->source.file, model->fetch.depth, model->options.reads, error);
    return model->fetch.reads ? 0 : -1;
}

static NlModel *new_model(NlError *error) {
    NlModel *model = calloc(1, sizeof *model);
    if (!model) nl_fail(error, NL_NO_MEMORY, "out of memory");
    else model->source.file = model->index.file = -1;
    return model;
}

NlModel *nl_open(const char *directory, const NlOptions *options, NlError *error) {
    NlModel *model = new_model(error);
    if (!model) return NULL;
    if (find_all(model, directory, options, error) == 0 && start(model, directory, error) == 0) {
        model->index.json.error = &model->error;
        return model;
    }
    nl_close(model);
    return NULL;
}

void nl_close(NlModel *model) {
    if (!model) return;
    nl_reads_close(model->fetch.reads);
    nl_workers_close(model->compute.workers);
    nl_stream_close(model->compute.stream);
    nl_stream_close(model->compute.routed);
    nl_source_close(&model->source, &model->index);
    nl_unmap(model->caches, model->cache_bytes);
    nl_unmap(model->arena.memory, model->arena.bytes);
    nl_weights_close(&model->weights);
    nl_index_close(&model->index);
    free(model->capacities);
    free(model->streamed_order);
    free(model->ffn);
    free(model);
}

int nl_plan(const char *directory, const NlOptions *options, NlMemory *memory, NlError *error) {
    NlModel *model = new_model(error);
    int result;
    memset(memory, 0, sizeof *memory);
    if (!model) return -1;
    result = find_all(model, directory, options, error);
    *memory = model->memory;
    nl_close(model);
    return result;
}
