/*
 * One-sided operations that need no responder, and what is left of them when the responder takes its leave back.
 *
 *   grants alone              they complete while the responder's proxy is stopped, and keep their meaning
 *   grants reads              READs that come before the requester has mapped the region do not keep those behind them from a grant
 *   grants edges              what shares a page with other bytes goes by the responder, and the pages between do not
 *   grants stop VERB ROUNDS   the requester's proxy is stopped while it copies; when the responder's VERB has returned nothing lands
 *   grants step VERB ROUNDS   as above, by a debugger that lets it go on instruction by instruction
 *   grants pause requester|responder VERB ROUNDS   either proxy is stopped for a while when grants are made, and taken back
 *
 * VERB: dereg, reset, err, destroy, rights. PROXY_PID and PEER_PID are the two proxies. Rounds go by turns with WRITEs, with READs, and
 * with both and atomics among them. `stop` and `step` come at random moments, and add rounds until they have met a copy of each of the
 * first two kinds in its midst, or have had enough: they fail if they met none. `steps.c` stops and kills proxies at each step of all
 * that, and meets every one.
 */
#include "floods.h"
#include "stops.h"

#include <dirent.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Where in the remote region. */
static uint64_t place;
static pid_t requester, responder;

static bool succeeds(enum ibv_wr_opcode opcode, uint32_t length)
{
	struct send send = rdma(opcode, 1, local, 0, length, remote, place);

	send.compare_add = 1;
	side_post(pair.a, pair.qa, send);
	return one(5000).status == IBV_WC_SUCCESS;
}

/* Posts one while the responder's proxy is stopped; whether it completed in that time. */
static bool goes_alone(enum ibv_wr_opcode opcode, uint32_t length)
{
	struct send send = rdma(opcode, 1, local, 0, length, remote, place);
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
	/* Behind the data, what atomics fetch. */
	local = side_reg(pair.a, 0, SIZE + PAGE, IBV_ACCESS_LOCAL_WRITE);
	remote = side_reg(pair.b, offset, length, ALL);
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
	for (int end = 0; end < 2; end++) {
		place = end ? SIZE - 8 : 0;
		CHECK(!warm(IBV_WR_RDMA_WRITE, 8, 5), "page %d, that other bytes share, was granted to write", end);
		CHECK(!warm(IBV_WR_RDMA_READ, 8, 5), "page %d, that other bytes share, was granted to read", end);
	}
	place = PAGE - 100;
	CHECK(warm(IBV_WR_RDMA_WRITE, SIZE - PAGE, 50), "no grant to write the pages between");
	CHECK(warm(IBV_WR_RDMA_READ, SIZE - PAGE, 50), "no grant to read the pages between");
	side_fill(pair.a, 0, SIZE, 7);
	side_post(pair.a, pair.qa, rdma(IBV_WR_RDMA_WRITE, 8, local, 0, SIZE, remote, 0));
	side_wc(pair.a, SEND_CQ, 8, IBV_WC_SUCCESS);
	CHECK_EQ(side_differs(pair.b, 0, 100, 5), -1);
	CHECK_EQ(side_differs(pair.b, 100 + SIZE, PAGE, 6), -1);
}

/*
 * Others on the machine wait for this process, or do again: whoever is to be met in the midst of something must not be through before it
 * has a processor. Where that is not allowed, fewer are met.
 */
static void hurry(bool on)
{
	struct sched_param param = {.sched_priority = on};

	sched_setscheduler(0, on ? SCHED_FIFO : SCHED_OTHER, &param);
}

/* Until so many have come, in a hurry: then the next is under way. */
static void await_pieces(int pieces)
{
	int64_t end = now_us() + 20000000;
	struct ibv_wc wc;

	hurry(true);
	while (come < pieces) {
		if (!side_poll(pair.a, SEND_CQ, &wc, 1, 0)) {
			CHECK(now_us() < end, "piece %d does not come", come);
			usleep(10);
			continue;
		}
		CHECK_EQ(wc.wr_id, come++);
		CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	}
}

static void needs_nobody(enum kind kind)
{
	if (kind != READS)
		CHECK(warm(IBV_WR_RDMA_WRITE, 8, 500), "no grant to write");
	if (kind != WRITES)
		CHECK(warm(IBV_WR_RDMA_READ, 8, 500), "no grant to read");
}

static void afresh(const char *gone, enum kind kind)
{
	renew(gone, 16);
	needs_nobody(kind);
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
		renew("", 16);
	}
}

/* Copies that were met in their midst, by kinds. */
static int met[KINDS];

/*
 * A round more: as many as there are to be, and until copies of both kinds were met. How many of a kind are met is the processor's: on
 * one, 17 of 40 floods of WRITEs were stopped in the midst of a copy, and none of 40 of READs.
 */
