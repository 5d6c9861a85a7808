/* The queue pair's state machine, and what the verbs refuse at once: IBA volume 1, 10.3.1, and ibv_modify_qp(3). */
#include "sides.h"

#include <errno.h>
#include <string.h>

enum { ALL = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };

/* Brings a fresh queue pair of `a` to `state` (RESET to RTS), towards the pair's `b`. */
static int fresh(struct pair *p, enum ibv_qp_state state)
{
	int qp = side_qp(p->a, link_defaults.capacity);
	int peer = side_qp(p->b, link_defaults.capacity);

	if (state >= IBV_QPS_INIT)
		CHECK_EQ(to_init(p->a, qp, ALL), 0);
	if (state >= IBV_QPS_RTR)
		CHECK_EQ(to_rtr(p->a, qp, p->b, peer, link_defaults), 0);
	if (state >= IBV_QPS_RTS)
		CHECK_EQ(to_rts(p->a, qp, link_defaults), 0);
	CHECK_EQ(side_state(p->a, qp), state);
	p->qb = peer;
	return qp;
}

/* Every transition, asked for with all attributes that a legal one would need. */
static void forbidden_transitions(struct pair *p)
{
	static const enum ibv_qp_state states[] = {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS};

	for (int i = 0; i < 4; i++) {
		enum ibv_qp_state from = states[i];

		if (from != IBV_QPS_INIT && from != IBV_QPS_RTR) {
			int qp = fresh(p, from);

			if (from != IBV_QPS_INIT)
				CHECK_EQ(to_rtr(p->a, qp, p->b, p->qb, link_defaults), EINVAL);
			CHECK_EQ(side_state(p->a, qp), from);
		}
		if (from != IBV_QPS_RTR && from != IBV_QPS_RTS) {
			int qp = fresh(p, from);

			CHECK_EQ(to_rts(p->a, qp, link_defaults), EINVAL);
			CHECK_EQ(side_state(p->a, qp), from);
		}
		if (from != IBV_QPS_RESET && from != IBV_QPS_INIT) {
			int qp = fresh(p, from);

			CHECK_EQ(to_init(p->a, qp, ALL), EINVAL);
			CHECK_EQ(side_state(p->a, qp), from);
		}
		if (from != IBV_QPS_RTS)
			CHECK_EQ(to_state(p->a, fresh(p, from), IBV_QPS_SQD), EINVAL);
	}
}

static void error_and_reset_from_everywhere(struct pair *p)
{
	static const enum ibv_qp_state states[] = {IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS};

	for (int i = 0; i < 3; i++) {
		int qp = fresh(p, states[i]);

		CHECK_EQ(to_state(p->a, qp, IBV_QPS_ERR), 0);
		CHECK_EQ(side_state(p->a, qp), IBV_QPS_ERR);
		CHECK_EQ(to_rts(p->a, qp, link_defaults), EINVAL);
		CHECK_EQ(to_state(p->a, qp, IBV_QPS_RESET), 0);
		CHECK_EQ(side_state(p->a, qp), IBV_QPS_RESET);
		qp = fresh(p, states[i]);
		CHECK_EQ(to_state(p->a, qp, IBV_QPS_RESET), 0);
		CHECK_EQ(side_state(p->a, qp), IBV_QPS_RESET);
	}
}

static void missing_attributes(struct pair *p)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1};
	int qp = fresh(p, IBV_QPS_RESET);

	CHECK_EQ(side_modify(p->a, qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT), EINVAL);
	/* An attribute that has no business in the transition. */
	CHECK_EQ(side_modify(p->a, qp, &attr,
			     IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS | IBV_QP_RQ_PSN),
		 EINVAL);
	/* A port that the device does not have. */
	attr.port_num = 2;
	CHECK(side_modify(p->a, qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS) != 0);
	CHECK_EQ(side_state(p->a, qp), IBV_QPS_RESET);
	CHECK_EQ(to_init(p->a, qp, ALL), 0);
	CHECK_EQ(to_state(p->a, qp, IBV_QPS_RTR), EINVAL);
	CHECK_EQ(side_state(p->a, qp), IBV_QPS_INIT);
}

static void posting_too_early(struct pair *p)
{
	struct region a = side_reg(p->a, 0, 4096, ALL);
	struct ibv_sge sge = {a.addr, 64, a.lkey};
	static const enum ibv_qp_state states[] = {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR};

	for (int i = 0; i < 3; i++) {
		int qp = fresh(p, states[i]), bad;
		struct send send = message(1, a, 0, 8);

		CHECK_EQ(side_try_post(p->a, qp, &send, 1, &bad), EINVAL);
		CHECK_EQ(bad, 0);
		CHECK_EQ(side_try_recv(p->a, qp, 2, &sge, 1), states[i] == IBV_QPS_RESET ? EINVAL : 0);
	}
	side_silent(p->a, SEND_CQ);
	side_silent(p->a, RECV_CQ);
}

