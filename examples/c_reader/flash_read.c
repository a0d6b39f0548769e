/*
 * Reads neurons of a neuralink flash layout with nothing but libc: what a runtime on a phone needs, and no more.
 *
 *     flash_read DIRECTORY BLOCK [NEURON ...]
 *
 * Opens model.flash.json and the flash file beside it, finds the slot of each neuron through the block's order
 * tensor, reads its bundle with one pread and prints its FNV-1a 64 checksum. Without neurons: all, in neuron order.
 * docs/format.md describes every field used here. Exit codes: 0 success, 1 bad layout or failed read, 2 wrong usage.
 */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define INDEX_NAME "model.flash.json"
#define MAX_INDEX_BYTES (UINT64_C(64) << 20)
#define MAX_DEPTH 32
#define MAX_NEURONS (UINT64_C(1) << 24)
#define MAX_STRIDE (UINT64_C(1) << 26)
#define FNV_START UINT64_C(0xcbf29ce484222325)
#define FNV_PRIME UINT64_C(0x100000001b3)

/* What is needed to read a block. Offsets are absolute in the flash file. */
typedef struct {
    uint64_t neurons, stride, bundles_offset, order_offset;
} Block;

/* An open layout. */
typedef struct {
    char *text; /* the index, `length` bytes */
    size_t length;
    int file;
    uint64_t file_bytes;
} Layout;

static int fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("flash_read: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return -1;
}

/* ---- JSON: every function takes the rest of the text and returns what follows, or NULL if it is not JSON ---- */

static const char *skip_space(const char *at, const char *end) {
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r')) at++;
    return at;
}

static const char *skip_string(const char *at, const char *end) {
    if (at == end || *at != '"') return NULL;
    for (at++; at < end && *at != '"'; at++) {
        if ((unsigned char)*at < 0x20) return NULL;
        if (*at != '\\') continue;
        if (++at == end) return NULL;
        if (*at == 'u') {
            for (int digit = 0; digit < 4; digit++)
                if (++at == end || !*at || !strchr("0123456789abcdefABCDEF", *at)) return NULL;
        } else if (!*at || !strchr("\"\\/bfnrt", *at)) {
            return NULL;
        }
    }
    return at < end ? at + 1 : NULL;
}

static const char *skip_digits(const char *at, const char *end) {
    const char *first = at;
    while (at < end && *at >= '0' && *at <= '9') at++;
    return at > first ? at : NULL;
}

static const char *skip_number(const char *at, const char *end) {
    if (at < end && *at == '-') at++;
    if (at < end && *at == '0') at++;
    else if (!(at = skip_digits(at, end))) return NULL;
    if (at < end && *at == '.' && !(at = skip_digits(at + 1, end))) return NULL;
    if (at < end && (*at == 'e' || *at == 'E')) {
        at++;
        if (at < end && (*at == '+' || *at == '-')) at++;
        at = skip_digits(at, end);
    }
    return at;
}

static const char *skip_word(const char *at, const char *end, const char *word) {
    size_t length = strlen(word);
    return (size_t)(end - at) >= length && !memcmp(at, word, length) ? at + length : NULL;
}

static const char *skip_value(const char *at, const char *end, int depth);

/* The `"key":` of an object's member; the value follows. */
static const char *skip_key(const char *at, const char *end) {
    if (!(at = skip_string(skip_space(at, end), end))) return NULL;
    at = skip_space(at, end);
    return at < end && *at == ':' ? skip_space(at + 1, end) : NULL;
}

static const char *skip_items(const char *at, const char *end, char close, int depth) {
    at = skip_space(at + 1, end);
    if (at < end && *at == close) return at + 1;
    for (;; at++) {
        if (close == '}' && !(at = skip_key(at, end))) return NULL;
        if (!(at = skip_value(skip_space(at, end), end, depth + 1))) return NULL;
        at = skip_space(at, end);
        if (at < end && *at == close) return at + 1;
        if (at == end || *at != ',') return NULL;
    }
}

static const char *skip_value(const char *at, const char *end, int depth) {
    if (at == end || depth > MAX_DEPTH) return NULL;
    switch (*at) {
        case '{': return skip_items(at, end, '}', depth);
        case '[': return skip_items(at, end, ']', depth);
        case '"': return skip_string(at, end);
        case 't': return skip_word(at, end, "true");
        case 'f': return skip_word(at, end, "false");
        case 'n': return skip_word(at, end, "null");
        default: return skip_number(at, end);
    }
}

/* Whether the string at `at` is `word`. Strings with escapes are never equal to one of our names, which have none. */
static int is_string(const char *at, const char *word) {
    size_t length = strlen(word);
    return *at == '"' && !strncmp(at + 1, word, length) && at[1 + length] == '"';
}

