/* The C API of neuralink flash layouts. */
#ifndef NEURALINK_H
#define NEURALINK_H

/* What went wrong. The numbers are stable. */
typedef enum {
    NL_OK = 0,
    NL_BAD_OPTION = 1,    /* an argument that cannot be used */
    NL_BAD_LAYOUT = 2,    /* the layout is missing, malformed or damaged */
    NL_NOT_SUPPORTED = 3, /* a model, activation or format that this library does not compute */
    NL_IO = 4,            /* a read failed, or the file changed while it was open */
    NL_NO_MEMORY = 5      /* the memory allowed is too little, or the system has none left */
} NlCode;

/* An error: a code and one line of text. Start with {0}. */
typedef struct {
    NlCode code;
    char text[400];
} NlError;

#endif