/* A connection serves again after RESET, and nothing of its former life is left. */
static void reset_and_reuse(struct pair *p)
{
	struct region a = side_reg(p->a, 0, 65536, ALL), b = side_reg(p->b, 0, 65536, ALL);

	connect_pair(p, link_defaults);
	for (int round = 0; round < 5; round++) {
		for (int i = 0; i < 10; i++)
			side_recv(p->b, p->qb, 100 + i, b, 4096 * i, 4096);
		for (int i = 0; i < 4; i++) {
			side_fill(p->a, 0, 4096, round * 10 + i);
			side_post(p->a, p->qa, message(i, a, 0, 4096));
			side_wc(p->a, SEND_CQ, i, IBV_WC_SUCCESS);
			side_wc(p->b, RECV_CQ, 100 + i, IBV_WC_SUCCESS);
			CHECK_EQ(side_differs(p->b, 4096 * i, 4096, round * 10 + i), -1);
		}
		/* Six receives stay; RESET forgets them without completions. */
		CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_RESET), 0);
		CHECK_EQ(to_state(p->b, p->qb, IBV_QPS_RESET), 0);
		side_silent(p->b, RECV_CQ);
		join(p->a, p->qa, p->b, p->qb, link_defaults);
	}
}

static void error_reset_and_reuse(struct pair *p)
{
	struct region a = side_reg(p->a, 0, 4096, ALL), b = side_reg(p->b, 0, 4096, ALL);

	connect_pair(p, link_defaults);
	side_recv(p->a, p->qa, 1, a, 0, 64);
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_ERR), 0);
	side_wc(p->a, RECV_CQ, 1, IBV_WC_WR_FLUSH_ERR);
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_RESET), 0);
	CHECK_EQ(to_state(p->b, p->qb, IBV_QPS_RESET), 0);
	join(p->a, p->qa, p->b, p->qb, link_defaults);
	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 2, a, 0, 64, b, 0));
	side_wc(p->a, SEND_CQ, 2, IBV_WC_SUCCESS);
}

static void send_queue_drained(struct pair *p)
{
	struct region a = side_reg(p->a, 0, 4096, ALL), b = side_reg(p->b, 0, 4096, ALL);
	struct ibv_wc wc;

	connect_pair(p, link_defaults);
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_SQD), 0);
	/* Requests may be posted but wait. */
	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 64, b, 0));
	CHECK_EQ(side_poll(p->a, SEND_CQ, &wc, 1, 100), 0);
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_RTS), 0);
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
}

/* Says that it wants to hear of it, in an attribute that counts only if the mask says so, too. */
static int drain(struct side *side, int qp, bool said, bool masked)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_SQD, .en_sqd_async_notify = said};

	return side_modify(side, qp, &attr, IBV_QP_STATE | (masked ? IBV_QP_EN_SQD_ASYNC_NOTIFY : 0));
}

/* The next event other than "communication established", or -1. */
static int event_of(struct side *side, int qp, int ms)
{
	struct event event;

	do {
		event = side_async(side, ms);
	} while (event.type == IBV_EVENT_COMM_EST);
	CHECK(event.type == -1 || event.qp == qp, "event %d of queue pair %d", event.type, event.qp);
	return event.type;
}

static void drained_is_told_once_to_who_asks(struct pair *p)
{
	struct region a = side_reg(p->a, 0, 4096, ALL), b = side_reg(p->b, 0, 4096, ALL);
	struct ibv_qp_attr changed = {.qp_state = IBV_QPS_SQD, .timeout = 15};

	connect_pair(p, link_defaults);
	for (int round = 0; round < 2; round++) {
		/* There is nothing to drain. */
		CHECK_EQ(drain(p->a, p->qa, true, true), 0);
		CHECK_EQ(event_of(p->a, p->qa, 5000), IBV_EVENT_SQ_DRAINED);
		CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_SQD), 0);
		CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_RTS), 0);
		CHECK_EQ(event_of(p->a, p->qa, 50), -1);
		CHECK_EQ(drain(p->a, p->qa, true, false), 0);
		CHECK_EQ(event_of(p->a, p->qa, 50), -1);
		CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_RTS), 0);
	}
	/* A message that nobody receives yet is under way for a while. */
	side_post(p->a, p->qa, message(1, a, 0, 8));
	side_silent(p->a, SEND_CQ);
	CHECK_EQ(drain(p->a, p->qa, true, true), 0);
	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 2, a, 0, 64, b, 0));
	CHECK_EQ(event_of(p->a, p->qa, 50), -1);
	CHECK_EQ(side_modify(p->a, p->qa, &changed, IBV_QP_STATE | IBV_QP_TIMEOUT), EINVAL);
	/* That much it takes meanwhile, and the event still comes. */
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_SQD), 0);
	side_recv(p->b, p->qb, 3, b, 0, 64);
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	CHECK_EQ(event_of(p->a, p->qa, 5000), IBV_EVENT_SQ_DRAINED);
	side_silent(p->a, SEND_CQ);
	CHECK_EQ(side_modify(p->a, p->qa, &changed, IBV_QP_STATE | IBV_QP_TIMEOUT), 0);
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_RTS), 0);
	side_wc(p->a, SEND_CQ, 2, IBV_WC_SUCCESS);
	CHECK_EQ(event_of(p->a, p->qa, 50), -1);
}

