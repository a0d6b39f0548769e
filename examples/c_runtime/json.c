/* A strict JSON scanner that allocates nothing. */
#include "json.h"

#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#define MAX_DEPTH 32

/* skip_*: every function takes the rest of the text and returns what follows, or NULL if it is not JSON. */

static const char *skip_value(const char *at, const char *end, int depth);

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

/* Without forms longer than need be and halves of surrogate pairs. */
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

int nl_json_check(const NlJson *json) {
    const char *after;
    if (!is_utf8((const unsigned char *)json->text, (const unsigned char *)json->end))
        return nl_fail(json->error, NL_BAD_LAYOUT, "%s: not UTF-8", json->name);
    after = skip_value(json->text, json->end, 0);
    if (!after || skip_space(after, json->end) != json->end || *json->text != '{')
        return nl_fail(json->error, NL_BAD_LAYOUT, "%s: not a JSON object", json->name);
    return 0;
}

int nl_json_is(const char *at, const char *word) {
    size_t length = strlen(word);
    return *at == '"' && !strncmp(at + 1, word, length) && at[1 + length] == '"';
}

int nl_json_copy(const char *at, char *out, size_t size) {
    size_t length;
    if (*at != '"') return -1;
    length = strcspn(at + 1, "\"\\");
    if (at[1 + length] != '"' || length >= size) return -1;
    memcpy(out, at + 1, length);
    out[length] = '\0';
    return 0;
}

int nl_json_key(const NlJson *json, const char **at, const char **value, int first) {
    const char *next = first ? *at + 1 : skip_value(skip_key(*at, json->end), json->end, 0);
    if (first && **at != '{') return 0;
    next = skip_space(next, json->end);
    if (!first && *next == ',') next = skip_space(next + 1, json->end);
    *at = next;
    if (*next == '}') return 0;
    *value = skip_key(next, json->end);
    return 1;
}

int nl_json_find(const NlJson *json, const char *object, const char *key, const char **value) {
    const char *at = object, *found;
    *value = NULL;
    if (*object != '{') return nl_fail(json->error, NL_BAD_LAYOUT, "%s: no object where %s should be", json->name, key);
    for (int more = nl_json_key(json, &at, &found, 1); more; more = nl_json_key(json, &at, &found, 0)) {
        if (!nl_json_is(at, key)) continue;
        if (*value) return nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s is there twice", json->name, key);
        *value = found;
    }
    return 0;
}

const char *nl_json_member(const NlJson *json, const char *object, const char *key) {
    const char *found;
    if (nl_json_find(json, object, key, &found) != 0) return NULL;
    if (!found) nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s is missing", json->name, key);
    return found;
}

int nl_json_item(const NlJson *json, const char **at, int first) {
    if (first && **at != '[') return 0;
    *at = skip_space(first ? *at + 1 : skip_value(*at, json->end, 0), json->end);
    if (!first && **at == ',') *at = skip_space(*at + 1, json->end);
    return **at != ']';
}

int nl_json_whole(const NlJson *json, const char *at, const char *key, uint64_t least, uint64_t most, uint64_t *out) {
    const char *after = skip_value(at, json->end, 0);
    uint64_t value = 0;
    for (; at < after; at++) {
        uint64_t digit = (uint64_t)(unsigned char)*at - '0';
        if (*at < '0' || *at > '9')
            return nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s is not a whole number", json->name, key);
        if (value > (UINT64_MAX - digit) / 10)
            return nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s is too large", json->name, key);
        value = value * 10 + digit;
    }
    if (value < least || value > most)
        return nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s is %" PRIu64 ", not from %" PRIu64 " to %" PRIu64, json->name,
                       key, value, least, most);
    *out = value;
    return 0;
}

int nl_json_number(const NlJson *json, const char *object, const char *key, uint64_t least, uint64_t most,
                   uint64_t *out) {
    const char *at = nl_json_member(json, object, key);
    return at ? nl_json_whole(json, at, key, least, most, out) : -1;
}

int nl_json_real(const NlJson *json, const char *at, const char *key, double *out) {
    const char *after = skip_value(at, json->end, 0);
    int negative = *at == '-', exponent = 0, stated = 0, sign = 1, point = 0;
    uint64_t digits = 0;
    if (*at != '-' && (*at < '0' || *at > '9'))
        return nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s is not a number", json->name, key);
    for (at += negative; at < after && *at != 'e' && *at != 'E'; at++) {
        if (*at == '.') {
            point = 1;
        } else if (digits < UINT64_MAX / 100) {
            digits = digits * 10 + (uint64_t)(*at - '0');
            exponent -= point;
        } else {
            exponent += !point; /* beyond what a double tells apart */
        }
    }
    if (at < after) {
        at++;
        if (*at == '-') sign = -1;
        if (*at == '-' || *at == '+') at++;
        for (; at < after; at++)
            if (stated < 100000) stated = stated * 10 + (*at - '0');
    }
    exponent += sign * stated;
    /* Powers of ten up to 22 are exact, so that the usual numbers are rounded once. */
    *out = (double)digits;
    if (digits) *out = exponent < 0 ? *out / pow(10, -exponent) : *out * pow(10, exponent);
    if (negative) *out = -*out;
    return isfinite(*out) ? 0 : nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s is too large", json->name, key);
}

int nl_json_string(const NlJson *json, const char *object, const char *key, const char *expected) {
    const char *at = nl_json_member(json, object, key);
    if (!at) return -1;
    return nl_json_is(at, expected)
               ? 0
               : nl_fail(json->error, NL_BAD_LAYOUT, "%s: %s is not \"%s\"", json->name, key, expected);
}
