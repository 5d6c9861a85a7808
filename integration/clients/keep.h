/* What the cases of `keep` have in common. */
#pragma once

#include "loop.h"

#include <stdint.h>

enum { PAGE = 4096, ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ };

extern struct loop loop;
/* What is written from: registered all the time. */
extern unsigned char *source;
extern struct ibv_mr *source_mr;

/* Fresh memory, at this address if it is one. */
void *map_at(void *at, size_t length);
/* A WRITE with this key: what its completion says. */
enum ibv_wc_status write_by(uint32_t rkey, void *to, uint32_t length);
/* A WRITE with this key is refused. Queue pairs and domain are others afterwards. */
void expect_dead(uint32_t rkey, void *to);
/* Registers, writes `mark` into every page, checks, deregisters; the key that it had. */
uint32_t round_of(unsigned char *at, size_t length, unsigned char mark);
/* Four of them, the last with 203. */
void some_rounds_of(unsigned char *at, size_t length);
/* Brings a buffer, with all bytes 203 that a round writes, to where it is kept between two rounds. */
enum { MOST_TRIES = 200 };
void settle(unsigned char *at, size_t length);
int mappings(void);
/* A number by chance, the same ones in each run. */
extern uint64_t chance;
unsigned below(unsigned limit);

/* In keep_memory.c: what programs do to memory that is kept. */
void memory_changes_between_two_registrations(void);
void advice_between_two_registrations(void);
void unmapped_memory_is_not_registered(void);
void overlapping_registrations(void);
void the_same_twice_at_once(void);
void forks_keep_memory_apart(void);
void a_child_has_a_life_of_its_own(void);
void random_sequences(void);

/* In keep_limits.c: how much is kept, and who else may need it. */
void what_is_kept_is_bounded(void);
void scribbled_words(void);
void quotas_are_whole(void);
void another_process_finds_room(void);
void take_all(void);
