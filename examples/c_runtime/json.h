/*
 * Looks things up in the text of a JSON document. `at` and `object` point at a value in a text that nl_json_check found
 * to be JSON. What returns an int returns 0, or -1 with an error.
 */
#ifndef NL_JSON_H
#define NL_JSON_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"

/* A text: [text, end), with a '\0' at `end`; `name` is for errors, which go to `error`. */
typedef struct {
    const char *name, *text, *end;
    NlError *error;
} NlJson;

/* Checks that the whole text is one JSON object in UTF-8. Spaces may follow it. */
int nl_json_check(const NlJson *json);

/* Whether the value is the string `word`. Strings with escapes are never equal to one of our names, which have none. */
int nl_json_is(const char *at, const char *word);

/* Copies a string without escapes to `out`; -1, without an error, if it is none or longer than `size` - 1. */
int nl_json_copy(const char *at, char *out, size_t size);

/* The value of a member of an object; NULL if it is not there. A key that is there twice is an error. */
int nl_json_find(const NlJson *json, const char *object, const char *key, const char **value);

/* The same, or NULL after an error, also if it is not there. */
const char *nl_json_member(const NlJson *json, const char *object, const char *key);

/* Goes from a list to its first item (`first`), or from an item to the next. Whether there is one; no list has none. */
int nl_json_item(const NlJson *json, const char **at, int first);

/* Goes from an object to its first key (`first`), or from a key to the next; *value is what it has. */
int nl_json_key(const NlJson *json, const char **at, const char **value, int first);

/* A member that is a whole number from `least` to `most`. */
int nl_json_number(const NlJson *json, const char *object, const char *key, uint64_t least, uint64_t most,
                   uint64_t *out);

/* A whole number from `least` to `most`; `key` is for errors. */
int nl_json_whole(const NlJson *json, const char *at, const char *key, uint64_t least, uint64_t most, uint64_t *out);

/* A number of any kind, whatever the locale is. */
int nl_json_real(const NlJson *json, const char *at, const char *key, double *out);

/* A member that must be the string `expected`. */
int nl_json_string(const NlJson *json, const char *object, const char *key, const char *expected);

#endif
