/*
 * Either proxy stops, or dies, at a step of granting, of copying by a grant, or of taking a grant back, and the responder's verb takes
 * its leave back: when that has returned nothing lands, and the other end hears what an RNIC would say.
 *
 *   steps PHASE requester|responder STEP PASSES stop|kill writes|reads|mixed|scattered VERB...
 *
 * PHASE says when the proxy comes to STEP, at the time PASSES:
 *   grant    when requests bring a grant; the verb comes while the proxy is there
 *   copy     in the midst of a flood; the same
 *   revoke   in the responder's verb, the requester having been stopped in the midst of a copy; it goes on while the responder is there
 *   behind   the same, and the requester goes on when the verb has returned
 *   after    the requester, which goes on when the verb has returned
 *
 * VERB: dereg, reset, err, destroy, rights. Each is a round; `kill` has one. Both proxies are test builds, which obey the files PROXY_STEPS and
 * PEER_STEPS; PROXY_PID and PEER_PID are their processes. That a proxy does not come to its step is a failure.
 */
#include "floods.h"
#include "stops.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* How long a proxy stays where it stopped while the other end goes on; and how long what must not land has time to. */
enum { A_WHILE_US = 10000, TIME_TO_LAND_US = 3000 };
/* What the responder's memory is at first. */
enum { FORMER = 5 };
/* A verb waits so long, at least, for a requester that is stopped while it is busy. */
enum { LEAST_US = 5000 };

/* As the proxy has it in `verbs-proxy/src/control/obedient/steps.rs`. */
struct order {
	_Atomic uint32_t given, passes, signal, reached;
	_Atomic char name[32];
};

/* A proxy. */
struct party {
	pid_t pid;
	struct order *order;
};

static struct party requester, responder;
/* A small request was under way when a step was reached; or one has failed. */
static bool pending, failed;

static struct party party(const char *pid, const char *steps)
{
	const char *path = getenv(steps);
	struct party party = {.pid = pid_of(pid)};
	int file;

