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
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include "json.h"
#include "weight_formats.h"

#define MAX_INDEX_BYTES (UINT64_C(64) << 20)
#define MAX_NEURONS (UINT64_C(1) << 24)
#define MAX_STRIDE (UINT64_C(1) << 26)
#define FNV_START UINT64_C(0xcbf29ce484222325)
#define FNV_PRIME UINT64_C(0x100000001b3)

enum { GATE, UP, DOWN, ROLES };
static const char *const ROLE_NAMES[ROLES] = {"gate", "up", "down"};

/* Where the weights of one role are: `bytes` of every neuron, the one in slot k at `offset` + k * `pitch`. */
typedef struct {
    const WeightFormat *format; /* NULL if the block has none */
    uint64_t bytes, offset, pitch;
} Part;

/* What is needed to read a block. Offsets are absolute in the flash file. */
typedef struct {
    uint64_t neurons, hidden, stride, bundles_offset, order_offset;
    const WeightFormat *source; /* of weights that are not rounded */
    Part parts[ROLES];
} Block;

/* An open layout. */
typedef struct {
    char *text; /* the index, `length` bytes */
    size_t length;
    int file;
    uint64_t file_bytes;
} Layout;

/* ---- files ---- */

static int read_at(int file, void *buffer, uint64_t bytes, uint64_t offset) {
    unsigned char *to = buffer;
    while (bytes > 0) {
        ssize_t count = pread(file, to, bytes < (1u << 30) ? (size_t)bytes : (size_t)1 << 30, (off_t)offset);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return fail("reading failed: %s", strerror(errno));
        if (count == 0) return fail("the file ended while it was being read");
        to += count;
        bytes -= (uint64_t)count;
        offset += (uint64_t)count;
    }
    return 0;
}

/* Opens DIRECTORY/NAME for reading and gives its size; -1 on failure. */
static int open_file(const char *directory, const char *name, uint64_t *bytes) {
    struct stat status;
    size_t length = strlen(directory) + strlen(name) + 2;
    char *path = malloc(length);
    int file;
    if (!path) return fail("out of memory");
    snprintf(path, length, "%s/%s", directory, name);
    file = open(path, O_RDONLY);
    if (file < 0) {
        fail("%s: %s", path, strerror(errno));
    } else if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
        fail("%s: not a file", path);
        close(file);
        file = -1;
    } else {
        *bytes = (uint64_t)status.st_size;
    }
    free(path);
    return file;
}

static int read_index(Layout *layout, const char *directory) {
    uint64_t bytes = 0;
    const char *end;
    int result = -1, file = open_file(directory, INDEX_NAME, &bytes);
    if (file < 0) return -1;
    if (bytes == 0 || bytes > MAX_INDEX_BYTES) {
        fail("%s: has %" PRIu64 " bytes", INDEX_NAME, bytes);
    } else if (!(layout->text = malloc((size_t)bytes + 1))) {
        fail("out of memory");
    } else if (read_at(file, layout->text, bytes, 0) == 0) {
        layout->length = (size_t)bytes;
        layout->text[bytes] = '\0'; /* so that one character of look-ahead is always there */
        end = skip_value(layout->text, layout->text + bytes, 0);
        if (!is_utf8((const unsigned char *)layout->text, (const unsigned char *)layout->text + bytes))
            fail("%s: not UTF-8", INDEX_NAME);
        else if (!end || skip_space(end, layout->text + bytes) != layout->text + bytes || *layout->text != '{')
            fail("%s: not a JSON object", INDEX_NAME);
        else
            result = 0;
    }
    close(file);
    return result;
}

