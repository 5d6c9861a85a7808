/*
 * Two ends of a connection that a test drives from one place.
 *
 * A side owns a device context, a protection domain, an arena of memory, two completion queues and some queue pairs.
 * It lives in this process, or in a forked child that talks to another proxy and is steered over a socket pair; the
 * calls are the same, so each case runs within one container and between two.
 */
#pragma once

#include "check.h"

#include <infiniband/verbs.h>

enum {
	ARENA_BYTES = 8 << 20,
	SEND_CQ = 0,
	RECV_CQ = 1,
	MAX_SGES = 8,
	MAX_WCS = 64,
	MAX_CHAIN = 8,
};

struct side;

struct region {
	int index;
	uint64_t addr;
	uint32_t lkey, rkey;
};

/* What a queue pair can hold. */
struct capacity {
	int send_wr, recv_wr, sges, inline_bytes;
	bool all_signaled;
};

/* A send request, flat enough to travel. */
struct send {
	uint64_t wr_id;
	int opcode, flags, sges;
	struct ibv_sge sge[MAX_SGES];
	uint64_t remote_addr, compare_add, swap;
	uint32_t rkey, imm;
};

struct event {
	int type, qp;
};

/* How two queue pairs are joined; start from `link_defaults`. */
struct link_options {
	int timeout, retries, rnr_retries, rnr_timer, access;
	struct capacity capacity;
};

extern const struct link_options link_defaults;

struct side *side_here(void);
/* `socket`: the proxy that the child uses, or NULL for the environment's. */
struct side *side_in_child(const char *socket);
/* Kills a side's process without a word. */
void side_kill(struct side *side);

int side_try_reg(struct side *side, uint64_t offset, uint64_t length, int access, struct region *region);
struct region side_reg(struct side *side, uint64_t offset, uint64_t length, int access);
struct region side_reg_in_other_pd(struct side *side, uint64_t offset, uint64_t length, int access);
int side_dereg(struct side *side, struct region region);

int side_try_qp(struct side *side, struct capacity capacity, int *qp);
int side_qp(struct side *side, struct capacity capacity);
uint32_t side_qp_num(struct side *side, int qp);
int side_modify(struct side *side, int qp, const struct ibv_qp_attr *attr, int mask);
enum ibv_qp_state side_state(struct side *side, int qp);
int side_destroy_qp(struct side *side, int qp);
union ibv_gid side_gid(struct side *side, uint16_t *lid);

/* Return errno as ibv_post_* do; `bad` gets the index of the refused request or -1. */
int side_try_post(struct side *side, int qp, const struct send *sends, int count, int *bad);
void side_post(struct side *side, int qp, struct send send);
int side_try_recv(struct side *side, int qp, uint64_t wr_id, const struct ibv_sge *sge, int sges);
void side_recv(struct side *side, int qp, uint64_t wr_id, struct region region, uint64_t offset, uint32_t length);

/* Polls until `count` completions came or `ms` have passed; how many came. */
int side_poll(struct side *side, int cq, struct ibv_wc *wcs, int count, int ms);
/* Exactly one completion within five seconds, and its status. */
struct ibv_wc side_wc(struct side *side, int cq, uint64_t wr_id, enum ibv_wc_status status);
/* No completion for 50 ms. */
void side_silent(struct side *side, int cq);

int side_notify(struct side *side, int cq, bool solicited_only);
/* Whether the queue's channel had an event within `ms`; it is acknowledged. */
bool side_event(struct side *side, int cq, int ms);
/* The next asynchronous event within `ms`, or type -1. */
struct event side_async(struct side *side, int ms);

void side_fill(struct side *side, uint64_t offset, uint64_t length, uint32_t seed);
/* Offset of the first byte that differs from the pattern of `side_fill`, or -1. */
int64_t side_differs(struct side *side, uint64_t offset, uint64_t length, uint32_t seed);
/* Offset of the first 16 bytes that are the pattern's of that place, or -1. */
int64_t side_holds(struct side *side, uint64_t offset, uint64_t length, uint32_t seed);
uint64_t side_peek(struct side *side, uint64_t offset);
void side_poke(struct side *side, uint64_t offset, uint64_t value);

/* A connected pair. */
struct pair {
	struct side *a, *b;
	int qa, qb;
};

/* `two`: the sides are two processes with two proxies. */
void open_sides(struct pair *pair, bool two);
void connect_pair(struct pair *pair, struct link_options options);
/* Joins two given queue pairs that are in RESET. */
void join(struct side *a, int qa, struct side *b, int qb, struct link_options options);
int to_init(struct side *side, int qp, int access);
int to_rtr(struct side *side, int qp, struct side *peer, int peer_qp, struct link_options options);
int to_rts(struct side *side, int qp, struct link_options options);
int to_state(struct side *side, int qp, enum ibv_qp_state state);

struct send rdma(enum ibv_wr_opcode opcode, uint64_t wr_id, struct region local, uint64_t local_offset, uint32_t length,
		 struct region remote, uint64_t remote_offset);
struct send message(uint64_t wr_id, struct region local, uint64_t offset, uint32_t length);

/* The cases of the program. */
struct test_case {
	const char *name;
	void (*run)(struct pair *pair);
	/* Makes no sense with both sides in one process. */
	bool needs_two;
};
extern const struct test_case data_cases[], error_cases[], state_cases[], event_cases[];
