/*
 * What goes wrong, on which side it shows, and what becomes of the queues: IBA volume 1, 9.9.2 (requester) and 9.9.3
 * (responder), 10.10 and 11.6.2 (completion status).
 */
#include "sides.h"

#include <string.h>
#include <time.h>

enum {
	LOCAL = IBV_ACCESS_LOCAL_WRITE,
	ALL = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC,
	REGION = 1 << 20,
};

static int64_t now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000ll + now.tv_nsec / 1000;
}

/* A queue pair in ERR completes everything with a flush error, in the order of posting. */
static void is_in_error(struct side *side, int qp, struct region region)
{
	CHECK_EQ(side_state(side, qp), IBV_QPS_ERR);
	side_post(side, qp, message(901, region, 0, 8));
	side_post(side, qp, message(902, region, 0, 8));
	side_wc(side, SEND_CQ, 901, IBV_WC_WR_FLUSH_ERR);
	side_wc(side, SEND_CQ, 902, IBV_WC_WR_FLUSH_ERR);
}

/* `failing` ends with `status` at the requester `a`; the responder's queue pair follows if `both`. */
static void fails(struct pair *p, struct region a, struct region b, struct send failing, enum ibv_wc_status status,
		  bool both)
{
	struct send later = message(11, a, 0, 8), unsignaled = message(12, a, 0, 8);

	for (int i = 0; i < 3; i++)
		side_recv(p->b, p->qb, 21 + i, b, 0, 4096);
	for (int i = 0; i < 2; i++)
		side_recv(p->a, p->qa, 31 + i, a, 4096, 4096);
	unsignaled.flags = 0;
	/* Without the fence, what follows a READ may be carried out before the READ fails. */
	later.flags |= IBV_SEND_FENCE;
	failing.wr_id = 10;

	struct send chain[3] = {failing, later, unsignaled};

	CHECK_EQ(side_try_post(p->a, p->qa, chain, 3, NULL), 0);
	side_wc(p->a, SEND_CQ, 10, status);
	side_wc(p->a, SEND_CQ, 11, IBV_WC_WR_FLUSH_ERR);
	/* A request that failed completes whether it was signaled or not. */
	side_wc(p->a, SEND_CQ, 12, IBV_WC_WR_FLUSH_ERR);
	side_wc(p->a, RECV_CQ, 31, IBV_WC_WR_FLUSH_ERR);
	side_wc(p->a, RECV_CQ, 32, IBV_WC_WR_FLUSH_ERR);
	is_in_error(p->a, p->qa, a);
	if (both) {
		for (int i = 0; i < 3; i++)
			side_wc(p->b, RECV_CQ, 21 + i, IBV_WC_WR_FLUSH_ERR);
		is_in_error(p->b, p->qb, b);
	}
	side_silent(p->a, SEND_CQ);
	side_silent(p->b, RECV_CQ);
}

static void simple(struct pair *p, struct region *a, struct region *b)
{
	connect_pair(p, link_defaults);
	*a = side_reg(p->a, 0, REGION, ALL);
	*b = side_reg(p->b, 0, REGION, ALL);
}

static void unknown_lkey(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	struct send send = message(1, a, 0, 64);

	send.sge[0].lkey = ~a.lkey;
	fails(p, a, b, send, IBV_WC_LOC_PROT_ERR, false);
}

static void stale_lkey(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	struct region gone = side_reg(p->a, 0, REGION, ALL);

	CHECK_EQ(side_dereg(p->a, gone), 0);
	fails(p, a, b, message(1, gone, 0, 64), IBV_WC_LOC_PROT_ERR, false);
}

static void lkey_of_another_domain(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	fails(p, a, b, message(1, side_reg_in_other_pd(p->a, 0, REGION, ALL), 0, 64), IBV_WC_LOC_PROT_ERR, false);
}

static void local_length_past_the_region(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	fails(p, a, b, message(1, a, REGION - 63, 64), IBV_WC_LOC_PROT_ERR, false);
}

static void local_address_before_the_region(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	struct send send = message(1, a, 0, 64);

	send.sge[0].addr -= 1;
	fails(p, a, b, send, IBV_WC_LOC_PROT_ERR, false);
}

