#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char *join(const char *directory, const char *name) {
    size_t length = (directory ? strlen(directory) : 0) + strlen(name) + 2;
    char *path = malloc(length);
    if (path) snprintf(path, length, "%s%s%s", directory ? directory : "", directory ? "/" : "", name);
    return path;
}

int nl_open_file(const char *directory, const char *name, int flags, uint64_t *bytes, NlError *error) {
    struct stat status;
    char *path = join(directory, name);
    int file;
    if (!path) return nl_fail(error, NL_NO_MEMORY, "out of memory");
    file = open(path, O_RDONLY | O_CLOEXEC | flags);
    if (file < 0) {
        nl_fail(error, NL_BAD_LAYOUT, "%s: %s", path, strerror(errno));
    } else if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
        nl_fail(error, NL_BAD_LAYOUT, "%s: not a file", path);
        close(file);
        file = -1;
    } else {
        *bytes = (uint64_t)status.st_size;
    }
    free(path);
    return file;
}

int nl_read_at(int file, void *buffer, uint64_t bytes, uint64_t offset, NlError *error) {
    unsigned char *to = buffer;
    while (bytes > 0) {
        ssize_t count = pread(file, to, bytes < (1u << 30) ? (size_t)bytes : (size_t)1 << 30, (off_t)offset);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return nl_fail(error, NL_IO, "reading failed: %s", strerror(errno));
        if (count == 0) return nl_fail(error, NL_IO, "the file ended while it was being read");
        to += count;
        bytes -= (uint64_t)count;
        offset += (uint64_t)count;
    }
    return 0;
}

int nl_read_json(const char *directory, const char *name, uint64_t most, NlJson *json, NlError *error) {
    uint64_t bytes = 0;
    char *text = NULL;
    int result = -1, file = nl_open_file(directory, name, 0, &bytes, error);
    json->name = name;
    json->text = json->end = NULL;
    json->error = error;
    if (file < 0) return -1;
    if (bytes == 0 || bytes > most) {
        nl_fail(error, NL_BAD_LAYOUT, "%s: has %" PRIu64 " bytes", name, bytes);
    } else if (!(text = malloc((size_t)bytes + 1))) {
        nl_fail(error, NL_NO_MEMORY, "out of memory");
    } else {
        text[bytes] = '\0'; /* so that one character of look-ahead is always there */
        json->text = text;
        json->end = text + bytes;
        if (nl_read_at(file, text, bytes, 0, error) == 0) result = nl_json_check(json);
    }
    close(file);
    return result;
}

int nl_is_there(const char *directory, const char *name) {
    char *path = join(directory, name);
    int there = path && access(path, F_OK) == 0;
    free(path);
    return there;
}
