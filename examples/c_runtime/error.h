/* How functions of this library fail: they enter a code and one line of text, and return -1. */
#ifndef NL_ERROR_H
#define NL_ERROR_H

#include "neuralink.h"

#if defined(__GNUC__)
#define NL_PRINTF(at, first) __attribute__((format(printf, at, first)))
#else
#define NL_PRINTF(at, first)
#endif

/* Enters an error and returns -1. The first error stays: what fails after it is a consequence. */
int nl_fail(NlError *error, NlCode code, const char *format, ...) NL_PRINTF(3, 4);

#endif
