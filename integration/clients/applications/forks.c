/*
 * Children, however they are made, have memory of their own. See topic.h.
 */
#include "topic.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;
extern pid_t _Fork(void);

/* The child by `make` writes to its copy; it may find none there, and the parent's stays as it was. */
static void apart(pid_t (*make)(void), bool has_a_copy)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *at = topic_memory(16 * PAGE, 1);
	struct ibv_mr *mr = topic_register(pd, at + PAGE, 8 * PAGE);
	pid_t child = make();
	int status;

	CHECK(child >= 0, "%s", strerror(errno));
	if (!child) {
		for (int i = 0; i < 16 * PAGE; i++) {
			if (has_a_copy && at[i] != 1)
				_exit(1);
			at[i] = 99;
		}
		_exit(0);
	}
	CHECK_EQ(waitpid(child, &status, 0), child);
	topic_all(at, 16 * PAGE, 1, "the parent's, after the child has written to its own");
	if (has_a_copy)
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child: status %#x", status);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	topic_all(at, 16 * PAGE, 1, "deregistered");
}

static pid_t by_clone(void)
{
	return syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
}

/* The same after the region is gone: no page of it may still be shared. */
static void apart_later(pid_t (*make)(void))
{
	struct ibv_pd *pd = topic_open();
	unsigned char *at = topic_memory(16 * PAGE, 1);

	CHECK_EQ(ibv_dereg_mr(topic_register(pd, at + PAGE, 8 * PAGE)), 0);
	pid_t child = make();

	CHECK(child >= 0, "%s", strerror(errno));
	if (!child) {
		for (int i = 0; i < 16 * PAGE; i++) {
			if (at[i] != 1)
				_exit(1);
			at[i] = 99;
		}
		_exit(0);
	}
	topic_ended_well(child, "the child");
	topic_all(at, 16 * PAGE, 1, "the parent's, after the child has written to its own");
}

static void rawfork_fork(void) { apart(fork, true); }
static void rawfork__Fork(void) { apart(_Fork, false); }
static void rawfork_clone(void) { apart(by_clone, false); }
static void rawfork_fork_deregistered(void) { apart_later(fork); }
static void rawfork_clone_deregistered(void) { apart_later(by_clone); }

/* Programs that are started beside registered memory. */
static void programs(void)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *at = topic_memory(16 * PAGE, 1);
	struct ibv_mr *mr = topic_register(pd, at, 16 * PAGE);
	char *const words[] = {"true", NULL};

	for (int i = 0; i < 10; i++) {
		pid_t child;

		CHECK_EQ(posix_spawnp(&child, "true", NULL, NULL, words, environ), 0);
		topic_ended_well(child, "posix_spawn");
		CHECK_EQ(system("true"), 0);
		FILE *echo = popen("echo hello", "r");
		char line[8];

		CHECK(echo && fgets(line, sizeof(line), echo) && !strcmp(line, "hello\n"), "popen");
		CHECK_EQ(pclose(echo), 0);
		child = vfork();
		if (!child) {
			execlp("true", "true", NULL);
			_exit(127);
		}
		topic_ended_well(child, "vfork");
	}
	topic_all(at, 16 * PAGE, 1, "the parent's");
	CHECK_EQ(ibv_dereg_mr(mr), 0);
}

/* A child of a child, and two at once. */
static void generations(void)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *at = topic_memory(16 * PAGE, 1);
	struct ibv_mr *mr = topic_register(pd, at, 16 * PAGE);
	pid_t children[2];

	for (int i = 0; i < 2; i++) {
		children[i] = fork();
		if (children[i])
			continue;
		memset(at, 2, 8 * PAGE);
		pid_t grandchild = fork();

		if (!grandchild) {
			topic_all(at, 8 * PAGE, 2, "the grandchild's");
			topic_all(at + 8 * PAGE, 8 * PAGE, 1, "the grandchild's");
			memset(at, 3, 16 * PAGE);
			_exit(0);
		}
		topic_ended_well(grandchild, "the grandchild");
		topic_all(at, 8 * PAGE, 2, "the child's");
		topic_all(at + 8 * PAGE, 8 * PAGE, 1, "the child's");
		_exit(0);
	}
	for (int i = 0; i < 2; i++)
		topic_ended_well(children[i], "a child");
	topic_all(at, 16 * PAGE, 1, "the parent's");
	CHECK_EQ(ibv_dereg_mr(mr), 0);
}

