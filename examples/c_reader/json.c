/* A strict JSON scanner that allocates nothing. */
#include "json.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define MAX_DEPTH 32

int fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("flash_read: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return -1;
}

/* skip_*: every function takes the rest of the text and returns what follows, or NULL if it is not JSON. */

const char *skip_space(const char *at, const char *end) {
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

const char *skip_value(const char *at, const char *end, int depth) {
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

int is_string(const char *at, const char *word) {
    size_t length = strlen(word);
    return *at == '"' && !strncmp(at + 1, word, length) && at[1 + length] == '"';
}

int find_member(const char *object, const char *end, const char *key, const char **value) {
    const char *at = object;
    *value = NULL;
    if (*object != '{') return fail("%s: no object where %s should be", INDEX_NAME, key);
    at = skip_space(object + 1, end);
    while (*at != '}') {
        const char *name = at, *found = skip_key(at, end);
        if (is_string(name, key)) {
            if (*value) return fail("%s: %s is there twice", INDEX_NAME, key);
            *value = found;
        }
        at = skip_space(skip_value(found, end, 0), end);
        if (*at == ',') at = skip_space(at + 1, end);
    }
    return 0;
}

const char *member(const char *object, const char *end, const char *key) {
    const char *found;
    if (find_member(object, end, key, &found) != 0) return NULL;
    if (!found) fail("%s: %s is missing", INDEX_NAME, key);
    return found;
}

int next_item(const char **at, const char *end, int first) {
    if (first && **at != '[') return 0;
    *at = skip_space(first ? *at + 1 : skip_value(*at, end, 0), end);
    if (!first && **at == ',') *at = skip_space(*at + 1, end);
    return **at != ']';
}

int number(const char *object, const char *end, const char *key, uint64_t least, uint64_t most, uint64_t *out) {
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

int string(const char *object, const char *end, const char *key, const char *expected) {
    const char *at = member(object, end, key);
    if (!at) return -1;
    return is_string(at, expected) ? 0 : fail("%s: %s is not \"%s\"", INDEX_NAME, key, expected);
}

int is_utf8(const unsigned char *at, const unsigned char *end) {
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
