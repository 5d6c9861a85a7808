/*
 * Known numbers of requests, for a test that reads what proxies have counted.
 *
 *   counted work|faults one        both ends in this process, one proxy
 *   counted work|faults two        the far end in a child whose proxy is at $PEER_SOCKET
 *   counted granted one|two        one-sided requests that need no responder after the first few
 *   counted held one               64 WRITEs of 64 KiB, for a proxy whose policy holds them back
 *
 * It says "done", and keeps what it has until its standard input ends.
 */
#include "sides.h"

#include <string.h>
#include <unistd.h>

enum {
	ALL = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC,
	REGION = 2 << 20,
	LARGE = 1 << 20,
};

static struct region a, b;

/* `count` requests of one kind, one after the other; each as long as it is. */
static void repeat(struct pair *p, struct send send, int count, bool receives)
{
	for (int i = 0; i < count; i++) {
		send.wr_id = 100 + i;
		if (receives)
			side_recv(p->b, p->qb, 200 + i, b, 0, 4096);
		side_post(p->a, p->qa, send);
		side_wc(p->a, SEND_CQ, send.wr_id, IBV_WC_SUCCESS);
		if (receives)
			side_wc(p->b, RECV_CQ, 200 + i, IBV_WC_SUCCESS);
	}
}

static void work(struct pair *p)
{
	struct send empty = message(1, a, 0, 0), with_imm = message(1, a, 0, 50), batch[MAX_CHAIN];

	connect_pair(p, link_defaults);
	repeat(p, message(1, a, 0, 100), 3, true);
	empty.sges = 0;
	repeat(p, empty, 1, true);
	with_imm.opcode = IBV_WR_SEND_WITH_IMM;
	repeat(p, with_imm, 2, true);
	repeat(p, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 8, b, 0), 5, false);
	repeat(p, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, LARGE, b, 0), 1, false);
	repeat(p, rdma(IBV_WR_RDMA_WRITE_WITH_IMM, 1, a, 0, 16, b, 0), 2, true);
	repeat(p, rdma(IBV_WR_RDMA_READ, 1, a, 0, 4096, b, 0), 4, false);
	repeat(p, rdma(IBV_WR_RDMA_READ, 1, a, 0, LARGE, b, 0), 1, false);
	repeat(p, rdma(IBV_WR_ATOMIC_CMP_AND_SWP, 1, a, 0, 8, b, 0), 1, false);
	repeat(p, rdma(IBV_WR_ATOMIC_FETCH_AND_ADD, 1, a, 0, 8, b, 0), 6, false);
	/* Many at once, of which the last is signaled. */
	for (int i = 0; i < MAX_CHAIN; i++) {
		batch[i] = rdma(IBV_WR_RDMA_WRITE, 300 + i, a, 0, 8, b, 0);
		batch[i].flags = i == MAX_CHAIN - 1 ? IBV_SEND_SIGNALED : 0;
	}
	CHECK_EQ(side_try_post(p->a, p->qa, batch, MAX_CHAIN, NULL), 0);
	side_wc(p->a, SEND_CQ, 300 + MAX_CHAIN - 1, IBV_WC_SUCCESS);
}

static void granted(struct pair *p)
{
	connect_pair(p, link_defaults);
	for (int round = 0; round < 3; round++) {
		repeat(p, rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 8, b, 0), 100, false);
		repeat(p, rdma(IBV_WR_RDMA_READ, 1, a, 0, 4096, b, 0), 100, false);
		repeat(p, rdma(IBV_WR_ATOMIC_FETCH_AND_ADD, 1, a, 0, 8, b, 0), 100, false);
		repeat(p, rdma(IBV_WR_ATOMIC_CMP_AND_SWP, 1, a, 0, 8, b, 0), 100, false);
		usleep(20000);
	}
}

static void faults(struct pair *p)
{
	struct link_options options = link_defaults;
	struct send bad;

	/* The responder refuses, and both queues are flushed: two requests of each side. */
	connect_pair(p, options);
	bad = rdma(IBV_WR_RDMA_WRITE, 1, a, 0, 8, b, 0);
	bad.rkey = ~b.rkey;
	side_recv(p->b, p->qb, 21, b, 0, 8);
	side_recv(p->b, p->qb, 22, b, 0, 8);
	side_post(p->a, p->qa, bad);
	side_wc(p->a, SEND_CQ, 1, IBV_WC_REM_ACCESS_ERR);
	side_post(p->a, p->qa, message(2, a, 0, 8));
	side_post(p->a, p->qa, message(3, a, 0, 8));
	side_wc(p->a, SEND_CQ, 2, IBV_WC_WR_FLUSH_ERR);
	side_wc(p->a, SEND_CQ, 3, IBV_WC_WR_FLUSH_ERR);
	side_wc(p->b, RECV_CQ, 21, IBV_WC_WR_FLUSH_ERR);
	side_wc(p->b, RECV_CQ, 22, IBV_WC_WR_FLUSH_ERR);

	/* Its own key. */
	connect_pair(p, options);
	bad = message(4, a, 0, 8);
	bad.sge[0].lkey = ~a.lkey;
	side_post(p->a, p->qa, bad);
	side_wc(p->a, SEND_CQ, 4, IBV_WC_LOC_PROT_ERR);

	/* Nobody receives: the first try, and two more. */
	options.rnr_retries = 2;
	connect_pair(p, options);
	side_post(p->a, p->qa, message(5, a, 0, 8));
	side_wc(p->a, SEND_CQ, 5, IBV_WC_RNR_RETRY_EXC_ERR);

	/* Nobody answers: tried again twice. */
	options = link_defaults;
	options.timeout = 8;
	options.retries = 2;
	connect_pair(p, options);
	CHECK_EQ(to_state(p->b, p->qb, IBV_QPS_RESET), 0);
	side_post(p->a, p->qa, message(6, a, 0, 8));
	side_wc(p->a, SEND_CQ, 6, IBV_WC_RETRY_EXC_ERR);
}

/* In chains, so that a request waits for those before it however late this process looks. */
static void held(struct pair *p)
{
	struct send chain[MAX_CHAIN];

	connect_pair(p, link_defaults);
	for (int round = 0; round < 64 / MAX_CHAIN; round++) {
		for (int i = 0; i < MAX_CHAIN; i++)
			chain[i] = rdma(IBV_WR_RDMA_WRITE, i, a, 0, 64 << 10, b, 0);
		CHECK_EQ(side_try_post(p->a, p->qa, chain, MAX_CHAIN, NULL), 0);
		for (int i = 0; i < MAX_CHAIN; i++)
			side_wc(p->a, SEND_CQ, i, IBV_WC_SUCCESS);
	}
}

int main(int argc, char **argv)
{
	struct pair pair = {0};
	char end;

	if (argc != 3) {
		fprintf(stderr, "usage: counted work|granted|faults|held one|two\n");
		return 2;
	}
	open_sides(&pair, !strcmp(argv[2], "two"));
	a = side_reg(pair.a, 0, REGION, ALL);
	b = side_reg(pair.b, 2 * REGION, REGION, ALL);
	if (!strcmp(argv[1], "work"))
		work(&pair);
	else if (!strcmp(argv[1], "granted"))
		granted(&pair);
	else if (!strcmp(argv[1], "held"))
		held(&pair);
	else
		faults(&pair);
	puts("done");
	fflush(stdout);
	CHECK_EQ(read(STDIN_FILENO, &end, 1), 0);
	return 0;
}
