/* What the questions of `legal` have in common. */
#pragma once

#include "check.h"

#include <errno.h>
#include <infiniband/verbs.h>
#include <string.h>

enum { PAGE = 4096, PORT = 1 };

extern struct ibv_context *context;
extern struct ibv_pd *pd;
extern struct ibv_cq *cq;
extern struct ibv_device_attr device;
extern struct ibv_port_attr port;
extern int gid_index;
extern union ibv_gid gid;
extern unsigned char *memory;
extern struct ibv_mr *mr;

const char *name_of(int error);
/* A line of the table. */
__attribute__((format(printf, 2, 3))) void say(const char *answer, const char *question, ...);
/* Of verbs that return an errno, and of those that return null or -1 and set it. */
int code(int result);
int made(void *object);

/* Answers to one question about many values. */
struct answers {
	unsigned value[64];
	int answer[64], count;
};

void add(struct answers *to, unsigned value, int answer);
/* Answer by answer, the values that have it. */
void say_all(const struct answers *all, const char *question);

/* By `enum ibv_qp_state`. */
extern const char *const state_names[];
/* A queue pair, and what makes one. */
struct ibv_qp_init_attr plain(void);
struct ibv_qp *create(void);
/* A queue pair, connected to itself, in that state; SQE is not to be had. */
struct ibv_qp *in_state(enum ibv_qp_state state);

/* In legal_objects.c: memory regions, completion queues, queue pairs. */
void ask_registration(void);
void ask_queue(void);
void ask_creation(void);

/* In legal_states.c: changes of a queue pair's state. */
void ask_transitions(void);
void ask_values(void);
void ask_query(void);

/* In legal_posting.c: work requests. */
void ask_posting(void);
