/* See floods.h. */
#include "floods.h"

#include "stops.h"

#include <string.h>
#include <unistd.h>

struct pair pair;
struct region local, remote;
int come;
bool scattered;
int retries = 2;

struct ibv_wc one(int ms)
{
	struct ibv_wc wc = {.status = -1};

	side_poll(pair.a, SEND_CQ, &wc, 1, ms);
	return wc;
}

int verb(const char *name, enum kind kind)
{
	/* What is left are rights that the flood needs not, or not for all of it. */
	static const int left[KINDS] = {
		[WRITES] = IBV_ACCESS_REMOTE_READ,
		[READS] = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC,
	};
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTS, .qp_access_flags = left[kind]};

	if (!strcmp(name, "dereg"))
		return side_dereg(pair.b, remote);
	if (!strcmp(name, "reset"))
		return to_state(pair.b, pair.qb, IBV_QPS_RESET);
	if (!strcmp(name, "err"))
		return to_state(pair.b, pair.qb, IBV_QPS_ERR);
	if (!strcmp(name, "destroy"))
		return side_destroy_qp(pair.b, pair.qb);
	CHECK(!strcmp(name, "rights"), "unknown verb %s", name);
	return side_modify(pair.b, pair.qb, &attr, IBV_QP_STATE | IBV_QP_ACCESS_FLAGS);
}

bool answers(const char *name)
{
	return !strcmp(name, "dereg") || !strcmp(name, "rights");
}

/* The same request in two parts. */
static struct send in_two(struct send send)
{
	send.sges = 2;
	send.sge[0].length /= 2;
	send.sge[1] = send.sge[0];
	send.sge[1].addr += send.sge[0].length;
	return send;
}

struct send piece(enum kind kind, int i)
{
	static const enum ibv_wr_opcode mixture[] = {IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ, IBV_WR_ATOMIC_FETCH_AND_ADD};
	uint64_t at = (uint64_t)i * PIECE;
	int place = kind == MIXED ? i % 3 : (int)kind;
	struct send send;

	if (place < 2) {
		send = rdma(mixture[place], i, local, at, PIECE, remote, at);
		return scattered ? in_two(send) : send;
	}
	send = rdma(mixture[place], i, local, SIZE + 8 * i, 8, remote, at);
	send.compare_add = 1;
	return send;
}

uint32_t requesters(uint32_t seed)
{
	return 2 * seed + 1;
}

uint32_t responders(uint32_t seed)
{
	return 2 * seed + 2;
}

void flood(enum kind kind, uint32_t seed)
{
	come = 0;
	side_fill(pair.a, 0, SIZE, requesters(seed));
	side_fill(pair.b, 0, SIZE, responders(seed));
	for (int i = 0; i < FLOOD; i++)
		side_post(pair.a, pair.qa, piece(kind, i));
}

bool is_amidst(enum kind kind, uint32_t seed)
{
	int64_t end = kind == READS ? side_differs(pair.a, 0, SIZE, responders(seed)) :
				       side_differs(pair.b, 0, SIZE, requesters(seed));

	return kind != MIXED && end >= 0 && end % PIECE > 64;
}

void is_exact(void)
{
	CHECK_EQ(side_differs(pair.b, 0, SIZE, LATER), -1);
	CHECK_EQ(side_holds(pair.a, 0, SIZE, LATER), -1);
	for (int i = 0; i < FLOOD; i++)
		CHECK(side_peek(pair.a, SIZE + 8 * i) != side_peek(pair.b, (uint64_t)i * PIECE), "fetched by %d", i);
}

void has_failed(struct ibv_wc wc, bool *failed, enum ibv_wc_status first)
{
	CHECK_EQ(wc.status, *failed ? IBV_WC_WR_FLUSH_ERR : first);
	*failed = true;
}

void outcome(const char *name, enum kind kind, bool failed)
{
	enum ibv_wc_status expected = answers(name) ? IBV_WC_REM_ACCESS_ERR : IBV_WC_RETRY_EXC_ERR;

	for (int i = come; i < FLOOD + 2; i++) {
		/* Of a mixture the first, too: a kind that nothing is left of. */
		if (i >= FLOOD)
			side_post(pair.a, pair.qa, piece(kind, kind == MIXED ? 3 * (i % 2) + 2 : i % FLOOD));
		struct ibv_wc wc = one(20000);

		if (i < FLOOD)
			CHECK_EQ(wc.wr_id, i);
		if (i < FLOOD && wc.status == IBV_WC_SUCCESS && !failed)
			continue;
		has_failed(wc, &failed, expected);
	}
	if (answers(name) || !strcmp(name, "err"))
		side_wc(pair.b, RECV_CQ, RECEIVE, IBV_WC_WR_FLUSH_ERR);
	else
		side_silent(pair.b, RECV_CQ);
}