static int open_layout(Layout *layout, const char *directory) {
    uint64_t version, stated;
    const char *text, *end, *file;
    char name[256];
    size_t length;
    if (read_index(layout, directory) != 0) return -1;
    text = layout->text;
    end = text + layout->length;
    if (string(text, end, "format", "neuralink-flash") != 0 || number(text, end, "version", 1, 1, &version) != 0)
        return -1;
    if (!(file = member(text, end, "file")) || number(file, end, "bytes", 1, INT64_MAX, &stated) != 0) return -1;
    if (!(file = member(file, end, "name")) || *file != '"') return fail("%s: the file has no name", INDEX_NAME);
    length = strcspn(file + 1, "\"\\/");
    if (file[1 + length] != '"' || length == 0 || length >= sizeof name || file[1] == '.')
        return fail("%s: the file's name is not a plain one", INDEX_NAME);
    memcpy(name, file + 1, length);
    name[length] = '\0';
    if ((layout->file = open_file(directory, name, &layout->file_bytes)) < 0) return -1;
    if (layout->file_bytes != stated)
        return fail("%s: has %" PRIu64 " bytes, the index says %" PRIu64, name, layout->file_bytes, stated);
    return 0;
}

/* A range of the flash file that must have `bytes` bytes and lie within it. */
static int range(const Layout *layout, const char *block, const char *key, uint64_t bytes, uint64_t *offset) {
    const char *end = layout->text + layout->length, *object = member(block, end, key);
    uint64_t stated;
    if (!object || number(object, end, "bytes", bytes, bytes, &stated) != 0) return -1;
    if (bytes > layout->file_bytes) return fail("%s: %s is larger than the file", INDEX_NAME, key);
    return number(object, end, "offset", 0, layout->file_bytes - bytes, offset);
}

/* The entry of a list that the string at `at` names, or NULL. */
static const WeightFormat *lookup(const WeightFormat *formats, const char *at) {
    for (; formats->name; formats++)
        if (is_string(at, formats->name)) return formats;
    return NULL;
}

/* Enters what an entry of `parts` or `resident` describes: format and bytes of the part of its role. */
static int new_part(const Layout *layout, const char *entry, Block *block, Part **part) {
    const char *end = layout->text + layout->length, *role = member(entry, end, "role"), *weights;
    const WeightFormat *format;
    int k = 0;
    if (!role || find_member(entry, end, "weights", &weights) != 0) return -1;
    while (k < ROLES && !is_string(role, ROLE_NAMES[k])) k++;
    if (k == ROLES) return fail("%s: a role is not gate, up or down", INDEX_NAME);
    if (block->parts[k].format) return fail("%s: the weights of %s are there twice", INDEX_NAME, ROLE_NAMES[k]);
    format = weights ? lookup(BLOCK_FORMATS, weights) : block->source;
    if (!format) return fail("%s: the weights of %s are in an unknown format", INDEX_NAME, ROLE_NAMES[k]);
    if (weights && !block->source->decode)
        return fail("%s: weights of dtype %s cannot be %s", INDEX_NAME, block->source->name, format->name);
    *part = &block->parts[k];
    (*part)->format = format;
    (*part)->bytes = row_bytes(format, block->hidden);
    if ((*part)->bytes > 0) return 0;
    return fail("%s: %" PRIu64 " weights are no whole blocks of %s", INDEX_NAME, block->hidden, format->name);
}

/* What a bundle holds: parts without holes between them, that fill it. */
static int find_bundle_parts(const Layout *layout, const char *object, Block *block) {
    const char *end = layout->text + layout->length, *at = member(object, end, "parts"), *bundles;
    uint64_t place = 0, stated;
    int rounded = 0;
    if (!at) return -1;
    for (int more = next_item(&at, end, 1); more; more = next_item(&at, end, 0)) {
        Part *part;
        if (new_part(layout, at, block, &part) != 0 ||
            number(at, end, "offset", place, place, &stated) != 0 ||
            number(at, end, "bytes", part->bytes, part->bytes, &stated) != 0)
            return -1;
        part->offset = block->bundles_offset + place;
        part->pitch = block->stride;
        place += part->bytes;
        if (part->format != block->source) rounded = 1;
    }
    if (place != block->stride)
        return fail("%s: stride is %" PRIu64 ", the parts have %" PRIu64 " bytes", INDEX_NAME, block->stride, place);
    if (!(bundles = member(object, end, "bundles"))) return -1;
    return string(bundles, end, "dtype", rounded ? "U8" : block->source->name);
}

