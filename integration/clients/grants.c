/*
 * One-sided operations that need no responder, and what is left of them when the responder takes its leave back.
 *
 *   grants alone              they complete while the responder's proxy is stopped, and keep their meaning
 *   grants reads              READs that come before the requester has mapped the region do not keep those behind them from a grant
 *   grants edges              what shares a page with other bytes goes by the responder
 *   grants stop VERB ROUNDS   the requester's proxy is stopped while it copies; when the responder's VERB has returned nothing lands
 *   grants step VERB ROUNDS   as above, by a debugger that lets it go on instruction by instruction
 *   grants pause requester|responder VERB ROUNDS   either proxy is stopped for a while when grants are made, and taken back
 *   grants kill requester|responder
 *
 * VERB: dereg, reset, err, destroy, rights. PROXY_PID and PEER_PID are the two proxies.
 */
#include "sides.h"
#include "stops.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, SIZE = 1 << 20, PIECE = 64 << 10, FLOOD = 24 };

static struct pair pair;
static struct region local, remote;
static pid_t requester, responder;

static struct ibv_wc one(int ms)
{
	struct ibv_wc wc = {.status = -1};

	side_poll(pair.a, SEND_CQ, &wc, 1, ms);
	return wc;
}

static bool succeeds(enum ibv_wr_opcode opcode, uint32_t length)
{
	struct send send = rdma(opcode, 1, local, 0, length, remote, 0);

	send.compare_add = 1;
	side_post(pair.a, pair.qa, send);
	return one(5000).status == IBV_WC_SUCCESS;
}

/* Posts one while the responder's proxy is stopped; whether it completed in that time. */
static bool goes_alone(enum ibv_wr_opcode opcode, uint32_t length)
{
	struct send send = rdma(opcode, 1, local, 0, length, remote, 0);
	bool alone;

	stop(responder);
	side_post(pair.a, pair.qa, send);
	alone = one(300).status == IBV_WC_SUCCESS;
	go_on(responder);
	if (!alone)
		CHECK_EQ(one(5000).status, IBV_WC_SUCCESS);
	return alone;
}

/* Until requests of this kind need no responder. False if that does not come. */
static bool warm(enum ibv_wr_opcode opcode, uint32_t length, int tries)
{
	for (int i = 0; i < tries; i++) {
		for (int j = 0; j < 5; j++)
			CHECK(succeeds(opcode, length), "request %d", j);
		usleep(2000);
		if (goes_alone(opcode, length))
			return true;
	}
	return false;
}

static void begin(uint64_t offset, uint64_t length)
{
	struct link_options options = link_defaults;

	options.timeout = 17;
	local = side_reg(pair.a, 0, SIZE, IBV_ACCESS_LOCAL_WRITE);
	remote = side_reg(pair.b, offset, length,
			  IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
				  IBV_ACCESS_REMOTE_ATOMIC);
	connect_pair(&pair, options);
}

static void alone(void)
{
	begin(0, SIZE);
	CHECK(warm(IBV_WR_RDMA_WRITE, 8, 50), "no grant to write");
	CHECK(warm(IBV_WR_RDMA_READ, 8, 50), "no grant to read");
	stop(responder);
	for (uint32_t seed = 1; seed < 20; seed++) {
		uint32_t length = seed % 2 ? SIZE / seed : seed;

		side_fill(pair.a, 0, length, seed);
		side_post(pair.a, pair.qa, rdma(IBV_WR_RDMA_WRITE, seed, local, 0, length, remote, 0));
		side_wc(pair.a, SEND_CQ, seed, IBV_WC_SUCCESS);
		CHECK_EQ(side_differs(pair.b, 0, length, seed), -1);
		side_fill(pair.a, 0, length, 1000);
		side_post(pair.a, pair.qa, rdma(IBV_WR_RDMA_READ, seed, local, 0, length, remote, 0));
		side_wc(pair.a, SEND_CQ, seed, IBV_WC_SUCCESS);
		CHECK_EQ(side_differs(pair.a, 0, length, seed), -1);
	}
	side_poke(pair.b, 64, 40);
	struct send add = rdma(IBV_WR_ATOMIC_FETCH_AND_ADD, 7, local, 0, 8, remote, 64);

	add.compare_add = 2;
	side_post(pair.a, pair.qa, add);
	side_wc(pair.a, SEND_CQ, 7, IBV_WC_SUCCESS);
	CHECK_EQ(side_peek(pair.a, 0), 40);
	CHECK_EQ(side_peek(pair.b, 64), 42);
	go_on(responder);
	/* Another queue pair has none of it, and what no right is given for is refused by the responder. */
	side_post(pair.a, pair.qa, rdma(IBV_WR_RDMA_WRITE, 8, local, 0, 8, remote, SIZE - 4));
	side_wc(pair.a, SEND_CQ, 8, IBV_WC_REM_ACCESS_ERR);
}

