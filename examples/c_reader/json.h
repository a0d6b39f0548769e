/*
 * Looks things up in the text of model.flash.json. `at` and `object` point at a value in text that was checked with
 * skip_value from its start, `end` is where the text ends; there must be a '\0'. What returns an int returns 0, or -1
 * after a line on stderr.
 */
#ifndef JSON_H
#define JSON_H

#include <stdint.h>

#define INDEX_NAME "model.flash.json"

/* Prints a line on stderr. Returns -1. */
int fail(const char *format, ...);

/* What follows white space. */
const char *skip_space(const char *at, const char *end);

/* What follows a value, or NULL if it is not JSON, in any text. `depth` is 0. */
const char *skip_value(const char *at, const char *end, int depth);

/* Whether text is UTF-8, without forms longer than need be and halves of surrogate pairs. */
int is_utf8(const unsigned char *at, const unsigned char *end);

/* Whether the value is the string `word`. Strings with escapes are never equal to one of our names, which have none. */
int is_string(const char *at, const char *word);

/* The value of a member of an object; NULL if it is not there. A key that is there twice is an error. */
int find_member(const char *object, const char *end, const char *key, const char **value);

/* The same, or NULL after a line on stderr, also if it is not there. */
const char *member(const char *object, const char *end, const char *key);

/* Goes from a list to its first item (`first`), or from an item to the next. Whether there is one; no list has none. */
int next_item(const char **at, const char *end, int first);

/* A member that is a whole number from `least` to `most`. */
int number(const char *object, const char *end, const char *key, uint64_t least, uint64_t most, uint64_t *out);

/* A member that must be the string `expected`. */
int string(const char *object, const char *end, const char *key, const char *expected);

#endif