/* Rows that are kept in memory instead of in bundles. Biases, which have their own dtype, are left to others. */
static int find_resident_rows(const Layout *layout, const char *object, Block *block) {
    const char *end = layout->text + layout->length, *at = member(object, end, "resident"), *kind, *place;
    if (!at) return -1;
    if (*at != '[') return fail("%s: resident is not a list", INDEX_NAME);
    for (int more = next_item(&at, end, 1); more; more = next_item(&at, end, 0)) {
        Part *part;
        if (!(kind = member(at, end, "kind"))) return -1;
        if (is_string(kind, "bias") || is_string(kind, "output_bias")) continue;
        if (!is_string(kind, "rows")) return fail("%s: a kind is not rows, bias or output_bias", INDEX_NAME);
        if (new_part(layout, at, block, &part) != 0 ||
            range(layout, at, "place", block->neurons * part->bytes, &part->offset) != 0 ||
            !(place = member(at, end, "place")) ||
            string(place, end, "dtype", part->format != block->source ? "U8" : block->source->name) != 0)
            return -1;
        part->pitch = part->bytes;
    }
    return 0;
}

static int read_block(const Layout *layout, const char *object, Block *block) {
    const char *end = layout->text + layout->length, *dtype, *order;
    if (number(object, end, "neurons", 1, MAX_NEURONS, &block->neurons) != 0 ||
        number(object, end, "hidden", 1, MAX_HIDDEN, &block->hidden) != 0 ||
        number(object, end, "stride", 1, MAX_STRIDE, &block->stride) != 0 ||
        range(layout, object, "bundles", block->neurons * block->stride, &block->bundles_offset) != 0 ||
        range(layout, object, "order", block->neurons * 4, &block->order_offset) != 0)
        return -1;
    order = member(object, end, "order");
    if (string(order, end, "dtype", "I32") != 0 || !(dtype = member(object, end, "dtype"))) return -1;
    if (!(block->source = lookup(SOURCE_FORMATS, dtype)))
        return fail("%s: a block has a dtype that this reader does not know", INDEX_NAME);
    return find_bundle_parts(layout, object, block) != 0 ? -1 : find_resident_rows(layout, object, block);
}

static int find_block(const Layout *layout, const char *id, Block *block) {
    const char *end = layout->text + layout->length, *at = member(layout->text, end, "blocks");
    if (!at) return -1;
    if (*at != '[') return fail("%s: blocks is not a list", INDEX_NAME);
    for (int more = next_item(&at, end, 1); more; more = next_item(&at, end, 0)) {
        const char *name = member(at, end, "id");
        if (!name) return -1;
        if (is_string(name, id)) return read_block(layout, at, block);
    }
    return fail("%s: no block %s", INDEX_NAME, id);
}

/* slots[neuron] = slot, from the order tensor, where order[slot] = neuron; NULL if that is no permutation. */
static uint32_t *read_slots(const Layout *layout, const Block *block) {
    unsigned char *order = malloc((size_t)block->neurons * 4);
    uint32_t *slots = malloc((size_t)block->neurons * sizeof *slots);
    int bad = !order || !slots;
    if (bad) fail("out of memory");
    else bad = read_at(layout->file, order, block->neurons * 4, block->order_offset) != 0;
    if (!bad) memset(slots, 0xff, (size_t)block->neurons * sizeof *slots);
    for (uint64_t slot = 0; !bad && slot < block->neurons; slot++) {
        const unsigned char *entry = order + 4 * slot; /* little-endian, whatever this machine is */
        uint32_t neuron = entry[0] | (uint32_t)entry[1] << 8 | (uint32_t)entry[2] << 16 | (uint32_t)entry[3] << 24;
        if (neuron >= block->neurons || slots[neuron] != UINT32_MAX) bad = 1, fail("the order is no permutation");
        else slots[neuron] = (uint32_t)slot;
    }
    free(order);
    if (bad) free(slots), slots = NULL;
    return slots;
}