/* The arena begins on a page; the region in the midst of one. */
static void edges(void)
{
	begin(100, SIZE);
	side_fill(pair.b, 0, 100, 5);
	side_fill(pair.b, 100 + SIZE, PAGE, 6);
	CHECK(!warm(IBV_WR_RDMA_WRITE, 8, 5), "a page that other bytes share was granted to write");
	CHECK(!warm(IBV_WR_RDMA_READ, 8, 5), "a page that other bytes share was granted to read");
	side_fill(pair.a, 0, SIZE, 7);
	side_post(pair.a, pair.qa, rdma(IBV_WR_RDMA_WRITE, 8, local, 0, SIZE, remote, 0));
	side_wc(pair.a, SEND_CQ, 8, IBV_WC_SUCCESS);
	CHECK_EQ(side_differs(pair.b, 0, 100, 5), -1);
	CHECK_EQ(side_differs(pair.b, 100 + SIZE, PAGE, 6), -1);
}

static int verb(const char *name)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTS, .qp_access_flags = IBV_ACCESS_REMOTE_READ};

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

static void flood(uint32_t seed)
{
	side_fill(pair.a, 0, SIZE, seed);
	for (int i = 0; i < FLOOD; i++)
		side_post(pair.a, pair.qa,
			  rdma(IBV_WR_RDMA_WRITE, i, local, i % 16 * PIECE, PIECE, remote, i % 16 * PIECE));
}

/* What has become of the flood: its first error is what an RNIC would give, the others are flushed. */
static void outcome(const char *name)
{
	bool refused = !strcmp(name, "dereg") || !strcmp(name, "rights");
	enum ibv_wc_status expected = refused ? IBV_WC_REM_ACCESS_ERR : IBV_WC_RETRY_EXC_ERR;
	bool failed = false;

	for (int i = 0; i < FLOOD; i++) {
		struct ibv_wc wc = one(20000);

		CHECK_EQ(wc.wr_id, i);
		if (wc.status == IBV_WC_SUCCESS && !failed)
			continue;
		CHECK_EQ(wc.status, failed ? IBV_WC_WR_FLUSH_ERR : expected);
		failed = true;
	}
}

/* `gone`: the verb that came before, or "". */
static void renew(const char *gone)
{
	struct link_options options = link_defaults;

	options.timeout = 16;
	options.retries = 2;
	side_destroy_qp(pair.a, pair.qa);
	if (strcmp(gone, "destroy"))
		CHECK_EQ(side_destroy_qp(pair.b, pair.qb), 0);
	if (strcmp(gone, "dereg"))
		CHECK_EQ(side_dereg(pair.b, remote), 0);
	remote = side_reg(pair.b, 0, SIZE,
			  IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
				  IBV_ACCESS_REMOTE_ATOMIC);
	connect_pair(&pair, options);
}

static void afresh(const char *gone)
{
	renew(gone);
	CHECK(warm(IBV_WR_RDMA_WRITE, 8, 500), "no grant");
}