	CHECK(path, "%s is not set", steps);
	file = open(path, O_RDWR | O_CLOEXEC);
	CHECK(file >= 0, "errno %d", errno);
	party.order = mmap(NULL, sizeof *party.order, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	CHECK(party.order != MAP_FAILED, "errno %d", errno);
	close(file);
	return party;
}

/* `signal`: what the proxy sends itself there, or zero. */
static void give(struct party party, const char *step, int passes, int signal)
{
	struct order *order = party.order;

	order->given = 0;
	CHECK(strlen(step) < sizeof order->name, "%s is too long", step);
	for (size_t i = 0; i < sizeof order->name; i++)
		order->name[i] = i < strlen(step) ? step[i] : 0;
	order->passes = passes;
	order->signal = signal;
	order->reached = 0;
	order->given = 1;
}

static bool is_there(struct party party)
{
	return party.order->reached;
}

/*
 * Whether it comes to its step in time; if it is to stop there, all of it has stopped. It says that it is there before it stops itself,
 * and would sleep on if it were told to go on in between.
 */
static bool comes(struct party party, int signal)
{
	enum { PATIENCE = 10000 };

	for (int64_t end = now_us() + 1000 * PATIENCE; !is_there(party) && now_us() < end;)
		usleep(20);
	return is_there(party) && (signal != SIGSTOP || is_stopped(party.pid, PATIENCE));
}

static void await(struct party party, int signal)
{
	CHECK(comes(party, signal), "the step is not reached");
}

/* Small requests, one after the other, until a proxy has come to its step. */
static void ask(struct party party, enum kind kind)
{
	int64_t end = now_us() + 10000000;
	struct ibv_wc wc;

	pending = failed = false;
	/* Else it could be what was written in the last round. */
	side_fill(pair.b, 0, SIZE, FORMER);
	for (int i = 0; !is_there(party); i++) {
		CHECK(now_us() < end, "the step is not reached");
		side_post(pair.a, pair.qa, small(kind == MIXED ? i : 3 * i + (int)kind));
		for (pending = true; pending && !is_there(party);) {
			pending = !side_poll(pair.a, SEND_CQ, &wc, 1, 0);
			if (pending)
				usleep(20);
			else
				CHECK_EQ(wc.status, IBV_WC_SUCCESS);
		}
	}
}

/* What was pending has succeeded, or is the first to fail. */
static void resolve(enum ibv_wc_status first)
{
	struct ibv_wc wc;

	if (!pending)
		return;
	wc = one(20000);
	pending = false;
	if (wc.status != IBV_WC_SUCCESS)
		has_failed(wc, &failed, first);
}

/* From here on requests of the kind need nobody. */
static void granted(enum kind kind)
{
	give(requester, "GrantTaken", kind == MIXED ? 2 : 1, 0);
	ask(requester, kind);
	resolve(IBV_WC_SUCCESS);
}

/* The requester is in the midst of a request of the flood, and stopped. */
static void copies(enum kind kind, uint32_t seed)
{
	granted(kind);
	give(requester, "PartCopied", 2, SIGSTOP);
	flood(kind, seed);
	await(requester, SIGSTOP);
	CHECK(kind == MIXED || is_amidst(kind, seed), "it is not in the midst of a piece");
}

/* A process of its own, made before any memory is registered: it waits for the responder while this one waits in a verb. */
static int tasks[2], reports[2];

struct task {
	int signal;
	/* The requester goes on while the responder is at its step. */
	bool frees;
};

static void make_conductor(void)
{
	struct task task;

	CHECK(!pipe(tasks) && !pipe(reports), "errno %d", errno);
	switch (fork()) {
	case -1:
		CHECK(false, "errno %d", errno);
		break;
	case 0:
		close(tasks[1]);
		while (read(tasks[0], &task, sizeof task) == sizeof task) {
			char report = comes(responder, task.signal);

			if (task.frees)
				kill(requester.pid, SIGCONT);
			usleep(A_WHILE_US);
			if (task.signal == SIGSTOP)
				kill(responder.pid, SIGCONT);
			if (write(reports[1], &report, 1) != 1)
				break;
		}
		_exit(0);
	}
	close(tasks[0]);
}

static void conduct(int signal, bool frees)
{
	struct task task = {.signal = signal, .frees = frees};

	CHECK_EQ(write(tasks[1], &task, sizeof task), sizeof task);
}

static void conducted(void)
{
	char report;

	CHECK_EQ(read(reports[0], &report, 1), 1);
	CHECK(report, "the responder does not come to its step");
}

/* What the verb returns, in time. */
static int said(const char *name, enum kind kind)
{
	int64_t before = now_us();
	int result = verb(name, kind);

	CHECK(now_us() - before < 5000000, "%s took %lld us", name, (long long)(now_us() - before));
	return result;
}

/* All is as it must be, now that both proxies run. */
static void ends(const char *name, enum kind kind)
{
	usleep(TIME_TO_LAND_US);
	is_exact();
	resolve(answers(name) ? IBV_WC_REM_ACCESS_ERR : IBV_WC_RETRY_EXC_ERR);
	outcome(name, kind, failed);
	is_exact();
}

/* The requester is gone, or will be: the verb, and what is left of it. */
static void ends_alone(const char *name)
{
	usleep(TIME_TO_LAND_US);
	CHECK_EQ(side_differs(pair.b, 0, SIZE, LATER), -1);
	has_lost_its_peer(name);
	CHECK_EQ(side_differs(pair.b, 0, SIZE, LATER), -1);
}

/* The responder is gone. When the requester's queue pair has failed, nothing more lands. */
static void ends_untold(void)
{
	side_fill(pair.b, 0, SIZE, LATER);
	usleep(TIME_TO_LAND_US);
	is_exact();
}

/* The requester has come to its step, with a flood under way, or posted now. `busy`: a verb waits for it. */
static void verb_beside_requester(const char *name, enum kind kind, int signal, bool busy)
{
	int64_t took;

	if (signal == SIGKILL) {
		CHECK_EQ(said(name, kind), 0);
		side_fill(pair.b, 0, SIZE, LATER);
		return ends_alone(name);
	}
	took = take_back(name, kind);
	CHECK(!busy || took >= LEAST_US, "the verb returned after %lld us while the requester was busy", (long long)took);
	usleep(TIME_TO_LAND_US);
	is_exact();
	go_on(requester.pid);
	ends(name, kind);
}

static void while_granting(struct party who, const char *step, int passes, int signal, const char *name, enum kind kind, uint32_t seed)
{
	bool killed = signal == SIGKILL;

	give(who, step, passes, signal);
	ask(who, kind);
	await(who, signal);
	if (!killed)
		flood(kind, seed);
	if (who.pid == requester.pid)
		return verb_beside_requester(name, kind, signal, false);
	if (killed) {
		said(name, kind);
		resolve(IBV_WC_RETRY_EXC_ERR);
		has_failed(until_it_fails(20000), &failed, IBV_WC_RETRY_EXC_ERR);
		return ends_untold();
	}
	conduct(signal, false);
	take_back(name, kind);
	conducted();
	ends(name, kind);
}

static void while_copying(const char *step, int passes, int signal, const char *name, enum kind kind, uint32_t seed)
{
	bool left = strstr(step, "Left");

	granted(kind);
	give(requester, step, passes, signal);
	flood(kind, seed);
	await(requester, signal);
	if (!strcmp(step, "PartCopied") && kind != MIXED)
		CHECK(is_amidst(kind, seed), "it is not in the midst of a piece");
	verb_beside_requester(name, kind, signal, !left);
}

static void while_revoking(const char *step, int passes, int signal, const char *name, enum kind kind, uint32_t seed, bool frees)
{
	copies(kind, seed);
	give(responder, step, passes, signal);
	conduct(signal, frees);
	if (signal == SIGKILL) {
		CHECK(said(name, kind), "%s returned, and the proxy was to die before", name);
		conducted();
		if (!frees)
			go_on(requester.pid);
		is_told(answers(name), false);
		return ends_untold();
	}
	take_back(name, kind);
	conducted();
	usleep(TIME_TO_LAND_US);
	is_exact();
	if (!frees)
		go_on(requester.pid);
	ends(name, kind);
}

static void afterwards(const char *step, int passes, int signal, const char *name, enum kind kind, uint32_t seed)
{
	copies(kind, seed);
	take_back(name, kind);
	give(requester, step, passes, signal);
	go_on(requester.pid);
	await(requester, signal);
	if (signal == SIGKILL)
		return ends_alone(name);
	usleep(TIME_TO_LAND_US);
	is_exact();
	go_on(requester.pid);
	ends(name, kind);
}

static enum kind kind_of(const char *name)
{
	scattered = !strcmp(name, "scattered");
	if (scattered || !strcmp(name, "writes"))
		return WRITES;
	if (!strcmp(name, "reads"))
		return READS;
	CHECK(!strcmp(name, "mixed"), "unknown kind %s", name);
	return MIXED;
}

int main(int argc, char **argv)
{
	/* 67 ms a try. */
	enum { TIMEOUT = 14 };

	CHECK(argc > 7, "usage: see the top of this file");
	requester = party("PROXY_PID", "PROXY_STEPS");
	responder = party("PEER_PID", "PEER_STEPS");
	make_conductor();
	open_sides(&pair, true);
	local = side_reg(pair.a, 0, SIZE + PAGE, IBV_ACCESS_LOCAL_WRITE);

	const char *phase = argv[1], *step = argv[3];
	struct party who = strcmp(argv[2], "responder") ? requester : responder;
	int passes = atoi(argv[4]), signal = strcmp(argv[5], "kill") ? SIGSTOP : SIGKILL;
	enum kind kind = kind_of(argv[6]);

	CHECK(signal == SIGSTOP || argc == 8, "a proxy dies once");
	for (int round = 0; round < argc - 7; round++) {
		const char *name = argv[7 + round];

		pending = failed = false;
		/* Who is to be answered may have to wait for a proxy that stands still. */
		retries = signal == SIGSTOP && answers(name) ? 7 : 2;
		if (round)
			renew(argv[6 + round], TIMEOUT);
		else
			connect_anew(TIMEOUT);
		if (!strcmp(phase, "grant"))
			while_granting(who, step, passes, signal, name, kind, round);
		else if (!strcmp(phase, "copy"))
			while_copying(step, passes, signal, name, kind, round);
		else if (!strcmp(phase, "after"))
			afterwards(step, passes, signal, name, kind, round);
		else
			while_revoking(step, passes, signal, name, kind, round, !strcmp(phase, "revoke"));
	}
	return 0;
}