static volatile sig_atomic_t handled;

static void count_fault(int signal)
{
	(void)signal;
	if (++handled > 2)
		_exit(2);
}

static void set_fault_handler(void (*handler)(int), int flags)
{
	struct sigaction action = {.sa_handler = handler, .sa_flags = flags};

	CHECK_EQ(sigaction(SIGSEGV, &action, NULL), 0);
}

static bool fault_handler_is(void (*handler)(int))
{
	struct sigaction action;

	return sigaction(SIGSEGV, NULL, &action) == 0 && action.sa_handler == handler;
}

static void *sleep_on(void *nothing)
{
	pause();
	return nothing;
}

/* Run times and crash reporters look whether it still is theirs, and what is ignored stays so in programs that are executed. */
static void handler_of_faults(void)
{
	void (*const handlers[])(int) = {SIG_DFL, SIG_IGN, count_fault};
	struct ibv_pd *pd = topic_open();
	unsigned char *at = topic_memory(16 * PAGE, 1);
	struct ibv_mr *mr = topic_register(pd, at, 16 * PAGE);
	const char *hold = getenv("RINGFENCE_HOLD");
	/* Others might need the library's at any time. */
	bool stays = hold && !strcmp(hold, "signals");
	pthread_t thread;

	for (int threads = 1; threads <= 2; threads++) {
		for (size_t i = 0; i < sizeof(handlers) / sizeof(*handlers); i++) {
			set_fault_handler(handlers[i], 0);
			pid_t child = fork();

			if (!child)
				_exit(!fault_handler_is(handlers[i]));
			topic_ended_well(child, "the child, which looks for its handler");
			if (!stays)
				CHECK(fault_handler_is(handlers[i]), "%zu, %d threads", i, threads);
		}
		if (threads == 1)
			CHECK_EQ(pthread_create(&thread, NULL, sleep_on, NULL), 0);
	}
	CHECK_EQ(ibv_dereg_mr(mr), 0);
}

/* As crash reporters set it: they say something, return, and have the fault kill the program. */
static void handler_that_runs_once(void)
{
	pid_t child = fork();
	pthread_t thread;
	int status;

	if (!child) {
		/* The library's handler stays where others wait by it. */
		setenv("RINGFENCE_HOLD", "signals", 1);
		set_fault_handler(count_fault, SA_RESETHAND);
		struct ibv_pd *pd = topic_open();
		unsigned char *at = topic_memory(16 * PAGE, 1);

		CHECK_EQ(pthread_create(&thread, NULL, sleep_on, NULL), 0);
		topic_register(pd, at, 16 * PAGE);
		CHECK_EQ(mprotect(at, PAGE, PROT_READ), 0);
		*(volatile unsigned char *)at = 2;
		_exit(1);
	}
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV, "status %#x", status);
}

int main(int argc, char **argv)
{
	static const struct topic_case cases[] = {
		{"rawfork_fork", rawfork_fork},
		{"rawfork__Fork", rawfork__Fork},
		{"rawfork_clone", rawfork_clone},
		{"rawfork_fork_deregistered", rawfork_fork_deregistered},
		{"rawfork_clone_deregistered", rawfork_clone_deregistered},
		{"programs", programs},
		{"generations", generations},
		{"handler_of_faults", handler_of_faults},
		{"handler_that_runs_once", handler_that_runs_once},
		{NULL, NULL},
	};

	return topic_main(cases, argc, argv);
}