/* Address and length whose sum wraps around. */
static void local_address_overflows(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	struct send send = message(1, a, 0, 64);

	send.sge[0].addr = UINT64_MAX - 7;
	fails(p, a, b, send, IBV_WC_LOC_PROT_ERR, false);
}

static void read_into_memory_without_local_write(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	struct region constant = side_reg(p->a, 0, REGION, 0);

	fails(p, a, b, rdma(IBV_WR_RDMA_READ, 1, constant, 0, 64, b, 0), IBV_WC_LOC_PROT_ERR, false);
}

static void unknown_rkey(struct pair *p)
{
	struct region a, b, bad;

	simple(p, &a, &b);
	bad = b;
	bad.rkey = ~b.rkey;
	side_fill(p->b, 0, 4096, 9);
	fails(p, a, b, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 64, bad, 0), IBV_WC_REM_ACCESS_ERR, true);
	CHECK_EQ(side_differs(p->b, 0, 4096, 9), -1);
}

static void stale_rkey(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	struct region gone = side_reg(p->b, 0, REGION, ALL);

	CHECK_EQ(side_dereg(p->b, gone), 0);
	fails(p, a, b, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 64, gone, 0), IBV_WC_REM_ACCESS_ERR, true);
}

static void rkey_of_another_domain(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	struct region other = side_reg_in_other_pd(p->b, 0, REGION, ALL);

	fails(p, a, b, rdma(IBV_WR_RDMA_READ, 1, a, 0, 64, other, 0), IBV_WC_REM_ACCESS_ERR, true);
}

static void write_past_the_remote_region(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	/* All or nothing: the length is in the first packet, so not even the part that fits is written. */
	side_fill(p->b, REGION - 4096, 8192, 4);
	fails(p, a, b, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 65536, b, REGION - 65535), IBV_WC_REM_ACCESS_ERR, true);
	CHECK_EQ(side_differs(p->b, REGION - 4096, 8192, 4), -1);
}

static void remote_address_overflows(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	struct send send = rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 64, b, 0);

	send.remote_addr = UINT64_MAX - 15;
	fails(p, a, b, send, IBV_WC_REM_ACCESS_ERR, true);
}

static void region_without(struct pair *p, int access, enum ibv_wr_opcode opcode)
{
	struct region a, b;

	simple(p, &a, &b);
	struct region narrow = side_reg(p->b, 0, REGION, access);

	fails(p, a, b, rdma(opcode, 1, a, 0, 8, narrow, 0), IBV_WC_REM_ACCESS_ERR, true);
}

static void region_forbids_write(struct pair *p)
{
	region_without(p, LOCAL | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC, IBV_WR_RDMA_WRITE);
}

static void region_forbids_read(struct pair *p)
{
	region_without(p, LOCAL | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC, IBV_WR_RDMA_READ);
}

static void region_forbids_atomics(struct pair *p)
{
	region_without(p, LOCAL | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ, IBV_WR_ATOMIC_FETCH_AND_ADD);
}

/* The specification allows a responder either NAK code where the queue pair does not take the operation. */
static void queue_pair_without(struct pair *p, int access, enum ibv_wr_opcode opcode)
{
	struct link_options options = link_defaults;
	struct ibv_wc wc;

	options.access = access;
	connect_pair(p, options);
	struct region a = side_reg(p->a, 0, REGION, ALL), b = side_reg(p->b, 0, REGION, ALL);

	side_poke(p->b, 0, 77);
	side_post(p->a, p->qa, rdma(opcode, 1, a, 0, 8, b, 0));
	CHECK_EQ(side_poll(p->a, SEND_CQ, &wc, 1, 5000), 1);
	CHECK(wc.status == IBV_WC_REM_ACCESS_ERR || wc.status == IBV_WC_REM_INV_REQ_ERR, "%s",
	      ibv_wc_status_str(wc.status));
	CHECK_EQ(side_peek(p->b, 0), 77);
	is_in_error(p->a, p->qa, a);
	is_in_error(p->b, p->qb, b);
}

static void queue_pair_forbids_write(struct pair *p)
{
	queue_pair_without(p, LOCAL | IBV_ACCESS_REMOTE_READ, IBV_WR_RDMA_WRITE);
}

static void queue_pair_forbids_read(struct pair *p)
{
	queue_pair_without(p, LOCAL | IBV_ACCESS_REMOTE_WRITE, IBV_WR_RDMA_READ);
}

