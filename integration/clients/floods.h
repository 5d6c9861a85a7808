/*
 * Floods of one-sided requests that are under way when the responder takes its leave back, and what must become of them.
 *
 * A program that uses them has two sides; `local` and `remote` are the requester's region and the responder's.
 */
#pragma once

#include "sides.h"

#include <sys/types.h>

enum { PAGE = 4096, SIZE = 3 << 20, PIECE = 64 << 10, FLOOD = SIZE / PIECE };
enum { ALL = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };
/* What the responder's program writes to its memory when it has taken its leave back. */
enum { LATER = 999999 };
/* What a flood is made of. */
enum kind { WRITES, READS, MIXED, KINDS };
/* The receive request that the responder's queue pair has. */
enum { RECEIVE = 4711 };

extern struct pair pair;
extern struct region local, remote;
/* How much of a flood is known to have succeeded. */
extern int come;
/* Whether requests of a flood have two entries in their lists, and so go the road itself, not the one that is inlined. */
extern bool scattered;
/* How often the requester of the next connection tries again. */
extern int retries;

/* The next completion within so many milliseconds, or one with a status that there is not. */
struct ibv_wc one(int ms);
/* What takes a grant back, by the responder: what it returns. */
int verb(const char *name, enum kind kind);
/* Whether an RNIC would go on to answer, and refuse. */
bool answers(const char *name);
struct send piece(enum kind kind, int i);
/* Patterns of the two sides' memory. */
uint32_t requesters(uint32_t seed);
uint32_t responders(uint32_t seed);
void flood(enum kind kind, uint32_t seed);
/* Whether a flood ended, for now, in the midst of a piece: not where one begins, and not by a byte that was alike before. */
bool is_amidst(enum kind kind, uint32_t seed);
/* What the responder's program has written is there, and nowhere else. */
void is_exact(void);
/* The next request has failed: with `first`, or flushed if one before has. */
void has_failed(struct ibv_wc wc, bool *failed, enum ibv_wc_status first);
/*
 * What becomes of the flood, and of what is posted after it: some of it succeeds, then one request has the error that an RNIC would
 * give, and what is behind it is flushed. `failed`: a request before the flood has. The responder's receive request is flushed where
 * its queue pair is in error, and gone with what the queue pair had otherwise.
 */
void outcome(const char *name, enum kind kind, bool failed);
void connect_anew(int timeout);
/* The same, for a connection whose end came by this verb, or "". */
void renew(const char *gone, int timeout);
/* Takes the leave back; the memory is the program's own from then on. How long that took. */
int64_t take_back(const char *name, enum kind kind);
/* A WRITE, a READ and an atomic by turns. */
struct send small(int i);
/* Small requests until one fails, or has no answer because the own proxy is gone. */
struct ibv_wc until_it_fails(int answer_ms);
/* What the responder has of a requester that is gone: nothing that it did not ask for. */
void has_lost_its_peer(const char *name);
/* What a requester is told of a responder that is gone, if a request before the flood has `failed` or not. `refuses`: it may have been
 * refused before. */
void is_told(bool refuses, bool failed);
