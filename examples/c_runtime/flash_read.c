/*
 * Reads neurons of a neuralink flash layout with nothing but libc: what a runtime on a phone needs, and no more.
 *
 *     flash_read [--values] DIRECTORY BLOCK [NEURON ...]
 *
 * Opens model.flash.json and the flash file beside it, finds the slot of each neuron through the block's order
 * tensor, reads its bundle with one pread and prints its FNV-1a 64 checksum. Without neurons: all, in neuron order.
 * With --values it prints the weights instead, decoded from whichever format they are stored in: those in the bundle
 * and those that are kept resident. docs/format.md describes every field used here.
 * Exit codes: 0 success, 1 bad layout or failed read, 2 wrong usage.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index.h"

#define FNV_START UINT64_C(0xcbf29ce484222325)
#define FNV_PRIME UINT64_C(0x100000001b3)

static uint64_t fnv1a(uint64_t hash, const unsigned char *bytes, uint64_t count) {
    for (uint64_t i = 0; i < count; i++) hash = (hash ^ bytes[i]) * FNV_PRIME;
    return hash;
}

static int neuron_of(const char *text, uint64_t neurons, uint64_t *neuron, NlError *error) {
    char *rest;
    unsigned long long value;
    errno = 0;
    value = strtoull(text, &rest, 10);
    if (*text < '0' || *text > '9' || *rest || errno || value >= neurons)
        return nl_fail(error, NL_BAD_OPTION, "%s is not a neuron from 0 to %" PRIu64, text, neurons - 1);
    *neuron = value;
    return 0;
}

static int print_checksums(const NlIndex *layout, const NlBlock *block, const uint32_t *slots, int count, char **asked) {
    uint64_t total = FNV_START, wanted = count ? (uint64_t)count : block->neurons;
    unsigned char *bundle = malloc((size_t)block->stride);
    int result = bundle ? 0 : nl_fail(layout->json.error, NL_NO_MEMORY, "out of memory");
    for (uint64_t k = 0; result == 0 && k < wanted; k++) {
        uint64_t neuron = k;
        if (count && (result = neuron_of(asked[k], block->neurons, &neuron, layout->json.error)) != 0) break;
        result = nl_read_at(layout->file, bundle, block->stride, block->bundles_offset + slots[neuron] * block->stride,
                            layout->json.error);
        if (result != 0) break;
        total = fnv1a(total, bundle, block->stride);
        printf("neuron %" PRIu64 " slot %" PRIu32 " %016" PRIx64 "\n", neuron, slots[neuron],
               fnv1a(FNV_START, bundle, block->stride));
    }
    if (result == 0) printf("total %" PRIu64 " %016" PRIx64 "\n", wanted, total);
    free(bundle);
    return result;
}

/* Reads and decodes the weights of the neuron in a slot and prints a line for each role. */
static int print_row(const NlIndex *layout, const NlBlock *block, uint64_t neuron, uint32_t slot, unsigned char *row,
                     float *values) {
    for (int role = 0; role < NL_ROLES; role++) {
        const NlPart *part = &block->parts[role];
        if (!part->format) continue;
        if (nl_read_at(layout->file, row, part->bytes, part->offset + slot * part->pitch, layout->json.error) != 0) return -1;
        part->format->decode(row, block->hidden, values);
        printf("neuron %" PRIu64 " slot %" PRIu32 " %s %s", neuron, slot, NL_ROLE_NAMES[role], part->format->name);
        /* Digits enough to tell all floats apart. */
        for (uint64_t j = 0; j < block->hidden; j++) printf(" %.9g", (double)values[j]);
        putchar('\n');
    }
    return 0;
}

static int print_values(const NlIndex *layout, const NlBlock *block, const uint32_t *slots, int count, char **asked) {
    uint64_t largest = 1, wanted = count ? (uint64_t)count : block->neurons;
    unsigned char *row;
    float *values;
    int result = 0;
    for (int role = 0; role < NL_ROLES; role++) {
        const NlPart *part = &block->parts[role];
        if (part->format && !part->format->decode)
            return nl_fail(layout->json.error, NL_NOT_SUPPORTED, "weights of dtype %s can only be checked, not printed", part->format->name);
        if (part->bytes > largest) largest = part->bytes;
    }
    row = malloc((size_t)largest);
    values = malloc((size_t)block->hidden * sizeof *values);
    if (!row || !values) result = nl_fail(layout->json.error, NL_NO_MEMORY, "out of memory");
    for (uint64_t k = 0; result == 0 && k < wanted; k++) {
        uint64_t neuron = k;
        if (count && (result = neuron_of(asked[k], block->neurons, &neuron, layout->json.error)) != 0) break;
        result = print_row(layout, block, neuron, slots[neuron], row, values);
    }
    free(row);
    free(values);
    return result;
}

static int find_block(const NlIndex *layout, const char *id, NlBlock *block) {
    const char *at, *name;
    int more = nl_index_next(layout, &at, 1);
    for (; more > 0; more = nl_index_next(layout, &at, 0)) {
        if (!(name = nl_json_member(&layout->json, at, "id"))) return -1;
        if (nl_json_is(name, id)) return nl_index_block(layout, at, block, 0);
    }
    return more ? -1 : nl_fail(layout->json.error, NL_BAD_OPTION, "%s: no block %s", NL_INDEX_NAME, id);
}

int main(int argc, char **argv) {
    NlError error = {NL_OK, ""};
    NlIndex layout;
    NlBlock block;
    uint32_t *slots = NULL;
    int values = argc > 1 && !strcmp(argv[1], "--values"), first = 1 + values, result = -1;
    if (argc - first < 2) {
        fputs("usage: flash_read [--values] DIRECTORY BLOCK [NEURON ...]\n", stderr);
        return 2;
    }
    if (nl_index_open(&layout, argv[first], &error) == 0 && find_block(&layout, argv[first + 1], &block) == 0) {
        slots = malloc((size_t)block.neurons * sizeof *slots);
        if (!slots) nl_fail(&error, NL_NO_MEMORY, "out of memory");
        else if (nl_index_slots(&layout, &block, slots) == 0)
            result = (values ? print_values : print_checksums)(&layout, &block, slots, argc - first - 2,
                                                               argv + first + 2);
    }
    if (fflush(stdout) != 0 || ferror(stdout)) {
        result = -1;
        nl_fail(&error, NL_IO, "the output cannot be written");
    }
    if (result != 0) fprintf(stderr, "flash_read: %s\n", error.text);
    free(slots);
    nl_index_close(&layout);
    return result == 0 ? 0 : 1;
}