static void queue_pair_forbids_atomics(struct pair *p)
{
	queue_pair_without(p, LOCAL | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ, IBV_WR_ATOMIC_CMP_AND_SWP);
}

static void misaligned_atomic(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	fails(p, a, b, rdma(IBV_WR_ATOMIC_FETCH_AND_ADD, 1, a, 0, 8, b, 4), IBV_WC_REM_INV_REQ_ERR, true);
}

/* A driver may refuse to take it, as rxe's library does, with one before it in the same list whose completion nobody has asked for. */
static void misaligned_atomic_behind_a_write(struct pair *p)
{
	struct region a, b;
	struct send chain[2];
	struct ibv_wc wcs[2];

	simple(p, &a, &b);
	chain[0] = rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 8, b, 0);
	chain[0].sge[1] = chain[0].sge[0];
	chain[0].sge[1].addr += 64;
	chain[0].sges = 2;
	chain[1] = rdma(IBV_WR_ATOMIC_FETCH_AND_ADD, 2, a, 128, 8, b, 4);
	CHECK_EQ(side_try_post(p->a, p->qa, chain, 2, NULL), 0);
	CHECK_EQ(side_poll(p->a, SEND_CQ, wcs, 2, 5000), 2);
	CHECK_EQ(wcs[0].wr_id, 1);
	CHECK_EQ(wcs[0].status, IBV_WC_SUCCESS);
	CHECK_EQ(wcs[1].wr_id, 2);
	CHECK(wcs[1].status == IBV_WC_REM_INV_REQ_ERR || wcs[1].status == IBV_WC_LOC_QP_OP_ERR, "%s",
	      ibv_wc_status_str(wcs[1].status));
	is_in_error(p->a, p->qa, a);
}

static void send_longer_than_the_receive(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	side_fill(p->b, 0, 8192, 6);
	side_recv(p->b, p->qb, 1, b, 4096, 100);
	side_recv(p->b, p->qb, 2, b, 0, 4096);
	side_post(p->a, p->qa, message(3, a, 0, 101));
	side_wc(p->b, RECV_CQ, 1, IBV_WC_LOC_LEN_ERR);
	side_wc(p->b, RECV_CQ, 2, IBV_WC_WR_FLUSH_ERR);
	side_wc(p->a, SEND_CQ, 3, IBV_WC_REM_INV_REQ_ERR);
	is_in_error(p->a, p->qa, a);
	is_in_error(p->b, p->qb, b);
}

static void receive_with_unknown_lkey(struct pair *p)
{
	struct region a, b, bad;

	simple(p, &a, &b);
	bad = b;
	bad.lkey = ~b.lkey;
	side_recv(p->b, p->qb, 1, bad, 0, 100);
	side_post(p->a, p->qa, message(2, a, 0, 100));
	side_wc(p->b, RECV_CQ, 1, IBV_WC_LOC_PROT_ERR);
	side_wc(p->a, SEND_CQ, 2, IBV_WC_REM_OP_ERR);
	is_in_error(p->a, p->qa, a);
	is_in_error(p->b, p->qb, b);
}

static void receive_without_local_write(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	side_recv(p->b, p->qb, 1, side_reg(p->b, 0, REGION, 0), 0, 100);
	side_post(p->a, p->qa, message(2, a, 0, 100));
	side_wc(p->b, RECV_CQ, 1, IBV_WC_LOC_PROT_ERR);
	side_wc(p->a, SEND_CQ, 2, IBV_WC_REM_OP_ERR);
	is_in_error(p->b, p->qb, b);
}

/* No receive is posted: after `rnr_retry` repetitions, each at least the responder's timer apart, the requester gives up. */
static void receiver_not_ready(struct pair *p)
{
	struct link_options options = link_defaults;

	options.rnr_timer = 18; /* 5.12 ms: IBA volume 1, table 45 */
	for (int retries = 0; retries < 7; retries++) {
		struct pair q = *p;

		options.rnr_retries = retries;
		connect_pair(&q, options);
		struct region a = side_reg(q.a, 0, 4096, ALL);
		int64_t start = now_us();

		side_post(q.a, q.qa, message(retries, a, 0, 8));
		side_wc(q.a, SEND_CQ, retries, IBV_WC_RNR_RETRY_EXC_ERR);
		CHECK(now_us() - start >= retries * 5120, "gave up after %ld us with rnr_retry %d",
		      (long)(now_us() - start), retries);
		is_in_error(q.a, q.qa, a);
		/* The responder has done nothing wrong. */
		CHECK_EQ(side_state(q.b, q.qb), IBV_QPS_RTS);
		CHECK_EQ(side_dereg(q.a, a), 0);
	}
}

