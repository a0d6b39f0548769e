/* The parts of flash_run: its options, the protocol of requests, and what it prints. */
#ifndef NL_FLASH_RUN_H
#define NL_FLASH_RUN_H

#include "neuralink.h"

#define MOST_STOPS 64

typedef struct {
    NlOptions options;
    NlSampling sampling;
    const char *directory, *probe; /* the layout; the name of the device to measure */
    uint32_t stops[MOST_STOPS], stop_count;
    int json, only_plan, end_with_stdin;
} Settings;

/* What some tokens took. */
typedef struct {
    uint64_t tokens;
    double seconds;
    NlCounters counters;
} Phase;

/* Options and their values; -1 if they are wrong, which is then said if it is not plain. */
int parse_options(int argc, char **argv, Settings *settings);

/* A whole number of at most `most`, and nothing else; -1 if it is none. */
int parse_whole(const char *text, uint64_t most, uint64_t *out);

/* From now on the program ends as soon as stdin does, whatever it is doing. -1 if that cannot be. */
int end_with_stdin(void);

/* Answers requests from stdin until there are no more. 1 if one failed, or nobody can read the answers. */
int serve(NlModel *model, Settings *settings);

/* The plan of memory, and what an open model is: words on stderr, or with --json lines of answers. */
void print_memory(const Settings *settings, const NlMemory *memory);
void print_model(const Settings *settings, const NlModel *model);

/* What the prompt took and, unless `tokens` is NULL, the new tokens. */
void print_figures(const Settings *settings, const Phase *prompt, const Phase *tokens);

#endif
