#include "error.h"

#include <stdarg.h>
#include <stdio.h>

int nl_fail(NlError *error, NlCode code, const char *format, ...) {
    va_list arguments;
    if (error->code != NL_OK) return -1;
    error->code = code;
    va_start(arguments, format);
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    return -1;
}