static void seven_rnr_retries_are_endless(struct pair *p)
{
	struct region a, b;
	struct ibv_wc wc;

	simple(p, &a, &b);
	side_fill(p->a, 0, 100, 8);
	side_post(p->a, p->qa, message(1, a, 0, 100));
	CHECK_EQ(side_poll(p->a, SEND_CQ, &wc, 1, 300), 0);
	side_recv(p->b, p->qb, 2, b, 0, 100);
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	side_wc(p->b, RECV_CQ, 2, IBV_WC_SUCCESS);
	CHECK_EQ(side_differs(p->b, 0, 100, 8), -1);
}

static void write_with_immediate_needs_a_receive(struct pair *p)
{
	struct link_options options = link_defaults;

	options.rnr_retries = 1;
	connect_pair(p, options);
	struct region a = side_reg(p->a, 0, REGION, ALL), b = side_reg(p->b, 0, REGION, ALL);

	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE_WITH_IMM, 1, a, 0, 64, b, 0));
	side_wc(p->a, SEND_CQ, 1, IBV_WC_RNR_RETRY_EXC_ERR);
}

static struct link_options impatient(void)
{
	struct link_options options = link_defaults;

	options.timeout = 8; /* 1.05 ms */
	options.retries = 2;
	return options;
}

static void peer_queue_pair_destroyed(struct pair *p)
{
	connect_pair(p, impatient());
	struct region a = side_reg(p->a, 0, REGION, ALL), b = side_reg(p->b, 0, REGION, ALL);

	CHECK_EQ(side_destroy_qp(p->b, p->qb), 0);
	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 8, b, 0));
	side_post(p->a, p->qa, message(2, a, 0, 8));
	side_wc(p->a, SEND_CQ, 1, IBV_WC_RETRY_EXC_ERR);
	side_wc(p->a, SEND_CQ, 2, IBV_WC_WR_FLUSH_ERR);
	is_in_error(p->a, p->qa, a);
}

static void peer_process_killed(struct pair *p)
{
	connect_pair(p, impatient());
	struct region a = side_reg(p->a, 0, REGION, ALL), b = side_reg(p->b, 0, REGION, ALL);

	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, REGION, b, 0));
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	side_kill(p->b);
	/* The proxy needs a moment to notice; until then the dead process's memory may still be written. */
	for (int i = 0; side_state(p->a, p->qa) == IBV_QPS_RTS; i++) {
		struct ibv_wc wc;

		CHECK(i < 500, "the queue pair does not notice");
		side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 2, a, 0, 8, b, 0));
		CHECK_EQ(side_poll(p->a, SEND_CQ, &wc, 1, 5000), 1);
		CHECK(wc.status == IBV_WC_SUCCESS || wc.status == IBV_WC_RETRY_EXC_ERR, "%s",
		      ibv_wc_status_str(wc.status));
	}
	is_in_error(p->a, p->qa, a);
}

static void peer_queue_pair_reset(struct pair *p)
{
	connect_pair(p, impatient());
	struct region a = side_reg(p->a, 0, REGION, ALL), b = side_reg(p->b, 0, REGION, ALL);

	CHECK_EQ(to_state(p->b, p->qb, IBV_QPS_RESET), 0);
	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 8, b, 0));
	side_wc(p->a, SEND_CQ, 1, IBV_WC_RETRY_EXC_ERR);
	is_in_error(p->a, p->qa, a);
}

static void peer_queue_pair_in_error(struct pair *p)
{
	connect_pair(p, impatient());
	struct region a = side_reg(p->a, 0, REGION, ALL);

	CHECK_EQ(to_state(p->b, p->qb, IBV_QPS_ERR), 0);
	side_post(p->a, p->qa, message(1, a, 0, 8));
	side_wc(p->a, SEND_CQ, 1, IBV_WC_RETRY_EXC_ERR);
	is_in_error(p->a, p->qa, a);
}