void connect_anew(int timeout)
{
	struct link_options options = link_defaults;

	options.timeout = timeout;
	options.retries = retries;
	remote = side_reg(pair.b, 0, SIZE, ALL);
	connect_pair(&pair, options);
	side_recv(pair.b, pair.qb, RECEIVE, remote, 0, 8);
}

void renew(const char *gone, int timeout)
{
	struct ibv_wc wc;

	side_destroy_qp(pair.a, pair.qa);
	if (strcmp(gone, "destroy"))
		CHECK_EQ(side_destroy_qp(pair.b, pair.qb), 0);
	if (strcmp(gone, "dereg"))
		CHECK_EQ(side_dereg(pair.b, remote), 0);
	while (side_poll(pair.b, RECV_CQ, &wc, 1, 0))
		;
	connect_anew(timeout);
}

int64_t take_back(const char *name, enum kind kind)
{
	int64_t before = now_us(), took;

	CHECK_EQ(verb(name, kind), 0);
	took = now_us() - before;
	CHECK(took < 5000000, "%s took %lld us", name, (long long)took);
	side_fill(pair.b, 0, SIZE, LATER);
	return took;
}

struct send small(int i)
{
	static const enum ibv_wr_opcode opcodes[] = {IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ, IBV_WR_ATOMIC_FETCH_AND_ADD};
	enum ibv_wr_opcode opcode = opcodes[i % 3];
	struct send send = rdma(opcode, i, local, i % 3 * PIECE, i % 3 == 2 ? 8 : 1000, remote, i % 3 * PIECE);

	send.compare_add = 1;
	return send;
}

struct ibv_wc until_it_fails(int answer_ms)
{
	int64_t end = now_us() + 10000000;
	struct ibv_wc wc;

	for (int i = 0;; i++) {
		side_post(pair.a, pair.qa, small(i));
		wc = one(answer_ms);
		if (wc.status != IBV_WC_SUCCESS)
			return wc;
		CHECK(now_us() < end, "requests to nobody succeed");
	}
}

void has_lost_its_peer(const char *name)
{
	if (answers(name)) {
		/* What had been under way may have been refused before its sender was gone. */
		bool refused = side_state(pair.b, pair.qb) == IBV_QPS_ERR;
		struct region other = side_reg(pair.b, SIZE, PAGE, IBV_ACCESS_LOCAL_WRITE);

		struct ibv_wc wc;

		side_post(pair.b, pair.qb, message(1, other, 0, 8));
		CHECK_EQ(side_poll(pair.b, SEND_CQ, &wc, 1, 20000), 1);
		/* Or is refused only now. */
		CHECK(wc.status == IBV_WC_WR_FLUSH_ERR || (!refused && wc.status == IBV_WC_RETRY_EXC_ERR), "status %d", wc.status);
	}
	if (answers(name) || !strcmp(name, "err"))
		side_wc(pair.b, RECV_CQ, RECEIVE, IBV_WC_WR_FLUSH_ERR);
	else
		side_silent(pair.b, RECV_CQ);
}

void is_told(bool refuses, bool failed)
{
	for (int i = come; i < FLOOD; i++) {
		struct ibv_wc wc = one(20000);

		CHECK_EQ(wc.wr_id, i);
		if (wc.status == IBV_WC_SUCCESS && !failed)
			continue;
		has_failed(wc, &failed,
			   refuses && wc.status == IBV_WC_REM_ACCESS_ERR ? wc.status : IBV_WC_RETRY_EXC_ERR);
	}
	/* By a grant they succeed until the requester's proxy has heard of it. */
	struct ibv_wc wc = until_it_fails(20000);

	has_failed(wc, &failed,
		   refuses && wc.status == IBV_WC_REM_ACCESS_ERR ? wc.status : IBV_WC_RETRY_EXC_ERR);
	side_post(pair.a, pair.qa, small(0));
	CHECK_EQ(one(20000).status, IBV_WC_WR_FLUSH_ERR);
}
