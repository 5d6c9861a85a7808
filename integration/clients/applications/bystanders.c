/*
 * Other threads, and the kernel on their behalf, use memory while a thread registers it, deregisters it or forks: they
 * notice nothing. See topic.h.
 */
#include "topic.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SECONDS = 2, CHUNK = 512, FORKS = 20, REGISTERED = 64 * MIB };

static atomic_bool stop;

/* A thread and the memory that it uses, away from what is registered but on the same page, or registered itself. */
struct bystander {
	unsigned char *at;
	bool blocks_signals;
	uint64_t rounds;
};

static void block_all_signals(void)
{
	sigset_t all;

	sigfillset(&all);
	CHECK_EQ(pthread_sigmask(SIG_BLOCK, &all, NULL), 0);
}

/* Counts in memory: a write that is lost, or goes elsewhere, is missed in the end. */
static void *counts(void *argument)
{
	struct bystander *self = argument;
	volatile uint64_t *counter = (volatile uint64_t *)self->at;

	if (self->blocks_signals)
		block_all_signals();
	while (!atomic_load(&stop)) {
		(*counter)++;
		self->rounds++;
		CHECK(*counter == self->rounds, "%llu, not %llu", (unsigned long long)*counter,
		      (unsigned long long)self->rounds);
	}
	return NULL;
}

/* Has the kernel write to the memory: what comes out of a pipe is what went in, and not a call fails. */
static void *receives(void *argument)
{
	struct bystander *self = argument;
	unsigned char sent[CHUNK];
	int ends[2];

	CHECK_EQ(pipe(ends), 0);
	while (!atomic_load(&stop)) {
		memset(sent, (int)++self->rounds, CHUNK);
		CHECK_EQ(write(ends[1], sent, CHUNK), CHUNK);
		ssize_t got = read(ends[0], self->at, CHUNK);

		CHECK(got == CHUNK, "read() in round %llu: %zd, %s", (unsigned long long)self->rounds, got,
		      strerror(errno));
		CHECK(!memcmp(self->at, sent, CHUNK), "other bytes in round %llu", (unsigned long long)self->rounds);
	}
	close(ends[0]);
	close(ends[1]);
	return NULL;
}

/* Has the kernel read the memory. */
static void *sends(void *argument)
{
	struct bystander *self = argument;
	unsigned char got[CHUNK];
	int ends[2];

	CHECK_EQ(pipe(ends), 0);
	while (!atomic_load(&stop)) {
		memset(self->at, (int)++self->rounds, CHUNK);
		ssize_t sent = write(ends[1], self->at, CHUNK);

		CHECK(sent == CHUNK, "write() in round %llu: %zd, %s", (unsigned long long)self->rounds, sent,
		      strerror(errno));
		CHECK_EQ(read(ends[0], got, CHUNK), CHUNK);
		for (int i = 0; i < CHUNK; i++)
			CHECK_EQ(got[i], (unsigned char)self->rounds);
	}
	close(ends[0]);
	close(ends[1]);
	return NULL;
}

static struct bystander started(pthread_t *thread, void *(*run)(void *), struct bystander *self)
{
	CHECK_EQ(pthread_create(thread, NULL, run, self), 0);
	while (!*(volatile uint64_t *)&self->rounds)
		usleep(100);
	return *self;
}

/* A small object is registered and deregistered again and again; the thread uses what lies beside it on its page. */
static void beside_registrations(void *(*run)(void *), bool blocks_signals)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *page = topic_memory(PAGE, 0);
	struct bystander bystander = {.at = page + PAGE / 2, .blocks_signals = blocks_signals};
	pthread_t thread;
	long registrations = 0;

	started(&thread, run, &bystander);
	for (double end = topic_now() + SECONDS; topic_now() < end; registrations++)
		CHECK_EQ(ibv_dereg_mr(topic_register(pd, page, PAGE / 4)), 0);
	atomic_store(&stop, true);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	printf("%ld registrations, %llu rounds beside them\n", registrations, (unsigned long long)bystander.rounds);
}

/* The thread uses registered memory while the process forks. */
static void beside_forks(void *(*run)(void *), bool blocks_signals)
{
	struct ibv_pd *pd = topic_open();
	unsigned char *memory = topic_memory(REGISTERED, 7);
	struct ibv_mr *mr = topic_register(pd, memory, REGISTERED);
	struct bystander bystander = {.at = memory + 8 * PAGE, .blocks_signals = blocks_signals};
	pthread_t thread;

	memset(bystander.at, 0, PAGE);
	started(&thread, run, &bystander);
	for (int i = 0; i < FORKS; i++) {
		pid_t child = fork();

		CHECK(child >= 0, "fork %d: %s", i, strerror(errno));
		/* It has what the parent had. */
		if (!child)
			_exit(memory[0] == 7 && memory[REGISTERED - 1] == 7 ? 0 : 1);
		topic_ended_well(child, "a child");
		usleep(5000);
	}
	atomic_store(&stop, true);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	topic_all(memory, 8 * PAGE, 7, "the parent's");
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	printf("%d forks, %llu rounds beside them\n", FORKS, (unsigned long long)bystander.rounds);
}

static void neighbours_write(void) { beside_registrations(counts, false); }
static void neighbours_blocked(void) { beside_registrations(counts, true); }
static void neighbours_read(void) { beside_registrations(receives, false); }
static void neighbours_send(void) { beside_registrations(sends, false); }
static void forkwrite(void) { beside_forks(counts, false); }
static void forkblocked(void) { beside_forks(counts, true); }
static void forkread(void) { beside_forks(receives, false); }
static void forksend(void) { beside_forks(sends, false); }

int main(int argc, char **argv)
{
	static const struct topic_case cases[] = {
		{"neighbours_write", neighbours_write},
		{"neighbours_blocked", neighbours_blocked},
		{"neighbours_read", neighbours_read},
		{"neighbours_send", neighbours_send},
		{"forkwrite", forkwrite},
		{"forkblocked", forkblocked},
		{"forkread", forkread},
		{"forksend", forksend},
		{NULL, NULL},
	};

	return topic_main(cases, argc, argv);
}
