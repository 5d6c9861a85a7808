/*
 * Completions of one queue pair, whatever happens meanwhile: random lists of requests, long ones and short ones, signaled and not,
 * in the midst of which one fails, or the queue pair goes to the error state or to RESET, or its peer does.
 *
 *   orders SEED ROUNDS
 *
 * What must be true in any case: completions come in the order of the requests. Until the first that fails those that are signaled
 * have one, and no others; from then on each has one. That first one says why, all others that they were flushed. After a RESET none
 * comes of what was before.
 */
#include "sides.h"

#include <string.h>

enum { MOST = 48, LONGEST = 3 << 20 };

enum end { PEACE, BAD_RKEY, BAD_LKEY, OWN_ERROR, PEER_ERROR, OWN_RESET, ENDS };

static uint64_t state;

static unsigned below(unsigned limit)
{
	state = state * 6364136223846793005u + 1442695040888963407u;
	return (unsigned)((state >> 33) % limit);
}

static uint32_t length(void)
{
	switch (below(6)) {
	case 0:
		return 0;
	case 1:
		return 1 + below(LONGEST);
	case 2:
		return 1 + below(64 << 10);
	default:
		return 1 + below(256);
	}
}

static struct send request(uint64_t wr_id, struct region a, struct region b)
{
	static const enum ibv_wr_opcode opcodes[] = {IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE, IBV_WR_SEND,
						     IBV_WR_RDMA_READ,	IBV_WR_ATOMIC_FETCH_AND_ADD};
	enum ibv_wr_opcode opcode = opcodes[below(6)];
	struct send send;

	if (opcode == IBV_WR_SEND)
		send = message(wr_id, a, 0, below(64));
	else if (opcode == IBV_WR_ATOMIC_FETCH_AND_ADD)
		send = rdma(opcode, wr_id, a, 0, 8, b, 64);
	else
		send = rdma(opcode, wr_id, a, 0, length(), b, 4096);
	send.flags = below(3) ? 0 : IBV_SEND_SIGNALED;
	if (!below(8))
		send.flags |= IBV_SEND_FENCE;
	return send;
}

/* Posts them in lists of random lengths; how many were taken. */
static int post_all(struct pair *p, const struct send *sends, int count)
{
	int posted = 0;

	while (posted < count) {
		int most = count - posted < MAX_CHAIN ? count - posted : MAX_CHAIN, some = 1 + (int)below((unsigned)most), bad;

		CHECK_EQ(side_try_post(p->a, p->qa, sends + posted, some, &bad), 0);
		posted += some;
	}
	return posted;
}

static void check_order(struct pair *p, const struct send *sends, int count, enum end end, int bad)
{
	bool failed = false;
	int next = 0;

	while (next < count) {
		struct ibv_wc wc;

		CHECK(side_poll(p->a, SEND_CQ, &wc, 1, 20000) == 1, "no completion at or behind request %d of %d", next, count);
		int at = (int)wc.wr_id;
		CHECK(at >= next && at < count, "completion of request %d, expected %d or later", at, next);
		for (; next < at; next++)
			CHECK(!failed && !(sends[next].flags & IBV_SEND_SIGNALED), "request %d has no completion", next);
		next = at + 1;
		if (wc.status == IBV_WC_SUCCESS) {
			CHECK(!failed && at != bad, "request %d succeeds", at);
			CHECK(sends[at].flags & IBV_SEND_SIGNALED, "request %d has a completion", at);
			continue;
		}
		if (failed)
			CHECK_EQ(wc.status, IBV_WC_WR_FLUSH_ERR);
		else if (at == bad)
			CHECK_EQ(wc.status, end == BAD_RKEY ? IBV_WC_REM_ACCESS_ERR : IBV_WC_LOC_PROT_ERR);
		else if (end == OWN_ERROR)
			CHECK_EQ(wc.status, IBV_WC_WR_FLUSH_ERR);
		else
			CHECK(end == PEER_ERROR && wc.status == IBV_WC_RETRY_EXC_ERR, "request %d: %s", at,
			      ibv_wc_status_str(wc.status));
		failed = true;
	}
	if (bad < count)
		CHECK(failed);
	side_silent(p->a, SEND_CQ);
}

static void forget(struct side *side, int cq)
{
	struct ibv_wc wcs[MAX_WCS];

	while (side_poll(side, cq, wcs, MAX_WCS, 0) > 0)
		;
}

static void check_reset(struct pair *p, struct region a, struct region b)
{
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_RESET), 0);
	/* Those before it may have come before. */
	forget(p->a, SEND_CQ);
	CHECK_EQ(to_state(p->b, p->qb, IBV_QPS_RESET), 0);
	join(p->a, p->qa, p->b, p->qb, link_defaults);
	side_post(p->a, p->qa, rdma(IBV_WR_RDMA_WRITE, 1000, a, 0, 64, b, 0));
	side_wc(p->a, SEND_CQ, 1000, IBV_WC_SUCCESS);
	side_silent(p->a, SEND_CQ);
}

static void once(struct pair *p, struct region a, struct region b)
{
	struct send sends[MOST];
	int count = 1 + (int)below(MOST), bad = count;
	enum end end = below(ENDS);

	connect_pair(p, link_defaults);
	for (int i = 0; i < MOST; i++)
		side_recv(p->b, p->qb, (uint64_t)i, b, 0, 64);
	for (int i = 0; i < count; i++)
		sends[i] = request((uint64_t)i, a, b);
	if (end == BAD_RKEY || end == BAD_LKEY) {
		bad = (int)below((unsigned)count);
		sends[bad] = rdma(IBV_WR_RDMA_WRITE, (uint64_t)bad, a, 0, 1 + below(LONGEST), b, 0);
		if (end == BAD_RKEY)
			sends[bad].rkey ^= 0x5a5a5a;
		else
			sends[bad].sge[0].lkey ^= 0x5a5a5a;
	}
	/* Of the last it is known when it is there. */
	sends[count - 1].flags |= IBV_SEND_SIGNALED;
	post_all(p, sends, count);
	if (end == OWN_ERROR)
		CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_ERR), 0);
	if (end == PEER_ERROR)
		CHECK_EQ(to_state(p->b, p->qb, IBV_QPS_ERR), 0);
	if (end == OWN_RESET)
		check_reset(p, a, b);
	else
		check_order(p, sends, count, end, bad);
	CHECK_EQ(side_destroy_qp(p->a, p->qa), 0);
	CHECK_EQ(side_destroy_qp(p->b, p->qb), 0);
	forget(p->b, RECV_CQ);
}

int main(int argc, char **argv)
{
	struct pair p = {0};

	if (argc != 3)
		return fprintf(stderr, "usage: orders SEED ROUNDS\n"), 2;
	state = strtoull(argv[1], NULL, 0);
	open_sides(&p, false);
	struct region a = side_reg(p.a, 0, ARENA_BYTES, link_defaults.access);
	struct region b = side_reg(p.b, 0, ARENA_BYTES, link_defaults.access);
	for (int rounds = atoi(argv[2]); rounds > 0; rounds--)
		once(&p, a, b);
	return 0;
}