/* A SEND waits for a receive request, for as long as it takes; then there is nobody who could post one. */
static void gives_up_on_a_peer_that(struct pair *p, int (*leaves)(struct side *, int))
{
	struct ibv_wc wc;

	connect_pair(p, impatient());
	struct region a = side_reg(p->a, 0, REGION, ALL), b = side_reg(p->b, 0, REGION, ALL);

	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 8, b, 0));
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	side_post(p->a, p->qa, message(2, a, 0, 8));
	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_READ, 3, a, 0, 8, b, 0));
	CHECK_EQ(side_poll(p->a, SEND_CQ, &wc, 1, 50), 0);
	CHECK_EQ(leaves(p->b, p->qb), 0);
	side_wc(p->a, SEND_CQ, 2, IBV_WC_RETRY_EXC_ERR);
	side_wc(p->a, SEND_CQ, 3, IBV_WC_WR_FLUSH_ERR);
	is_in_error(p->a, p->qa, a);
}

static int goes_to_error(struct side *side, int qp)
{
	return to_state(side, qp, IBV_QPS_ERR);
}

static int goes_to_reset(struct side *side, int qp)
{
	return to_state(side, qp, IBV_QPS_RESET);
}

/* By a request of its own. */
static int fails_by_itself(struct side *side, int qp)
{
	struct region own = side_reg(side, 0, REGION, ALL);
	struct send bad = rdma(IBV_WR_RDMA_WRITE, 9, own, 0, 8, own, 0);

	bad.sge[0].lkey = ~own.lkey;
	side_post(side, qp, bad);
	side_wc(side, SEND_CQ, 9, IBV_WC_LOC_PROT_ERR);
	return 0;
}

static void waiting_for_a_peer_that_goes_to_error(struct pair *p)
{
	gives_up_on_a_peer_that(p, goes_to_error);
}

static void waiting_for_a_peer_that_is_reset(struct pair *p)
{
	gives_up_on_a_peer_that(p, goes_to_reset);
}

static void waiting_for_a_peer_that_is_destroyed(struct pair *p)
{
	gives_up_on_a_peer_that(p, side_destroy_qp);
}

static void waiting_for_a_peer_that_fails(struct pair *p)
{
	gives_up_on_a_peer_that(p, fails_by_itself);
}

/*
 * A queue pair that its peer does not name as its destination is not there for it. This is more than the specification
 * asks for, whose RC packets do not say which queue pair sent them; a fence needs it.
 */
static void peer_is_connected_to_another(struct pair *p)
{
	struct region a, b;

	simple(p, &a, &b);
	struct capacity capacity = link_defaults.capacity;
	int intruder = side_qp(p->a, capacity);

	CHECK_EQ(to_init(p->a, intruder, ALL), 0);
	CHECK_EQ(to_rtr(p->a, intruder, p->b, p->qb, impatient()), 0);
	CHECK_EQ(to_rts(p->a, intruder, impatient()), 0);
	side_poke(p->b, 0, 5);
	side_post(p->a, intruder, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 8, b, 0));
	side_wc(p->a, SEND_CQ, 1, IBV_WC_RETRY_EXC_ERR);
	CHECK_EQ(side_peek(p->b, 0), 5);
	/* The rightful pair works on. */
	side_poke(p->a, 0, 6);
	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 2, a, 0, 8, b, 0));
	side_wc(p->a, SEND_CQ, 2, IBV_WC_SUCCESS);
	CHECK_EQ(side_peek(p->b, 0), 6);
}

/* Receives flush in the order of posting when the owner moves the queue pair to ERR; sends, too. */
static void flush_keeps_the_order(struct pair *p)
{
	struct region a, b;
	struct ibv_wc wcs[MAX_WCS];

	simple(p, &a, &b);
	for (int i = 0; i < 40; i++)
		side_recv(p->a, p->qa, 100 + i, a, 0, 64);
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_ERR), 0);
	for (int i = 0; i < 10; i++)
		side_post(p->a, p->qa, message(200 + i, a, 0, 8));
	CHECK_EQ(side_poll(p->a, RECV_CQ, wcs, 40, 5000), 40);
	for (int i = 0; i < 40; i++) {
		CHECK_EQ(wcs[i].wr_id, 100 + i);
		CHECK_EQ(wcs[i].status, IBV_WC_WR_FLUSH_ERR);
		CHECK_EQ(wcs[i].qp_num, side_qp_num(p->a, p->qa));
	}
	CHECK_EQ(side_poll(p->a, SEND_CQ, wcs, 10, 5000), 10);
	for (int i = 0; i < 10; i++) {
		CHECK_EQ(wcs[i].wr_id, 200 + i);
		CHECK_EQ(wcs[i].status, IBV_WC_WR_FLUSH_ERR);
	}
}