/* The value of a member of an object in text that is valid JSON. A key that is there twice is an error. */
static const char *member(const char *object, const char *end, const char *key) {
    const char *found = NULL, *at = object;
    if (*object != '{') return fail("%s: no object where %s should be", INDEX_NAME, key), NULL;
    at = skip_space(object + 1, end);
    while (*at != '}') {
        const char *name = at, *value = skip_key(at, end);
        if (is_string(name, key)) {
            if (found) return fail("%s: %s is there twice", INDEX_NAME, key), NULL;
            found = value;
        }
        at = skip_space(skip_value(value, end, 0), end);
        if (*at == ',') at = skip_space(at + 1, end);
    }
    if (!found) fail("%s: %s is missing", INDEX_NAME, key);
    return found;
}

/* A member that is a whole number from `least` to `most`. */
static int number(const char *object, const char *end, const char *key, uint64_t least, uint64_t most, uint64_t *out) {
    const char *at = member(object, end, key), *after;
    uint64_t value = 0;
    if (!at) return -1;
    after = skip_value(at, end, 0);
    for (; at < after; at++) {
        uint64_t digit = (uint64_t)(unsigned char)*at - '0';
        if (*at < '0' || *at > '9') return fail("%s: %s is not a whole number", INDEX_NAME, key);
        if (value > (UINT64_MAX - digit) / 10) return fail("%s: %s is too large", INDEX_NAME, key);
        value = value * 10 + digit;
    }
    if (value < least || value > most)
        return fail("%s: %s is %" PRIu64 ", not from %" PRIu64 " to %" PRIu64, INDEX_NAME, key, value, least, most);
    *out = value;
    return 0;
}

static int string(const char *object, const char *end, const char *key, const char *expected) {
    const char *at = member(object, end, key);
    if (!at) return -1;
    return is_string(at, expected) ? 0 : fail("%s: %s is not \"%s\"", INDEX_NAME, key, expected);
}

/* Whether text is UTF-8, without forms longer than need be and halves of surrogate pairs. */
static int is_utf8(const unsigned char *at, const unsigned char *end) {
    while (at < end) {
        uint32_t code = *at, least = 0;
        int more = 0;
        if (code >= 0xc0 && code < 0xe0) more = 1, code &= 0x1f, least = 0x80;
        else if (code >= 0xe0 && code < 0xf0) more = 2, code &= 0x0f, least = 0x800;
        else if (code >= 0xf0 && code < 0xf8) more = 3, code &= 0x07, least = 0x10000;
        else if (code >= 0x80) return 0;
        if (end - at <= more) return 0;
        for (at++; more > 0; more--, at++) {
            if ((*at & 0xc0) != 0x80) return 0;
            code = code << 6 | (*at & 0x3f);
        }
        if (code < least || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return 0;
    }
    return 1;
}

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

static int find_block(const Layout *layout, const char *id, Block *block) {
    const char *end = layout->text + layout->length, *at = member(layout->text, end, "blocks"), *order;
    if (!at) return -1;
    if (*at != '[') return fail("%s: blocks is not a list", INDEX_NAME);
    for (at = skip_space(at + 1, end); *at != ']';) {
        const char *name = member(at, end, "id");
        if (!name) return -1;
        if (is_string(name, id)) {
            if (number(at, end, "neurons", 1, MAX_NEURONS, &block->neurons) != 0 ||
                number(at, end, "stride", 1, MAX_STRIDE, &block->stride) != 0 ||
                range(layout, at, "bundles", block->neurons * block->stride, &block->bundles_offset) != 0 ||
                range(layout, at, "order", block->neurons * 4, &block->order_offset) != 0)
                return -1;
            order = member(at, end, "order");
            return string(order, end, "dtype", "I32");
        }
        at = skip_space(skip_value(at, end, 0), end);
        if (*at == ',') at = skip_space(at + 1, end);
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

int main(int argc, char **argv) {
    Layout layout = {NULL, 0, -1, 0};
    Block block = {0, 0, 0, 0};
    uint32_t *slots = NULL;
    int result = -1;
    if (argc < 3) {
        fputs("usage: flash_read DIRECTORY BLOCK [NEURON ...]\n", stderr);
        return 2;
    }
    if (open_layout(&layout, argv[1]) == 0 && find_block(&layout, argv[2], &block) == 0 &&
        (slots = read_slots(&layout, &block)) != NULL)
        result = print_checksums(&layout, &block, slots, argc - 3, argv + 3);
    if (fflush(stdout) != 0 || ferror(stdout)) result = fail("the output cannot be written");
    free(slots);
    free(layout.text);
    if (layout.file >= 0) close(layout.file);
    return result == 0 ? 0 : 1;
}