/* All that a drained send queue may be told, and that it obeys. */
static void a_drained_queue_takes_attributes(struct pair *p)
{
	struct region a = side_reg(p->a, 0, 4096, ALL), b = side_reg(p->b, 0, 4096, ALL);
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_SQD,
		.port_num = 1,
		.qp_access_flags = ALL,
		.timeout = 13,
		.retry_cnt = 6,
		.rnr_retry = 0,
		.max_rd_atomic = 2,
		.max_dest_rd_atomic = 2,
		.min_rnr_timer = 2,
		.ah_attr = {.is_global = 1, .port_num = 1, .grh = {.hop_limit = 63}},
	};
	const int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS | IBV_QP_TIMEOUT |
			 IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC | IBV_QP_MAX_DEST_RD_ATOMIC |
			 IBV_QP_MIN_RNR_TIMER | IBV_QP_AV;

	connect_pair(p, link_defaults);
	attr.ah_attr.grh.dgid = side_gid(p->b, &attr.ah_attr.dlid);
	CHECK_EQ(drain(p->a, p->qa, true, true), 0);
	CHECK_EQ(event_of(p->a, p->qa, 5000), IBV_EVENT_SQ_DRAINED);
	/* What both ends must agree on stays. */
	CHECK_EQ(side_modify(p->a, p->qa, &attr, mask | IBV_QP_PATH_MTU), EINVAL);
	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 64, b, 0));
	CHECK_EQ(side_modify(p->a, p->qa, &attr, mask), 0);
	CHECK_EQ(side_state(p->a, p->qa), IBV_QPS_SQD);
	side_silent(p->a, SEND_CQ);
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_RTS), 0);
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_READ, 2, a, 0, 64, b, 0));
	side_wc(p->a, SEND_CQ, 2, IBV_WC_SUCCESS);
	/* It was to try for ever; now not again. */
	side_post(p->a, p->qa, message(3, a, 0, 8));
	side_wc(p->a, SEND_CQ, 3, IBV_WC_RNR_RETRY_EXC_ERR);
}

/* Where a card has no such state: EOPNOTSUPP, and the queue pair is as it was. Where it has, this is what any may do. */
static void a_queue_that_cannot_be_told_goes_on(struct pair *p)
{
	struct region a = side_reg(p->a, 0, 4096, ALL), b = side_reg(p->b, 0, 4096, ALL);
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_SQD, .rnr_retry = 0, .qp_access_flags = 0};
	int told;

	connect_pair(p, link_defaults);
	CHECK_EQ(drain(p->a, p->qa, true, true), 0);
	CHECK_EQ(event_of(p->a, p->qa, 5000), IBV_EVENT_SQ_DRAINED);
	told = side_modify(p->a, p->qa, &attr, IBV_QP_STATE | IBV_QP_RNR_RETRY);
	CHECK(told == 0 || told == EOPNOTSUPP, "errno %d", told);
	CHECK_EQ(side_state(p->a, p->qa), IBV_QPS_SQD);
	/* Rights need no drained queue: the peer loses its. */
	CHECK_EQ(side_modify(p->a, p->qa, &attr, IBV_QP_STATE | IBV_QP_ACCESS_FLAGS), 0);
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_RTS), 0);
	side_post(p->a, p->qa, message(1, a, 0, 8));
	if (told) {
		side_silent(p->a, SEND_CQ);
		side_recv(p->b, p->qb, 2, b, 0, 64);
		side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
		side_post(p->b, p->qb, rdma(IBV_WR_RDMA_WRITE, 3, b, 0, 64, a, 0));
		side_wc(p->b, SEND_CQ, 3, IBV_WC_REM_ACCESS_ERR);
	} else {
		side_wc(p->a, SEND_CQ, 1, IBV_WC_RNR_RETRY_EXC_ERR);
	}
}

