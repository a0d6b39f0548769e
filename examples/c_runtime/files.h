/* Files: opening, reading at an offset, and whole texts. */
#ifndef NL_FILES_H
#define NL_FILES_H

#include <stdint.h>

#include "json.h"

/* Without a directory (NULL), a name is a path. */

/* Opens DIRECTORY/NAME for reading, with more `flags` of open(2), and gives its size; -1 on failure. */
int nl_open_file(const char *directory, const char *name, int flags, uint64_t *bytes, NlError *error);

/* Reads exactly `bytes` at `offset`; a file that ends before is an error. */
int nl_read_at(int file, void *buffer, uint64_t bytes, uint64_t offset, NlError *error);

/* Reads DIRECTORY/NAME, a JSON object of at most `most` bytes, and checks it. Free json->text, also after an error. */
int nl_read_json(const char *directory, const char *name, uint64_t most, NlJson *json, NlError *error);

/* Whether DIRECTORY/NAME is there. */
int nl_is_there(const char *directory, const char *name);

#endif
