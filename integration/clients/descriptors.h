/* What the cases of `descriptors` have in common. */
#pragma once

#include "loop.h"

#include <sys/types.h>

enum { HIGHEST = 4096, LENGTH = 4096 };

/* This program's file. */
extern const char *self;
/* What it was begun with. */
extern bool inherited[HIGHEST];

void once(void);
void ended_well(pid_t child, const char *what);
struct ibv_device *first_device(void);
void use(struct ibv_device *device);

/* In descriptors_waits.c: descriptors to wait on, and calls that are interrupted. */
void descriptors_that_do_not_block(void);
void low_numbers_are_the_programs(void);
void a_child_has_none_of_the_librarys(void);
void few_descriptors(void);
void interruptions(void);
void cancelled_threads(void);
void an_answer_that_never_comes(void);
void children_of_every_kind(void);