static bool goes_on(int round, int rounds)
{
	enum { PATIENCE = 12 };

	if (round < rounds || ((!met[WRITES] || !met[READS]) && round < PATIENCE * rounds))
		return true;
	if (!met[WRITES] && !met[READS] && round < 10 * PATIENCE * rounds)
		return true;
	printf("met in the midst of %d WRITEs and %d READs, in %d rounds\n", met[WRITES], met[READS], round);
	CHECK(met[WRITES] || met[READS], "it was never stopped in the midst of a copy, and this shows nothing");
	return false;
}

/* A requester that is stopped by now in the midst of a copy: the verb waits until it cannot go on with it. */
static void takes_time(int64_t took, enum kind kind)
{
	met[kind]++;
	CHECK(took >= 5000, "the verb returned after %lld us while a copy was under way", (long long)took);
}

static void stops(const char *name, int rounds)
{
	for (int round = 0; goes_on(round, rounds); round++) {
		enum kind kind = round % KINDS;

		if (!round)
			begin(0, SIZE);
		afresh(round ? name : "", kind);
		flood(kind, round);
		await_pieces(1 + rand() % (FLOOD / 2));
		/* At once: `stop` looks around first. */
		CHECK(!kill(requester, SIGSTOP), "errno %d", errno);
		stop(requester);
		hurry(false);
		bool amidst = is_amidst(kind, round);
		int64_t took = take_back(name, kind);

		if (amidst)
			takes_time(took, kind);
		go_on(requester);
		usleep(3000);
		is_exact();
		outcome(name, kind, false);
		is_exact();
	}
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
	for (int round = 0; goes_on(round, rounds); round++) {
		enum kind kind = round % KINDS;

		if (!round)
			begin(0, SIZE);
		afresh(round ? name : "", kind);
		pid_t worker = worker_of(requester);
		int status;

		CHECK(!ptrace(PTRACE_SEIZE, worker, NULL, NULL), "errno %d", errno);
		flood(kind, round);
		await_pieces(1 + rand() % (FLOOD / 2));
		CHECK(!ptrace(PTRACE_INTERRUPT, worker, NULL, NULL), "errno %d", errno);
		CHECK(waitpid(worker, &status, __WALL) == worker && WIFSTOPPED(status), "errno %d", errno);
		hurry(false);
		step(worker, rand() % 300);
		bool amidst = is_amidst(kind, round);
		int64_t took = take_back(name, kind);

		if (amidst)
			takes_time(took, kind);
		/* The rest of what it was about to do, one by one. */
		step(worker, 3000);
		is_exact();
		CHECK(!ptrace(PTRACE_DETACH, worker, NULL, NULL), "errno %d", errno);
		usleep(3000);
		is_exact();
		outcome(name, kind, false);
	}
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
		hurry(true);
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

static void order(pid_t pid, int delay_us)
{
	struct order order = {.pid = pid, .delay_us = delay_us};

	CHECK_EQ(write(orders[1], &order, sizeof order), sizeof order);
}

static void await_stop(void)
{
	char report;

	CHECK_EQ(read(reports[0], &report, 1), 1);
}

/* Grants are asked for, made and used meanwhile: a proxy that is stopped for a while delays them, and changes nothing. */
static void small_ones_arrive(int count)
{
	side_fill(pair.b, PIECE, 1000, 5);
	side_poke(pair.b, 2 * PIECE, 0);
	for (int i = 0; i < count; i++) {
		side_fill(pair.a, 0, 1000, i);
		side_fill(pair.a, PIECE, 1000, 6);
		side_post(pair.a, pair.qa, small(i));
		side_wc(pair.a, SEND_CQ, i, IBV_WC_SUCCESS);
		if (i % 3 == 0)
			CHECK_EQ(side_differs(pair.b, 0, 1000, i), -1);
		else if (i % 3 == 1)
			CHECK_EQ(side_differs(pair.a, PIECE, 1000, 5), -1);
		else
			CHECK_EQ(side_peek(pair.b, 2 * PIECE), (uint64_t)i / 3 + 1);
	}
}

static void pauses(pid_t pid, const char *name, int rounds)
{
	for (int round = 0; round < rounds; round++) {
		enum kind kind = round % KINDS;

		if (!round)
			begin(0, SIZE);
		renew(round ? name : "", 16);
		order(pid, rand() % 4000);
		small_ones_arrive(42);
		await_stop();
		flood(kind, round);
		order(pid, rand() % 600);
		take_back(name, kind);
		await_stop();
		usleep(3000);
		is_exact();
		outcome(name, kind, false);
		is_exact();
	}
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
	else
		CHECK(false, "usage: see the top of this file");
	return 0;
}
