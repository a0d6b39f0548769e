/*
 * The protocol of flash_run. Requests are lines of words, answered in order; README.md describes them:
 *
 *     generate N TOKEN ...    a new sequence: `token T` for each of at most N new tokens, then `figures`
 *     continue N TOKEN ...    the same, going on with the sequence
 *     logits TOKEN ...        a new sequence: `logits V ...`, the logits after its last token
 *     perplexity TOKEN ...    a new sequence: `perplexity MEAN COUNT`, then `figures`
 *     shrink BYTES            a smaller memory limit from now on: `memory`
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "flash_run.h"

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static NlCounters minus(NlCounters a, NlCounters b) {
    a.looked_up -= b.looked_up;
    a.hits -= b.hits;
    a.reads -= b.reads;
    a.bytes_read -= b.bytes_read;
    a.bytes_useful -= b.bytes_useful;
    a.bytes_streamed -= b.bytes_streamed;
    a.io_seconds -= b.io_seconds;
    return a;
}

static int is_stop(const Settings *settings, uint32_t token) {
    for (uint32_t k = 0; k < settings->stop_count; k++)
        if (settings->stops[k] == token) return 1;
    return 0;
}

static int generate(NlModel *model, Settings *settings, uint64_t wanted, const uint32_t *tokens, uint32_t count,
                    NlError *error) {
    Phase phases[2];
    NlCounters before, after;
    double began = now(), ended;
    memset(phases, 0, sizeof phases);
    nl_counters(model, &before);
    if (!nl_tokens(model, tokens, count, error)) return -1;
    for (uint64_t made = 1;; made++) {
        uint32_t token = nl_choose(model, &settings->sampling);
        ended = now();
        nl_counters(model, &after);
        Phase *phase = &phases[made > 1];
        phase->tokens = made > 1 ? phase->tokens + 1 : count;
        phase->seconds += ended - began;
        phase->counters = minus(after, before);
        if (made == 1) before = after;
        began = ended;
        printf("token %" PRIu32 "\n", token);
        if (fflush(stdout) != 0) return 0; /* nobody listens */
        if (made == wanted || is_stop(settings, token)) break;
        if (!nl_tokens(model, &token, 1, error)) return -1;
    }
    print_figures(settings, &phases[0], &phases[1]);
    return 0;
}

static int print_logits(NlModel *model, const uint32_t *tokens, uint32_t count, NlError *error) {
    NlFacts facts;
    const float *logits = nl_tokens(model, tokens, count, error);
    if (!logits) return -1;
    nl_facts(model, &facts);
    printf("logits");
    for (uint32_t k = 0; k < facts.vocabulary; k++) printf(" %.9g", (double)logits[k]);
    putchar('\n');
    return 0;
}

static int print_perplexity(NlModel *model, const Settings *settings, const uint32_t *tokens, uint32_t count, NlError *error) {
    Phase phase = {count, 0, {0}};
    NlCounters before;
    const double began = now();
    double mean;
    nl_counters(model, &before);
    if (nl_perplexity(model, tokens, count, &mean, error) != 0) return -1;
    phase.seconds = now() - began;
    nl_counters(model, &phase.counters);
    phase.counters = minus(phase.counters, before);
    printf("perplexity %.17g %" PRIu32 "\n", mean, count - 1);
    print_figures(settings, &phase, NULL);
    return 0;
}

/* The numbers that follow in a request, in memory of its own. */
static int parse_tokens(uint32_t **tokens, uint32_t *count) {
    uint32_t room = 0;
    *tokens = NULL;
    *count = 0;
    for (char *word = strtok(NULL, " "); word; word = strtok(NULL, " ")) {
        uint64_t token;
        if (parse_whole(word, UINT32_MAX, &token) != 0) return -1;
        if (*count == room) {
            uint32_t *more = room > UINT32_MAX / 8 ? NULL : realloc(*tokens, (room = room ? 2 * room : 64) * sizeof **tokens);
            if (!more) return -1;
            *tokens = more;
        }
        (*tokens)[(*count)++] = (uint32_t)token;
    }
    return 0;
}

/* What a request has behind its word. */
typedef struct {
    const char *word;
    int number, tokens; /* whether there is a number first, and whether there are tokens */
} Form;

static const Form FORMS[] = {{"generate", 1, 1}, {"continue", 1, 1}, {"logits", 0, 1}, {"perplexity", 0, 1}, {"shrink", 1, 0}};

/* Reads the rest of a request. NULL if it is none. */
static const Form *read_request(const char *word, uint64_t *number, uint32_t **tokens, uint32_t *count) {
    for (unsigned k = 0; k < sizeof FORMS / sizeof *FORMS; k++) {
        const Form *form = &FORMS[k];
        const char *text;
        if (strcmp(word, form->word) != 0) continue;
        if (form->number && (!(text = strtok(NULL, " ")) || parse_whole(text, UINT64_MAX, number) != 0 || !*number)) return NULL;
        return parse_tokens(tokens, count) == 0 && (*count > 0) == form->tokens ? form : NULL;
    }
    return NULL;
}

static int answer(NlModel *model, Settings *settings, char *line, NlError *error) {
    const char *word = strtok(line, " \r\n");
    uint64_t number = 0;
    uint32_t *tokens = NULL, count = 0;
    const Form *form;
    NlMemory memory;
    int result = -1;
    if (!word) return 0;
    form = read_request(word, &number, &tokens, &count);
    if (form && form->tokens && strcmp(form->word, "continue") != 0) nl_cut(model, 0);
    if (!form) {
        error->code = NL_BAD_OPTION;
        snprintf(error->text, sizeof error->text, "a request is `generate N TOKEN ...`, `continue N TOKEN ...`, "
                                                  "`logits TOKEN ...`, `perplexity TOKEN ...` or `shrink BYTES`");
    } else if (!strcmp(form->word, "shrink")) {
        if ((result = nl_shrink(model, number, error)) == 0) {
            nl_memory(model, &memory);
            print_memory(settings, &memory);
        }
    } else if (!strcmp(form->word, "logits")) {
        result = print_logits(model, tokens, count, error);
    } else if (!strcmp(form->word, "perplexity")) {
        result = print_perplexity(model, settings, tokens, count, error);
    } else {
        result = generate(model, settings, number, tokens, count, error);
    }
    free(tokens);
    return result;
}

int serve(NlModel *model, Settings *settings) {
    char *line = NULL;
    size_t room = 0;
    int failed = 0;
    while (fflush(stdout) == 0 && !ferror(stdout) && getline(&line, &room, stdin) > 0) {
        NlError error = {NL_OK, ""};
        line[strcspn(line, "\r\n")] = '\0';
        if (answer(model, settings, line, &error) == 0) continue;
        printf("error %d %s\n", (int)error.code, error.text);
        failed = 1;
    }
    free(line);
    if (!ferror(stdout)) return failed;
    fputs("flash_run: answers cannot be written to stdout\n", stderr);
    return 1;
}