/* What was sent before the failing request has succeeded, and says so. */
static void earlier_requests_succeed(struct pair *p)
{
	struct region a, b;
	struct send chain[4];

	simple(p, &a, &b);
	for (int i = 0; i < 4; i++)
		chain[i] = rdma(IBV_WR_RDMA_WRITE, i, a, 0, 4096, b, 4096 * i);
	chain[2].rkey = ~chain[2].rkey;
	CHECK_EQ(side_try_post(p->a, p->qa, chain, 4, NULL), 0);
	side_wc(p->a, SEND_CQ, 0, IBV_WC_SUCCESS);
	side_wc(p->a, SEND_CQ, 1, IBV_WC_SUCCESS);
	side_wc(p->a, SEND_CQ, 2, IBV_WC_REM_ACCESS_ERR);
	side_wc(p->a, SEND_CQ, 3, IBV_WC_WR_FLUSH_ERR);
}

const struct test_case error_cases[] = {
	{"unknown_lkey", unknown_lkey, false},
	{"stale_lkey", stale_lkey, false},
	{"lkey_of_another_domain", lkey_of_another_domain, false},
	{"local_length_past_the_region", local_length_past_the_region, false},
	{"local_address_before_the_region", local_address_before_the_region, false},
	{"local_address_overflows", local_address_overflows, false},
	{"read_into_memory_without_local_write", read_into_memory_without_local_write, false},
	{"unknown_rkey", unknown_rkey, false},
	{"stale_rkey", stale_rkey, false},
	{"rkey_of_another_domain", rkey_of_another_domain, false},
	{"write_past_the_remote_region", write_past_the_remote_region, false},
	{"remote_address_overflows", remote_address_overflows, false},
	{"region_forbids_write", region_forbids_write, false},
	{"region_forbids_read", region_forbids_read, false},
	{"region_forbids_atomics", region_forbids_atomics, false},
	{"queue_pair_forbids_write", queue_pair_forbids_write, false},
	{"queue_pair_forbids_read", queue_pair_forbids_read, false},
	{"queue_pair_forbids_atomics", queue_pair_forbids_atomics, false},
	{"misaligned_atomic", misaligned_atomic, false},
	{"misaligned_atomic_behind_a_write", misaligned_atomic_behind_a_write, false},
	{"send_longer_than_the_receive", send_longer_than_the_receive, false},
	{"receive_with_unknown_lkey", receive_with_unknown_lkey, false},
	{"receive_without_local_write", receive_without_local_write, false},
	{"receiver_not_ready", receiver_not_ready, false},
	{"seven_rnr_retries_are_endless", seven_rnr_retries_are_endless, false},
	{"write_with_immediate_needs_a_receive", write_with_immediate_needs_a_receive, false},
	{"peer_queue_pair_destroyed", peer_queue_pair_destroyed, false},
	{"peer_process_killed", peer_process_killed, true},
	{"peer_queue_pair_reset", peer_queue_pair_reset, false},
	{"peer_queue_pair_in_error", peer_queue_pair_in_error, false},
	{"waiting_for_a_peer_that_goes_to_error", waiting_for_a_peer_that_goes_to_error, false},
	{"waiting_for_a_peer_that_is_reset", waiting_for_a_peer_that_is_reset, false},
	{"waiting_for_a_peer_that_is_destroyed", waiting_for_a_peer_that_is_destroyed, false},
	{"waiting_for_a_peer_that_fails", waiting_for_a_peer_that_fails, false},
	{"peer_is_connected_to_another", peer_is_connected_to_another, false},
	{"flush_keeps_the_order", flush_keeps_the_order, false},
	{"earlier_requests_succeed", earlier_requests_succeed, false},
	{NULL, NULL, false},
};
