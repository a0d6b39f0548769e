#include "room.h"

#include <string.h>

#include "reads.h"

void nl_room_carve(NlRoom *room, NlArena *arena, uint64_t pages) {
    room->pages = pages;
    room->memory = nl_carve(arena, NL_WORKING, pages * NL_PAGE);
    room->taken = nl_carve(arena, NL_WORKING, pages);
    room->next = 0;
}

/* The first of `wanted` free pages in [from, to); `to` if there are none. */
static uint64_t find(const NlRoom *room, uint64_t from, uint64_t to, uint64_t wanted) {
    for (uint64_t begin = from, end = from; end < to; end++) {
        if (room->taken[end]) begin = end + 1;
        else if (end + 1 - begin == wanted) return begin;
    }
    return to;
}

unsigned char *nl_room_take(NlRoom *room, uint64_t bytes) {
    uint64_t wanted = (bytes + NL_PAGE - 1) / NL_PAGE, first = find(room, room->next, room->pages, wanted);
    if (first == room->pages) first = find(room, 0, room->pages, wanted);
    if (first == room->pages) return NULL;
    memset(room->taken + first, 1, wanted);
    room->next = first + wanted;
    return room->memory + first * NL_PAGE;
}

void nl_room_give(NlRoom *room, const unsigned char *at, uint64_t bytes) {
    memset(room->taken + (uint64_t)(at - room->memory) / NL_PAGE, 0, (bytes + NL_PAGE - 1) / NL_PAGE);
}
