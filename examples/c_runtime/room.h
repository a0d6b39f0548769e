/* Memory that reads of different lengths share: each takes the first whole pages that are free and adjacent. */
#ifndef NL_ROOM_H
#define NL_ROOM_H

#include "arena.h"

typedef struct {
    unsigned char *memory;
    uint8_t *taken; /* by page */
    uint64_t pages, next; /* where to look first */
} NlRoom;

/* Gives a room of `pages` pages its memory from an arena; all of it is free. */
void nl_room_carve(NlRoom *room, NlArena *arena, uint64_t pages);

/* Takes room for some bytes; NULL if there is none. */
unsigned char *nl_room_take(NlRoom *room, uint64_t bytes);

/* Gives back what was taken for as many bytes. */
void nl_room_give(NlRoom *room, const unsigned char *at, uint64_t bytes);

#endif
