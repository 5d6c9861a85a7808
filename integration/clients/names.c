/*
 * What an application writes to its memory after its queue pair or region has gone does not reach the former peer, which was to copy
 * from there and had not come to it.
 *
 *   names send|write VERB ROUNDS   the data are the requester's, and its verb ends what is under way
 *   names read VERB ROUNDS         the data are the responder's
 *
 * VERB: dereg, reset, err, destroy; of a requester also timeout, of a responder also rights. PROXY_PID and PEER_PID are the two proxies.
 */
#include "sides.h"
#include "stops.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SIZE = 1 << 20, PIECE = 64 << 10, PIECES = SIZE / PIECE, FORMER = 1, SECRET = 2 };
enum { ALL = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ };

static struct pair pair;
static struct region local, remote;

/* Ends what is under way, as its application does it or sees it. */
static void end(const char *verb, struct side *side, int qp, struct region region)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTS, .qp_access_flags = IBV_ACCESS_REMOTE_WRITE};
	int64_t before = now_us(), took;
	struct ibv_wc wc;

	if (!strcmp(verb, "dereg"))
		CHECK_EQ(side_dereg(side, region), 0);
	else if (!strcmp(verb, "reset"))
		CHECK_EQ(to_state(side, qp, IBV_QPS_RESET), 0);
	else if (!strcmp(verb, "err"))
		CHECK_EQ(to_state(side, qp, IBV_QPS_ERR), 0);
	else if (!strcmp(verb, "destroy"))
		CHECK_EQ(side_destroy_qp(side, qp), 0);
	else if (!strcmp(verb, "rights"))
		CHECK_EQ(side_modify(side, qp, &attr, IBV_QP_STATE | IBV_QP_ACCESS_FLAGS), 0);
	else if (!strcmp(verb, "timeout"))
		/* Those that were copied before the proxy was stopped may have succeeded. */
		do
			CHECK_EQ(side_poll(side, SEND_CQ, &wc, 1, 20000), 1);
		while (wc.status == IBV_WC_SUCCESS && wc.wr_id < PIECES - 1);
	else
		CHECK(false, "unknown verb %s", verb);
	took = now_us() - before;
	CHECK(!strcmp(verb, "timeout") || took < 5000000, "%s took %lld us", verb, (long long)took);
}

/* Posts everything; whoever is to copy it is stopped before, or in the midst of it. */
static void post(bool sends, bool reads, pid_t copier)
{
	bool before = rand() % 2;

	if (before)
		stop(copier);
	for (int i = 0; i < PIECES; i++)
		side_post(pair.a, pair.qa,
			  sends ? message(i, local, (uint64_t)i * PIECE, PIECE) :
				  rdma(reads ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE, i, local, (uint64_t)i * PIECE, PIECE,
				       remote, (uint64_t)i * PIECE));
	if (before)
		return;
	for (int64_t until = now_us() + rand() % 100; now_us() < until;)
		;
	stop(copier);
}

/* Whether any page has what was written last. */
static bool leaked(struct side *side, uint64_t secret)
{
	for (uint64_t at = 0; at < SIZE; at += 4096)
		if (side_peek(side, at) == secret)
			return true;
	return false;
}

static void trial(const char *kind, const char *verb, int round)
{
	bool sends = !strcmp(kind, "send"), reads = !strcmp(kind, "read");
	struct link_options options = link_defaults;
	struct side *source, *target;
	const uint64_t secret = 0x5ec2e7000000 + (uint64_t)round;
	pid_t copier;

	/* 67 ms a try, which the first request must do with where others have the processors, too. */
	options.timeout = 14;
	options.retries = strcmp(verb, "timeout") ? 7 : 3;
	connect_pair(&pair, options);
	local = side_reg(pair.a, 0, SIZE, IBV_ACCESS_LOCAL_WRITE);
	remote = side_reg(pair.b, 0, SIZE, ALL);
	source = reads ? pair.b : pair.a;
	target = reads ? pair.a : pair.b;
	copier = pid_of(reads ? "PROXY_PID" : "PEER_PID");
	side_fill(source, 0, SIZE, FORMER);
	for (int i = 0; sends && i <= PIECES; i++)
		side_recv(pair.b, pair.qb, i, remote, (uint64_t)(i % PIECES) * PIECE, PIECE);
	/* From now on the memory is shared. */
	side_post(pair.a, pair.qa,
		  sends ? message(0, local, 0, PIECE) :
			  rdma(reads ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE, 0, local, 0, PIECE, remote, 0));
	side_wc(pair.a, SEND_CQ, 0, IBV_WC_SUCCESS);
	CHECK_EQ(side_differs(target, 0, PIECE, FORMER), -1);

	post(sends, reads, copier);
	end(verb, source, reads ? pair.qb : pair.qa, reads ? remote : local);
	for (uint64_t at = 0; at < SIZE; at += 4096)
		side_poke(source, at, secret);
	go_on(copier);
	/* Longer than one try. */
	usleep(reads ? 150000 : 50000);
	CHECK(!leaked(target, secret), "%s, %s: what was written afterwards has arrived in round %d", kind, verb, round);

	if (reads || strcmp(verb, "destroy"))
		side_destroy_qp(pair.a, pair.qa);
	if (!reads || strcmp(verb, "destroy"))
		side_destroy_qp(pair.b, pair.qb);
	if (reads || strcmp(verb, "dereg"))
		CHECK_EQ(side_dereg(pair.a, local), 0);
	if (!reads || strcmp(verb, "dereg"))
		CHECK_EQ(side_dereg(pair.b, remote), 0);
}

int main(int argc, char **argv)
{
	CHECK(argc == 4, "usage: see the top of this file");
	srand((unsigned)now_us());
	open_sides(&pair, true);
	for (int round = 0; round < atoi(argv[3]); round++)
		trial(argv[1], argv[2], round);
	return 0;
}