static void reads(void)
{
	begin(0, SIZE);
	for (int round = 0; round < 5; round++) {
		for (int i = 0; i < FLOOD; i++)
			side_post(pair.a, pair.qa,
				  rdma(IBV_WR_RDMA_READ, i, local, i % 16 * PIECE, PIECE, remote, i % 16 * PIECE));
		for (int i = 0; i < FLOOD; i++)
			side_wc(pair.a, SEND_CQ, i, IBV_WC_SUCCESS);
		CHECK(warm(IBV_WR_RDMA_READ, PIECE, 100), "no grant to read in round %d", round);
		renew("");
	}
}

/* Takes the leave back, and sees that nothing lands any more whatever the requester does then. */
static int64_t take_back(const char *name)
{
	int64_t before = now_us(), took;

	CHECK_EQ(verb(name), 0);
	took = now_us() - before;
	CHECK(took < 5000000, "%s took %lld us", name, (long long)took);
	side_fill(pair.b, 0, SIZE, 999999);
	return took;
}

static void stops(const char *name, int rounds)
{
	int waited = 0;

	for (int round = 0; round < rounds; round++) {
		if (!round)
			begin(0, SIZE);
		afresh(round ? name : "");
		flood(round);
		for (int64_t until = now_us() + rand() % 250; now_us() < until;)
			;
		stop(requester);
		waited += take_back(name) > 8000;
		go_on(requester);
		usleep(3000);
		CHECK_EQ(side_differs(pair.b, 0, SIZE, 999999), -1);
		outcome(name);
		CHECK_EQ(side_differs(pair.b, 0, SIZE, 999999), -1);
	}
	printf("%d of %d times it was stopped while it copied\n", waited, rounds);
}

/* Some instructions, until it sleeps; fewer where others have the processors. */
static void step(pid_t worker, int instructions)
{
	int64_t end = now_us() + 2000000;
	int status;

	for (; instructions > 0 && now_us() < end; instructions--) {
		CHECK(!ptrace(PTRACE_SINGLESTEP, worker, NULL, NULL), "errno %d", errno);
		for (int64_t until = now_us() + 1000000; waitpid(worker, &status, __WALL | WNOHANG) != worker;) {
			if (now_us() < until)
				continue;
			CHECK(!ptrace(PTRACE_INTERRUPT, worker, NULL, NULL), "errno %d", errno);
			CHECK(waitpid(worker, &status, __WALL) == worker && WIFSTOPPED(status), "errno %d", errno);
			return;
		}
		CHECK(WIFSTOPPED(status), "status %#x", status);
	}
}

static void steps(const char *name, int rounds)
{
	int waited = 0;

	for (int round = 0; round < rounds; round++) {
		if (!round)
			begin(0, SIZE);
		afresh(round ? name : "");
		pid_t worker = worker_of(requester);
		int status;

		CHECK(!ptrace(PTRACE_SEIZE, worker, NULL, NULL), "errno %d", errno);
		flood(round);
		for (int64_t until = now_us() + rand() % 100; now_us() < until;)
			;
		CHECK(!ptrace(PTRACE_INTERRUPT, worker, NULL, NULL), "errno %d", errno);
		CHECK(waitpid(worker, &status, __WALL) == worker && WIFSTOPPED(status), "errno %d", errno);
		step(worker, rand() % 300);
		waited += take_back(name) > 8000;
		/* The rest of what it was about to do, one by one. */
		step(worker, 3000);
		CHECK_EQ(side_differs(pair.b, 0, SIZE, 999999), -1);
		CHECK(!ptrace(PTRACE_DETACH, worker, NULL, NULL), "errno %d", errno);
		usleep(3000);
		CHECK_EQ(side_differs(pair.b, 0, SIZE, 999999), -1);
		outcome(name);
	}
	printf("%d of %d times it was stopped while it copied\n", waited, rounds);
}

/* A process of its own that stops a proxy for 10 ms, some time after it is told to: made before any memory is registered. */
static int orders[2], reports[2];

struct order {
	pid_t pid;
	int delay_us;
};

