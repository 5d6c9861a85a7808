/* Completion channels and asynchronous events: IBA volume 1, 11.5.2 and 11.6.3; ibv_req_notify_cq(3). */
#include "sides.h"

enum { ALL = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };

static struct region whole(struct side *side)
{
	return side_reg(side, 0, 1 << 20, ALL);
}

static void an_event_for_the_next_completion(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	for (int i = 0; i < 100; i++) {
		CHECK_EQ(side_notify(p->a, SEND_CQ, false), 0);
		side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, i, a, 0, 64, b, 0));
		CHECK(side_event(p->a, SEND_CQ, 5000), "round %d", i);
		side_wc(p->a, SEND_CQ, i, IBV_WC_SUCCESS);
	}
}

static void no_event_unless_asked_for(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 64, b, 0));
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	CHECK(!side_event(p->a, SEND_CQ, 50));
	/* One demand, one event. */
	CHECK_EQ(side_notify(p->a, SEND_CQ, false), 0);
	for (int i = 0; i < 3; i++) {
		side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, i, a, 0, 64, b, 0));
		side_wc(p->a, SEND_CQ, i, IBV_WC_SUCCESS);
	}
	CHECK(side_event(p->a, SEND_CQ, 5000));
	CHECK(!side_event(p->a, SEND_CQ, 50));
}

static void solicited_events_only(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);
	struct send send = message(1, a, 0, 8);

	for (int i = 0; i < 3; i++)
		side_recv(p->b, p->qb, i, b, 0, 64);
	CHECK_EQ(side_notify(p->b, RECV_CQ, true), 0);
	for (int i = 0; i < 2; i++) {
		side_post(p->a, p->qa, send);
		side_wc(p->b, RECV_CQ, i, IBV_WC_SUCCESS);
		CHECK(!side_event(p->b, RECV_CQ, 50));
	}
	send.flags |= IBV_SEND_SOLICITED;
	side_post(p->a, p->qa, send);
	CHECK(side_event(p->b, RECV_CQ, 5000));
	side_wc(p->b, RECV_CQ, 2, IBV_WC_SUCCESS);
}

/* What no program may miss, whether or not it hears of more than it wants to. */
static void solicited_events(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);
	struct send send = message(1, a, 0, 8), write = rdma(IBV_WR_RDMA_WRITE_WITH_IMM, 2, a, 0, 8, b, 4096);

	send.flags |= IBV_SEND_SOLICITED;
	write.flags |= IBV_SEND_SOLICITED;
	for (int i = 0; i < 20; i++) {
		side_recv(p->b, p->qb, i, b, 0, 64);
		CHECK_EQ(side_notify(p->b, RECV_CQ, true), 0);
		side_post(p->a, p->qa, i % 2 ? write : send);
		CHECK(side_event(p->b, RECV_CQ, 5000), "round %d", i);
		side_wc(p->b, RECV_CQ, i, IBV_WC_SUCCESS);
		side_wc(p->a, SEND_CQ, i % 2 ? 2 : 1, IBV_WC_SUCCESS);
	}
	/* A completion in error counts as solicited. */
	side_recv(p->b, p->qb, 77, b, 0, 64);
	CHECK_EQ(side_notify(p->b, RECV_CQ, true), 0);
	CHECK_EQ(to_state(p->b, p->qb, IBV_QPS_ERR), 0);
	CHECK(side_event(p->b, RECV_CQ, 5000));
	side_wc(p->b, RECV_CQ, 77, IBV_WC_WR_FLUSH_ERR);
}

/* The flag is for the other end: a sender's own completion is not solicited, but for an error. */
static void a_sender_solicits_nothing_of_itself(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);
	struct send send = message(1, a, 0, 8);

	send.flags |= IBV_SEND_SOLICITED;
	CHECK_EQ(side_notify(p->a, SEND_CQ, true), 0);
	side_recv(p->b, p->qb, 2, b, 0, 64);
	side_post(p->a, p->qa, send);
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	CHECK(!side_event(p->a, SEND_CQ, 50));
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_ERR), 0);
	side_post(p->a, p->qa, send);
	CHECK(side_event(p->a, SEND_CQ, 5000));
	side_wc(p->a, SEND_CQ, 1, IBV_WC_WR_FLUSH_ERR);
}

/* Who has asked for any event has it, also after asking for solicited ones. */
static void a_demand_is_not_weakened(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	for (int i = 0; i < 10; i++) {
		side_recv(p->b, p->qb, i, b, 0, 64);
		CHECK_EQ(side_notify(p->b, RECV_CQ, i % 2), 0);
		CHECK_EQ(side_notify(p->b, RECV_CQ, !(i % 2)), 0);
		side_post(p->a, p->qa, message(1, a, 0, 8));
		CHECK(side_event(p->b, RECV_CQ, 5000), "round %d", i);
		side_wc(p->b, RECV_CQ, i, IBV_WC_SUCCESS);
		side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	}
	/* One event was for both demands. */
	CHECK(!side_event(p->b, RECV_CQ, 50));
}

/* The next event of `qp`'s side other than "communication established", which devices may or may not give. */
static int next_event(struct side *side, int qp)
{
	struct event event;

	do {
		event = side_async(side, 5000);
	} while (event.type == IBV_EVENT_COMM_EST);
	CHECK(event.type == -1 || event.qp == qp, "event %d of queue pair %d, expected one of %d", event.type, event.qp,
	      qp);
	return event.type;
}

static void access_error_event(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	b.rkey = ~b.rkey;
	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 64, b, 0));
	side_wc(p->a, SEND_CQ, 1, IBV_WC_REM_ACCESS_ERR);
	CHECK_EQ(next_event(p->b, p->qb), IBV_EVENT_QP_ACCESS_ERR);
	/* The requester learns by its completion, not by an event. */
	CHECK_EQ(side_async(p->a, 50).type, -1);
}

static void request_error_event(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	side_post(p->a, p->qa, rdma(IBV_WR_ATOMIC_FETCH_AND_ADD, 1, a, 0, 8, b, 4));
	side_wc(p->a, SEND_CQ, 1, IBV_WC_REM_INV_REQ_ERR);
	CHECK_EQ(next_event(p->b, p->qb), IBV_EVENT_QP_REQ_ERR);
}

static void no_events_in_peace(struct pair *p)
{
	connect_pair(p, link_defaults);
	struct region a = whole(p->a), b = whole(p->b);

	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 64, b, 0));
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_ERR), 0);
	CHECK_EQ(side_async(p->a, 50).type, -1);
	CHECK_EQ(side_async(p->b, 50).type, -1);
}

const struct test_case event_cases[] = {
	{"an_event_for_the_next_completion", an_event_for_the_next_completion, false},
	{"no_event_unless_asked_for", no_event_unless_asked_for, false},
	{"solicited_events_only", solicited_events_only, false},
	{"solicited_events", solicited_events, false},
	{"a_sender_solicits_nothing_of_itself", a_sender_solicits_nothing_of_itself, false},
	{"a_demand_is_not_weakened", a_demand_is_not_weakened, false},
	{"access_error_event", access_error_event, false},
	{"request_error_event", request_error_event, false},
	{"no_events_in_peace", no_events_in_peace, false},
	{NULL, NULL, false},
};
