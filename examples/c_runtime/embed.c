/*
 * The smallest app on neuralink.h: token ids in and out, progress, and a way to stop.
 *
 *     embed DIRECTORY MEGABYTES NEW TOKEN ...
 *
 * Prints NEW tokens that follow those of a prompt, within MEGABYTES of memory. Ctrl-C stands for the app's button.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#include "neuralink.h"

static volatile sig_atomic_t stopped;

static void stop(int number) {
    (void)number;
    stopped = 1;
}

/* Goes through the prompt in pieces: a call cannot be interrupted, but between two there is time to look around. */
static int read_prompt(NlModel *model, const uint32_t *tokens, uint32_t count, NlError *error) {
    NlMemory memory;
    nl_memory(model, &memory);
    for (uint32_t done = 0, now; done < count && !stopped; done += now) {
        now = count - done < memory.batch ? count - done : (uint32_t)memory.batch;
        if (!nl_tokens(model, tokens + done, now, error)) return -1;
        fprintf(stderr, "prompt: %u of %u tokens\n", (unsigned)(done + now), (unsigned)count);
    }
    return 0;
}

static int generate(NlModel *model, uint32_t wanted, NlError *error) {
    NlSampling sampling = {0}; /* the likeliest */
    for (uint32_t made = 0; made < wanted && !stopped; made++) {
        uint32_t token = nl_choose(model, &sampling);
        printf("%u\n", (unsigned)token);
        fflush(stdout);
        if (made + 1 < wanted && !nl_tokens(model, &token, 1, error)) return -1;
    }
    return 0;
}

static uint32_t number_of(const char *text) { return (uint32_t)strtoul(text, NULL, 10); }

int main(int argc, char **argv) {
    NlError error = {0};
    NlOptions options = {0};
    NlModel *model = NULL;
    uint32_t *prompt, count = argc > 4 ? (uint32_t)argc - 4 : 0;
    int result = 1;
    if (!count || !(prompt = malloc(count * sizeof *prompt))) {
        fputs("usage: embed DIRECTORY MEGABYTES NEW TOKEN ...\n", stderr);
        return 2;
    }
    for (uint32_t k = 0; k < count; k++) prompt[k] = number_of(argv[4 + k]);
    signal(SIGINT, stop);
    options.dram = UINT64_C(1000000) * number_of(argv[2]);
    options.context = count + number_of(argv[3]);
    if ((model = nl_open(argv[1], &options, &error)) && read_prompt(model, prompt, count, &error) == 0 &&
        generate(model, number_of(argv[3]), &error) == 0)
        result = 0;
    if (result) fprintf(stderr, "embed: %s\n", error.text);
    nl_close(model);
    free(prompt);
    return result;
}