static uint64_t fnv1a(uint64_t hash, const unsigned char *bytes, uint64_t count) {
    for (uint64_t i = 0; i < count; i++) hash = (hash ^ bytes[i]) * FNV_PRIME;
    return hash;
}

static int neuron_of(const char *text, uint64_t neurons, uint64_t *neuron) {
    char *rest;
    unsigned long long value;
    errno = 0;
    value = strtoull(text, &rest, 10);
    if (*text < '0' || *text > '9' || *rest || errno || value >= neurons)
        return fail("%s is not a neuron from 0 to %" PRIu64, text, neurons - 1);
    *neuron = value;
    return 0;
}

static int print_checksums(const Layout *layout, const Block *block, const uint32_t *slots, int count, char **asked) {
    uint64_t total = FNV_START, wanted = count ? (uint64_t)count : block->neurons;
    unsigned char *bundle = malloc((size_t)block->stride);
    int result = bundle ? 0 : fail("out of memory");
    for (uint64_t k = 0; result == 0 && k < wanted; k++) {
        uint64_t neuron = k;
        if (count && (result = neuron_of(asked[k], block->neurons, &neuron)) != 0) break;
        result = read_at(layout->file, bundle, block->stride, block->bundles_offset + slots[neuron] * block->stride);
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
static int print_row(const Layout *layout, const Block *block, uint64_t neuron, uint32_t slot, unsigned char *row,
                     float *values) {
    for (int role = 0; role < ROLES; role++) {
        const Part *part = &block->parts[role];
        if (!part->format) continue;
        if (read_at(layout->file, row, part->bytes, part->offset + slot * part->pitch) != 0) return -1;
        part->format->decode(row, block->hidden, values);
        printf("neuron %" PRIu64 " slot %" PRIu32 " %s %s", neuron, slot, ROLE_NAMES[role], part->format->name);
        /* Digits enough to tell all floats apart. */
        for (uint64_t j = 0; j < block->hidden; j++) printf(" %.9g", (double)values[j]);
        putchar('\n');
    }
    return 0;
}

static int print_values(const Layout *layout, const Block *block, const uint32_t *slots, int count, char **asked) {
    uint64_t largest = 1, wanted = count ? (uint64_t)count : block->neurons;
    unsigned char *row;
    float *values;
    int result = 0;
    for (int role = 0; role < ROLES; role++) {
        const Part *part = &block->parts[role];
        if (part->format && !part->format->decode)
            return fail("weights of dtype %s can only be checked, not printed", part->format->name);
        if (part->bytes > largest) largest = part->bytes;
    }
    row = malloc((size_t)largest);
    values = malloc((size_t)block->hidden * sizeof *values);
    if (!row || !values) result = fail("out of memory");
    for (uint64_t k = 0; result == 0 && k < wanted; k++) {
        uint64_t neuron = k;
        if (count && (result = neuron_of(asked[k], block->neurons, &neuron)) != 0) break;
        result = print_row(layout, block, neuron, slots[neuron], row, values);
    }
    free(row);
    free(values);
    return result;
}

int main(int argc, char **argv) {
    Layout layout = {NULL, 0, -1, 0};
    Block block;
    uint32_t *slots = NULL;
    int values = argc > 1 && !strcmp(argv[1], "--values"), first = 1 + values, result = -1;
    if (argc - first < 2) {
        fputs("usage: flash_read [--values] DIRECTORY BLOCK [NEURON ...]\n", stderr);
        return 2;
    }
    memset(&block, 0, sizeof block);
    if (open_layout(&layout, argv[first]) == 0 && find_block(&layout, argv[first + 1], &block) == 0 &&
        (slots = read_slots(&layout, &block)) != NULL)
        result = (values ? print_values : print_checksums)(&layout, &block, slots, argc - first - 2, argv + first + 2);
    if (fflush(stdout) != 0 || ferror(stdout)) result = fail("the output cannot be written");
    free(slots);
    free(layout.text);
    if (layout.file >= 0) close(layout.file);
    return result == 0 ? 0 : 1;
}