static void make_stopper(void)
{
	struct order order;

	CHECK(!pipe(orders) && !pipe(reports), "errno %d", errno);
	switch (fork()) {
	case -1:
		CHECK(false, "errno %d", errno);
		break;
	case 0:
		close(orders[1]);
		while (read(orders[0], &order, sizeof order) == sizeof order) {
			for (int64_t until = now_us() + order.delay_us; now_us() < until;)
				;
			kill(order.pid, SIGSTOP);
			usleep(10000);
			kill(order.pid, SIGCONT);
			if (write(reports[1], "", 1) != 1)
				break;
		}
		_exit(0);
	}
	close(orders[0]);
}

static void stop_within(pid_t pid, int us)
{
	struct order order = {.pid = pid, .delay_us = rand() % us};

	CHECK_EQ(write(orders[1], &order, sizeof order), sizeof order);
}

static void await_stop(void)
{
	char report;

	CHECK_EQ(read(reports[0], &report, 1), 1);
}

static void pauses(pid_t pid, const char *name, int rounds)
{
	for (int round = 0; round < rounds; round++) {
		if (!round)
			begin(0, SIZE);
		renew(round ? name : "");
		/* Grants are asked for, made and used meanwhile. */
		stop_within(pid, 4000);
		for (int i = 0; i < 40; i++) {
			side_fill(pair.a, 0, 1000, i);
			CHECK(succeeds(IBV_WR_RDMA_WRITE, 1000), "request %d", i);
			CHECK_EQ(side_differs(pair.b, 0, 1000, i), -1);
		}
		await_stop();
		flood(round);
		stop_within(pid, 400);
		take_back(name);
		await_stop();
		usleep(3000);
		CHECK_EQ(side_differs(pair.b, 0, SIZE, 999999), -1);
		outcome(name);
		CHECK_EQ(side_differs(pair.b, 0, SIZE, 999999), -1);
	}
}

static void kills(const char *who)
{
	begin(0, SIZE);
	CHECK(warm(IBV_WR_RDMA_WRITE, 8, 100), "no grant");
	flood(1);
	for (int64_t until = now_us() + rand() % 200; now_us() < until;)
		;
	if (!strcmp(who, "requester")) {
		CHECK(!kill(requester, SIGKILL), "errno %d", errno);
		take_back("reset");
		usleep(3000);
		CHECK_EQ(side_differs(pair.b, 0, SIZE, 999999), -1);
		return;
	}
	CHECK(!kill(responder, SIGKILL), "errno %d", errno);
	for (int i = 0; i < FLOOD; i++) {
		struct ibv_wc wc = one(60000);

		CHECK_EQ(wc.wr_id, i);
	}
	/* Until the requester's proxy has heard of it. */
	for (int64_t until = now_us() + 10000000; succeeds(IBV_WR_RDMA_WRITE, 8);)
		CHECK(now_us() < until, "a WRITE to nobody succeeds");
}

int main(int argc, char **argv)
{
	requester = pid_of("PROXY_PID");
	responder = pid_of("PEER_PID");
	srand((unsigned)now_us());
	CHECK(argc > 1, "usage: see the top of this file");
	if (!strcmp(argv[1], "pause"))
		make_stopper();
	open_sides(&pair, true);
	if (!strcmp(argv[1], "alone"))
		alone();
	else if (!strcmp(argv[1], "reads"))
		reads();
	else if (!strcmp(argv[1], "edges"))
		edges();
	else if (!strcmp(argv[1], "stop") && argc == 4)
		stops(argv[2], atoi(argv[3]));
	else if (!strcmp(argv[1], "step") && argc == 4)
		steps(argv[2], atoi(argv[3]));
	else if (!strcmp(argv[1], "pause") && argc == 5)
		pauses(strcmp(argv[2], "responder") ? requester : responder, argv[3], atoi(argv[4]));
	else if (!strcmp(argv[1], "kill") && argc == 3)
		kills(argv[2]);
	else
		CHECK(false, "usage: see the top of this file");
	return 0;
}