static void full_send_queue(struct pair *p)
{
	struct link_options options = link_defaults;
	struct region a = side_reg(p->a, 0, 4096, ALL);
	struct send chain[MAX_CHAIN];
	int posted = 0, result = 0, bad = -1;

	/* Nothing completes: the receiver is not ready, for ever. */
	connect_pair(p, options);
	for (int i = 0; i < MAX_CHAIN; i++)
		chain[i] = message(i, a, 0, 8);
	while (!result && posted < 100000) {
		result = side_try_post(p->a, p->qa, chain, MAX_CHAIN, &bad);
		posted += result ? bad : MAX_CHAIN;
	}
	CHECK_EQ(result, ENOMEM);
	CHECK(posted >= options.capacity.send_wr, "only %d requests fit, %d were promised", posted,
	      options.capacity.send_wr);
}

static void refused_requests(struct pair *p)
{
	struct region a = side_reg(p->a, 0, 65536, ALL), b = side_reg(p->b, 0, 65536, ALL);
	struct send chain[3];
	int bad;

	connect_pair(p, link_defaults);
	for (int i = 0; i < 3; i++)
		chain[i] = rdma(IBV_WR_RDMA_WRITE, i, a, 0, 64, b, 0);
	/* The second is refused: the first is under way, the third is not. */
	chain[1].opcode = 77;
	CHECK(side_try_post(p->a, p->qa, chain, 3, &bad) != 0);
	CHECK_EQ(bad, 1);
	side_wc(p->a, SEND_CQ, 0, IBV_WC_SUCCESS);
	side_silent(p->a, SEND_CQ);

	chain[0].flags |= IBV_SEND_INLINE;
	chain[0].sge[0].length = 60000;
	CHECK(side_try_post(p->a, p->qa, chain, 1, &bad) != 0, "inline data beyond max_inline_data");
	chain[0] = rdma(IBV_WR_RDMA_WRITE, 0, a, 0, 64, b, 0);
	chain[0].sges = 1000;
	CHECK(side_try_post(p->a, p->qa, chain, 1, &bad) != 0, "more SGEs than max_send_sge");
	/* The queue pair has not suffered. */
	CHECK_EQ(side_state(p->a, p->qa), IBV_QPS_RTS);
	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 5, a, 0, 64, b, 0));
	side_wc(p->a, SEND_CQ, 5, IBV_WC_SUCCESS);
}

static void registration_flags(struct pair *p)
{
	struct region region;

	/* Remote write and remote atomic need local write: ibv_reg_mr(3). */
	CHECK_EQ(side_try_reg(p->a, 0, 4096, IBV_ACCESS_REMOTE_WRITE, &region), EINVAL);
	CHECK_EQ(side_try_reg(p->a, 0, 4096, IBV_ACCESS_REMOTE_ATOMIC, &region), EINVAL);
	CHECK_EQ(side_try_reg(p->a, 0, 4096, IBV_ACCESS_REMOTE_READ, &region), 0);
}

static void capacities_beyond_the_device(struct pair *p)
{
	struct capacity capacity = link_defaults.capacity;
	int qp;

	capacity.send_wr = 1 << 30;
	CHECK(side_try_qp(p->a, capacity, &qp) != 0);
	capacity = link_defaults.capacity;
	capacity.sges = 100000;
	CHECK(side_try_qp(p->a, capacity, &qp) != 0);
	CHECK_EQ(side_try_qp(p->a, link_defaults.capacity, &qp), 0);
}

const struct test_case state_cases[] = {
	{"forbidden_transitions", forbidden_transitions, false},
	{"error_and_reset_from_everywhere", error_and_reset_from_everywhere, false},
	{"missing_attributes", missing_attributes, false},
	{"posting_too_early", posting_too_early, false},
	{"reset_and_reuse", reset_and_reuse, false},
	{"error_reset_and_reuse", error_reset_and_reuse, false},
	{"send_queue_drained", send_queue_drained, false},
	{"drained_is_told_once_to_who_asks", drained_is_told_once_to_who_asks, false},
	{"a_drained_queue_takes_attributes", a_drained_queue_takes_attributes, false},
	{"a_queue_that_cannot_be_told_goes_on", a_queue_that_cannot_be_told_goes_on, false},
	{"full_send_queue", full_send_queue, false},
	{"refused_requests", refused_requests, false},
	{"registration_flags", registration_flags, false},
	{"capacities_beyond_the_device", capacities_beyond_the_device, false},
	{NULL, NULL, false},
};
